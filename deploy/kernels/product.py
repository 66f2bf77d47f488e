"""The weights of a convolution or classifier as kernels read them, dense and block sparse alike.

A weight (O, C, kh, kw) is a matrix of O rows and C * kh * kw columns. For the rows of a group, a kernel computes

    y[row, pixel] = epilogue(bias[row] + sum over the group's columns k of weight[k, row] * x[offset[k] + pixel])

What a column is (a channel, or a tap of a channel) and where it lies is wholly in `offset`, so a pointwise, a 3x3 and a
strided convolution are the same code. Of narrow numbers a column is several channels, whose products the processor sums
up by itself. A dense layer is one whose groups all keep every column: then one list of offsets serves every group.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ml_dtypes import bfloat16
from tvm.script.ir_builder import tirx as T

from ..onnx.blocks import Pattern, tuples
from ..onnx.graph import Conv, Grid
from ..targets import Machine
from .emit import prefetch
from .family import Schedule


@dataclass(frozen=True)
class Product:
    """The shape of the packed weights."""

    rows: int  # output channels
    group: int  # rows that are computed together and share their columns
    columns: int  # kept columns a group if dense, of all groups together if sparse; a multiple of `unroll`
    sparse: bool
    unroll: int  # columns a step, each with its own sums: hides the latency of few sums
    dtype: str = "float32"  # of the weights; int32 hold `dot` narrow ones
    dot: int = 1  # channels of a column; 4 are multiplied as integers
    places: int = 1  # where the pixels of a group's columns are: in the map, or in the map and in a scratch

    @property
    def groups(self) -> int:
        return -(-self.rows // self.group)

    def buffers(self, prefix: str = "") -> list[tuple[str, int, str]]:
        """Names, lengths and types of the arrays that `pack` makes."""
        steps, rows = self.columns * (1 if self.sparse else self.groups), self.groups * self.group
        integers = [(f"{prefix}scale", rows, "float32"), (f"{prefix}start", rows, "int32")]
        return [
            (f"{prefix}weight", max(1, steps) * self.group, self.dtype),
            (f"{prefix}offset", max(1, self.columns), "int32"),
            (f"{prefix}pointer", self.groups * self.places + 1, "int32"),
            (f"{prefix}bias", rows, "float32"),
            *(integers if self.integer else []),
        ]

    @property
    def integer(self) -> bool:
        """Whether sums are whole, (sum + start) * scale + bias being what they mean."""
        return self.dot == 4

    def over_columns(self, machine: Machine, group, place: int, pointer, weight, body: Callable) -> None:
        """Emit `body(weight index, offset index, u)` for every column of the group there; u counts within a step.

        Weights come from memory, once an image, and a processor forgets at every page what it was reading, so they are
        fetched a page ahead.
        """
        line, page = machine.core.line_bytes // 4, machine.core.page_bytes // 4

        def steps(count, first) -> None:
            with T.serial(*count) as step:
                place = step * self.unroll
                for at in range(0, self.unroll * self.group, line):
                    prefetch(weight, (first + place) * self.group + page + at)
                for u in range(self.unroll):
                    body(first + place + u, place + u, u)

        if self.sparse:
            number = group * self.places + place
            steps((pointer[number], pointer[number + 1]), 0)
        else:
            steps((self.columns // self.unroll,), group * self.columns)


@dataclass(frozen=True)
class Columns:
    """Columns of one group whose pixels are in one place."""

    channels: np.ndarray  # (columns, dot); one more than there are stands for a weight of zero
    taps: np.ndarray  # (columns,)
    offsets: np.ndarray  # (columns,) where the pixels lie


def kept_rows(node: Conv, pattern: Pattern, schedule: Schedule) -> np.ndarray:
    """(groups, channels * taps) bool: which columns each group of a schedule keeps."""
    groups = -(-len(node.weight) // schedule.group)
    if not schedule.sparse:
        return np.ones((groups, node.weight[0].size), bool)
    return np.repeat(pattern.keep, pattern.block // schedule.group, axis=0)[:groups]


def columns_of(node: Conv, pattern: Pattern, schedule: Schedule, offsets: np.ndarray, dot: int = 1) -> list[Columns]:
    """The columns of every group, read where they lie; of a dense one, which groups share, of the first.

    offsets: (columns,) where each column's pixels lie; of `dot` channels side by side, those of the first.
    """
    channels, taps, found = node.weight.shape[1], node.weight[0, 0].size, []
    for keep in kept_rows(node, pattern, schedule)[: None if schedule.sparse else 1]:
        columns = np.flatnonzero(tuples(keep[None], channels, dot)[0].any(-1))
        columns = columns[np.argsort(offsets[columns], kind="stable")]  # sorted reads are twice as fast as scattered
        some = (columns // taps * dot)[:, None] + np.arange(dot)
        found.append(Columns(np.minimum(some, channels), columns % taps, offsets[columns]))
    return found


def shared_length(count: int, unit: int = 1) -> int:
    """A little more than `count`, in whole units: layers of one shape whose masks differ then share their code."""
    step = unit << max(0, count.bit_length() - 4)
    return max(unit, -(-count // step) * step)


def pack(
    node: Conv,
    schedule: Schedule,
    columns: list[Columns],
    dtype: str = "float32",
    places: int = 1,
    grid: Grid | None = None,
    unit: float = 1.0,
) -> tuple[Product, list[np.ndarray]]:
    """The weights of `node` in groups of rows: weight (columns, group), offset of a column, pointer of a group, bias.

    columns: of each group, or of all of them together if dense; `places` entries a group. dtype: of the weights; those
    of a column of several channels are put into an int32. grid: whose steps the weights, int8, are multiplied with;
    then there are a scale and a start of every row, too. unit: of what comes out.

    Every entry gets whole steps of `unroll` columns, and the last group whole `group` rows: what is missing is filled
    with zero weights. The columns of an entry are those from step pointer[entry] to pointer[entry + 1].
    """
    rows, channels, *_ = node.weight.shape
    group, unroll, dot = schedule.group, schedule.unroll, columns[0].channels.shape[1]
    groups = -(-rows // group)
    values = node.weight.astype(np.float32).reshape(rows, channels, -1)
    if grid is None:
        values = values / np.float32(unit)
    else:  # a factor of zero behind the layer leaves weights of zero, and a scale of zero
        values = np.rint(values / np.where(node.scale == 0, 1, node.scale)[:, None, None])
    values = np.pad(values, ((0, groups * group - rows), (0, 1), (0, 0))).reshape(groups, group, channels + 1, -1)
    bias = np.pad((node.bias / np.float32(unit)).astype(np.float32), (0, groups * group - rows))
    weights, offsets, counts = [], [], []
    for entry, some in enumerate(columns if schedule.sparse else columns * groups):
        extra = -len(some.taps) % unroll
        taken = values[entry // places][:, some.channels, some.taps[:, None]].swapaxes(0, 1)  # (columns, group, dot)
        weights.append(np.pad(taken, ((0, extra), (0, 0), (0, 0))))
        offsets.append(np.pad(some.offsets, (0, extra)))
        counts.append(len(offsets[-1]) // unroll)
    weight = np.ascontiguousarray(np.concatenate(weights).reshape(-1), np.float32)
    if dtype != "float32":
        weight = weight.astype({"bfloat16": bfloat16, "int8": np.int8}[dtype])
        weight = weight.view(np.int32 if dot > 1 else np.uint16)
    offset = np.concatenate(offsets) if schedule.sparse else offsets[0]
    if not len(offset):  # a layer without any weight still needs a buffer
        weight, offset = np.zeros(group, weight.dtype), np.zeros(1)
    pointer = np.concatenate([[0], np.cumsum(counts)])
    if places > 1:
        extra = shared_length(len(offset), unroll) - len(offset)
        offset, weight = np.pad(offset, (0, extra)), np.pad(weight, (0, extra * group))
    product = Product(rows, group, len(offset), schedule.sparse, unroll, "int32" if dot > 1 else dtype, dot, places)
    packed = [weight, offset.astype(np.int32), pointer.astype(np.int32), bias]
    if grid is not None:
        scale = np.pad(node.scale * np.float32(grid.scale / unit), (0, groups * group - rows), constant_values=1)
        start = -grid.zero * values.sum((2, 3)).reshape(-1)
        packed += [scale.astype(np.float32), start.astype(np.int32)]
    return product, packed
