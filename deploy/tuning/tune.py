"""Cycles of kernels measured instead of counted: what `--tune FILE` does.

A convolution (or depthwise one, or a pooling) is compiled alone with the kernel in question, and timed, here or on the
device of `--rpc`. Equal ones are timed once. FILE keeps what was measured, after every measurement: an interrupted
tuning goes on where it was, and with a complete file nothing is measured, so it can be shipped.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import tvm
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from utils.files import save_json

from ..codegen.program import make_program
from ..kernels.family import Family, Schedule, Workload
from ..kernels.nchw_elementwise import NCHWSlicePad
from ..kernels.reorder import Reorder
from ..onnx.blocks import Pattern
from ..onnx.graph import Conv, Graph, Node, SlicePad, Window
from ..plan.cost import Choice, CostModel, rivals
from ..plan.layout import Plan, plan_of
from ..targets import Machine
from . import clock

VERSION = 2  # of the file; a change of its keys needs a new one
ROUNDS, RUNS = 5, 10  # of timed calls: the mean of a round, the least of the rounds
PICTURE = " picture"  # a name that no tensor of a file has
CANDIDATES = 3  # dense and sparse ones of a node that are measured, the cheapest by the families' rules


def alone(
    graph: Graph, node: Node, schedule: Schedule, pattern: Pattern | None, machine: Machine
) -> tuple[Graph, Plan]:
    """A network of one node and its plan.

    What is added to the node's output is cut from its input. A picture has no grid, so a quantised input is cut from
    one, too.
    """
    nodes, (source, *added), shapes = [node], node.inputs, graph.shapes
    chosen = {node.output: Choice(0.0, schedule, pattern)}
    picture = PICTURE if graph.grid(source) else source
    for name in {*added, source} - {picture}:
        axes = len(shapes[name])
        nodes.insert(0, SlicePad(name, [picture], name, (0,) * axes, (1,) * axes, grid=graph.grid(name)))
        chosen[name] = Choice(0.0, Schedule(NCHWSlicePad))
    network = Graph(nodes, shapes | {picture: shapes[source]}, picture, node.output)
    return network, plan_of(network, machine, {node.output} if schedule.family.nchwc else set(), chosen)


def milliseconds(graph: Graph, machine: Machine, plan: Plan, place) -> float:
    """Time of a network of one node, without the reorders and slices that it needs only because it stands alone."""
    program = make_program(graph, machine, plan)
    module, around = program.module, (Reorder, NCHWSlicePad)
    calls = [(name, arrays) for kernel, name, arrays in program.calls() if not isinstance(kernel, around)]
    kernels = {name: module[name].with_attr("global_symbol", name) for name, _ in calls}
    return 1e3 * sum(clock.seconds(tvm.IRModule(kernels), calls, machine, place, RUNS, ROUNDS))


def key(graph: Graph, node: Conv | Window, schedule: Schedule, pattern: Pattern | None, dtype: str) -> str:
    """All that decides how long a node takes, as JSON that people can read. dtype: the machine's."""
    window = node if isinstance(node, Window) else node.depthwise
    facts = {"family": schedule.family.name, "x": graph.shapes[node.inputs[0]]}
    if window:
        fields = ("kind", "kernel", "stride", "pad", "dilation", "activation")
        facts["window"] = {name: getattr(window, name) for name in fields}
    if isinstance(node, Conv):
        fields = ("stride", "pad", "dilation", "activation")
        facts |= {"weight": node.weight.shape, **{name: getattr(node, name) for name in fields}}
        facts |= {"added": len(node.inputs) > 1}
        facts |= {name: getattr(schedule, name) for name in ("group", "tile", "unroll")}
        facts |= {"gather": True} if schedule.gather else {}
        if schedule.sparse:
            facts["sparse"] = {"block": pattern.block, "density": round(pattern.density, 3)}
    facts |= {"dtype": dtype} if dtype != "float32" else {}  # so files from before there were other types stay valid
    made = window.grid if isinstance(node, Conv) and window else None
    quantised = {"input": graph.grid(node.inputs[0]), "depthwise": made, "output": node.grid}
    quantised |= {"weight": node.scale, "before": node.before} if isinstance(node, Conv) else {}
    quantised = [name for name, how in quantised.items() if how is not None]
    facts |= {"quantised": quantised} if quantised else {}
    return json.dumps(facts)


