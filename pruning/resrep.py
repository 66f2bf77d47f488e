"""ResRep: forget channels in a linear layer behind batch norm, remember in the rest, then merge the two without loss.

Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting" (ICCV 2021). A compactor, a 1x1
convolution that starts as the identity, follows the batch norm of every target layer. A penalty shrinks its rows; rows
chosen to be forgotten get no other gradient. Rows that reach zero are output channels that can go.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.channels import Costs, rounded_up, select
from pruning.layers import check_plain
from pruning.method import Method
from pruning.options import ResRepOptions
from pruning.score import Calibration
from structure import SUM, Graph, Space, fuse_batch_norm, fuse_pointwise, slice_channels
from utils.kept import Kept
from utils.run import Run

EPOCHS_BEFORE_MASKS = 5


class Compactor(nn.Conv2d):
    """A 1x1 convolution, at first the identity; diagonal, it only scales channels.

    Its buffer `mask` (channels,) is 1 for the rows to remember and 0 for those to forget.
    """

    def __init__(self, channels: int, diagonal: bool, like: Tensor):
        settings = {"device": like.device, "dtype": like.dtype}
        super().__init__(channels, channels, 1, groups=channels if diagonal else 1, bias=False, **settings)
        nn.init.dirac_(self.weight, self.groups)
        self.register_buffer("mask", torch.ones(channels, **settings))

    def rows(self) -> Tensor:
        return self.weight.flatten(1)


class CompactedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, then its `compactor`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.compactor(super().forward(x))


class CompactedConv2d(nn.Conv2d):
    """`nn.Conv2d` without a batch norm, then its `compactor`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.compactor(super().forward(x))


_COMPACTED = {nn.BatchNorm2d: CompactedBatchNorm2d, nn.Conv2d: CompactedConv2d}


@dataclass
class Target:
    """Channels that go together, and where the compactors are that decide: several where layers share their channels.

    Attributes:
        name: of the first layer.
        space: of its output channels.
        hosts: convolution, and the batch norm behind it that has the compactor; without one the convolution has it.
    """

    name: str
    space: Space
    hosts: list[tuple[str, str | None]]

    def compactors(self, network: nn.Module) -> list[Compactor]:
        return [network.get_submodule(norm or convolution).compactor for convolution, norm in self.hosts]


