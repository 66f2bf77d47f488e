"""Where pixels lie: maps in planes or in blocks of channels, the taps of a window, planes of a padded, strided map."""

from dataclasses import dataclass

import numpy as np

from .graph import Conv, Graph, Window


@dataclass(frozen=True)
class Map:
    """Where the channels and pixels of an image lie: blocks of `lanes` channels, each inside a border of zeros.

    With one lane and no border it is a plain (C, H, W) array.
    """

    channels: int
    rows: int
    columns: int
    lanes: int = 1
    border: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.channels // self.lanes)

    @property
    def pitch(self) -> int:
        """Floats from a row to the next."""
        return (self.columns + 2 * self.border) * self.lanes

    @property
    def block(self) -> int:
        """Floats of a block of channels."""
        return (self.rows + 2 * self.border) * self.pitch

    @property
    def size(self) -> int:
        """Floats of an image."""
        return self.blocks * self.block

    def at(self, row: int, column: int) -> int:
        return (row + self.border) * self.pitch + (column + self.border) * self.lanes

    def channel(self, c: int) -> int:
        return c // self.lanes * self.block + c % self.lanes


@dataclass(frozen=True)
class Taps:
    """The window that slides over a map."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]

    def offsets(self, x: Map) -> list[int]:
        """Of every tap, row by row, from the window's first."""
        return [
            ky * self.dilation[0] * x.pitch + kx * self.dilation[1] * x.lanes
            for ky in range(self.kernel[0])
            for kx in range(self.kernel[1])
        ]

    def first(self, x: Map, row: int, column: int) -> int:
        """Where the window of output pixel (row, column) begins."""
        return x.at(row * self.stride[0] - self.pad[0], column * self.stride[1] - self.pad[1])


POINT = Taps((1, 1), (1, 1), (0, 0), (1, 1))


@dataclass(frozen=True)
class Planes:
    """Where one channel of (rows, columns) pixels lies once padded and split."""

    rows: int
    columns: int
    out_rows: int
    out_columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]  # above, left; below and right follow from the output
    dilation: tuple[int, int] = (1, 1)

    @property
    def needed(self) -> bool:
        """Whether there is anything to do: a pointwise convolution of stride 1 reads the map as it lies."""
        return (self.kernel, self.stride, self.pad) != ((1, 1), (1, 1), (0, 0))

    def _taps(self, axis: int) -> list[int]:
        return [k * self.dilation[axis] for k in range(self.kernel[axis])]

    @property
    def phases(self) -> list[tuple[int, int]]:
        """The (row, column) phases that some tap reads."""
        return sorted({(y % self.stride[0], x % self.stride[1]) for y in self._taps(0) for x in self._taps(1)})

    @property
    def height(self) -> int:
        return self.out_rows + self._taps(0)[-1] // self.stride[0]

    @property
    def width(self) -> int:
        return self.out_columns + self._taps(1)[-1] // self.stride[1]

    @property
    def size(self) -> int:
        """Floats a channel."""
        return len(self.phases) * self.height * self.width

    @property
    def offsets(self) -> list[int]:
        """Of every tap, row by row: where output (0, 0) finds its input."""
        (sy, sx), phases = self.stride, self.phases
        return [
            (phases.index((y % sy, x % sx)) * self.height + y // sy) * self.width + x // sx
            for y in self._taps(0)
            for x in self._taps(1)
        ]


def four(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(batch, channels, rows, columns), also of a tensor without height and width, or with axes behind them."""
    shape = (*shape, *(1,) * (4 - len(shape)))
    return (*shape[:3], int(np.prod(shape[3:])))


def planes_of(graph: Graph, node: Conv | Window) -> Planes:
    kernel = node.weight.shape[2:] if isinstance(node, Conv) else node.kernel
    rows, columns = four(graph.shapes[node.inputs[0]])[2:]
    return Planes(rows, columns, *four(graph.shapes[node.output])[2:], kernel, node.stride, node.pad, node.dilation)


def reach(p: Planes) -> int:
    """How far the taps reach outside of the map, on its worst side."""
    sides = [0]
    for axis, (length, out) in enumerate(((p.rows, p.out_rows), (p.columns, p.out_columns))):
        last = (out - 1) * p.stride[axis] + (p.kernel[axis] - 1) * p.dilation[axis] - p.pad[axis]
        sides += [p.pad[axis], last - (length - 1)]
    return max(sides)