class Times:
    """Measured times, and the file that keeps them. ValueError for a file of something else or of another computer."""

    def __init__(self, path: str | Path, machine: Machine, place=None):
        self.path, self.machine, self.place = Path(path), machine, place or clock.Here()
        here = {"target": str(machine.target), "threads": machine.threads}
        new = {"version": VERSION, **here, "cpu": self.place.processor, "times_ms": {}}
        self.state = _read(self.path) if self.path.exists() else new
        for name, value in here.items():
            if self.state[name] != value:
                raise ValueError(f"{path} was measured with {name} {self.state[name]}, not {value}")

    def cycles(self, graph: Graph, node: Conv | Window, schedule: Schedule, pattern: Pattern | None) -> float:
        """Cycles of a node for a batch, on all threads together: measured now, or earlier."""
        name, times = key(graph, node, schedule, pattern, self.machine.dtype), self.state["times_ms"]
        if name not in times:
            self._check()
            network, plan = alone(graph, node, schedule, pattern, self.machine)
            times[name] = round(milliseconds(network, self.machine, plan, self.place), 6)
            save_json(self.path, self.state)
        return times[name] * 1e6 * self.state["gigahertz"] * self.machine.threads

    def _check(self) -> None:
        """ValueError if nothing can be added to the file."""
        if not self.place.runs(self.machine):
            raise ValueError(f"{self.path} lacks kernels, and this computer cannot time {self.machine.name}'s")
        if self.state["cpu"] != self.place.processor:
            raise ValueError(f"{self.path} lacks kernels, and was measured on another processor ({self.state['cpu']})")
        if "gigahertz" not in self.state:
            one = replace(self.machine, threads=1)
            peak = clock.peak_gflops(one, self.place)
            self.state["gigahertz"] = peak / (2 * one.lanes * one.core.multiply_adds)


class MeasuredCostModel(CostModel):
    """Convolutions, depthwise ones and pooling cost what they took by the clock, other nodes what is counted."""

    def __init__(self, times: Times, *arguments, **options):
        self.times = times
        super().__init__(*arguments, **options)

    def track(self, nodes: list[Node]) -> Iterable[Node]:
        """The nodes, with progress and the time left on the screen."""
        columns = (TextColumn("tuning: layer"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            yield from progress.track(nodes)

    def compared(self, families: list[type[Family]], work: Workload, pattern: Pattern | None) -> list[Schedule]:
        return rivals(families, work, self.machine, pattern, CANDIDATES)

    def cost(self, work: Workload, schedule: Schedule, pattern: Pattern | None) -> float:
        node = work.node
        if not isinstance(node, Conv | Window):
            return super().cost(work, schedule, pattern)
        if isinstance(node, Conv) and node.depthwise and not schedule.family.nchwc:  # which is another kernel
            node = replace(node, inputs=[node.depthwise.output, *node.inputs[1:]], depthwise=None)
        return self.times.cycles(self.graph, node, schedule, pattern)


def _read(path: Path) -> dict:
    try:
        state = json.loads(path.read_text())
        numbers = [state["threads"], state["gigahertz"], *state["times_ms"].values()]
        if not all(type(n) in (int, float) and 0 < n < math.inf for n in numbers) or {"target", "cpu"} - state.keys():
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no file of measured kernels, which --tune writes") from None
    if state.get("version") != VERSION:
        raise ValueError(f"{path} was written by another version of --tune: remove it, and measure again")
    return state
