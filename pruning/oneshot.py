"""Pruning by a score or by chance under fixed patterns: the 1xN family and its baselines, as rows of one table.

1xN blocks: Lin et al., "1xN Pattern for Pruning Convolutional Neural Networks" (TPAMI 2022).
"""

from dataclasses import dataclass, fields
from math import gcd
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from pruning import budget
from pruning.groups import BLOCKS, FILTERS, KERNELS, WEIGHTS, Pattern, group_means, group_sizes, spread
from pruning.layers import add_mask, check_plain, hold, masked_layers, remove_mask
from pruning.method import Method
from pruning.options import OneShotOptions, RandomOptions
from pruning.order import clustered_order, filter_order
from pruning.reconstruction import Problem
from pruning.repair import Repaired, repair
from pruning.score import NEED_GRADIENTS, Calibration, mean_gradients, score
from structure import Graph
from utils.kept import Kept
from utils.published import REARRANGED
from utils.run import Run

PATTERNS = {
    "block_l1": BLOCKS,
    "block_random": BLOCKS,
    "weight": WEIGHTS,
    "filter": FILTERS,
    "kernel_l1": KERNELS,
    "kernel_random": KERNELS,
}


@dataclass
class Plan:
    """What `attach` decides about a layer; it stands in the layer as `plan`.

    Attributes:
        pattern: what lives and dies together.
        rate: the share of groups that is asked to go, and `goal` their number.
        order: (O,) int64: the filters that form blocks, one after another; None as they are stored.
        chance: (groups,) a random score of every group; None where the weights decide.
        known: of the weight's shape, for scores that need more than the weight: a gradient, or prices.
        kept_l1, note: for the report.
    """

    pattern: Pattern
    rate: float
    goal: int
    order: Tensor | None = None
    chance: Tensor | None = None
    known: Tensor | None = None
    kept_l1: dict[str, float] | None = None
    note: str = ""


