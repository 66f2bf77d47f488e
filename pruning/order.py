"""In which order filters form blocks: sorted by L1 norm, as published, or clustered so that more weight is kept; and
orders that make like filters neighbours, so that blocks or stripes become rows of memory."""

import numpy as np
import torch
from torch import Tensor

from pruning.budget import cut
from pruning.groups import Pattern, group_means, living_kernels, spread


def filter_order(weight: Tensor) -> Tensor:
    """Filters (O, ...) by ascending L1 norm, summed in float64: the published order of blocks. Ties keep theirs."""
    return weight.detach().double().abs().flatten(1).sum(1).argsort(stable=True)


def clustered_order(scores: Tensor, pattern: Pattern, rate: float, rounds: int = 10) -> Tensor:
    """An order of filters in which 1xN blocks keep more of the score than in ascending order, never less.

    Two steps in turn, neither of which can lose kept score: choose the blocks that stay, given who shares a block; then
    deal filters to blocks so that the kernels they lose are least, given which blocks stay (an assignment problem).

    Args:
        scores: (O, I, kh, kw), of every weight.
        pattern: 1xN blocks.
        rate: share of blocks that goes.
    """
    from scipy.optimize import linear_sum_assignment

    kernels = scores.reshape(*scores.shape[:2], -1).sum(2).cpu()  # (O, I)
    order, best = kernels.sum(1).argsort(stable=True), -1.0
    for _ in range(rounds):
        means = group_means(kernels[order], pattern)
        gone = spread(cut([means], int(len(means) * rate))[0], pattern, kernels)
        kept = torch.empty_like(kernels)
        kept[order] = (~gone).double()  # (O, I), of filters where they are stored
        total = float((kept * kernels).sum())
        if total <= best * (1 + 1e-9):
            break
        best, found = total, order
        gain = kernels @ kept[order].T  # (O, O): the score that a filter would keep at a place
        if len(gain) > pattern.N:
            filters, places = linear_sum_assignment(gain.numpy(), maximize=True)
            order = torch.from_numpy(filters[np.argsort(places)])
    return found.to(scores.device)


def gathering_order(weight: Tensor, N: int) -> Tensor:
    """An order of filters in which those with the same living kernels are neighbours: scattered blocks become rows.

    The order of first appearance is kept; sets whose size N does not divide come last, so that they misalign no other.
    """
    _, pattern = living_kernels(weight).unique(dim=0, return_inverse=True)
    size = pattern.bincount()
    places = torch.arange(len(pattern), device=pattern.device)
    first = torch.full_like(size, len(pattern)).scatter_reduce(0, pattern, places, "amin")
    late = (size % N != 0).long()
    return ((late * len(pattern) + first)[pattern]).argsort(stable=True)


def order_by_shape(weight: Tensor) -> Tensor:
    """An order of filters (O, I, kh, kw) in which neighbours keep the same stripes, as far as possible.

    Filters are paired so that the stripes that either keeps are few, the largest first; pairs are paired the same way,
    and so on: any 2, 4, 8, ... rows that a block may span share what they do not keep.
    """
    shapes = (weight.detach() != 0).any(1).flatten(1).cpu().numpy()  # (O, positions)
    groups, rest = [[o] for o in range(len(shapes))], []
    while len(groups) > 1:
        pairs, unions, free = [], [], np.ones(len(groups), bool)
        for first in np.argsort(-shapes.sum(1), kind="stable"):
            if not free[first]:
                continue
            free[first] = False
            if not free.any():  # shorter than its neighbours: it goes behind them, to misalign none
                rest = groups[first] + rest
                continue
            partner = np.where(free, (shapes[first] | shapes).sum(1), np.inf).argmin()
            free[partner] = False
            pairs.append(groups[first] + groups[partner])
            unions.append(shapes[first] | shapes[partner])
        groups, shapes = pairs, np.array(unions)
    return torch.tensor([*groups[0], *rest])
