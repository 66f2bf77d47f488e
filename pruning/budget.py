"""How much goes, and where: from one asked rate to a number of groups per layer, and when it is reached."""

from fnmatch import fnmatchcase

import torch
from torch import Tensor

SCHEDULES = {
    "oneshot": lambda t: 1.0,
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,  # Zhu & Gupta 2017, equation 1, from zero
}


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


def global_counts(scores: dict[str, Tensor], sizes: dict[str, Tensor], target: float, cap: float) -> dict[str, int]:
    """One ranking over all layers: how many groups of each layer go so that `target` of all weights go.

    Args:
        scores: layer -> mean |w| of each group. They are compared relative to the layer's own mean, so that layers of
            small weights are not emptied first.
        sizes: layer -> weights in each group.
        cap: no layer loses more than this share of its groups.

    Raises:
        ValueError: the target lies beyond what the cap allows.
    """
    relative, weights, owner = [], [], []
    for number, (name, score) in enumerate(scores.items()):
        eligible = score.argsort(stable=True)[: int(len(score) * cap)]
        mean = (score * sizes[name]).sum() / sizes[name].sum()
        relative.append(score[eligible] / mean)
        weights.append(sizes[name][eligible])
        owner.append(torch.full_like(eligible, number))
    relative, weights, owner = map(torch.cat, (relative, weights, owner))
    wanted = int(target * sum(int(size.sum()) for size in sizes.values()))
    if weights.sum() < wanted:
        raise ValueError(f"--max_rate {cap}: too low for --pr_target {target}")
    order = relative.argsort(stable=True)
    taken = int((weights[order].cumsum(0) <= wanted).sum())
    counts = owner[order[:taken]].bincount(minlength=len(scores))
    return dict(zip(scores, counts.tolist(), strict=True))