class OneShot(Method):
    """Masks chosen at `attach`, or step by step while training, then fine-tuning.

    The method's name says the pattern, and whether a score or chance decides.
    """

    options: OneShotOptions

    def __init__(self, name: str, options: OneShotOptions):
        super().__init__(name, options)
        self.random = isinstance(options, RandomOptions)
        self.pattern = PATTERNS[name]
        self.reference = getattr(options, "blocks", "aligned") == "reference"
        if self.pattern is BLOCKS:
            self.pattern = BLOCKS.of(options.N)
        self.kind = getattr(options, "score", None) or ("l1" if self._no_prices() else "obs")
        if self.kind == "obs" and (reason := self._no_prices()):
            raise ValueError(f"--score obs: {reason}")
        if self.kind in NEED_GRADIENTS and options.schedule != "oneshot":
            raise ValueError(f"--score {self.kind}: chosen once, from calibration pictures, so not with --schedule")
        self.rates = _read_rates(options.rates) if isinstance(options.rates, str | Path) else options.rates or {}

    def __str__(self) -> str:
        known = {"N", "pr_target", "seed"}
        asked = {f.name: getattr(self.options, f.name) for f in fields(self.options)}
        changed = [f"{f.name} {asked[f.name]}" for f in fields(self.options) if asked[f.name] != f.default]
        further = sorted(word for word in changed if word.split()[0] not in known)
        label = f"{'random ' * self.random}{self.pattern}"
        return ", ".join([label, f"pr_target {asked['pr_target']}", *(word.removesuffix(" True") for word in further)])

    def _no_prices(self) -> str:
        """Why `--score obs` cannot serve; nothing if it can."""
        o = self.options
        reasons = {
            "prices are those of a repair, so only with --repair": not o.repair,
            "chosen once, so not with --schedule": o.schedule != "oneshot",
            "blocks that wrap around share no rows, so not with --blocks reference": self.reference,
            "prices of different layers do not compare, so not with --budget global": o.budget == "global",
            "the price of a filter lies in the next layer: l1, l2 or taylor": self.pattern is FILTERS,
            "not for a random choice": self.random,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def check(self, network: nn.Module) -> None:
        graph = Graph(network)
        layers = graph.masked_layers()
        if not layers:
            raise ValueError(f"{type(network).__name__} has no layer to prune")
        check_plain(layers)
        exempt = set() if self.options.full else graph.head
        rates = budget.layer_rates(list(layers), self.options.pr_target, exempt, self.rates)
        if self.options.pr_target and not any(rates.values()):
            raise ValueError(
                f"{type(network).__name__}: no pooling stands behind a layer to prune, so that all {len(layers)} count "
                "as the classifier, which is kept: --full prunes it, too"
            )
        N = self.pattern.N
        if N == 1:
            return
        if max(layer.weight.shape[0] for layer in layers.values()) < N:
            raise ValueError(f"--N {N}: longer than the widest layer of this network")
        for name, layer in layers.items():
            O, I = layer.weight.shape[:2]
            if self.reference and O * I % N:
                raise ValueError(f"--N {N}: does not divide the {O * I} kernels of {name}; try --blocks aligned")

    def attach(self, network: nn.Module, calibration: Calibration | None = None) -> None:
        self.check(network)
        graph = Graph(network)
        layers = graph.masked_layers()
        exempt = set() if self.options.full else graph.head
        rates = budget.layer_rates(list(layers), self.options.pr_target, exempt, self.rates)
        gradients = self._gradients(network, layers, calibration)
        rearranged = rearranged_layers(graph) if getattr(self.options, "rearrange", False) else set()
        generator = torch.Generator().manual_seed(getattr(self.options, "seed", 0))
        for name, layer in layers.items():
            groups = getattr(layer, "groups", 1)
            layer.plan = self._plan(layer.weight, rates[name], gradients.get(name), generator, groups)
            if name in rearranged and rates[name]:
                self._rearrange(layer)
        if self.options.budget == "global":
            self._share_out([layer for name, layer in layers.items() if name not in exempt])
        first = budget.SCHEDULES[self.options.schedule](0.0)
        for layer in layers.values():
            add_mask(layer, self._mask(layer.weight, layer.plan, first))

    def calibrate(self, network: nn.Module, dense: nn.Module, calibration: Calibration) -> Repaired:
        return repair(network, dense, calibration, self.choose if self.kind == "obs" else None)

    def choose(self, layer: nn.Module, problem: Problem) -> Tensor:
        """The mask of a layer by the prices of its groups."""
        plan, weight = layer.plan, layer.weight
        order = torch.arange(len(weight), device=weight.device) if plan.order is None else plan.order
        size = weight[0, 0].numel() if plan.pattern.dims else 1
        prices = problem.prices(plan.pattern.N, size, plan.rate, order).repeat_interleave(plan.pattern.N, 0)
        by_weight = prices[: len(weight), :, None].expand(-1, -1, size)[order.argsort()]
        plan.known = by_weight.reshape(weight.shape)
        layer.mask.copy_(self._mask(weight, plan, 1.0))
        plan.known = None
        return layer.mask

    def after_update(self, run: Run) -> None:
        if self.options.schedule != "oneshot":
            self._grow(run)
        self.settle(run.network)

    def settle(self, network: nn.Module) -> None:
        hold(list(masked_layers(network).values()))

    def _grow(self, run: Run) -> None:
        """Select anew when it is time, until the end. What is pruned stays so, since zeros have the lowest score."""
        every, end = self.options.schedule_every, self.options.schedule_end
        one_step = run.batches_per_step / (len(run.loader) * run.epochs)
        t = min(run.progress / end, 1.0)
        if run.progress + one_step > 1 + 1e-9:  # no step follows, since batches are left over
            t = 1.0
        if run.progress - 2 * one_step >= end or (t < 1 and run.iteration % every):
            return
        share = budget.SCHEDULES[self.options.schedule](t)
        for layer in masked_layers(run.network).values():
            layer.mask.copy_(self._mask(layer.weight, layer.plan, share))

    def finish(self, network: nn.Module) -> dict[str, Kept]:
        kept = {}
        for name, layer in masked_layers(network).items():
            plan, sparsity = layer.plan, 1 - float(layer.mask.double().mean())
            label = f"{'random ' * self.random}{plan.pattern}"
            kept[name] = Kept(label, plan.rate, sparsity, plan.pattern.N, kept_l1=plan.kept_l1 or {}, note=plan.note)
            del layer.plan
            remove_mask(layer)
        return kept

    def _gradients(self, network: nn.Module, layers: dict, calibration: Calibration | None) -> dict[str, Tensor]:
        if self.kind not in NEED_GRADIENTS:
            return {}
        if calibration is None:
            raise ValueError(f"--score {self.kind}: needs calibration pictures")
        return mean_gradients(network, layers, calibration)

    def _plan(
        self, weight: Tensor, rate: float, gradient: Tensor | None, generator: torch.Generator, groups: int = 1
    ) -> Plan:
        O, I = weight.shape[:2]
        N = self.pattern.N if groups == 1 else gcd(self.pattern.N, O // groups)  # no block lies in two groups
        short = O % N
        pattern = self.pattern.of(N, wrapped=self.reference and bool(short))
        count = len(group_means(weight, pattern))
        columns = count // I if getattr(self.options, "balanced", False) else 1
        goal = int(count * rate) if columns == 1 else int(I * rate) * columns
        tail = "blocks wrap around" if self.reference else f"blocks of {short} at the end"
        note = f"{N} does not divide {O}: {tail}" if short else ""
        if N < self.pattern.N:
            note = f"blocks of {N}, since {self.pattern.N} does not divide the {O // groups} filters of a group"
        plan = Plan(pattern, rate, goal, known=gradient, note=note)
        if self.random:
            plan.chance = self._chance(count, goal, generator).to(weight.device)
        return plan

    def _chance(self, count: int, goal: int, generator: torch.Generator) -> Tensor:
        """A random score of every group: the first `goal` of its ranking are the ones to go."""
        if self.reference:  # drawn with replacement, so that 39 % go where 50 % are asked
            scores = torch.ones(count)
            scores[torch.randint(count, (goal,), generator=generator)] = 0
            return scores
        return torch.rand(count, generator=generator)

    def _rearrange(self, layer: nn.Module) -> None:
        """Choose the order in which the filters of a layer form blocks, and note what each order would keep."""
        plan, weight = layer.plan, layer.weight
        size = self._scores(weight, plan)
        orders = {"stored": None, "sort": filter_order(weight)}
        if self.options.rearrange_by == "cluster":
            orders["cluster"] = clustered_order(size, plan.pattern, plan.rate)
        plan.kept_l1 = {}
        for by, plan.order in orders.items():
            kept = (size * self._mask(weight, plan, 1.0).view_as(size)).sum() / size.sum()
            plan.kept_l1[by] = round(float(kept), 4)
        plan.order = orders[self.options.rearrange_by]

    def _share_out(self, layers: list[nn.Module]) -> None:
        """Replace uniform goals by those of one ranking over `layers`."""
        scores = [self._group_scores(layer.weight, layer.plan) for layer in layers]
        sizes = [group_sizes(layer.weight, layer.plan.pattern) for layer in layers]
        goals = budget.global_counts(scores, sizes, self.options.pr_target, self.options.max_rate)
        for layer, goal, size in zip(layers, goals, sizes, strict=True):
            layer.plan.goal, layer.plan.rate = goal, goal / len(size)

    def _scores(self, weight: Tensor, plan: Plan) -> Tensor:
        """Of every weight; by its size until a repair knows prices."""
        return score(weight, plan.known, "l1" if self.kind == "obs" and plan.known is None else self.kind)

    def _group_scores(self, weight: Tensor, plan: Plan) -> Tensor:
        """(groups,) of the filters in their order."""
        values = self._scores(weight, plan)
        return group_means(values if plan.order is None else values[plan.order], plan.pattern)

    def _mask(self, weight: Tensor, plan: Plan, share: float) -> Tensor:
        """Bool mask, of the weight's shape, when `share` of the layer's goal is reached."""
        scores = self._group_scores(weight, plan) if plan.chance is None else plan.chance
        count = int(plan.goal * share)
        if plan.chance is not None and self.reference:
            count = min(count, int((scores == 0).sum()))
        if getattr(self.options, "balanced", False):
            columns = scores.view(weight.shape[1], -1).unbind(1)  # every N rows: their blocks
            goes = torch.stack([budget.cut([column], count // len(columns))[0] for column in columns], 1).flatten()
        else:
            (goes,) = budget.cut([scores], count)
        stays = spread(~goes, plan.pattern, weight)
        return stays if plan.order is None else stays[plan.order.argsort()]


def _read_rates(path: str | Path) -> dict[str, float]:
    try:
        table = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--rates {path}: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        raise ValueError(f"--rates {path}: not a mapping of layer names to rates")
    return {str(pattern): rate for pattern, rate in table.items()}


def rearranged_layers(graph: Graph) -> set[str]:
    """Names of the layers whose filters `--rearrange` reorders.

    For its own five networks the publication decides, by their layers' names. Elsewhere the structure does: a layer is
    reordered if the order of its outputs is free to change, since otherwise its filters could never become neighbours.
    """
    names = list(graph.masked_layers())
    published = REARRANGED.get(getattr(graph.network, "arch", None))
    if published:
        return published(names)
    claimed, chosen = set(), set()
    for name in names:  # a space has one order: the first layer in it decides
        space = graph.output[name]
        if not space.fixed and space not in claimed:
            claimed.add(space)
            chosen.add(name)
    return chosen
