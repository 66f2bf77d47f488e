"""Which maps lie in planes and which in blocks of channels: what is cheapest over the whole network.

Every convolution has a best kernel in either layout (`schedule`), the other nodes have a cost in either, and turning a
map from one to the other costs too. The sum is minimised by local search from every cut of the network in two. Costs
are counted by rules or, if there is a `tune.Tuner`, measured.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from ..kernels.schedule import Choice, Site, choose, rivals, tap_cycles
from ..onnx.blocks import Pattern, find_blocks, matrix, with_covers
from ..onnx.geometry import four, planes_of, reach
from ..onnx.graph import Affine, Conv, Graph, Mean, Node, Window
from ..targets import Machine

BAND_BYTES = 768 * 1024  # of an expansion that is kept at a time
# Bytes of an expansion that is worth it, and the part of its rows that may be computed twice: pointwise, separable
WIDE_BYTES, TWICE = (1024 * 1024, 2048 * 1024), (1.0, 0.125)
TURN = 0.6  # cycles to turn a float from one layout to the other
LEAVES = 0.4  # cycles to write a float to the third cache, and to read it again
TIE = 1.03  # times that differ by less are equal
RIVALS = 3  # kernels of each kind that are measured, the cheapest by the rule


@dataclass
class Layout:
    """What was decided, by the names of tensors."""

    lanes: set[str] = field(default_factory=set)  # those in blocks of channels
    borders: dict[str, int] = field(default_factory=dict)  # zeros around them, that their readers need
    choices: dict[str, Choice] = field(default_factory=dict)  # the kernel that makes them
    patterns: dict[str, Pattern] = field(default_factory=dict)
    expansions: dict[str, Conv] = field(default_factory=dict)  # computed band by band inside the kernel of these


class Costs:
    """Cycles of every node in planes and in blocks of channels (None: impossible there)."""

    def __init__(self, graph: Graph, machine: Machine, dense: bool, least_sparsity: float, tuner=None):
        self.graph, self.machine, self.tuner = graph, machine, tuner
        self.convs: dict[tuple[str, bool], tuple[float, Choice | None, Pattern]] = {}
        self.dense, self.least_sparsity = dense, least_sparsity
        nodes = tuner.track(graph.nodes) if tuner else graph.nodes
        self.nodes = {node.output: (self.planes(node), self.lanes(node)) for node in nodes}

    def conv(self, node: Conv, lanes: bool) -> tuple[float, Choice | None, Pattern]:
        """The best kernel in a layout, None if there is none, the pattern it computes with, and their cost in front."""
        if (node.output, lanes) not in self.convs:
            shape, whole = planes_of(self.graph, node), find_blocks(node.weight)
            # A rate of 0.5 prunes int(0.5 * blocks), so a layer asked to be half empty may be a little less.
            as_dense = self.dense or 1 - whole.density < self.least_sparsity - 0.01
            site = Site(
                len(node.weight), matrix(node.weight).shape[1], shape.out_rows, shape.out_columns,
                shape.width if shape.needed else shape.columns, not shape.needed, node.first is not None,
            )  # fmt: skip
            found = []
            for pattern in [whole] if as_dense else with_covers(whole, node.weight):
                facts = (site, self.machine, pattern.block, 1.0 if as_dense else pattern.density, lanes)
                some = rivals(*facts, RIVALS) if self.tuner else filter(None, [choose(*facts)])
                found += [(self.cost(node, lanes, choice, pattern), choice, pattern) for choice in some]
            found = sorted(found, key=lambda one: one[1].cycles) or [(np.inf, None, whole)]
            least = min(cost for cost, *_ in found)
            # Where two are measured as fast, the rule decides.
            self.convs[node.output, lanes] = next(one for one in found if one[0] <= least * TIE)
        return self.convs[node.output, lanes]

    def cost(self, node: Conv, lanes: bool, choice: Choice, pattern: Pattern) -> float:
        """Of a kernel and what comes with it: the planes it reads, or the depthwise convolution inside it."""
        batch, channels = four(self.graph.shapes[node.inputs[0]])[:2]
        p, beside = planes_of(self.graph, node), 0.0
        if not lanes and node.first:  # which is another kernel
            node = replace(node, inputs=[node.first.output, *node.inputs[1:]], first=None)
        elif lanes and node.first:
            vectors = -(-channels // self.machine.lanes) * p.out_rows * p.out_columns
            beside = vectors * tap_cycles(node.first.kernel, node.first.stride, self.machine)
        elif not lanes and p.needed:
            beside = channels * p.size / 4
        if self.tuner:
            return self.tuner.cycles(self.graph, node, lanes, choice, pattern)
        return batch * (choice.cycles + beside)

    def planes(self, node: Node) -> float:
        batch, channels = four(self.graph.shapes[node.inputs[0]])[:2]
        if isinstance(node, Window):
            if self.tuner:
                return self.tuner.cycles(self.graph, node, False)
            p = planes_of(self.graph, node)
            return batch * channels * (50 + 1.1 * p.size * (len(p.offsets) + 6) / self.machine.lanes)
        if not isinstance(node, Conv):
            return 0
        cycles = self.conv(node, False)[0]
        return cycles + (min(self.planes(node.first), self.turned(node.first)) if node.first else 0)

    def turned(self, node: Window) -> float:
        """Cycles of a depthwise convolution between planes that works in blocks of channels."""
        shapes, cycles = self.graph.shapes, self.lanes(node)
        if cycles is None:
            return float("inf")
        return cycles + TURN * float(np.prod(shapes[node.inputs[0]]) + np.prod(shapes[node.output]))

    def lanes(self, node: Node) -> float | None:
        m, shapes = self.machine, self.graph.shapes
        batch, channels, rows, columns = four(shapes[node.output])
        source = four(shapes[node.inputs[0]])
        small = source[1] < m.lanes or source[2] * source[3] == 1
        if isinstance(node, Mean):
            return None if small else 0
        if channels < m.lanes or rows * columns == 1:
            return None
        pixels = batch * -(-channels // m.lanes) * rows * columns
        if isinstance(node, Conv):
            cycles = np.inf if source[2] * source[3] == 1 or (node.first and small) else self.conv(node, True)[0]
            return cycles if np.isfinite(cycles) else None
        if small:
            return None
        if isinstance(node, Window):
            if node.kind == "max" and node.pad != (0, 0) and not self._positive(node.inputs[0]):
                return None  # the border of zeros must not win
            if self.tuner:
                return self.tuner.cycles(self.graph, node, True)
            return pixels * tap_cycles(node.kernel, node.stride, m)
        return 0 if isinstance(node, Affine) else None

    def _positive(self, tensor: str) -> bool:
        makers = [node for node in self.graph.nodes if node.output == tensor]
        clip = makers[0].activation if makers else None
        return bool(clip) and clip[0] == "clip" and clip[1] is not None and clip[1] >= 0

    def feeds(self, node: Node) -> list[str]:
        """The inputs that must lie as the node works: not pictures that are read as they are, nor gates."""
        shapes, lanes = self.graph.shapes, self.machine.lanes
        whole = [name for name in node.inputs if np.prod(four(shapes[name])[2:]) > 1]
        return [name for name in whole if four(shapes[name])[1] >= lanes]

    def total(self, lanes: set[str]) -> float:
        """Of the whole network, if the tensors in `lanes` are made in blocks of channels."""
        result, turned = 0.0, set()
        for node in self.graph.nodes:
            inside = node.output in lanes
            result += self.nodes[node.output][inside]
            turned |= {(name, inside) for name in self.feeds(node) if (self._lies(name, lanes)) != inside}
        saved = [conv.output for conv in _expansions(self.graph, lanes, self.machine.threads).values()]
        moved = [(TURN, [name for name, _ in turned]), (-LEAVES, saved)]
        return result + sum(cost * float(np.prod(self.graph.shapes[name])) for cost, names in moved for name in names)

    def _lies(self, name: str, lanes: set[str]) -> bool:
        return name in lanes and not self._flat(name)

    def _flat(self, name: str) -> bool:
        return int(np.prod(four(self.graph.shapes[name])[2:])) == 1


def borders(graph: Graph, lanes: set[str]) -> dict[str, int]:
    """Zeros around the tensors that convolutions in blocks of channels read."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        window = node.first if isinstance(node, Conv) and node.first else node
        if isinstance(window, Conv | Window) and lanes & {node.output, window.output}:
            name = node.inputs[0]
            found[name] = max(found.get(name, 0), reach(planes_of(graph, window)))
    return found


