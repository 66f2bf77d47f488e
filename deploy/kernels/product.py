"""The weights of a convolution or classifier as kernels read them, dense and block sparse alike.

A weight (O, C, kh, kw) is a matrix of O rows and C * kh * kw columns. For the rows of a group, a kernel computes

    y[row, pixel] = epilogue(bias[row] + sum over the group's columns k of weight[k, row] * x[offset[k] + pixel])

What a column is (a channel, or a tap of a channel) and where it lies is wholly in `offset`, so a pointwise, a 3x3 and a
strided convolution are the same code. A dense layer is one whose groups all keep every column: then one list of offsets
serves every group.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T

from ..onnx.blocks import Pattern, matrix
from ..onnx.graph import Conv
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

    @property
    def groups(self) -> int:
        return -(-self.rows // self.group)

    def buffers(self, prefix: str = "") -> list[tuple[str, int, str]]:
        """Names, lengths and types of the arrays that `pack` makes."""
        steps = self.columns * (1 if self.sparse else self.groups)
        return [
            (f"{prefix}weight", max(1, steps) * self.group, "float32"),
            (f"{prefix}offset", max(1, self.columns), "int32"),
            (f"{prefix}pointer", self.groups + 1, "int32"),
            (f"{prefix}bias", self.groups * self.group, "float32"),
        ]

    def over_columns(self, machine: Machine, group, pointer, weight, body: Callable) -> None:
        """Emit `body(weight index, offset index, u)` for every kept column of the group; u counts within a step.

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
            steps((pointer[group], pointer[group + 1]), 0)
        else:
            steps((self.columns // self.unroll,), group * self.columns)


def pack(node: Conv, pattern: Pattern, schedule: Schedule, offsets: np.ndarray) -> tuple[Product, list[np.ndarray]]:
    """The weights of `node` in groups of rows: weight (columns, group), offset of a column, pointer of a group, bias.

    offsets: (columns,) where each column's pixels lie. Every group gets whole steps of `unroll` columns, and the last
    one whole `group` rows: what is missing is filled with zero weights. A group's columns are those from step
    pointer[group] to pointer[group + 1].
    """
    group, unroll = schedule.group, schedule.unroll
    dense = matrix(node.weight).astype(np.float32)
    groups = -(-len(dense) // group)
    dense = np.pad(dense, ((0, groups * group - len(dense)), (0, 0))).reshape(groups, group, -1)
    bias = np.pad(node.bias.astype(np.float32), (0, groups * group - len(node.bias)))
    keep = np.ones((groups, dense.shape[2]), bool)
    if schedule.sparse:
        keep = np.repeat(pattern.keep, pattern.block // group, axis=0)[:groups]
    weights, places, counts = [], [], []
    for g, columns in enumerate(map(np.flatnonzero, keep)):
        columns = columns[np.argsort(offsets[columns], kind="stable")]  # sorted reads are twice as fast as scattered
        extra = -len(columns) % unroll
        weights.append(np.pad(dense[g][:, columns].T, ((0, extra), (0, 0))))
        places.append(np.pad(offsets[columns], (0, extra)))
        counts.append(len(places[-1]) // unroll)
    weight = np.ascontiguousarray(np.concatenate(weights).reshape(-1), np.float32)
    offset = np.concatenate(places) if schedule.sparse else places[0]
    if not len(offset):  # a layer without any weight still needs a buffer
        weight, offset = np.zeros(group, np.float32), np.zeros(1)
    pointer = np.concatenate([[0], np.cumsum(counts)])
    product = Product(len(node.weight), group, len(offset), schedule.sparse, unroll)
    return product, [weight, offset.astype(np.int32), pointer.astype(np.int32), bias]
