"""How much goes, and where: one cut through a ranking of groups, the rate of every layer, and when it is reached."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import Tensor

SCHEDULES = {
    "oneshot": lambda t: 1.0,
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,  # Zhu & Gupta 2017, equation 1, from zero
}
Costs = list[Tensor] | Callable[[Tensor], Tensor]


@torch.no_grad()
def cut(
    scores: list[Tensor],
    goal: float,
    costs: Costs | None = None,
    least: int | Sequence[int] = 0,
    looked_at: int | None = None,
) -> list[Tensor]:
    """Which groups go: those of the lowest scores, ranked over all layers together, until the goal is spent.

    Of equal scores the first goes first. Nothing here waits for a GPU, unless `costs` does.

    Args:
        scores: (groups,) of each layer.
        goal: the sum of costs that may go. Without costs, the number of groups: one selection, linear in their number.
        costs: (groups,) of each layer; or, where costs depend on what has gone already, a function from the ranking
            (numbers of groups, those of the first layer first) to the sum that is spent before each of its groups, so
            that the last one may exceed the goal.
        least: how many groups of the highest scores stay, in all layers or for each. They are passed over.
        looked_at: how many groups of the ranking are looked at, those passed over included; by default all.

    Returns:
        bool (groups,) for each layer: True where a group goes.
    """
    sizes, together = [len(score) for score in scores], torch.cat(scores)
    stays = _highest(together, sizes, [least] * len(sizes) if isinstance(least, int) else least)
    if costs is None:
        goes = lowest(together if stays is None else together.masked_fill(stays, torch.inf), int(goal))
    else:
        order = together.argsort(stable=True)
        if callable(costs):
            spent = costs(order)
        else:
            cost = torch.cat(costs)
            spent = (cost if stays is None else cost.masked_fill(stays, 0))[order].cumsum(0)
        goes = torch.zeros_like(together, dtype=torch.bool)
        goes[order[:looked_at]] = (spent <= goal)[:looked_at]
    return list((goes if stays is None else goes & ~stays).split(sizes))


def lowest(scores: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` lowest of `scores` (n,); of equal ones the first.

    At the size of ResNet-50 one selection is seven to ten times faster than sorting. On CUDA `kthvalue` of so many is
    slow, since a single block of threads computes it; `topk` is not.
    """
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.is_cuda:
        threshold = scores.topk(count, largest=False, sorted=False).values.max()
    else:
        threshold = scores.kthvalue(count).values
        goes = scores <= threshold
        if int(goes.sum()) == count:  # no equal ones are left over; a GPU is not asked, since that would make it wait
            return goes
    below, equal = scores < threshold, scores == threshold
    return below | (equal & (equal.cumsum(0, dtype=torch.int32) <= count - below.sum()))


def _highest(together: Tensor, sizes: list[int], least: Sequence[int]) -> Tensor | None:
    """Bool mask of the `least` highest of every layer's scores, which stand one layer after another; None if none."""
    if not any(least):
        return None
    owner, place = _layout(tuple(sizes), tuple(least), together.device)
    order = together.argsort(stable=True)
    by_layer = order[owner[order].argsort(stable=True)]  # numbers of groups, by layer, and by score within
    return torch.zeros_like(together, dtype=torch.bool).scatter_(0, by_layer, place)


@lru_cache(maxsize=8)  # made once, since a GPU would wait for what comes from the host
def _layout(sizes: tuple[int, ...], least: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of groups that stand one layer after another: each one's layer, and whether it is among its layer's last."""
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    place = torch.cat([torch.arange(size, 0, -1) <= count for size, count in zip(sizes, least, strict=True)])
    return owner.to(device), place.to(device)


def layer_rates(names: list[str], target: float, exempt: set[str], table: dict[str, float]) -> dict[str, float]:
    """The rate of every layer: of the first pattern in `table` that its name matches, else `target`, or 0 if exempt.

    Raises:
        ValueError: a pattern matches no layer, or a rate is none.
    """
    for pattern, rate in table.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--rates: {pattern!r} matches no layer; layers are {', '.join(names[:6])}, ...")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ValueError(f"--rates: {pattern}: {rate!r} is not a rate in [0, 1)")

    def of(name: str) -> float:
        matched = next((rate for pattern, rate in table.items() if fnmatchcase(name, pattern)), None)
        return (0.0 if name in exempt else target) if matched is None else float(matched)

    return {name: of(name) for name in names}


def global_counts(scores: list[Tensor], sizes: list[Tensor], target: float, cap: float) -> list[int]:
    """One ranking over all layers: how many groups of each layer go so that `target` of all weights go.

    Args:
        scores: of the groups of each layer. They are compared relative to the layer's own mean, so that layers of small
            weights are not emptied first.
        sizes: weights in each group.
        cap: no layer loses more than this share of its groups.

    Raises:
        ValueError: the target lies beyond what the cap allows.
    """
    relative = [score / ((score * size).sum() / size.sum()) for score, size in zip(scores, sizes, strict=True)]
    least = [len(score) - int(len(score) * cap) for score in scores]
    wanted = int(target * sum(int(size.sum()) for size in sizes))
    most = cut(relative, torch.inf, sizes, least)
    if sum(int(size[goes].sum()) for size, goes in zip(sizes, most, strict=True)) < wanted:
        raise ValueError(f"--max_rate {cap}: too low for --pr_target {target}")
    return [int(goes.sum()) for goes in cut(relative, wanted, sizes, least)]
