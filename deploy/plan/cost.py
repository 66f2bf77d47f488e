"""Cycles of every node in NCHW and in NCHWc, by the rules of the kernel families."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..kernels import FAMILIES
from ..kernels.family import Family, Schedule, Workload
from ..kernels.reorder import CYCLES as REORDER
from ..onnx.blocks import Pattern, find_pattern, with_covers
from ..onnx.graph import Conv, Graph, Node, View, Window
from ..targets import Machine

SPARSE_MARGIN = 0.95  # a sparse kernel must promise this part of the dense one's time
TIE = 1.03  # costs within this factor of the least are equal, and the cycles that were counted decide


@dataclass(frozen=True)
class Choice:
    """The best kernel for a node in one layout."""

    cost: float  # cycles of the batch, with what the kernel needs in front of it
    schedule: Schedule
    pattern: Pattern | None = None  # of the blocks it multiplies


def families_for(work: Workload, machine: Machine, nchwc: bool) -> list[type[Family]]:
    return [f for f in FAMILIES if f.node is type(work.node) and f.nchwc == nchwc and f.fits(work, machine)]


def rivals(families: list[type[Family]], work: Workload, machine: Machine, pattern: Pattern | None, most: int):
    """The `most` cheapest dense schedules and, unless every block is kept (or pattern is None), as many sparse ones."""
    every = [schedule for family in families for schedule in family.candidates(work, machine, pattern)]
    every.sort(key=lambda schedule: schedule.cycles)
    return [s for sparse in (False, True) for s in [s for s in every if s.sparse == sparse][:most]]


class CostModel:
    """The cost of every node in either layout, counted by the families' rules; a subclass may measure instead."""

    def __init__(self, graph: Graph, machine: Machine, dense: bool = False, least_sparsity: float = 0.0):
        """dense: no layer is compiled sparse. least_sparsity: the least share of zero blocks that one needs for it."""
        self.graph, self.machine = graph, machine
        self.dense, self.least_sparsity = dense, least_sparsity
        self.found: dict[tuple[str, bool], Choice | None] = {}
        self.nodes = {node.output: (self.nchw(node), self.nchwc(node)) for node in self.track(graph.nodes)}

    def track(self, nodes: list[Node]) -> Iterable[Node]:
        return nodes

    def compared(self, families: list[type[Family]], work: Workload, pattern: Pattern | None) -> list[Schedule]:
        """The schedules whose `cost` is asked: the cheapest one, but a sparse one must win by a margin."""

        def handicap(schedule: Schedule) -> float:
            return schedule.cycles / (SPARSE_MARGIN if schedule.sparse else 1)

        return sorted(rivals(families, work, self.machine, pattern, 1), key=handicap)[:1]

    def cost(self, work: Workload, schedule: Schedule, pattern: Pattern | None) -> float:
        """Cycles of the batch, with the prologue. A depthwise convolution in front of an NCHW kernel is not counted."""
        return work.x[0] * (schedule.cycles + schedule.family.prologue_cycles(work, self.machine))

    def patterns(self, node: Node) -> tuple[list[Pattern | None], bool]:
        """The patterns of kept blocks that a node may be computed with, and whether it may be compiled sparse."""
        if not isinstance(node, Conv):
            return [None], False
        whole = find_pattern(node.weight, node.scale is not None)
        # A rate of 0.5 prunes int(0.5 * blocks), so a layer asked to be half empty may be a little less.
        sparse = not self.dense and 1 - whole.density >= self.least_sparsity - 0.01
        return (with_covers(whole, node.weight) if sparse else [whole]), sparse

    def best(self, node: Node, nchwc: bool) -> Choice | None:
        """The best kernel of a node in a layout; None if there is none."""
        key = node.output, nchwc
        if key not in self.found:
            work = Workload(self.graph, node)
            families, every = families_for(work, self.machine, nchwc), []
            patterns, sparse = self.patterns(node)
            for pattern in patterns if families else ():
                some = self.compared(families, work, pattern if sparse else None)
                every += [Choice(self.cost(work, schedule, pattern), schedule, pattern) for schedule in some]
            least = min((choice.cost for choice in every), default=0.0)
            tied = [choice for choice in every if choice.cost <= least * TIE]
            self.found[key] = min(tied, key=lambda choice: choice.schedule.cycles, default=None)
        return self.found[key]

    def nchw(self, node: Node) -> float:
        choice = self.best(node, False)
        if choice is None:
            assert isinstance(node, View), node
            return 0.0
        depthwise = node.depthwise if isinstance(node, Conv) else None
        return choice.cost + (min(self.nchw(depthwise), self.reordered(depthwise)) if depthwise else 0.0)

    def nchwc(self, node: Node) -> float | None:
        choice = self.best(node, True)
        return choice and choice.cost

    def reordered(self, node: Window) -> float:
        """Cycles of a depthwise convolution between NCHW maps that works in NCHWc."""
        work, choice = Workload(self.graph, node), self.best(node, True)
        if choice is None:
            return float("inf")
        values = (b * c * rows * columns for b, c, rows, columns in (work.x, work.y))
        return choice.cost + REORDER * float(sum(values))
