"""Find 1xN blocks in weights.

A weight (O, C, kh, kw) is a matrix of O rows and C * kh * kw columns. Rows are cut into groups of N neighbours (the
last may be shorter); a block is one column of one group. It is dropped if all its weights are zero.
"""

from dataclasses import dataclass

import numpy as np

from .graph import Conv, Graph

SIZES = (32, 16, 8, 4, 2, 1)
SPILL = 1.01  # kept blocks may hold this much more than the non-zero weights: a weight may be zero by chance
ROUNDED_SPILL = 1.1  # the same of quantised weights, of which up to 5 % are rounded to zero


@dataclass(frozen=True)
class Pattern:
    """Which blocks of a layer are kept: keep (groups, columns)."""

    block: int
    keep: np.ndarray

    @property
    def density(self) -> float:
        """Kept blocks / all blocks."""
        return float(self.keep.mean())

    def density_of(self, channels: int, count: int) -> float:
        """The same, where a column is `count` neighbouring channels and is kept if one of them is."""
        return float(tuples(self.keep, channels, count).any(-1).mean())


def matrix(weight: np.ndarray) -> np.ndarray:
    return weight.reshape(len(weight), -1)


def tuples(columns: np.ndarray, channels: int, count: int) -> np.ndarray:
    """(rows, channels * taps) as (rows, tuples * taps, count): `count` neighbouring channels side by side.

    What the last tuple lacks is zero.
    """
    rows = len(columns)
    columns = np.pad(columns.reshape(rows, channels, -1), ((0, 0), (0, -channels % count), (0, 0)))
    return columns.reshape(rows, -1, count, columns.shape[2]).swapaxes(2, 3).reshape(rows, -1, count)


def keep_blocks(weight: np.ndarray, block: int) -> np.ndarray:
    """(groups, columns) bool: blocks of `block` rows that hold a weight other than zero."""
    used = matrix(weight) != 0
    return np.add.reduceat(used, np.arange(0, len(used), block), axis=0) > 0


def find_pattern(weight: np.ndarray, rounded: bool = False) -> Pattern:
    """The pattern with the largest N whose blocks are all or nothing; of a dense weight, density 1.

    rounded: whether the weights were quantised, so that small ones have become zero.
    """
    used = int(np.count_nonzero(weight))
    lengths = len(weight)
    for block in SIZES:
        keep = keep_blocks(weight, block)
        rows = np.minimum(block, lengths - block * np.arange(len(keep)))  # the last group may be short
        if int((keep.sum(1) * rows).sum()) <= used * (ROUNDED_SPILL if rounded else SPILL) or block == 1:
            return Pattern(block, keep)
    raise AssertionError("N = 1 always fits")


def with_covers(whole: Pattern, weight: np.ndarray) -> list[Pattern]:
    """Patterns to compute with: `whole` and, where its blocks are small, larger blocks that hold some zeros."""
    return [whole, *(Pattern(block, keep_blocks(weight, block)) for block in SIZES if whole.block < 4 <= block)]


def check(graph: Graph, block: int | None) -> None:
    """ValueError if no layer has zero blocks of `block` rows; with None, any pattern is accepted."""
    if block is None:
        return
    layers = [node for node in graph.nodes if isinstance(node, Conv)]
    found = {node.name: find_pattern(node.weight, node.scale is not None) for node in layers}
    pruned = {name: pattern for name, pattern in found.items() if pattern.density < 0.99}
    if not any(pattern.block % block == 0 for pattern in pruned.values()):
        seen = sorted({pattern.block for pattern in pruned.values()})
        have = f"blocks of {', '.join(map(str, seen))} rows" if seen else "no zero blocks at all"
        raise ValueError(f"--bsr {block}: no layer has zero blocks of {block} rows; the weights have {have}")
