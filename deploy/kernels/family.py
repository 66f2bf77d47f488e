"""What a family of kernels is. Each is one class in a file of its own, and a row of FAMILIES in __init__.py.

The class says which nodes it computes in which layout of maps, with which tiles, how many cycles that takes, and how
weights are packed for it. An instance is one kernel: it holds the sizes that the code depends on, so layers that agree
in them share it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import tvm
from tvm import relax

from ..onnx.blocks import Pattern, matrix
from ..onnx.geometry import Layout, Polyphase, nchw
from ..onnx.graph import Conv, Graph, Grid, Node
from ..targets import Machine


@dataclass(frozen=True)
class Schedule:
    """How a node is computed: by which family of kernels, with which parameters."""

    family: "type[Family]"
    sparse: bool = False  # only kept blocks are multiplied
    group: int = 0  # output channels computed together
    tile: int = 0  # the most that a tile holds: vectors of pixels in NCHW, pixels in NCHWc
    unroll: int = 1  # columns of the weight matrix a step, each with sums of its own
    density: float = 1.0  # kept columns / all columns
    gather: bool = False  # of pairs of channels, of which it is kept one, the kept ones are put side by side
    cycles: float = 0.0  # of an image on one thread, counted by the family's rule

    @property
    def text(self) -> str:
        """What deploy.json says of it."""
        return f"{'sparse' if self.sparse else 'dense'}, {self.family.tiles_text.format(self)}"


class Workload:
    """A node and the shapes around it: what the choice of its kernel depends on, besides the machine."""

    def __init__(self, graph: Graph, node: Node):
        self.graph, self.node = graph, node
        self.x, self.y = (nchw(graph.shapes[name]) for name in (node.inputs[0], node.output))  # (B, C, H, W) each

    @cached_property
    def polyphase(self) -> Polyphase:
        return Polyphase.of(self.graph, self.node)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(rows, columns) of a convolution's weights as a matrix."""
        return matrix(self.node.weight).shape

    def dot(self, machine: Machine) -> int:
        """As dot_of."""
        return dot_of(self.graph, self.node, machine)

    def itemsize(self, machine: Machine) -> int:
        """Bytes of a value of what the node multiplies, where it lies in NCHWc."""
        return 4 // self.dot(machine)

    def columns(self, dot: int) -> int:
        """Columns of that matrix, if `dot` neighbouring channels make one."""
        channels, *taps = self.node.weight.shape[1:]
        return -(-channels // dot) * taps[0] * taps[1]

    @property
    def pixels(self) -> int:
        """Pixels of an output map."""
        return self.y[2] * self.y[3]

    @property
    def non_negative(self) -> bool:
        """Whether the activation that makes the node's input keeps it at zero or above."""
        maker = next((node for node in self.graph.nodes if node.output == self.node.inputs[0]), None)
        clip = maker.activation if maker else None
        clipped = bool(clip) and clip[0] == "clip" and clip[1] is not None and clip[1] >= 0
        return clipped or bool(maker and maker.grid and maker.grid.zero == 0)


def dot_of(graph: Graph, node: Conv, machine: Machine) -> int:
    """How many neighbouring channels of an NCHWc map a multiply-add of this convolution sums up."""
    if machine.dtype == "int8":
        grid = node.depthwise.grid if node.depthwise else graph.grid(node.inputs[0])
        return 4 if grid and node.scale is not None else 1
    return 2 if machine.dtype == "bfloat16" else 1


@dataclass(frozen=True)
class Expansion:
    """A pointwise convolution that is computed inside the kernel of the next one, for some output rows at a time."""

    node: Conv
    band: int  # rows of the next convolution's output


class Caller(Protocol):
    """What a family may ask of the program it adds its call to (codegen.program.Program)."""

    graph: Graph
    machine: Machine

    def schedule(self, node: Node) -> Schedule: ...

    def pattern(self, node: Conv) -> Pattern: ...

    def expansion(self, node: Conv) -> Expansion | None: ...

    def layout(self, tensor: str) -> Layout:
        """How `tensor` is made, or is to be made."""

    def number(self, grid: Grid | None) -> str | Grid:
        """What an NCHWc map holds whose values are on this grid, or on none."""

    def nchwc(self, channels: int, rows: int, columns: int, number: str | Grid, halo: int = 0) -> Layout:
        """A layout of blocks of channels."""

    def fetch(self, tensor: str, nchwc: bool = False, halo: int = 0) -> tuple[relax.Expr, Layout]:
        """A made tensor in NCHW or NCHWc with a halo of at least `halo`, reordered where needed."""

    def lower(self, node: Node) -> None:
        """Add the calls that compute `node`."""

    def call(self, kernel: "Kernel", arguments: list, length: int, layers: tuple[Conv, ...] = ()) -> relax.Expr:
        """Call a kernel with tensors and NumPy constants; it makes `length` values. layers: what it computes."""


class Kernel(ABC):
    """A frozen dataclass of all that the code of one kernel depends on. What computes no node, such as a reorder, is
    derived from this class directly."""

    name: ClassVar[str]  # of its functions, in the file of --tune and in deploy.json

    @property
    def made(self) -> str:
        """The type of what it makes: that of its output's layout, if it has one."""
        return self.y.dtype if isinstance(getattr(self, "y", None), Layout) else "float32"

    @abstractmethod
    def emit(self, machine: Machine) -> tvm.tirx.PrimFunc:
        """The code."""


class Family(Kernel):
    """Kernels that compute one kind of node in one layout of maps."""

    node: ClassVar[type[Node]]  # the kind that it computes
    nchwc: ClassVar[bool] = False  # maps in NCHWc, else in NCHW
    tiles_text: ClassVar[str] = ""  # a format of a Schedule

    @classmethod
    def fits(cls, work: Workload, machine: Machine) -> bool:
        """Whether it can compute the node."""
        return True

    @classmethod
    def candidates(cls, work: Workload, machine: Machine, pattern: Pattern | None) -> Iterator[Schedule]:
        """Schedules with their cycles, each of which fits the registers. pattern: of kept blocks, None for dense."""
        yield replace(Schedule(cls), cycles=cls.cycles(work, Schedule(cls), machine))

    @classmethod
    def cycles(cls, work: Workload, schedule: Schedule, machine: Machine) -> float:
        """Of an image on one thread. Only the order of alternatives matters, not the cycles themselves."""
        return 0.0

    @classmethod
    def prologue_cycles(cls, work: Workload, machine: Machine) -> float:
        """Of what runs in front of the kernel, or inside of it, because this family needs it."""
        return 0.0

    @classmethod
    def pack(cls, node: Node, schedule: Schedule, machine: Machine) -> list[np.ndarray]:
        """The node's constants as the kernel reads them."""
        return []

    @classmethod
    @abstractmethod
    def lower(cls, node: Node, program: Caller) -> relax.Expr:
        """Fetch what the node reads, add the call, and return what it makes, in `program.layout(node.output)`."""


class ConvFamily(Family):
    """Convolutions and classifiers: dense ones, and sparse ones in groups of rows that share their kept columns."""

    node = Conv

    @classmethod
    def dot(cls, work: Workload, machine: Machine) -> int:
        """How many neighbouring channels are a column of the node's weights."""
        return 1

    @classmethod
    @abstractmethod
    def dense_groups(cls, work: Workload, machine: Machine) -> list[int]:
        """How many rows to compute together where all share their columns."""

    @classmethod
    @abstractmethod
    def tilings(cls, work: Workload, machine: Machine, groups: list[int]) -> Iterator[tuple[int, int, int]]:
        """(group, tile, unroll) that fit the registers."""

    @classmethod
    def candidates(cls, work: Workload, machine: Machine, pattern: Pattern | None) -> Iterator[Schedule]:
        kinds = [(False, cls.dense_groups(work, machine), 1.0)]
        if pattern is not None and pattern.density < 1.0:
            block = pattern.block
            divisors = [g for g in (1, 2, 4, 8, 16, 32) if block % g == 0 and (g == block or g >= 4)]
            kinds.append((True, divisors, pattern.density_of(work.node.weight.shape[1], cls.dot(work, machine))))
        for sparse, groups, density in kinds:
            for group, tile, unroll in cls.tilings(work, machine, groups):
                schedule = Schedule(cls, sparse, group, tile, unroll, density)
                yield replace(schedule, cycles=cls.cycles(work, schedule, machine))


def step_cycles(m: Machine, fmas: int, loads: float, pixels: float, weights: float, unroll: int) -> float:
    """Of one column: bound by arithmetic, by loads, by the slower caches, or by the latency of few sums."""
    return max(fmas / m.core.multiply_adds, loads / m.core.loads, pixels, weights, m.core.latency / unroll)


def unroll_for(sums: int, machine: Machine) -> int:
    """Columns a step so that enough sums are in flight to hide the latency; a power of two."""
    return max(1, 1 << ((machine.sums_in_flight // sums).bit_length() - 1)) if sums < machine.sums_in_flight else 1
