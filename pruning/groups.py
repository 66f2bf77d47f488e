"""Which weights share a fate: patterns, the mean of what their groups hold, and masks from what is decided of groups.

A weight (O, I, kh, kw) is seen as (output channel, input channel, position). Groups are made by averaging over some of
these axes, and over N consecutive output channels; no number is kept for each weight.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """What lives and dies together.

    Attributes:
        label: for reports; `{N}` in it is the block length.
        dims: the axes of (O, I, position) over which all weights share a fate.
        N: consecutive output channels that share it, too. The last group of rows is shorter where N does not divide O.
        wrapped: where N does not divide O, blocks run on into the next input channel, as the published 1xN code has
            it. N must divide O * I then.
    """

    label: str
    dims: tuple[int, ...]
    N: int = 1
    wrapped: bool = False

    def __str__(self) -> str:
        return self.label.format(N=self.N)

    def of(self, N: int, wrapped: bool = False) -> "Pattern":
        """The pattern with blocks of N rows."""
        return replace(self, N=N, wrapped=wrapped)


WEIGHTS = Pattern("weights", ())
KERNELS = Pattern("kernels", (2,))
BLOCKS = Pattern("1x{N} blocks", (2,))
FILTERS = Pattern("filters", (1, 2))
CHANNELS = Pattern("input channels", (0, 2))


def group_means(values: Tensor, pattern: Pattern) -> Tensor:
    """The mean of `values` (O, I, ...) over every group, shape (groups,).

    Groups stand in the order in which equal ones are ranked: kernels and blocks input channel first, as published,
    filters and channels by number, single weights as they lie in memory.
    """
    if not pattern.dims:
        return values.permute(_memory_order(values)).flatten()
    members = math.prod(_cells(values, pattern).shape[dim] for dim in pattern.dims) * pattern.N
    means = _sums(values, pattern) / members
    if short := _cells(values, pattern).shape[0] % pattern.N:
        means[-1] *= pattern.N / short
    return means.transpose(0, 1).flatten()


def group_sizes(weight: Tensor, pattern: Pattern) -> Tensor:
    """How many weights of `weight` (O, I, ...) every group has, float64 (groups,), in the order of `group_means`."""
    ones = torch.ones_like(weight, dtype=torch.float64)
    return _sums(ones, pattern).transpose(0, 1).flatten() if pattern.dims else ones.flatten()


def spread(flags: Tensor, pattern: Pattern, like: Tensor) -> Tensor:
    """What is decided of every group (groups,), for every weight: a tensor of the shape of `like` (O, I, ...)."""
    if not pattern.dims:
        order = _memory_order(like)
        placed = flags.view([like.shape[dim] for dim in order])
        return placed.permute([order.index(dim) for dim in range(like.dim())])
    O, I, positions = cells = _cells(like, pattern).shape
    kept = [1 if dim in pattern.dims else size for dim, size in enumerate(cells)]
    kept[0] = -(-kept[0] // pattern.N)
    rows = flags.view(kept[1], kept[0], kept[2]).transpose(0, 1)
    if pattern.N > 1:
        rows = rows.repeat_interleave(pattern.N, 0, output_size=kept[0] * pattern.N)[:O]
    rows = rows.expand(O, I, positions)
    if pattern.wrapped:
        rows = rows.view(like.shape[1], like.shape[0], positions).transpose(0, 1)
    return rows.reshape(like.shape)


def living_kernels(weight: Tensor) -> Tensor:
    """(O, I) bool: which kernels of `weight` (O, I, ...) have a nonzero entry."""
    return (weight.detach().reshape(*weight.shape[:2], -1) != 0).any(2)


def blocks_intact(weight: Tensor, N: int) -> bool:
    """Is every aligned 1xN block of `weight` (O, I, ...) wholly zero or free of dead kernels?"""
    share = group_means(living_kernels(weight).double(), BLOCKS.of(N))
    return bool(((share < 1e-6) | (share > 1 - 1e-6)).all())


def _sums(values: Tensor, pattern: Pattern) -> Tensor:
    """The sum over every group: (groups of rows, I or 1, positions or 1)."""
    cells = _cells(values, pattern)
    sums = cells.sum(pattern.dims, keepdim=True)
    if pattern.N > 1:
        sums = F.pad(sums, (0, 0, 0, 0, 0, -len(cells) % pattern.N)).unflatten(0, (-1, pattern.N)).sum(1)
    return sums


def _cells(values: Tensor, pattern: Pattern) -> Tensor:
    """`values` as (output, input, position); wrapped blocks run down the columns of one tall input channel."""
    cells = values.reshape(*values.shape[:2], -1)
    return cells.transpose(0, 1).reshape(-1, 1, cells.shape[2]) if pattern.wrapped else cells


def _memory_order(values: Tensor) -> list[int]:
    """The axes from the slowest to the fastest in memory: flattened in this order, channels_last needs no copy."""
    return sorted(range(values.dim()), key=values.stride, reverse=True)