class ResRep(Method):
    """Compactors, gradient resetting and channel selection; `finish` leaves a narrower plain network."""

    options: ResRepOptions

    def __init__(self, name: str, options: ResRepOptions):
        super().__init__(name, options)
        self.targets: list[Target] = []  # read from the structure in `attach`
        self.costs: Costs | None = None  # known when the first picture has come
        self.published = options.fidelity == "reference"

    def __str__(self) -> str:
        o = self.options
        extras = ", residual groups tied" * o.tied_groups + f", widths of {o.round_to}" * (o.round_to > 1)
        return f"ResRep, flops_target {o.flops_target}{extras}{', as the published code' * self.published}"

    def check(self, network: nn.Module) -> None:
        graph = Graph(network)
        targets = find_targets(graph, self.options.tied_groups)
        if not targets:
            sums = not self.options.tied_groups and find_targets(graph, tied_groups=True)
            hint = ": residual sums tie all of them; --tied_groups prunes those of a sum together" if sums else ""
            raise ValueError(f"{type(network).__name__} has no layer whose channels ResRep could prune{hint}")
        check_plain({name: graph.modules[name] for target in targets for name, _ in target.hosts})

    def attach(self, network: nn.Module, calibration: Calibration | None = None) -> None:
        graph = Graph(network)
        self.targets = find_targets(graph, self.options.tied_groups)
        for target in self.targets:
            for convolution, norm in target.hosts:
                layer, host = graph.modules[convolution], graph.modules[norm or convolution]
                host.__class__ = _COMPACTED[type(host)]
                host.compactor = Compactor(layer.out_channels, layer.groups > 1, layer.weight)

    def optimizers(self, network: nn.Module, make) -> list[torch.optim.Optimizer]:
        groups = {kind: [] for kind in ("compactor", "bias", "norm", "weight")}
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                kinds = {
                    "compactor": isinstance(module, Compactor),
                    "bias": name == "bias",
                    "norm": isinstance(module, nn.BatchNorm2d),
                    "weight": True,
                }
                if parameter.requires_grad:
                    groups[next(kind for kind, holds in kinds.items() if holds)].append(parameter)
        compactor = {"momentum": self.options.compactor_momentum}
        if not self.options.decay_compactors:
            compactor["weight_decay"] = 0.0
        own = {
            "compactor": compactor,
            "bias": {"weight_decay": 0.0, "lr_scale": self.options.bias_lr_factor},
            "norm": {"weight_decay": 0.0},
            "weight": {},
        }
        optimizer = make([{"params": groups[kind]} | own[kind] for kind in reversed(groups) if groups[kind]])
        for group in optimizer.param_groups:
            if "betas" in group and "momentum" in group:  # Adam's name for it
                group["betas"] = (group.pop("momentum"), group["betas"][1])
        return [optimizer]

    def step(self, run: Run, *batches: tuple[Tensor, Tensor]) -> None:
        if self.costs is None:
            self.costs = self._costs(run.network, batches[0][0][:1])
        super().step(run, *batches)

    @torch.no_grad()
    def on_gradients(self, run: Run) -> None:
        """Rows to forget lose the loss's gradient; every row is pulled towards zero."""
        least = max(self.options.conversion_threshold, 1e-12)
        for compactors, norms in self._by_shape(run.network):
            weights, masks = _stacked([c.weight for c in compactors]), _stacked([c.mask for c in compactors])
            gradients = _stacked([c.weight.grad for c in compactors]) * masks[..., None]
            gradients.addcdiv_(weights, norms.clamp_min(least)[..., None], value=self.options.lasso_strength)
            _put([c.weight.grad for c in compactors], gradients)

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        o = self.options
        self._catch(run)
        before = o.before_mask_iters
        if before is None:
            before = EPOCHS_BEFORE_MASKS * (len(run.loader) // run.batches_per_step)
        waited = run.iteration - before
        if waited <= 0 or waited % o.mask_interval or run.progress > o.mask_end:
            return
        norms, masks = self.norms(run.network), self.masks(run.network)
        masked = [int((mask == 0).sum()) for mask in masks]
        limits = (o.flops_target, o.begin_granularity, o.num_at_least)
        chosen = select(norms, masked, self.costs, *limits, self.published)
        for target, keep in zip(self.targets, chosen, strict=True):
            if self.published and keep.all():
                continue  # its code rewrites the masks of those layers only in which it has chosen a channel
            for compactor in target.compactors(run.network):
                compactor.mask.copy_(keep)

    def _costs(self, network: nn.Module, image: Tensor) -> Costs:
        """By a picture (1, 3, H, W)."""
        return Costs(network, self.targets, image, self.options.round_to, self.published)

    def _catch(self, run: Run) -> None:
        """Rows to forget that a stride would carry across zero stay there, or they would swing around it for ever."""
        optimizer = run.optimizers[0]
        first, momentum = optimizer.param_groups[0], self.options.compactor_momentum
        adam = "betas" in first  # each of its entries moves by the rate, however small the penalty
        for compactors, norms in self._by_shape(run.network):
            weights = [c.weight for c in compactors]
            push = weights[0][0].numel() ** 0.5 if adam else self.options.lasso_strength / (1 - momentum)
            kept = ((_stacked([c.mask for c in compactors]) > 0) | (norms >= first["lr"] * push))[..., None]
            name = "exp_avg" if adam else "momentum_buffer"
            buffers = [optimizer.state[weight].get(name) for weight in weights]
            _put(weights, _stacked(weights) * kept)
            if buffers[0] is not None:
                _put(buffers, _stacked(buffers) * kept)

    def norms(self, network: nn.Module) -> list[Tensor]:
        """The norm (channels,) of every target channel's rows in all its compactors."""
        owned = [target.compactors(network) for target in self.targets]
        squares = iter(row_squares([compactor for compactors in owned for compactor in compactors]))
        shared = [[next(squares) for _ in compactors] for compactors in owned]
        return list(torch._foreach_sqrt([sum(rest, first) for first, *rest in shared]))

    def masks(self, network: nn.Module) -> list[Tensor]:
        """(channels,) of every target: 1 remember, 0 forget."""
        return [target.compactors(network)[0].mask for target in self.targets]

    def _by_shape(self, network: nn.Module) -> list[tuple[list[Compactor], Tensor]]:
        """Compactors of one shape, to compute with together, and the norms (compactors, channels) of their rows."""
        groups: dict[torch.Size, list[tuple[Compactor, Tensor]]] = {}
        for target, norm in zip(self.targets, self.norms(network), strict=True):
            for compactor in target.compactors(network):
                groups.setdefault(compactor.weight.shape, []).append((compactor, norm))
        return [([c for c, _ in group], torch.stack([norm for _, norm in group])) for group in groups.values()]

    @torch.no_grad()
    def settle(self, network: nn.Module) -> None:
        for target, norms in zip(self.targets, self.norms(network), strict=True):
            dead = norms < self.options.conversion_threshold
            for compactor in target.compactors(network):
                compactor.weight.masked_fill_(dead.view(-1, 1, 1, 1), 0)

    @torch.no_grad()
    def figures(self, network: nn.Module) -> dict[str, float]:
        masks = self.masks(network)
        norms, mask = torch.cat(self.norms(network)), torch.cat(masks).bool()
        figures = {"masked_channels": int((~mask).sum()), "norm_remembered": float(norms[mask].mean())}
        if self.costs:
            figures["macs_ratio"] = self.costs.share([int(mask.sum()) for mask in masks])
        if not mask.all():
            figures |= {"norm_forgotten": float(norms[~mask].mean())}
            figures |= {"norm_gap": float(norms[mask].min() - norms[~mask].max())}
        return figures

    @torch.no_grad()
    def finish(self, network: nn.Module) -> dict[str, Kept]:
        self.settle(network)
        keep, all_norms = {}, self.norms(network)
        masked = [int((mask == 0).sum()) for mask in self.masks(network)]
        for target, norms in zip(self.targets, all_norms, strict=True):
            layers = [merge(network, *host) for host in target.hosts]
            alive = sum((layer.weight != 0).flatten(1).any(1) | (layer.bias != 0) for layer in layers) > 0
            width = rounded_up(max(int(alive.sum()), 1), self.options.round_to, len(norms))
            first = (norms + alive * norms.max()).argsort(descending=True, stable=True)
            keep[target.name] = first[:width].sort().values
        stayed, kept = slice_channels(network, keep), {}
        for target, to_forget in zip(self.targets, masked, strict=True):
            left, dense = len(network.get_submodule(target.name).weight), target.space.channels
            notes = [stayed.get(target.name)]
            if to_forget > dense - left:
                notes.append(f"{to_forget} channels to forget, {dense - left} gone")
            own = Kept("channels", width=[dense, left], note="; ".join(filter(None, notes)))
            kept |= {name: own for name, _ in target.hosts}
        return kept

    def shortfalls(self, network: nn.Module, kept: dict[str, Kept], image: Tensor) -> list[str]:
        costs = self.costs or self._costs(network, image)
        share, goal = costs.share([kept[target.name].width[1] for target in self.targets]), self.options.flops_target
        if share <= goal:
            return []
        return [f"--flops_target {goal:g} is not reached: {share:.4f} of the multiply-adds are left."]


def row_squares(compactors: list[Compactor]) -> list[Tensor]:
    """The squared norm (channels,) of every compactor's rows; those of one shape are computed together."""
    shapes: dict[torch.Size, list[int]] = {}
    for number, compactor in enumerate(compactors):
        shapes.setdefault(compactor.weight.shape, []).append(number)
    squares = {}
    for numbers in shapes.values():
        rows = _stacked([compactors[number].weight for number in numbers])
        squares |= zip(numbers, rows.square().sum(2).unbind(), strict=True)
    return [squares[number] for number in range(len(compactors))]


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Compactors' tensors (C, 1 or C, 1, 1) or masks (C,) as one, (n, C, 1 or C) or (n, C)."""
    return torch.stack([tensor.detach().flatten(1) if tensor.dim() > 1 else tensor for tensor in tensors])


def _put(tensors: list[Tensor], values: Tensor) -> None:
    """Store (n, C, 1 or C) values in compactors' tensors."""
    torch._foreach_copy_(tensors, [v.view_as(t) for v, t in zip(values.unbind(), tensors, strict=True)])


def find_targets(graph: Graph, tied_groups: bool) -> list[Target]:
    """The channels that may go, in the order of layers: those that no sum ties, or those of whole groups, too."""
    targets, allowed = [], {SUM} if tied_groups else set()
    for space in dict.fromkeys(graph.output.values()):
        convolutions = [name for name in space.producers if isinstance(graph.modules[name], nn.Conv2d)]
        free = not space.sized and not space.fixed - allowed
        free &= tied_groups or not graph.stem.intersection(convolutions)
        if not free or len(convolutions) < len(space.producers) or graph.head.intersection(convolutions):
            continue
        hosts = [(name, graph.norm_after(name)) for name in convolutions]
        # Where channels are multiplied (squeeze-excite), the factor without a batch norm is the gate: it may stay.
        hosts = [host for host in hosts if host[1]] or hosts
        if space.scaled:  # a dead channel must be zero where it is multiplied: a constant would vary with the gate
            depthwise = [name for name in space.carriers if isinstance(graph.modules[name], nn.Conv2d)]
            hosts += [(name, graph.norm_after(name)) for name in depthwise]
        if all(type(graph.modules[norm or name]) in _COMPACTED for name, norm in hosts):
            targets.append(Target(hosts[0][0], space, hosts))
    return targets


@torch.no_grad()
def merge(network: nn.Module, convolution: str, norm: str | None) -> nn.Conv2d:
    """Merge a convolution, the batch norm behind it and the compactor: the convolution alone is left, with a bias."""
    layer, host = network.get_submodule(convolution), network.get_submodule(norm or convolution)
    compactor, weight, bias = host.compactor, layer.weight, layer.bias
    if norm:
        weight, bias = fuse_batch_norm(weight, bias, host.state_dict(), host.eps)
        network.set_submodule(norm, nn.Identity())
    else:
        del host.compactor
        host.__class__ = nn.Conv2d
    weight, bias = fuse_pointwise(weight, bias, compactor.rows())
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter(bias.to(layer.weight))
    return layer
