"""The weight of one layer that gives the outputs asked for, from what the layer reads: least squares under a mask.

With the columns x (p,) that a layer reads at a position, the outputs y (O,) that it should give there, and the dense
weight W0 (O, p):

    H = cov(x, x) + ridge * I,    C = cov(y, x) + ridge * W0,    loss(W) = tr(G (W H W' - 2 W C')) + constant

G (O, O) says what errors of the outputs cost: the Fisher information of the dense network at these outputs (Martens and
Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015), or a diagonal. Which blocks
go is chosen by Optimal Brain Surgeon (Hassibi and Stork, "Second order derivatives for network pruning", 1993; for a
layer's output and many weights: Frantar and Alistarh, "Optimal Brain Compression", 2022). The rows of a 1xN block share
their mask, and with it one inverse of H.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGE = 0.01  # of the mean diagonal of H; between 0.001 and 0.1 accuracy hardly depends on it
ROUNDING = 1e-4  # of an input's squared mean: a variance that is smaller is what float32 leaves of a constant input
MIX = 0.5  # the share of the identity that is added to G, so that no error is free
STEPS = 40  # of conjugate gradients
SHARE = 16  # a round of the elimination removes this part of the blocks that are left
MARGIN = 0.25  # how much more than the asked rate of its blocks N rows may lose, where others lose less
BYTES = 2**28  # that copies of the inverse may take together
OWN_INVERSE = 2e11  # multiply-adds up to which every N rows of a layer have an inverse of their own
ROUNDS = 8  # of removing blocks where they share one
EXACT = 1024  # columns up to which is computed in float64


@dataclass
class Moments:
    """What a layer reads and should give, summed over positions; G groups of channels, 1 where all are connected.

    Attributes:
        xx: (G, p, p), yx: (G, O / G, p), yy: (G, O / G): sums of products.
        x: (G, p), y: (G, O / G): sums.
        count: how many positions.
    """

    xx: Tensor
    yx: Tensor
    yy: Tensor
    x: Tensor
    y: Tensor
    count: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor, squares: bool = True) -> "Moments":
        """Those of some positions: x (G, positions, p), y (G, positions, O / G); without `squares` xx is zero."""
        xx = x.mT @ x if squares else x.new_zeros(())
        sums = (xx, y.mT @ x, y.square().sum(1), x.sum(1), y.sum(1))
        return cls(*(value.double() for value in sums), x.shape[1])

    def plus(self, other: "Moments") -> "Moments":
        return Moments(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def means(self, centred: bool) -> "Moments":
        """Means of products minus the products of means if `centred`: covariances."""
        xx, yx, yy, x, y = (getattr(self, name) / self.count for name in ("xx", "yx", "yy", "x", "y"))
        if centred:  # something behind the layer adds the mean of the error: a batch norm, or its own bias
            xx, yx, yy = xx - x[:, :, None] * x[:, None], yx - y[:, :, None] * x[:, None], yy - y.square()
            varies = xx.diagonal(dim1=1, dim2=2) > ROUNDING * x.square()
            xx, yx = xx * varies[:, :, None] * varies[:, None], yx * varies[:, None]
        return Moments(xx, yx, yy, x, y, 1)

    def error(self, weight: Tensor) -> float:
        """What `weight` (O, p) leaves of the outputs' variance, 0 to 1 for a fit: the relative error of the layer."""
        W = weight.double().view(self.yx.shape)
        left = self.yy.sum() - 2 * (W * self.yx).sum() + (W * (W @ self.xx)).sum()
        return float(left / self.yy.sum().clamp_min(1e-30))

    def split(self) -> list["Moments"]:
        """Those of each group of channels."""
        values = (self.xx, self.yx, self.yy, self.x, self.y)
        return [Moments(*parts, self.count) for parts in zip(*(value.split(1) for value in values), strict=True)]