def arrange(graph: Graph, machine: Machine, dense: bool, least_sparsity: float, tuner=None) -> Layout:
    costs = Costs(graph, machine, dense, least_sparsity, tuner)
    able = [name for name, (_, lanes) in costs.nodes.items() if lanes is not None]
    cuts = [set(able[:i]) for i in range(len(able) + 1)] + [set(able[i:]) for i in range(1, len(able))]
    best = min(cuts, key=costs.total)
    improved = True
    while improved:
        improved = False
        for name in able:
            other = best ^ {name}
            if costs.total(other) < costs.total(best):
                best, improved = other, True
    for node in graph.nodes:
        window = node.first if isinstance(node, Conv) and node.output not in best else None
        if window and costs.turned(window) < costs.planes(window):
            best = best | {window.output}
    chosen = {name: found for (name, lanes), found in costs.convs.items() if lanes == (name in best)}
    choices, patterns = ({name: found[i] for name, found in chosen.items()} for i in (1, 2))
    return Layout(best, borders(graph, best), choices, patterns, _expansions(graph, best, machine.threads))


def band_of(graph: Graph, node: Conv, expand: Conv, threads: int) -> int:
    """How many rows of `node` to compute together with its expansion, so that the latter stays in the cache.

    As few rows as possible are computed twice, and as few threads as possible wait for the last band.
    """
    window, (batch, channels, _, columns) = planes_of(graph, node.first), four(graph.shapes[expand.output])
    row, rows, stride = 4 * channels * (columns + 2 * window.pad[1]), window.out_rows, window.stride[0]
    high = {band: window.kernel[0] + (band - 1) * stride for band in range(1, rows) if rows % band == 0}
    fit = [band for band in high if row * (high[band] + 2 * window.pad[1]) <= BAND_BYTES]
    return min(fit, key=lambda band: -(-batch * rows // band // threads) * high[band], default=0)


def _expansions(graph: Graph, lanes: set[str], threads: int) -> dict[str, Conv]:
    """Pointwise convolutions whose output would leave the cache before the depthwise one behind them reads it."""
    found, makers = {}, {node.output: node for node in graph.nodes}
    for node in graph.nodes:
        expand = isinstance(node, Conv) and node.first and makers.get(node.inputs[0])
        if not isinstance(expand, Conv) or node.output not in lanes or expand.output not in lanes:
            continue
        window, source = planes_of(graph, node.first), four(graph.shapes[expand.inputs[0]])
        plain = expand.weight.shape[2:] == (1, 1) and expand.output not in found and len(expand.inputs) == 1
        plain = plain and expand.stride == (1, 1) and expand.pad == (0, 0) and expand.inputs[0] in lanes
        separable, wide = expand.first is not None, 4 * np.prod(four(graph.shapes[expand.output])[1:])
        large = wide > WIDE_BYTES[separable] and source[2] * source[3] > 1
        if not plain or not large or reach(window) > min(window.pad) or graph.only_user(expand) is not node:
            continue
        new = window.stride[0] * band_of(graph, node, expand, threads)  # rows of the expansion
        if window.kernel[0] - window.stride[0] <= new * TWICE[separable]:
            found[node.output] = expand
    return found
