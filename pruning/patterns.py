"""Which weights share a fate, and which groups go: masks by arithmetic alone, no network in sight.

A pattern numbers every weight with the group that it lives and dies in. A score sums over groups. The smallest groups
go; of equal ones, those with the lower number. That is all there is to one-shot pruning; everything else is a choice of
numbering, score and rate.
"""

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]  # (O, I, kh, kw)


def weight_groups(shape: Shape) -> Tensor:
    """Every weight for itself. Returns int64 group numbers of `shape`."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def filter_groups(shape: Shape) -> Tensor:
    """All weights of an output channel together."""
    return torch.arange(shape[0]).view(-1, 1, 1, 1).expand(shape)


def block_groups(shape: Shape, N: int, blocks: str) -> Tensor:
    """1xN blocks: N consecutive output kernels that share an input channel (1xN pruning, section 3.1).

    Groups are numbered input channel first, as published. Where N does not divide O, `blocks="aligned"` ends each
    input channel's column with a shorter block; `blocks="reference"` runs on into the next column, as the published
    code does.
    """
    O, I = shape[:2]
    if blocks == "reference":
        groups = torch.arange(O * I).div(N, rounding_mode="floor").view(I, O).T
    else:
        groups = torch.arange(I) * -(-O // N) + torch.arange(O).div(N, rounding_mode="floor").view(-1, 1)
    return groups.reshape(O, I, 1, 1).expand(shape)


def in_order(groups: Tensor, order: Tensor) -> Tensor:
    """The numbering of filters that stand in `order`, brought back to where they are stored."""
    return groups[order.argsort()]


def magnitude(weight: Tensor, groups: Tensor) -> Tensor:
    """Mean |w| of each group (float64: sums of float32 must not depend on their order). Shape (number of groups,)."""
    numbers, sizes = groups.flatten(), groups.flatten().bincount()
    return numbers.bincount(weight.detach().abs().flatten().double(), len(sizes)) / sizes


def smallest(score: Tensor, count: int, columns: int = 1) -> Tensor:
    """Numbers of the `count` groups of least `score`; of equal ones the first.

    With `columns` > 1 the numbering runs through that many groups of rows for each input channel, and every group of
    rows loses equally many blocks, so that no thread gets more work than another (SUBP, NeurIPS 2023).
    """
    order = score.view(-1, columns).argsort(dim=0, stable=True)[: count // columns]
    return (order * columns + torch.arange(columns)).flatten()


def mask_without(groups: Tensor, pruned: Tensor) -> Tensor:
    """Float mask of the shape of `groups`: 0 for members of a pruned group, 1 for all others."""
    keep = torch.ones(int(groups.max()) + 1)
    keep[pruned] = 0
    return keep[groups]


def living_kernels(weight: Tensor) -> Tensor:
    """(O, I) bool: which kernels of `weight` (O, I, ...) have a nonzero entry."""
    weight = weight.detach()
    return (weight.flatten(2) != 0).any(2) if weight.dim() > 2 else weight != 0


def blocks_intact(weight: Tensor, N: int) -> bool:
    """Is every aligned 1xN block of `weight` (O, I, ...) wholly zero or free of dead kernels?"""
    alive = living_kernels(weight)
    groups = block_groups((*alive.shape, 1, 1), N, "aligned")[:, :, 0, 0].flatten()
    size = groups.bincount()
    living = groups[alive.flatten()].bincount(minlength=len(size))
    return bool(((living == 0) | (living == size)).all())


def gathering_order(weight: Tensor, N: int) -> Tensor:
    """An order of filters in which those with the same living kernels are neighbours: scattered blocks become rows.

    The order of first appearance is kept; sets whose size N does not divide come last, so that they misalign no other.
    """
    _, pattern = living_kernels(weight).unique(dim=0, return_inverse=True)
    size = pattern.bincount()
    first = torch.full_like(size, len(pattern)).scatter_reduce(0, pattern, torch.arange(len(pattern)), "amin")
    late = (size % N != 0).long()
    return ((late * len(pattern) + first)[pattern]).argsort(stable=True)