class Problem:
    """The least squares of one layer whose channels are all connected.

    Args:
        moments: means, as `Moments.means` gives them.
        weight: (O, p), the dense one.
        cost: G (O, O), or its diagonal (O,).
    """

    def __init__(self, moments: Moments, weight: Tensor, cost: Tensor):
        self.moments, self.exact = moments, weight.shape[1] <= EXACT
        kind = torch.float64 if self.exact else torch.float32
        H, C, self.dense = moments.xx[0], moments.yx[0], weight.double()
        ridge = RIDGE * H.diagonal().mean() + 1e-12
        self.H = (H + ridge * torch.eye(len(H), dtype=H.dtype, device=H.device)).to(kind)
        self.C = (C + ridge * self.dense).to(kind)
        self.dense, self.cost = self.dense.to(kind), (cost.diagonal() if cost.dim() > 1 else cost).to(kind)
        self.coupling = None
        if cost.dim() > 1:
            identity = torch.eye(len(cost), dtype=kind, device=cost.device)
            self.coupling = (1 - MIX) * cost.to(kind) / self.cost.mean() + MIX * identity

    def loss(self, weight: Tensor) -> float:
        """tr(G (W H W' - 2 W C')) of `weight` (O, p), with the diagonal of G alone where rows are not coupled."""
        W, G = weight.to(self.H), torch.diag(self.cost) if self.coupling is None else self.coupling
        return float((W * (G @ (W @ self.H - 2 * self.C))).sum())

    def prices(self, N: int, size: int, rate: float, order: Tensor) -> Tensor:
        """What it costs to remove each block at its turn, (groups of N rows, blocks); of those that stay, infinity.

        Every N rows lose their cheapest blocks first, and the rest of their weights makes up for it before the next
        ones are chosen. Prices never fall in that order, so that one sort merges all rows of a layer.

        Args:
            N: rows of a block; the last rows may be fewer.
            size: columns of a block, next to each other.
            rate: the share of blocks that is to go, over all rows.
            order: (O,): the rows that form blocks, one after another.
        """
        (O, p), groups = self.dense.shape, -(-len(self.dense) // N)
        blocks = p // size
        gone = min(blocks - 1, round(blocks * min(0.95, rate + MARGIN)))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.H))
        C = F.pad((self.C * self.cost.sqrt()[:, None])[order], (0, 0, 0, groups * N - O))
        W = (C @ inverse).view(groups, N, p).float()
        if groups * p**3 <= OWN_INVERSE:
            parts = W.split(max(1, BYTES // (4 * p**2)))
            return torch.cat([_eliminate(inverse.float(), part, size, gone) for part in parts])
        return _share(inverse.float(), W, self.H, C, size, gone)

    def refit(self, mask: Tensor) -> Tensor:
        """The weight (O, p) of least loss that is zero where `mask` (O, p) is.

        Rows of the same support share a factorisation. Where G couples rows, conjugate gradients go on from there.
        """
        W = torch.zeros_like(self.dense)
        supports, which = mask.unique(dim=0, return_inverse=True)
        for number, support in enumerate(supports):
            kept, rows = support.nonzero().flatten(), (which == number).nonzero().flatten()
            if len(kept):
                factor = torch.linalg.cholesky(self.H[kept[:, None], kept])
                W[rows[:, None], kept] = torch.cholesky_solve(self.C[rows[:, None], kept].mT, factor).mT
        return W if self.coupling is None else _descend(W, mask, self.H, self.C, self.coupling, STEPS)


def least_squares(means: Moments, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weight (O, p) of least squares, zero where `mask` (O, p) is; with groups of channels, each by itself."""
    G, p = means.x.shape
    if mask is not None:
        parts = zip(means.split(), weight.chunk(G), mask.chunk(G), strict=True)
        return torch.cat([Problem(of, rows, torch.ones_like(rows[:, 0])).refit(kept) for of, rows, kept in parts])
    ridge = RIDGE * means.xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
    H = means.xx + ridge * torch.eye(p, dtype=means.xx.dtype, device=weight.device)
    C = means.yx + ridge * weight.double().view(G, -1, p)
    return torch.linalg.solve(H, C.mT).mT.reshape(-1, p)


def _share(inverse: Tensor, W: Tensor, H: Tensor, C: Tensor, size: int, gone: int) -> Tensor:
    """The prices of `Problem.prices` where all rows share one inverse: only weights are fitted anew after a round."""
    (groups, N, p), worst = W.shape, W.new_zeros(len(W), 1)
    price = torch.full((groups, p // size), torch.inf, device=W.device)
    diagonal = _diagonal_blocks(inverse[None], size)
    for number in range(ROUNDS):
        count = gone * (number + 1) // ROUNDS - gone * number // ROUNDS
        if not count:
            continue
        least, chosen = _costs(W, diagonal, size).masked_fill(price < torch.inf, torch.inf).topk(count, largest=False)
        least = torch.maximum(worst, least)
        worst = least[:, -1:]
        price.scatter_(1, chosen, least)
        mask = (price == torch.inf).repeat_interleave(size, 1).repeat_interleave(N, 0)
        W = _descend(W.view(-1, p).to(H) * mask, mask, H, C, None, 8).float().view(groups, N, p)
    return price


def _descend(W: Tensor, mask: Tensor, H: Tensor, C: Tensor, G: Tensor | None, steps: int) -> Tensor:
    """`W` (O, p) after conjugate gradients on its support, scaled by the diagonal; G None stands for the identity."""

    def coupled(rows: Tensor) -> Tensor:
        return rows if G is None else G @ rows

    scale = mask / H.diagonal() if G is None else mask / (G.diagonal()[:, None] * H.diagonal())
    rest = mask * coupled(C - W @ H)
    scaled = scale * rest
    direction, length = scaled, (rest * scaled).sum()
    for _ in range(steps):
        curved = mask * coupled(direction @ H)
        along = (direction * curved).sum()
        if not along > 0:  # solved
            break
        step = length / along
        W, rest = W + step * direction, rest - step * curved
        scaled = scale * rest
        before, length = length, (rest * scaled).sum()
        direction = scaled + length / before * direction
    return W


def _eliminate(inverse: Tensor, W: Tensor, size: int, gone: int) -> Tensor:
    """The prices of `Problem.prices`, where each of W (groups, N, p) has its own copy of the inverse of H (p, p)."""
    groups, N, p = W.shape
    price = torch.full((groups, p // size), torch.inf, device=W.device)
    H, worst = inverse.expand(groups, p, p).clone(), W.new_zeros(groups, 1)
    alive = torch.arange(p // size, device=W.device).expand(groups, -1)  # the numbers of the blocks that are left
    within = torch.arange(size, device=W.device)
    while gone:
        left = alive.shape[1]
        count = min(max(1, left // SHARE), gone)
        least, chosen = _costs(W, _diagonal_blocks(H, size), size).topk(count, largest=False)  # ascending
        least = torch.maximum(worst, least)
        worst, gone = least[:, -1:], gone - count
        price.scatter_(1, alive.gather(1, chosen), least)
        stays = torch.ones(groups, left, dtype=torch.bool, device=W.device).scatter_(1, chosen, False)
        alive = alive[stays].view(groups, -1)
        stays = stays.nonzero()[:, 1].view(groups, -1)
        cut, rest = ((b[:, :, None] * size + within).flatten(1) for b in (chosen, stays))
        # What is left of H and W once the columns `cut` are eliminated: the dead are not carried on.
        rows = H.gather(1, rest[:, :, None].expand(-1, -1, H.shape[2]))
        crossed = H.gather(1, cut[:, :, None].expand(-1, -1, H.shape[2]))
        square = crossed.gather(2, cut[:, None].expand(-1, cut.shape[1], -1))
        crossed = crossed.gather(2, rest[:, None].expand(-1, cut.shape[1], -1))
        gain = torch.linalg.solve(square, crossed)  # (groups, cut, rest)
        H = rows.gather(2, rest[:, None].expand(-1, rest.shape[1], -1)).baddbmm_(crossed.mT, gain, alpha=-1)
        lost = W.gather(2, cut[:, None].expand(-1, N, -1))
        W = W.gather(2, rest[:, None].expand(-1, N, -1)).baddbmm_(lost, gain, alpha=-1)
    return price


def _diagonal_blocks(H: Tensor, size: int) -> Tensor:
    """(groups, blocks, size, size) of H (groups, p, p)."""
    blocks = H.shape[1] // size
    return H.view(-1, blocks, size, blocks, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _costs(W: Tensor, diagonal: Tensor, size: int) -> Tensor:
    """(groups, blocks): w_b' (H^-1_bb)^-1 w_b, summed over the rows of W (groups, N, p)."""
    w = W.unflatten(2, (-1, size)).permute(0, 2, 3, 1)  # (groups, blocks, size, N)
    solved = w / diagonal if size == 1 else torch.linalg.solve(diagonal, w)
    return (w * solved).sum((2, 3))
