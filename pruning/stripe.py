"""Stripe-wise pruning: Meng et al., "Pruning Filter in Filter" (NeurIPS 2020).

A stripe is what a filter has at one position of its kernel: the weights of all input channels there. Its scale is
learned with it, under an L1 penalty; a stripe whose scale falls to the threshold goes, as does a filter without any.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from pruning.budget import cut
from pruning.layers import check_plain
from pruning.method import Method, missed
from pruning.options import StripeOptions
from pruning.order import order_by_shape
from pruning.pictures import draw_shapes
from pruning.score import Calibration
from structure import Graph, Space, Spaces, living_channels, permute, remove_branches, slice_channels
from utils.kept import Kept
from utils.run import Run


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
    source: Spaces  # of its input channels, one after another
    target: Space


class Stripe(Method):
    """Skeletons beside the convolutions, trained with them; what is left at the end has the shapes that they found.

    Every convolution with a batch norm behind it gets a skeleton, but depthwise and grouped ones, whose filters live
    and die with the channels that they read. Where a stripe is a whole filter (1x1) that a residual sum needs, nothing
    could be removed: the skeleton of such a layer is not penalised, as published.

    With `sr`, the strength of the L1 penalty is as published, in the skeletons' gradient. Without it, the strength
    adapts: every update shrinks all scales by what brings as many stripes as are asked to the threshold in the time
    left, and no more than asked go. `freeze_weights` 1 trains skeletons only, as in the publication's experiment with
    random weights; less is a warm-up for skeletons beside trained weights.
    """

    options: StripeOptions

    def __init__(self, name: str, options: StripeOptions):
        super().__init__(name, options)
        self.sites: dict[str, Site] = {}  # read from the structure in `attach`
        self.pixels: tuple[int, ...] | None = None  # of each one's output, known when the first picture has passed
        self.adapts = options.sr is None

    def __str__(self) -> str:
        o = self.options
        asked = f"pr_target {o.pr_target} of {o.pr_unit}" if self.adapts else f"sr {o.sr}"
        frozen = f", freeze_weights {o.freeze_weights:g}" if o.freeze_weights else ""
        return f"stripes, {asked}, threshold {o.threshold}{frozen}"

    def check(self, network: nn.Module) -> None:
        graph = Graph(network)
        names = _normalised(graph)
        if not names:
            raise ValueError(f"{type(network).__name__} has no convolution with a batch norm behind it: no stripes")
        check_plain({name: graph.layers[name] for name in names})

    def reading(self) -> dict[str, float]:
        return {"threshold": self.options.threshold}

    def attach(self, network: nn.Module, calibration: Calibration | None = None) -> None:
        self.check(network)
        graph = Graph(network)
        for name in _normalised(graph):
            layer, target = graph.layers[name], graph.output[name]
            layer.__class__ = StripeConv2d
            layer.FilterSkeleton = nn.Parameter(layer.weight.new_ones(len(layer.weight), *layer.kernel_size))
            free = not (target.fixed or target.sized)
            if free or layer.FilterSkeleton[0].numel() > 1:
                norms = graph.norms_of(target) if free else []
                self.sites[name] = Site(norms, not graph.bypassed(name), graph.input[name], target)

    def optimizers(self, network: nn.Module, make) -> list[torch.optim.Optimizer]:
        skeletons = [layer.FilterSkeleton for layer in stripe_layers(network).values()]
        known = set(map(id, skeletons))
        # Apart, since a fused optimiser cannot leave some of its parameters for later.
        return [make(skeletons), make([p for p in network.parameters() if p.requires_grad and id(p) not in known])]

    @torch.no_grad()
    def on_gradients(self, run: Run) -> None:
        self.pixels = tuple(layer.pixels for layer in self._layers(run.network))
        scales = self._scales(run.network)
        gradients, signs = [scale.grad for scale in scales], torch._foreach_sign(scales)
        torch._foreach_add_(gradients, signs, alpha=self.options.sr or 0)
        torch._foreach_mul_(gradients, torch._foreach_abs(signs))  # the dead stay so
        self._alive = torch.cat([sign.flatten() for sign in signs]) != 0  # until the update that follows
        if run.progress <= self.options.freeze_weights:
            run.optimizers[1].zero_grad(set_to_none=True)  # then it does nothing, not even decay

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        network = run.network
        flat = self._flat(network) * self._alive  # momentum would move the dead
        goes = self._goes(network, flat)
        if self.adapts:
            flat = flat.sign() * (flat.abs() - self._shift(run, flat, goes)).clamp_min(0)
        self._store(network, flat, goes)

    @torch.no_grad()
    def settle(self, network: nn.Module) -> None:
        flat = self._flat(network)
        self._store(network, flat, self._goes(network, flat))

    def draw(self, kept: dict[str, Kept], title: str, folder: Path) -> list[str]:
        return draw_shapes(kept, f"{title}: filters that keep each position", folder / "shapes.png")

    def figures(self, network: nn.Module) -> dict[str, float]:
        flat = self._flat(network)
        return {"stripes_gone": float((flat == 0).double().mean()), "mean_scale": float(flat.abs().mean())}

    @torch.no_grad()
    def finish(self, network: nn.Module) -> dict[str, Kept]:
        kept = {}
        self.pixels = tuple(layer.pixels for layer in self._layers(network))
        for name, layer in stripe_layers(network).items():
            alive = layer.FilterSkeleton != 0
            stripes, filters = int(alive.sum()), int(alive.flatten(1).any(1).sum())
            note = f"{stripes} of {alive.numel()} stripes, {filters} of {len(alive)} filters"
            kept[name] = Kept("stripes", filters=len(alive), positions=alive.sum(0).tolist(), note=note)
            layer.weight.mul_(layer.FilterSkeleton[:, None])
            del layer.FilterSkeleton
            vars(layer).pop("pixels", None)
            layer.__class__ = nn.Conv2d
        slice_channels(network, living_channels(network))
        for name in kept.keys() & remove_branches(network):
            kept[name].note += ": the branch is removed"
        layers = {name: network.get_submodule(name) for name in kept}
        broken = {n: m.weight for n, m in layers.items() if isinstance(m, nn.Conv2d) and _is_broken(m.weight)}
        permute(network, {name: order_by_shape(weight) for name, weight in broken.items()})
        return kept

    def shortfalls(self, network: nn.Module, kept: dict[str, Kept], image: Tensor) -> list[str]:
        if not self.adapts:
            return []
        by_macs, total, left = self.options.pr_unit == "macs", 0, 0
        for (name, site), pixels in zip(self.sites.items(), self.pixels, strict=True):
            layer, own = network.get_submodule(name), kept[name]
            here = isinstance(layer, nn.Conv2d)  # else its branch is removed
            stripes, inputs = own.filters * sum(map(len, own.positions)), sum(s.channels or 0 for s in site.source)
            if by_macs:
                total += stripes * (inputs or layer.in_channels) * pixels  # the picture's channels are no layer's
                left += int(layer.weight.count_nonzero()) * pixels if here else 0
            else:
                total += stripes
                left += sum(map(sum, own.positions)) if here else 0
        what = "multiply-adds of layers with stripes" if by_macs else "stripes"
        return missed(what, self.options.pr_target * total, total - left, total)

    def _layers(self, network: nn.Module) -> list[StripeConv2d]:
        """Those whose stripes may go."""
        return [network.get_submodule(name) for name in self.sites]

    def _scales(self, network: nn.Module) -> list[nn.Parameter]:
        return [layer.FilterSkeleton for layer in self._layers(network)]

    def _flat(self, network: nn.Module) -> Tensor:
        """All scales (stripes,), one layer after another: what follows takes a few operators for all layers."""
        return torch.cat([scale.detach().flatten() for scale in self._scales(network)])

    def _goes(self, network: nn.Module, flat: Tensor) -> Tensor:
        """Bool (stripes,): those that go as soon as their scales reach the threshold."""
        layers, o = self._layers(network), self.options
        sizes = [layer.FilterSkeleton.numel() for layer in layers]
        share = 1 - o.max_rate if self.adapts else 0.0
        essential = [site.essential for site in self.sites.values()]
        least = [max(1, round(size * share)) * stays for size, stays in zip(sizes, essential, strict=True)]
        scores = list(flat.abs().split(sizes))
        if not self.adapts:
            goes = cut(scores, len(flat), least=least)
        elif o.pr_unit == "stripes":
            goes = cut(scores, len(flat) * o.pr_target + 1e-9, least=least)
        elif self.pixels is None:
            return torch.zeros_like(flat, dtype=torch.bool)
        else:
            costs, gone, total = self._costs(layers, flat)
            goes = cut(scores, o.pr_target * total - gone, costs, least)
        return torch.cat(goes)

    def _costs(self, layers: list[StripeConv2d], flat: Tensor) -> tuple[list[Tensor], Tensor, int]:
        """Multiply-adds of every layer's stripes, those that went with dead inputs, and all of the dense layers."""
        makers = {site.target: number for number, site in enumerate(self.sites.values()) if site.norms}
        living = [part.sum() for part in self._living_filters(layers, flat)]
        costs, total = [], 0
        for layer, site, pixels in zip(layers, self.sites.values(), self.pixels, strict=True):
            dead = sum(s.channels - living[makers[s]] for s in site.source if s in makers)
            read = layer.in_channels - dead
            costs.append(flat.new_ones(layer.FilterSkeleton.numel(), dtype=torch.float64) * (read * pixels))
            total += layer.FilterSkeleton.numel() * layer.in_channels * pixels
        return costs, total - torch.cat(costs).sum(), total

    def _living_filters(self, layers: list[StripeConv2d], flat: Tensor) -> list[Tensor]:
        """(filters,) of every layer: 1 where a filter has a stripe whose scale is not zero, else 0."""
        counts = [len(layer.FilterSkeleton) for layer in layers]
        lengths = [layer.FilterSkeleton[0].numel() for layer in layers]
        filters = _filter_numbers(tuple(counts), tuple(lengths), flat.device)
        return flat.new_zeros(sum(counts)).index_add_(0, filters, (flat != 0).to(flat)).clamp_max(1).split(counts)

    def _store(self, network: nn.Module, flat: Tensor, goes: Tensor) -> None:
        """Put scales in place: zero where they go and have reached the threshold. Dead filters fall silent."""
        flat = flat.masked_fill(goes & (flat.abs() <= self.options.threshold), 0)
        layers, scales = self._layers(network), self._scales(network)
        parts = flat.split([scale.numel() for scale in scales])
        torch._foreach_copy_(scales, [part.view_as(scale) for part, scale in zip(parts, scales, strict=True)])
        norms, alive = [], []
        for site, living in zip(self.sites.values(), self._living_filters(layers, flat), strict=True):
            norms += [network.get_submodule(norm) for norm in site.norms]
            alive += [living] * len(site.norms)
        if norms:
            torch._foreach_mul_([norm.weight for norm in norms], alive)
            torch._foreach_mul_([norm.bias for norm in norms], alive)

    def _shift(self, run: Run, flat: Tensor, goes: Tensor) -> Tensor:
        """By how much all scales shrink in this update, so that the last one that is to go reaches the threshold in
        time: the proximal step of an L1 penalty, which no optimiser's momentum carries too far."""
        last = flat.abs().where(goes, 0).max()
        updates = (self.options.schedule_end - run.progress) * run.epochs * len(run.loader) / run.batches_per_step
        return (last - self.options.threshold).clamp_min(0) / max(updates, 1)


@lru_cache(maxsize=4)  # made once, since a GPU would wait for what comes from the host
def _filter_numbers(counts: tuple[int, ...], lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(stripes,): the number of every stripe's filter, for layers of so many filters of so many stripes each."""
    per_filter = torch.tensor(lengths).repeat_interleave(torch.tensor(counts))
    return torch.arange(len(per_filter)).repeat_interleave(per_filter).to(device)


def stripe_layers(network: nn.Module) -> dict[str, StripeConv2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, StripeConv2d)}


def _normalised(graph: Graph) -> list[str]:
    """Names of the dense convolutions whose outputs a batch norm reads, and nobody else."""
    dense = [n for n in graph.output if getattr(graph.layers[n], "groups", 0) == 1]
    return [n for n in dense if graph.norm_after(n)]


def _is_broken(weight: Tensor) -> bool:
    """Do its filters (O, I, kh, kw) have different shapes?"""
    alive = (weight != 0).any(1)
    return bool((alive != alive[:1]).any())
