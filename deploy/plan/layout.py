"""Which maps are NCHW and which NCHWc, so that the whole network is cheapest.

Every node has a best kernel in either layout (`cost`), and reordering a map from one to the other costs too. The sum is
minimised by local search from every cut of the network in two.
"""

from dataclasses import dataclass, field

import numpy as np

from ..kernels.family import Expansion, Schedule
from ..kernels.reorder import CYCLES as REORDER
from ..onnx.blocks import Pattern
from ..onnx.geometry import Polyphase, nchw
from ..onnx.graph import Conv, Graph, Node, Window
from ..targets import Machine
from .cost import Choice, CostModel
from .fusion import expansions


@dataclass
class Plan:
    """What was decided, by the names of tensors."""

    nchwc: set[str] = field(default_factory=set)  # those made in NCHWc, the others in NCHW
    halos: dict[str, int] = field(default_factory=dict)  # around those in NCHWc, as their readers need
    schedules: dict[str, Schedule] = field(default_factory=dict)  # the kernel that makes them
    patterns: dict[str, Pattern] = field(default_factory=dict)
    expansions: dict[str, Expansion] = field(default_factory=dict)  # computed inside the kernel of these


def reads_map(graph: Graph, node: Node, machine: Machine) -> list[str]:
    """The inputs that must have the node's layout. Pictures, with few channels, and gates of one pixel need not."""
    shapes = {name: nchw(graph.shapes[name]) for name in node.inputs}
    return [name for name, (_, c, rows, columns) in shapes.items() if c >= machine.lanes and rows * columns > 1]


def total(costs: CostModel, nchwc: set[str]) -> float:
    """Cycles of the whole network, if the tensors in `nchwc` are made in NCHWc."""
    graph, result, reordered = costs.graph, 0.0, set()
    for node in graph.nodes:
        inside = node.output in nchwc
        result += costs.nodes[node.output][inside]
        for name in reads_map(graph, node, costs.machine):
            if (name in nchwc) != inside:
                reordered.add((name, inside))
    # What is computed inside the next kernel is not written to the third cache and read again.
    saved = [expansion.node.output for expansion in expansions(graph, nchwc, costs.machine).values()]
    moved = [(REORDER, [name for name, _ in reordered]), (-8 / costs.machine.core.l3_rate, saved)]
    return result + sum(cost * float(np.prod(graph.shapes[name])) for cost, names in moved for name in names)


def halos(graph: Graph, nchwc: set[str]) -> dict[str, int]:
    """Zeros around the tensors that windows in NCHWc read."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        window = node.depthwise if isinstance(node, Conv) and node.depthwise else node
        if isinstance(window, Conv | Window) and nchwc & {node.output, window.output}:
            name = node.inputs[0]
            found[name] = max(found.get(name, 0), Polyphase.of(graph, window).halo)
    return found


def make_plan(costs: CostModel) -> Plan:
    graph, machine = costs.graph, costs.machine
    able = [name for name, (_, nchwc) in costs.nodes.items() if nchwc is not None]
    cuts = [set(able[:i]) for i in range(len(able) + 1)] + [set(able[i:]) for i in range(1, len(able))]
    best = min(cuts, key=lambda cut: total(costs, cut))
    improved = True
    while improved:
        improved = False
        for name in able:
            other = best ^ {name}
            if total(costs, other) < total(costs, best):
                best, improved = other, True
    for node in graph.nodes:
        window = node.depthwise if isinstance(node, Conv) and node.output not in best else None
        if window and costs.reordered(window) < costs.nchw(window):
            best = best | {window.output}
    chosen = {name: choice for (name, nchwc), choice in costs.found.items() if choice and nchwc == (name in best)}
    return plan_of(graph, machine, best, chosen)


def plan_of(graph: Graph, machine: Machine, nchwc: set[str], chosen: dict[str, Choice]) -> Plan:
    """The plan that follows from the layouts and the kernels of all nodes."""
    return Plan(
        nchwc,
        halos(graph, nchwc),
        {name: choice.schedule for name, choice in chosen.items()},
        {name: choice.pattern for name, choice in chosen.items()},
        expansions(graph, nchwc, machine),
    )
