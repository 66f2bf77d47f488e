"""How many channels may go: multiply-adds of a network for any widths, and ResRep's choice of channels by them."""

import numpy as np
import torch
from torch import Tensor, nn

from pruning.budget import cut
from utils.count import count
from utils.published import COUNTED_MACS


class Costs:
    """Multiply-adds of a network, for any widths of its targets.

    Args:
        targets: channels that go together (`resrep.Target`).
        image: (1, 3, H, W), of the size that counts.
        round_to: widths are rounded up to multiples of it.
        published: count as the published code does (`COUNTED_MACS`).

    Attributes:
        dense: the width of every target in the dense network, and `total` what that costs.
    """

    def __init__(self, network: nn.Module, targets: list, image: Tensor, round_to: int = 1, published: bool = False):
        counted = COUNTED_MACS.get(getattr(network, "arch", None)) if published else None
        widths = [len(network.get_submodule(target.name).weight) for target in targets]  # it may be narrower already
        outputs, inputs = {}, {}  # layer -> the targets whose channels it writes, or reads, as often as it does
        for number, target in enumerate(targets):
            for name in (*target.space.producers, *target.space.carriers):
                outputs.setdefault(name, []).append(number)
            for name in target.space.consumers:
                inputs.setdefault(name, []).append(number)
        self.dense = [target.space.channels for target in targets]
        self.round_to, fixed = round_to, len(targets)
        units, self.outputs, self.inputs = [], [], []
        for name, cost in count(network, image).items():
            if name.endswith(".compactor"):  # it will be merged
                continue
            O, I = network.get_submodule(name).weight.shape[:2]
            per_channel, rows = _shares(outputs.get(name, []), O, widths, fixed)
            per_input, columns = _shares(inputs.get(name, []), I, widths, fixed)
            unit = cost.macs // (per_channel * per_input) * (counted(name) if counted else 1)
            for output, times in rows.items():
                for input, more in columns.items():
                    units.append(unit * times * more)
                    self.outputs.append(output)
                    self.inputs.append(input)
        self.units = np.array(units)
        self.total = self(self.dense)

    def __call__(self, widths) -> np.ndarray:
        """Multiply-adds for widths (..., targets): int64 (...)."""
        rounded = rounded_up(np.asarray(widths), self.round_to, np.array(self.dense))
        rounded = np.concatenate([rounded, np.ones((*rounded.shape[:-1], 1), np.int64)], -1)
        return (self.units * rounded[..., self.outputs] * rounded[..., self.inputs]).sum(-1)

    def share(self, widths) -> float:
        return self(widths) / self.total


def _shares(places: list[int], channels: int, widths: list[int], fixed: int) -> tuple[int, dict[int, int]]:
    """By how many channels a layer's cost is divided, and target -> how often its width counts then.

    Args:
        places: the targets whose channels the layer has, as often as it has them.
        channels: how many the layer has now; a linear layer behind a flatten has several a target's channel.
        widths: of the targets now.
        fixed: stands for channels of no target, whose width counts as 1.
    """
    if not places:
        return 1, {fixed: 1}
    if len(places) == 1 and channels % widths[places[0]] == 0:
        return widths[places[0]], {places[0]: 1}
    others = channels - sum(widths[place] for place in places)
    shares = {place: places.count(place) for place in places}
    return channels, shares | ({fixed: others} if others else {})


def rounded_up(width, multiple: int, most):
    """The next multiple, but no more than `most`; numbers or arrays."""
    return np.minimum(-(-width // multiple) * multiple, most)


def select(
    norms: list[Tensor],
    masked: list[int],
    costs: Costs,
    goal: float,
    granularity: int,
    at_least: int,
    published: bool = False,
) -> list[Tensor]:
    """Which channels to forget next: those of the smallest norms until the goal is met, but only a few more than now.

    Every selection starts afresh, so a channel that has grown comes back.

    Args:
        norms: of every target's channels.
        masked: how many channels of every target are forgotten now.
        goal: share of the multiply-adds to keep.
        granularity: how many more channels than now may be looked at, while the goal is not met.
        at_least: a target keeps as many channels. Those passed over for that count as looked at, as published.
        published: where the last one that may be looked at is passed over, the next that may go is taken, as in the
            published code.

    Returns:
        a mask (channels,) for every target: 1 remember, 0 forget.
    """
    dense = np.array([len(norm) for norm in norms])
    owner = np.repeat(np.arange(len(norms)), dense)

    def saved(order: Tensor) -> Tensor:
        """Multiply-adds saved before each group of the ranking is forgotten."""
        looked_at = np.cumsum(owner[order.cpu().numpy()][:, None] == np.arange(len(norms)), 0)
        forgotten = np.minimum(looked_at, np.maximum(dense - at_least, 0))
        before = np.concatenate([np.zeros((1, len(norms)), np.int64), forgotten[:-1]])
        return torch.from_numpy(costs.total - costs(dense - before)).to(order.device)

    enough = costs.total - int(goal * costs.total)  # to save
    limit = sum(masked) + granularity if costs.share(dense - masked) > goal else None
    if limit is not None and published:
        limit = _next_taken(norms, limit - 1, at_least) + 1
    gone = cut(norms, enough - 1, saved, at_least, limit)
    widths = dense - [int(goes.sum()) for goes in gone]
    masks = [1 - goes.to(norm) for goes, norm in zip(gone, norms, strict=True)]
    if costs.share(widths) <= goal:  # what rounding keeps anyway is remembered: the last ones that went
        for norm, mask, most in zip(norms, masks, dense - rounded_up(widths, costs.round_to, dense), strict=True):
            ranking = norm.argsort(stable=True)
            forgotten = ranking[mask[ranking] == 0]
            mask[forgotten[most:]] = 1
    return masks


def _next_taken(norms: list[Tensor], start: int, at_least: int) -> int:
    """The place in the ranking, `start` or later, of the first channel that is not one of its target's last."""
    dense = [len(norm) for norm in norms]
    owner = np.repeat(np.arange(len(norms)), dense)[torch.cat(norms).argsort(stable=True).cpu().numpy()]
    seen = np.zeros(len(norms), np.int64)
    for place, target in enumerate(owner):
        seen[target] += 1
        if place >= start and seen[target] <= dense[target] - at_least:
            return place
    return len(owner)
