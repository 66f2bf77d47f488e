"""Kept channels whose neighbour is pruned, put side by side so that one instruction multiplies two of them.

Narrow numbers are multiplied in pairs of neighbouring channels. A group of a sparse layer keeps some pairs whole; those
are read from the map as they lie. The single channels that remain are paired anew: a tile of the map is transposed
once, so that all pixels of a channel lie together, and each group interleaves the channels that it wants into a scratch
that stays in the cache. A group pays this once, for all of its rows.
"""

from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T

from ..onnx.blocks import Pattern, tuples
from ..onnx.geometry import Layout, Taps
from ..onnx.graph import Conv
from .emit import pick
from .family import Schedule
from .instructions import interleave
from .product import Columns, kept_rows
from .tiles import Strip

PIXELS = 16  # that are transposed, and interleaved, together


@dataclass(frozen=True)
class Gather:
    """The shape of the scratches, and of the arrays that say what goes into them."""

    groups: int
    pairs: int  # of all groups
    most: int  # pairs of a group
    blocks: int  # of the map
    block: int  # channels of one
    width: int  # pixels from a row of a window to the next; 0: only the pixels of a tile are wanted
    pixels: int  # of the largest window, and what its last run may exceed it by

    def buffers(self, prefix: str = "") -> list[tuple[str, int, str]]:
        return [(f"{prefix}pairs", self.groups + 1, "int32"), (f"{prefix}channels", 2 * self.pairs, "int32")]

    def planes(self):
        """A scratch for a tile, (channels, pixels)."""
        return T.alloc_buffer((self.blocks * self.block * self.pixels,), "uint16")

    def paired(self):
        """A scratch for the pairs of a group, (pairs, pixels, 2)."""
        return T.alloc_buffer((self.most * self.pixels * 2,), "uint16")

    def transpose(self, window: "Window", x, read, stride: int, planes) -> None:
        """Fill `planes` with the window that begins at x[read]; blocks of channels lie `stride` apart."""
        with T.serial(self.blocks) as number, T.serial(window.rows) as row:
            begin = T.bind(read + number * stride + row * window.step)
            to = T.bind(number * (self.block * self.pixels) + row * len(window.columns))
            for first in window.chunks:
                some = [window.columns[min(first + i, len(window.columns) - 1)] for i in range(PIXELS)]
                some = [T.bind(x[T.ramp(begin + at, 1, self.block)]) for at in some]
                half = len(some) // 2
                for _ in range(half.bit_length()):
                    pairs = zip(some[:half], some[half:], strict=True)
                    some = [T.bind(turned) for a, b in pairs for turned in interleave(a, b)]
                for channel in range(self.block):
                    pixels = pick(
                        some[channel // 2], range(channel % 2 * PIXELS, (channel % 2 + 1) * PIXELS), self.block
                    )
                    T.buffer_store(planes, pixels, [T.ramp(to + channel * self.pixels + first, 1, PIXELS)])

    def interleave(self, window: "Window", planes, constants, group, paired) -> None:
        """Fill `paired` with the single channels of a group, two by two."""
        pointer, channels = constants
        order = [i // 2 + i % 2 * PIXELS for i in range(2 * PIXELS)]
        with T.serial(pointer[group + 1] - pointer[group]) as number:
            pair = T.bind(pointer[group] + number)
            one, other = (T.bind(channels[2 * pair + i]) for i in range(2))
            to = T.bind(number * (2 * self.pixels))
            for at in range(0, window.rows * len(window.columns), PIXELS):
                both = [planes[T.ramp(channel + at, 1, PIXELS)] for channel in (one, other)]
                T.buffer_store(paired, T.Shuffle(both, order), [T.ramp(to + 2 * at, 1, 2 * PIXELS)])


@dataclass(frozen=True)
class Window:
    """The pixels that a tile needs, counted from its first one. They lie side by side in the scratches."""

    rows: int
    step: int  # values from a row of the map to the next
    columns: tuple[int, ...]  # where the pixels of a row lie in the map
    taken: tuple[int, ...]  # where every sum of the tile reads in the scratch of pairs

    @classmethod
    def of(cls, strip: Strip, taps: Taps, x: Layout, width: int) -> "Window":
        """width: pixels from a row of the scratch to the next; 0: only the tile's own pixels are wanted."""
        down, right = taps.stride
        if not width:
            there = tuple(y * down * x.row_stride + c * right * x.block for y, c in strip.pixels)
            return cls(1, 0, there, tuple(2 * i for i in range(len(there))))
        rows, first, columns = _box(strip, taps)
        there = tuple((first + min(c, columns - 1)) * x.block for c in range(width))
        taken = tuple(2 * (y * down * width + c * right - first) for y, c in strip.pixels)
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


def singles(keep: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """What a group keeps, (channels * taps) bool: (first channels of whole pairs, single channels)."""
    kept = np.pad(keep.reshape(channels, -1).any(1), (0, channels % 2)).reshape(-1, 2)
    whole = kept.all(1)
    return 2 * np.flatnonzero(whole), np.flatnonzero((kept & ~whole[:, None]).reshape(-1))


def window_size(strips: tuple[Strip, ...], taps: Taps) -> tuple[int, int]:
    """(width, pixels) of the largest window of these tiles, as Gather has them."""
    if taps.kernel == (1, 1):
        return 0, _whole(max(len(strip.pixels) for strip in strips))
    boxes = [_box(strip, taps) for strip in strips]
    width = max(columns for _, _, columns in boxes)
    return width, _whole(max(rows for rows, _, _ in boxes) * width + max(0, PIXELS - width))


def _whole(pixels: int) -> int:
    return -(-pixels // PIXELS) * PIXELS


def rounded(count: int) -> int:
    """A little more, so that layers of one shape whose masks differ have arrays of one length, and share their code."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


def columns_of(
    node: Conv, pattern: Pattern, schedule: Schedule, offsets: np.ndarray, x: Layout, taps: Taps, strips
) -> tuple[Gather, list[Columns], list[np.ndarray]]:
    """The gather of a layer, the columns of every group in the map and then in the scratch, and the gather's arrays.

    offsets: (pairs * taps,) where each pair of neighbouring channels lies in x.
    """
    channels, count = node.weight.shape[1], node.weight[0, 0].size
    width, pixels = window_size(strips, taps)
    down, right = (np.arange(k) * d for k, d in zip(taps.kernel, taps.dilation, strict=True))
    of_tap = 2 * (down[:, None] * width + right).reshape(-1)
    columns, pairs = [], []
    for keep in kept_rows(node, pattern, schedule):
        whole, single = singles(keep, channels)
        used = tuples(keep[None], channels, 2)[0].any(-1).reshape(-1, count)
        pair, tap = np.nonzero(used[whole // 2])
        first = whole[pair]
        columns.append(Columns(first[:, None] + np.arange(2), tap, offsets[first // 2 * count + tap]))
        # Where their number is odd, the last one comes twice, the second time with weights of zero.
        there = np.pad(single, (0, len(single) % 2), mode="edge" if len(single) else "constant").reshape(-1, 2)
        mine = np.pad(single, (0, len(single) % 2), constant_values=channels).reshape(-1, 2)
        known = np.pad(keep.reshape(channels, -1), ((0, 1), (0, 0)))
        pair, tap = np.nonzero(known[mine].any(1))
        columns.append(Columns(mine[pair], tap, 2 * pair * pixels + of_tap[tap]))
        pairs.append(there * pixels)
    counts = [len(some) for some in pairs]
    total = max(1, rounded(sum(counts)))
    gather = Gather(len(pairs), total, max(1, rounded(max(counts))), x.blocks, x.block, width, pixels)
    every = np.concatenate(pairs)
    arrays = [np.cumsum([0, *counts]), np.pad(every, ((0, total - len(every)), (0, 0))).reshape(-1)]
    return gather, columns, [a.astype(np.int32) for a in arrays]
