"""Magnitude and random pruning under fixed patterns: the 1xN family and its baselines, as rows of one table.

1xN blocks: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks" (TPAMI 2022).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from pruning import budget, patterns, rearrange
from pruning.layers import add_mask, hold, masked_layers, remove_mask
from pruning.method import Method
from structure import Graph

CHOICES = {
    "blocks": ("aligned", "reference"),
    "budget": ("uniform", "global"),
    "schedule": tuple(budget.SCHEDULES),
    "rearrange_by": ("sort", "cluster"),
}


@dataclass(frozen=True)
class Row:
    """One method: which weights share a fate, and whether chance or magnitude decides."""

    groups: Callable[[patterns.Shape, int, str], Tensor]  # (shape, N, blocks) -> group numbers
    label: str
    random: bool = False
    in_blocks: bool = False  # consecutive filters share a fate, so that rearranging them means something


def _kernels(shape: patterns.Shape, N: int, blocks: str) -> Tensor:
    return patterns.block_groups(shape, 1, blocks)  # a kernel is a block of one


ROWS = {
    "block_l1": Row(patterns.block_groups, "1x{N} blocks", in_blocks=True),
    "block_random": Row(patterns.block_groups, "random 1x{N} blocks", random=True, in_blocks=True),
    "weight": Row(lambda shape, N, blocks: patterns.weight_groups(shape), "weights"),
    "filter": Row(lambda shape, N, blocks: patterns.filter_groups(shape), "filters"),
    "kernel_l1": Row(_kernels, "kernels"),
    "kernel_random": Row(_kernels, "random kernels", random=True),
}


@dataclass
class Plan:
    """What is decided about one layer when the method attaches."""

    groups: Tensor  # group number of every weight, filters in stored order
    goal: int  # groups to prune in the end
    columns: int  # groups of rows that must lose equally many
    chance: Tensor | None  # random score of every group


@dataclass
class OneShot(Method):
    """Masks chosen at `attach`, or step by step while training, then fine-tuning.

    Args:
        row: which method, a key of `ROWS`.
        N: block length.
        pr_target: share of groups to prune in every layer (of all weights, if the budget is global), in [0, 1).
        rearrange: form blocks among filters in an order of their own.
        rearrange_by: "sort" by L1 norm, as published, or "cluster" filters so that more weight is kept.
        full: prune the classifier too.
        blocks: where N does not divide a layer's width, "aligned" ends a column with a shorter block and "reference"
            wraps around; "reference" also draws random blocks with replacement, as published.
        balanced: every N rows lose equally many blocks.
        budget: "uniform", the same rate in every layer, or "global", one ranking over all layers.
        max_rate: of a global budget, the most any layer loses.
        rates: YAML file (or a dict) of layer-name patterns and their rates, instead of pr_target.
        schedule: "oneshot", or "linear" or "cubic" growth of the rate while training.
        schedule_end: the share of training after which the rate has grown to its end.
        schedule_every: updates between two selections.
        seed: of random masks.
    """

    row: str
    N: int = 16
    pr_target: float = 0.5
    rearrange: bool = False
    rearrange_by: str = "sort"
    full: bool = False
    blocks: str = "aligned"
    balanced: bool = False
    budget: str = "uniform"
    max_rate: float = 0.9
    rates: Path | dict | None = None
    schedule: str = "oneshot"
    schedule_end: float = 0.5
    schedule_every: int = 50
    seed: int = 0
    kept: dict[str, dict] = field(default_factory=dict, init=False)
    plans: dict[str, Plan] = field(default_factory=dict, init=False)
    done: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for name in ("pr_target", "max_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: a rate in [0, 1)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)}: one of {', '.join(choices)}")
        if self.N < 1:
            raise ValueError(f"--N {self.N}: a block length of 1 or more")
        if not 0 < self.schedule_end <= 1:
            raise ValueError(f"--schedule_end {self.schedule_end}: a share of training in (0, 1]")
        if self.schedule_every < 1:
            raise ValueError(f"--schedule_every {self.schedule_every}: 1 or more updates")
        for name in ("rearrange", "balanced"):
            if getattr(self, name) and not self._row.in_blocks:
                raise ValueError(f"--{name}: means nothing for {self.row}, only for 1xN blocks")
        if self.blocks == "reference" and (self.balanced or self.rearrange_by != "sort"):
            raise ValueError("--blocks reference: as published, without --balanced and --rearrange_by cluster")
        if self.budget == "global" and (self._row.random or self.rates):
            raise ValueError("--budget global: ranks by magnitude, so not for random methods and not with --rates")
        if self.rates is not None and not isinstance(self.rates, dict):
            self.rates = _read_rates(self.rates)

    def __str__(self) -> str:
        asked = {field.name: (getattr(self, field.name), field.default) for field in fields(self) if field.init}
        further = asked.keys() - {"row", "N", "pr_target", "seed"}
        told = [f"{name} {asked[name][0]}" for name in sorted(further) if asked[name][0] != asked[name][1]]
        label = self._row.label.format(N=self.N)
        return ", ".join([label, f"pr_target {self.pr_target}", *(word.removesuffix(" True") for word in told)])

    def check(self, network: nn.Module) -> None:
        graph = Graph(network)
        layers = graph.masked_layers()
        if not layers:
            raise ValueError(f"{type(network).__name__} has no layer to prune")
        budget.layer_rates(list(layers), self.pr_target, graph.head, self.rates or {})
        if not self._in_blocks_of_several:
            return
        if max(layer.weight.shape[0] for layer in layers.values()) < self.N:
            raise ValueError(f"--N {self.N}: longer than the widest layer of this network")
        for name, layer in layers.items():
            O, I = layer.weight.shape[:2]
            if self.blocks == "reference" and O * I % self.N:
                raise ValueError(f"--N {self.N}: does not divide the {O * I} kernels of {name}; try --blocks aligned")

    def attach(self, network: nn.Module) -> None:
        self.check(network)
        graph = Graph(network)
        layers = graph.masked_layers()
        exempt = set() if self.full else graph.head
        rates = budget.layer_rates(list(layers), self.pr_target, exempt, self.rates or {})
        chosen = rearranged_layers(graph) if self.rearrange else set()
        generator = torch.Generator().manual_seed(self.seed)
        for name, layer in layers.items():
            self._plan(name, layer, rates[name], name in chosen, generator)
        if self.budget == "global":
            self._share_out({name: layer for name, layer in layers.items() if name not in exempt})
        first = budget.SCHEDULES[self.schedule](0.0)
        for name, layer in layers.items():
            add_mask(layer, self._mask(layer.weight.detach().cpu(), self.plans[name], first))

    def after_update(self, run) -> None:
        if self.schedule != "oneshot" and not self.done:
            self._grow(run)
        self.settle(run.network)

    def settle(self, network: nn.Module) -> None:
        hold(list(masked_layers(network).values()))

    def _grow(self, run) -> None:
        """Select anew when it is time; what is pruned stays so, being the smallest of all."""
        t = min(run.progress / self.schedule_end, 1.0)
        if t < 1 and run.iteration % self.schedule_every:
            return
        share = budget.SCHEDULES[self.schedule](t)
        for name, layer in masked_layers(run.network).items():
            layer.mask.copy_(self._mask(layer.weight.detach().cpu(), self.plans[name], share).view_as(layer.mask))
        self.done = t == 1

    def finish(self, network: nn.Module) -> dict[str, dict]:
        for name, layer in masked_layers(network).items():
            self.kept[name]["sparsity"] = 1 - float(layer.mask.double().mean())
            remove_mask(layer)
        return self.kept

    @property
    def _row(self) -> Row:
        return ROWS[self.row]

    @property
    def _in_blocks_of_several(self) -> bool:
        return self._row.in_blocks and self.N > 1

    def _plan(self, name: str, layer: nn.Module, rate: float, rearranged: bool, generator: torch.Generator) -> None:
        weight = layer.weight.detach().cpu()
        weight = weight if weight.dim() == 4 else weight[:, :, None, None]
        O, I = weight.shape[:2]
        groups = self._row.groups(tuple(weight.shape), self.N, self.blocks)
        count = int(groups.max()) + 1
        columns = count // I if self.balanced else 1
        goal = int(count * rate) if columns == 1 else int(I * rate) * columns
        report = self.kept[name] = {"pattern": self._row.label.format(N=self.N), "rate": rate}
        if self._in_blocks_of_several:
            report["N"] = self.N
            if O % self.N:
                report["note"] = _misfit_note(self.N, O, self.blocks)
        chance = self._chance(count, goal, generator) if self._row.random else None
        plan = Plan(groups, goal, columns, chance)
        if rearranged and rate:
            orders = {"stored": torch.arange(O), "sort": rearrange.filter_order(weight)}
            if self.rearrange_by == "cluster":
                orders["cluster"] = rearrange.clustered_order(weight, groups, self.N, rate)
            plans = {by: Plan(patterns.in_order(groups, order), goal, columns, chance) for by, order in orders.items()}
            plan = plans[self.rearrange_by]
            report["kept_l1"] = {
                by: round(rearrange.kept_share(weight, self._mask(weight, p, 1.0)), 4) for by, p in plans.items()
            }
        self.plans[name] = plan

    def _chance(self, count: int, goal: int, generator: torch.Generator) -> Tensor:
        """A random score of every group: the first `goal` of its ranking are the ones to go."""
        if self.blocks == "reference":  # drawn with replacement, so that 39 % go where 50 % are asked
            score = torch.ones(count)
            score[torch.randint(count, (goal,), generator=generator)] = 0
            return score
        return torch.rand(count, generator=generator)

    def _share_out(self, layers: dict[str, nn.Module]) -> None:
        """Replace uniform goals by those of one ranking over `layers`."""
        plans = {name: self.plans[name] for name in layers}
        scores = {name: patterns.magnitude(layers[name].weight.cpu(), plan.groups) for name, plan in plans.items()}
        sizes = {name: plan.groups.flatten().bincount() for name, plan in plans.items()}
        for name, goal in budget.global_counts(scores, sizes, self.pr_target, self.max_rate).items():
            plans[name].goal = goal
            self.kept[name]["rate"] = goal / len(scores[name])

    def _mask(self, weight: Tensor, plan: Plan, share: float) -> Tensor:
        """The mask of a layer when `share` of its goal is reached."""
        score = patterns.magnitude(weight, plan.groups) if plan.chance is None else plan.chance
        count = int(plan.goal * share)
        if plan.chance is not None and self.blocks == "reference":
            count = min(count, int((score == 0).sum()))
        return patterns.mask_without(plan.groups, patterns.smallest(score, count, plan.columns))


def _read_rates(path: Path) -> dict[str, float]:
    try:
        table = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--rates {path}: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        raise ValueError(f"--rates {path}: not a mapping of layer names to rates")
    return {str(pattern): rate for pattern, rate in table.items()}


def _misfit_note(N: int, width: int, blocks: str) -> str:
    tail = f"blocks of {width % N} at the end" if blocks == "aligned" else "blocks wrap around"
    return f"{N} does not divide {width}: {tail}"


def rearranged_layers(graph: Graph) -> set[str]:
    """Names of the layers whose filters `--rearrange` reorders.

    The publication decides by layer names, for its own five networks. Elsewhere the structure decides: a layer is
    reordered if the order of its outputs is free to change, or else its filters could never become neighbours.
    """
    names = list(graph.masked_layers())
    for marker, published in PUBLISHED_REARRANGEMENT.items():
        if marker in names:
            return published(names)
    claimed, chosen = set(), set()
    for name in names:  # a space has one order: the first layer in it decides
        space = graph.output[name]
        if not space.fixed and space not in claimed:
            claimed.add(space)
            chosen.add(name)
    return chosen


def _every_second(names: list[str]) -> set[str]:
    """Plain, sorted, plain, ...: projections stay, expansions are sorted. Squeeze-excite layers do not count."""
    chosen, sort_next = set(), False
    for name in names:
        if sort_next:
            chosen.add(name)
        sort_next = not sort_next and "fc" not in name
    return chosen


# The layer that gives one of the published networks away -> its rule (the fact sheet calls them P and R).
PUBLISHED_REARRANGEMENT: dict[str, Callable[[list[str]], set[str]]] = {
    "features.0.3": set,  # MobileNet-V1: all
    "features.1.conv.3": _every_second,  # V2
    "features.1.conv.3.fc.0": _every_second,  # V3-small
    "features.1.conv.4": _every_second,  # V3-large
    "layer1.0.conv3": lambda names: {name for name in names if not name.endswith("conv3")},  # ResNet-50
}
