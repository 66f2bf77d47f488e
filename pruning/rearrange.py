"""In which order filters form blocks: sorted by L1 norm, as published, clustered so that more weight is kept, or with
like beside like so that neighbours have the same zeros."""

import numpy as np
import torch
from torch import Tensor

from pruning.patterns import in_order, magnitude, mask_without, smallest


def filter_order(weight: Tensor) -> Tensor:
    """Filters (O, ...) by ascending L1 norm, summed in float64: the published order of blocks. Ties keep theirs."""
    return weight.detach().double().abs().flatten(1).sum(1).argsort(stable=True)


def clustered_order(weight: Tensor, groups: Tensor, N: int, rate: float, rounds: int = 10) -> Tensor:
    """An order of filters in which 1xN blocks keep more of the weight than in `filter_order`, never less.

    Two steps in turn, neither of which can lose kept L1: choose the blocks that stay, given who shares a block; then
    deal filters to blocks so that the kernels they lose are least, given which blocks stay (an assignment problem).

    Args:
        weight: (O, I, kh, kw).
        groups: block numbers of `weight`'s shape, for filters in stored order.
        N: filters a block.
        rate: share of blocks that goes.
    """
    from scipy.optimize import linear_sum_assignment

    kernels = weight.detach().abs().flatten(2).sum(2).double().numpy()  # (O, I)
    order, best = filter_order(weight), -1.0
    for _ in range(rounds):
        placed = in_order(groups, order)
        mask = mask_without(placed, smallest(magnitude(weight, placed), int((int(groups.max()) + 1) * rate)))
        kept = mask.flatten(2)[:, :, 0].double().numpy()  # (O, I) of filters where they are stored
        total = float((kept * kernels).sum())
        if total <= best * (1 + 1e-9):
            break
        best, found = total, order
        slots = kept[order.numpy()]  # (O, I): which input channels the filter standing at a place keeps
        gain = kernels @ slots.T  # (O, O): L1 that a filter would keep at a place
        if len(gain) > N:
            filters, places = linear_sum_assignment(gain, maximize=True)
            order = torch.from_numpy(filters[np.argsort(places)])
    return found


def kept_share(weight: Tensor, mask: Tensor) -> float:
    """Share of a layer's L1 norm that its mask keeps."""
    size = weight.detach().abs()
    return float((size * mask.view_as(size)).sum() / size.sum())


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
