"""Kept channels whose neighbours are pruned, put side by side so that one instruction multiplies several of them.

Narrow numbers are multiplied in tuples of neighbouring channels, two bfloat16 or four bytes. A group of a sparse layer
keeps some tuples whole; those are read from the map as they lie. The single channels that remain make new tuples: a
tile of the map is transposed once, so that all pixels of a channel lie together, and each group interleaves the
channels that it wants into a scratch that stays in the cache. A group pays this once, for all of its rows.
"""

from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T

from ..onnx.blocks import Pattern, tuples
from ..onnx.geometry import Layout, Taps
from ..onnx.graph import Conv, Grid
from ..targets import Machine
from .emit import pick
from .family import Schedule, Workload
from .instructions import Narrow, interleave, turned, turns
from .product import Columns, kept_rows, shared_length
from .tiles import Strip, strips

PIXELS = 16  # that are transposed, and interleaved, together
# Cycles for so many pixels: to transpose a channel, and to interleave a tuple of channels; by the tuple's length.
TRANSPOSE, INTERLEAVE = {2: 3.5, 4: 2.3}, {2: 2.5, 4: 3.0}


@dataclass(frozen=True)
class Gather:
    """The shape of the scratches, and of the arrays that say what goes into them."""

    groups: int
    tuples: int  # of all groups
    most: int  # tuples of a group
    dot: int  # channels of a tuple
    blocks: int  # of the map
    block: int  # channels of one
    width: int  # pixels from a row of a window to the next; 0: only the pixels of a tile are wanted
    pixels: int  # of the largest window, and what its last run may exceed it by

    def buffers(self, prefix: str = "") -> list[tuple[str, int, str]]:
        tuples = [(f"{prefix}tuples", self.groups + 1, "int32")]
        return [*tuples, (f"{prefix}channels", self.dot * self.tuples, "int32")]

    @property
    def turned(self) -> bool:
        """Whether pixels are interleaved in instructions.turns' order; taps need them in a row."""
        return self.dot == 4 and not self.width and self.pixels % (2 * PIXELS) == 0

    def place(self, pixel: int) -> int:
        """Where a pixel of the window lies in the scratch of tuples."""
        return self.dot * (turned(pixel) if self.turned else pixel)

    @property
    def bits(self) -> int:
        """Of a number."""
        return 32 // self.dot

    def planes(self):
        """A scratch for a tile, (channels, pixels)."""
        return T.alloc_buffer((self.blocks * self.block * self.pixels,), f"uint{self.bits}")

    def gathered(self, dtype: str | Grid) -> Narrow:
        """A scratch for the tuples of a group, (tuples, pixels, dot)."""
        return Narrow(T.alloc_buffer((self.most * self.pixels * self.dot,), f"uint{self.bits}"), dtype)

    def transpose(self, window: "Window", x, read, stride: int, planes) -> None:
        """Fill `planes` with the window that begins at x[read]; blocks of channels lie `stride` apart."""
        with T.serial(self.blocks) as number, T.serial(window.rows) as row:
            begin = T.bind(read + number * stride + row * window.step)
            to = T.bind(number * (self.block * self.pixels) + row * len(window.columns))
            for first in window.chunks:
                some = [window.columns[min(first + i, len(window.columns) - 1)] for i in range(PIXELS)]
                some = [T.bind(x[T.ramp(begin + at, 1, self.block)]) for at in some]
                half, each = len(some) // 2, self.block // PIXELS
                for _ in range(half.bit_length()):
                    both = zip(some[:half], some[half:], strict=True)
                    some = [T.bind(turned) for a, b in both for turned in interleave(a, b, self.bits)]
                for channel in range(self.block):
                    lane = channel % each * PIXELS
                    pixels = pick(some[channel // each], range(lane, lane + PIXELS), self.block)
                    T.buffer_store(planes, pixels, [T.ramp(to + channel * self.pixels + first, 1, PIXELS)])

    def interleave(self, window: "Window", planes, pointer, channels, group, gathered: Narrow) -> None:
        """Fill `gathered` with the single channels of a group."""
        order = [i // self.dot + i % self.dot * PIXELS for i in range(self.dot * PIXELS)]
        with T.serial(pointer[group + 1] - pointer[group]) as number:
            first = T.bind((pointer[group] + number) * self.dot)
            some = [T.bind(channels[first + i]) for i in range(self.dot)]
            to = T.bind(number * (self.dot * self.pixels))
            each = 2 * PIXELS if self.turned else PIXELS
            for at in range(0, window.rows * len(window.columns), each):
                parts = [planes[T.ramp(channel + at, 1, each)] for channel in some]
                whole = turns(parts) if self.turned else T.Shuffle(parts, order)
                T.buffer_store(gathered.buffer, whole, [T.ramp(to + self.dot * at, 1, self.dot * each)])


@dataclass(frozen=True)
class Window:
    """The pixels that a tile needs, counted from its first one. They lie side by side in the scratches."""

    rows: int
    step: int  # values from a row of the map to the next
    columns: tuple[int, ...]  # where the pixels of a row lie in the map
    taken: tuple[int, ...]  # the pixel of the scratches that every sum of the tile reads for the first tap

    @classmethod
    def of(cls, strip: Strip, taps: Taps, x: Layout, width: int) -> "Window":
        """width: pixels from a row of the scratches to the next; 0: only the tile's own pixels are wanted."""
        down, right = taps.stride
        if not width:
            there = tuple(y * down * x.row_stride + c * right * x.block for y, c in strip.pixels)
            return cls(1, 0, there, tuple(range(len(there))))
        rows, first, columns = _box(strip, taps)
        there = tuple((first + min(c, columns - 1)) * x.block for c in range(width))
        taken = tuple(y * down * width + c * right - first for y, c in strip.pixels)
        return cls(rows, x.row_stride, there, taken)

    @property
    def chunks(self) -> list[int]:
        """First pixels of the runs that cover a row; where they do not divide it, the last one begins earlier."""
        length = max(len(self.columns), PIXELS)
        return [min(first, length - PIXELS) for first in range(0, length, PIXELS)]


def _box(strip: Strip, taps: Taps) -> tuple[int, int, int]:
    """(rows, first column, columns) of the input that a tile reads, counted from its first pixel."""
    (down, right), reach = taps.stride, [(k - 1) * d for k, d in zip(taps.kernel, taps.dilation, strict=True)]
    rows, columns = [y * down for y, _ in strip.pixels], [c * right for _, c in strip.pixels]
    first = min(columns)
    return max(rows) + reach[0] + 1, first, max(columns) + reach[1] + 1 - first


def singles(keep: np.ndarray, channels: int, dot: int) -> tuple[np.ndarray, np.ndarray]:
    """What a group keeps, (channels * taps) bool: (numbers of whole tuples, single channels)."""
    kept = np.pad(keep.reshape(channels, -1).any(1), (0, -channels % dot)).reshape(-1, dot)
    whole = kept.all(1)
    return np.flatnonzero(whole), np.flatnonzero((kept & ~whole[:, None]).reshape(-1))


def window_size(tiles: tuple[Strip, ...], taps: Taps) -> tuple[int, int]:
    """(width, pixels) of the largest window of these tiles, as Gather has them."""
    if taps.kernel == (1, 1):
        return 0, _whole(max(len(strip.pixels) for strip in tiles))
    boxes = [_box(strip, taps) for strip in tiles]
    width = max(columns for _, _, columns in boxes)
    return width, _whole(max(rows for rows, _, _ in boxes) * width + max(0, PIXELS - width))


def _whole(pixels: int) -> int:
    return -(-pixels // PIXELS) * PIXELS


def columns_of(
    node: Conv, pattern: Pattern, schedule: Schedule, offsets: np.ndarray, x: Layout, taps: Taps, tiles, dot: int
) -> tuple[Gather, list[Columns], list[np.ndarray]]:
    """The gather of a layer, the columns of every group in the map and then in the scratch, and the gather's arrays.

    offsets: (tuples * taps,) where each tuple of `dot` neighbouring channels lies in x.
    """
    channels, count = node.weight.shape[1], node.weight[0, 0].size
    width, pixels = window_size(tiles, taps)
    down, right = (np.arange(k) * d for k, d in zip(taps.kernel, taps.dilation, strict=True))
    of_tap = dot * (down[:, None] * width + right).reshape(-1)
    columns, gathered = [], []
    for keep in kept_rows(node, pattern, schedule):
        whole, single = singles(keep, channels, dot)
        used = tuples(keep[None], channels, dot)[0].any(-1).reshape(-1, count)
        number, tap = np.nonzero(used[whole])
        first = whole[number]
        some = np.minimum(dot * first[:, None] + np.arange(dot), channels)
        columns.append(Columns(some, tap, offsets[first * count + tap]))
        # What the last tuple lacks is its last channel again, with weights of zero.
        extra = -len(single) % dot
        there = np.pad(single, (0, extra), mode="edge" if len(single) else "constant").reshape(-1, dot)
        mine = np.pad(single, (0, extra), constant_values=channels).reshape(-1, dot)
        known = np.pad(keep.reshape(channels, -1), ((0, 1), (0, 0)))
        number, tap = np.nonzero(known[mine].any(1))
        columns.append(Columns(mine[number], tap, dot * number * pixels + of_tap[tap]))
        gathered.append(there * pixels)
    counts = [len(some) for some in gathered]
    total = shared_length(sum(counts))
    gather = Gather(len(counts), total, shared_length(max(counts)), dot, x.blocks, x.block, width, pixels)
    every = np.concatenate(gathered)
    arrays = [np.cumsum([0, *counts]), np.pad(every, ((0, total - len(every)), (0, 0))).reshape(-1)]
    return gather, columns, [a.astype(np.int32) for a in arrays]


def cycles(work: Workload, schedule: Schedule, machine: Machine) -> float:
    """Of an image: to transpose every tile, and to gather channels for every group of it."""
    taps, tiles = Taps() if work.node.depthwise else Taps.of(work.node), strips(*work.y[2:], schedule.tile)
    steps = sum(len(strip.starts) for strip in tiles) * window_size(tiles, taps)[1] // PIXELS
    dot, density = work.dot(machine), schedule.density
    count = (density - density**dot) * work.x[1] / dot * -(-work.y[1] // schedule.group)
    return steps * (work.x[1] * TRANSPOSE[dot] + count * INTERLEAVE[dot])


def chunk_of(groups: int, tiles: int, machine: Machine) -> int:
    """How many groups of rows a task computes: many share a transposed tile, but threads want tasks."""
    able = [count for count in range(1, groups + 1) if groups % count == 0]
    return max(chunk for chunk in able if chunk == 1 or tiles * groups // chunk >= 4 * machine.threads)
