"""Stripe-wise pruning: Meng et al., "Pruning Filter in Filter" (NeurIPS 2020).

A stripe is what a filter has at one position of its kernel: the weights of all input channels there. Its scale is
learned with it, under an L1 penalty; a stripe whose scale falls to the threshold goes, as does a filter without any.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pruning.method import Method
from pruning.rearrange import order_by_shape
from structure import Graph, Space, living_channels, permute, remove_branches, slice_channels


class StripeConv2d(nn.Conv2d):
    """`nn.Conv2d` with a parameter `FilterSkeleton` (O, kh, kw), the scales of its filters' stripes."""

    pixels = 0  # of the output, known once a picture has passed

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x, self.weight * self.FilterSkeleton[:, None], self.bias)
        self.pixels = y.shape[2] * y.shape[3]
        return y


@dataclass
class Site:
    """What the structure says about a layer whose stripes may go."""

    norms: list[str]  # batch norms of its filters, where a dead filter can be sliced out
    essential: bool  # no path from picture to logits leads around it: some stripes stay
    source: Space  # of its input channels
    target: Space


@dataclass
class Stripe(Method):
    """Skeletons beside the convolutions, trained with them; what is left at the end has the shapes that they found.

    Every convolution with a batch norm behind it gets a skeleton, but depthwise and grouped ones, whose filters live
    and die with the channels that they read. Where a stripe is a whole filter (1x1) that a residual sum needs, nothing
    could be removed: the skeleton of such a layer is not penalised, as published.

    Args:
        sr: strength of the L1 penalty on skeletons, as published, in their gradient. Without it, the strength adapts:
            every update shrinks all scales by what brings as many stripes as are asked to the threshold in the time
            left; no more than asked go.
        threshold: a stripe of this scale or less is dead.
        pr_target: share to prune if the strength adapts, in [0, 1).
        pr_unit: what the share is of: "stripes", or "macs" of the layers with skeletons.
        max_rate: if the strength adapts, no layer that everything flows through loses more than this share of stripes.
        schedule_end: the share of training after which `pr_target` is reached.
        freeze_weights: share of training in which only skeletons are trained. 1: all of it, as in the publication's
            experiment with random weights; less: a warm-up for skeletons beside trained weights.
    """

    sr: float | None = None
    threshold: float = 0.05
    pr_target: float = 0.5
    pr_unit: str = "stripes"
    max_rate: float = 0.9
    schedule_end: float = 0.5
    freeze_weights: float = 0.0
    sites: dict[str, Site] = field(default_factory=dict, init=False)
    dead: list[Tensor] = field(default_factory=list, init=False)  # from a step's gradients to its update

    def __post_init__(self) -> None:
        if self.sr is not None and self.sr < 0:
            raise ValueError(f"--sr {self.sr}: a strength of 0 or more")
        if not 0 < self.threshold < 1:  # scales start at 1
            raise ValueError(f"--threshold {self.threshold}: a scale in (0, 1)")
        for name in ("pr_target", "max_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: a rate in [0, 1)")
        if self.pr_unit not in ("stripes", "macs"):
            raise ValueError(f"--pr_unit {self.pr_unit}: one of stripes, macs")
        if not 0 < self.schedule_end <= 1:
            raise ValueError(f"--schedule_end {self.schedule_end}: a share of training in (0, 1]")
        if not 0 <= self.freeze_weights <= 1:
            raise ValueError(f"--freeze_weights {self.freeze_weights}: a share of training in [0, 1]")

    def __str__(self) -> str:
        asked = f"pr_target {self.pr_target} of {self.pr_unit}" if self.sr is None else f"sr {self.sr}"
        frozen = f", freeze_weights {self.freeze_weights:g}" if self.freeze_weights else ""
        return f"stripes, {asked}, threshold {self.threshold}{frozen}"

    def check(self, network: nn.Module) -> None:
        if not _normalised(Graph(network)):
            raise ValueError(f"{type(network).__name__} has no convolution with a batch norm behind it: no stripes")

    def attach(self, network: nn.Module) -> None:
        graph = Graph(network)
        for name in _normalised(graph):
            layer, target = graph.layers[name], graph.output[name]
            layer.__class__ = StripeConv2d
            layer.FilterSkeleton = nn.Parameter(layer.weight.new_ones(len(layer.weight), *layer.kernel_size))
            if not target.fixed or layer.FilterSkeleton[0].numel() > 1:
                norms = [n for n in target.carriers if isinstance(graph.modules[n], nn.BatchNorm2d)]
                self.sites[name] = Site(
                    [] if target.fixed else norms, not graph.bypassed(name), graph.input[name], target
                )

    def optimizers(self, network: nn.Module, make) -> list[torch.optim.Optimizer]:
        skeletons = [layer.FilterSkeleton for layer in stripe_layers(network).values()]
        known = set(map(id, skeletons))
        # Apart, since a fused optimiser cannot leave some of its parameters for later.
        return [make(skeletons), make([p for p in network.parameters() if p.requires_grad and id(p) not in known])]

    @torch.no_grad()
    def on_gradients(self, run) -> None:
        self.dead = [layer.FilterSkeleton == 0 for layer in self._layers(run.network)]
        for layer, dead in zip(self._layers(run.network), self.dead, strict=True):
            scale = layer.FilterSkeleton
            scale.grad.add_(scale.sign(), alpha=self.sr or 0).masked_fill_(dead, 0)
        if run.progress <= self.freeze_weights:
            run.optimizers[1].zero_grad(set_to_none=True)  # then it does nothing, not even decay

    @torch.no_grad()
    def after_update(self, run) -> None:
        scales = [layer.FilterSkeleton for layer in self._layers(run.network)]
        for scale, dead in zip(scales, self.dead, strict=True):
            scale.masked_fill_(dead, 0)  # momentum would move it
        if self.sr is None:
            shift = self._shift(run)
            for scale in scales:
                scale.copy_(scale.sign() * (scale.abs() - shift).clamp_min(0))
        self.settle(run.network)

    @torch.no_grad()
    def settle(self, network: nn.Module) -> None:
        layers = self._layers(network)
        size, gone = self._ranking(layers)
        dead = size <= self.threshold
        if self.sr is None:
            dead &= gone <= self.pr_target
        modules, scales = dict(network.named_modules()), [layer.FilterSkeleton for layer in layers]
        for site, scale, mine in zip(self.sites.values(), scales, dead.split([s.numel() for s in scales]), strict=True):
            scale.masked_fill_(mine.view_as(scale), 0)
            filters = (scale == 0).flatten(1).all(1)
            for norm in site.norms:
                modules[norm].weight.masked_fill_(filters, 0)
                modules[norm].bias.masked_fill_(filters, 0)

    def figures(self, network: nn.Module) -> dict[str, float]:
        scales = torch.cat([layer.FilterSkeleton.detach().flatten() for layer in self._layers(network)])
        return {"stripes_gone": float((scales == 0).double().mean()), "mean_scale": float(scales.abs().mean())}

    @torch.no_grad()
    def finish(self, network: nn.Module) -> dict[str, dict]:
        kept = {}
        for name, layer in stripe_layers(network).items():
            alive = layer.FilterSkeleton != 0
            stripes, filters = int(alive.sum()), int(alive.flatten(1).any(1).sum())
            kept[name] = {
                "pattern": "stripes",
                "filters": len(alive),
                "positions": alive.sum(0).tolist(),  # how many of them keep each position of the kernel
                "note": f"{stripes} of {alive.numel()} stripes, {filters} of {len(alive)} filters",
            }
            layer.weight.mul_(layer.FilterSkeleton[:, None])
            del layer.FilterSkeleton
            vars(layer).pop("pixels", None)
            layer.__class__ = nn.Conv2d
        slice_channels(network, living_channels(network))
        for name in kept.keys() & remove_branches(network):
            kept[name]["note"] += ": the branch is removed"
        layers = {name: network.get_submodule(name) for name in kept}
        broken = {n: m.weight for n, m in layers.items() if isinstance(m, nn.Conv2d) and _is_broken(m.weight)}
        permute(network, {name: order_by_shape(weight) for name, weight in broken.items()})
        return kept

    def _layers(self, network: nn.Module) -> list[StripeConv2d]:
        """Those whose stripes may go."""
        return [network.get_submodule(name) for name in self.sites]

    def _ranking(self, layers: list[StripeConv2d]) -> tuple[Tensor, Tensor]:
        """Of all stripes that may go, layer by layer: the scale's size (infinite where one must stay), and the share of
        all that has gone once this one and all smaller ones have."""
        sizes, costs, everything, left = [], [], 0, 0
        alive = {
            site.target: (layer.FilterSkeleton != 0).flatten(1).any(1).sum()
            for site, layer in zip(self.sites.values(), layers, strict=True)
            if site.norms
        }
        for site, layer in zip(self.sites.values(), layers, strict=True):
            size = layer.FilterSkeleton.detach().abs().flatten()
            if site.essential:
                least = 1 if self.sr is not None else max(1, round(len(size) * (1 - self.max_rate)))
                size[size.topk(least).indices] = torch.inf
            stripe, pixels = (layer.in_channels, layer.pixels) if self.pr_unit == "macs" else (1, 1)
            read = alive.get(site.source, stripe) if self.pr_unit == "macs" else 1
            sizes.append(size)
            costs.append(torch.ones_like(size) * (read * pixels))
            everything += len(size) * stripe * pixels
            left += costs[-1].sum()
        size, cost = torch.cat(sizes), torch.cat(costs).double()
        order = size.argsort(stable=True)
        gone = torch.empty_like(cost)
        gone[order] = (everything - left + cost[order].cumsum(0)) / everything
        return size, gone

    def _shift(self, run) -> Tensor:
        """By how much all scales shrink in this update, so that the last one that is to go reaches the threshold in
        time: the proximal step of an L1 penalty, which no optimiser's momentum carries too far."""
        size, gone = self._ranking(self._layers(run.network))
        last = size.where((gone <= self.pr_target) & size.isfinite(), 0).max()
        updates = (self.schedule_end - run.progress) * run.epochs * len(run.loader) / run.batches_per_step
        return (last - self.threshold).clamp_min(0) / max(updates, 1)


def stripe_layers(network: nn.Module) -> dict[str, StripeConv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, StripeConv2d)}


def _normalised(graph: Graph) -> list[str]:
    """Names of the dense convolutions whose outputs a batch norm reads, and nobody else."""
    return [n for n in graph.output if isinstance(graph.layers[n], nn.Conv2d) and graph.norm_after(n)]


def _is_broken(weight: Tensor) -> bool:
    """Do its filters (O, I, kh, kw) have different shapes?"""
    alive = (weight != 0).any(1)
    return bool((alive != alive[:1]).any())
