"""Where the channels and pixels of a map lie in memory, and where the window of a convolution reads them."""

from dataclasses import dataclass

import numpy as np

from .graph import Conv, Graph, Grid, Window


def nchw(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(batch, channels, rows, columns), also of a tensor without height and width, or with axes behind them."""
    shape = (*shape, *(1,) * (4 - len(shape)))
    return (*shape[:3], int(np.prod(shape[3:])))


@dataclass(frozen=True)
class Layout:
    """An image in memory. With `block` 1 it is NCHW, (C, H, W); else NCHWc: the channels of a block are the last axis.

    In NCHWc with a block as wide as a vector register, a pixel of a block is one vector, its neighbour is the next one
    however wide the map is, and strides cost nothing. The halo is a border of zeros around every block.

    Sums have 32 bits whatever a map holds, so kernels compute a *run* of channels together, as many as a register holds
    sums: a block of float32 values is one run, a block of bfloat16 values two, one of bytes four.
    """

    channels: int
    rows: int
    columns: int
    block: int = 1  # channels, the c of NCHWc
    halo: int = 0  # pixels on each side
    dtype: str | Grid = "float32"  # float32, bfloat16, or the grid that its bytes count the steps of

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.rows, self.columns

    @property
    def blocks(self) -> int:
        return -(-self.channels // self.block)

    @property
    def row_stride(self) -> int:
        """Values from a row to the next."""
        return (self.columns + 2 * self.halo) * self.block

    @property
    def block_stride(self) -> int:
        """Values from a block to the next."""
        return (self.rows + 2 * self.halo) * self.row_stride

    @property
    def size(self) -> int:
        """Values of an image."""
        return self.blocks * self.block_stride

    def at(self, row: int, column: int) -> int:
        """Where a pixel lies in its block."""
        return (row + self.halo) * self.row_stride + (column + self.halo) * self.block

    def runs(self, lanes: int) -> int:
        """How many runs of `lanes` channels it has; the last may be short."""
        return -(-self.channels // lanes)

    def run(self, number, lanes: int):
        """Where the run of `lanes` channels of that number begins."""
        each = self.block // lanes
        return number * self.block_stride if each == 1 else number // each * self.block_stride + number % each * lanes

    def channel(self, c: int) -> int:
        """Where a channel begins."""
        return c // self.block * self.block_stride + c % self.block


@dataclass(frozen=True)
class Taps:
    """The window of a convolution or pooling, (vertical, horizontal) each. A tap is one of its kh * kw positions."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)  # above, left; below and right follow from the output's size
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, node: Conv | Window) -> "Taps":
        kernel = node.weight.shape[2:] if isinstance(node, Conv) else node.kernel
        return cls(tuple(kernel), node.stride, node.pad, node.dilation)

    def offsets(self, x: Layout) -> list[int]:
        """Where every tap reads, row by row, counted from the first."""
        return [
            ky * self.dilation[0] * x.row_stride + kx * self.dilation[1] * x.block
            for ky in range(self.kernel[0])
            for kx in range(self.kernel[1])
        ]

    def first(self, x: Layout, row: int, column: int) -> int:
        """Where the first tap of output pixel (row, column) reads."""
        return x.at(row * self.stride[0] - self.pad[0], column * self.stride[1] - self.pad[1])


@dataclass(frozen=True)
class Polyphase:
    """A padded channel split into its stride x stride phases (every s-th row and column), each a plane of its own.

    So every tap becomes a constant offset, and neighbouring outputs read neighbouring inputs, whatever the stride is.
    """

    rows: int
    columns: int
    out_rows: int
    out_columns: int
    taps: Taps

    @classmethod
    def of(cls, graph: Graph, node: Conv | Window) -> "Polyphase":
        sizes = (size for name in (node.inputs[0], node.output) for size in nchw(graph.shapes[name])[2:])
        return cls(*sizes, Taps.of(node))

    @property
    def needed(self) -> bool:
        """Whether there is anything to do: a pointwise convolution of stride 1 reads the map as it lies."""
        return (self.taps.kernel, self.taps.stride, self.taps.pad) != ((1, 1), (1, 1), (0, 0))

    def _places(self, axis: int) -> list[int]:
        return [k * self.taps.dilation[axis] for k in range(self.taps.kernel[axis])]

    @property
    def phases(self) -> list[tuple[int, int]]:
        """The (row, column) phases that some tap reads."""
        (sy, sx) = self.taps.stride
        return sorted({(y % sy, x % sx) for y in self._places(0) for x in self._places(1)})

    @property
    def height(self) -> int:
        return self.out_rows + self._places(0)[-1] // self.taps.stride[0]

    @property
    def width(self) -> int:
        return self.out_columns + self._places(1)[-1] // self.taps.stride[1]

    @property
    def size(self) -> int:
        """Values of a channel."""
        return len(self.phases) * self.height * self.width

    @property
    def offsets(self) -> list[int]:
        """Where every tap, row by row, finds the input of output (0, 0)."""
        (sy, sx), phases = self.taps.stride, self.phases
        return [
            (phases.index((y % sy, x % sx)) * self.height + y // sy) * self.width + x // sx
            for y in self._places(0)
            for x in self._places(1)
        ]

    @property
    def halo(self) -> int:
        """How far the taps reach outside of the map, on its worst side."""
        taps, sides = self.taps, [0]
        for axis, (length, out) in enumerate(((self.rows, self.out_rows), (self.columns, self.out_columns))):
            last = (out - 1) * taps.stride[axis] + self._places(axis)[-1] - taps.pad[axis]
            sides += [taps.pad[axis], last - (length - 1)]
        return max(sides)
