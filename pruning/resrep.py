"""ResRep: forget channels in a linear layer behind batch norm, remember in the rest, then merge the two without loss.

Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting" (ICCV 2021). A compactor, a 1x1
convolution that starts as the identity, follows the batch norm of every target layer. A penalty shrinks its rows; rows
chosen to be forgotten get no other gradient. Rows that reach zero are output channels that can go.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from pruning.method import Method
from structure import SUM, Graph, Space, fuse_batch_norm, fuse_pointwise, slice_channels
from utils.count import count

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
    """Channels that go together, and the compactors that decide: several where layers share their channels."""

    name: str  # of the first layer
    space: Space
    hosts: list[tuple[str, str | None]]  # convolution, batch norm behind it
    compactors: list[Compactor] = field(default_factory=list)

    def norms(self) -> Tensor:
        """Norm (channels,) of every channel's rows in all compactors."""
        return torch.cat([compactor.rows() for compactor in self.compactors], 1).norm(dim=1)

    @property
    def mask(self) -> Tensor:
        return self.compactors[0].mask


@dataclass
class ResRep(Method):
    """Compactors, gradient resetting and channel selection; `finish` leaves a narrower plain network.

    Args:
        flops_target: multiply-adds to keep, as a share of the dense network's.
        tied_groups: prune the channels of residual sums, too, all layers of a group together; else only those of layers
            inside blocks, as published.
        lasso_strength: of the penalty's gradient, which has this length for every row.
        before_mask_iters: updates before the first selection can be; five epochs if None.
        mask_interval: updates between two selections.
        mask_end: the share of training after which the selection stands, so that short runs have time to forget.
        begin_granularity: by how many channels a selection may exceed the one before while the target is not reached.
        num_at_least: channels that a layer keeps.
        compactor_momentum: of compactors, instead of the optimiser's.
        decay_compactors: apply weight decay to compactors.
        bias_lr_factor: of the learning rate of biases, batch norms' included.
        conversion_threshold: rows of a smaller norm are zero.
        round_to: widths are multiples of it, where the dense ones are.
    """

    flops_target: float = 0.455
    tied_groups: bool = False
    lasso_strength: float = 1e-4
    before_mask_iters: int | None = None
    mask_interval: int = 200
    mask_end: float = 1.0
    begin_granularity: int = 4
    num_at_least: int = 1
    compactor_momentum: float = 0.99
    decay_compactors: bool = False
    bias_lr_factor: float = 2.0
    conversion_threshold: float = 1e-5
    round_to: int = 1
    targets: list[Target] = field(default_factory=list, init=False)
    costs: "Costs | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name in ("flops_target", "mask_end"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"--{name} {getattr(self, name)}: a share in (0, 1]")
        for name in ("mask_interval", "begin_granularity", "num_at_least", "round_to"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: 1 or more")
        for name in ("lasso_strength", "before_mask_iters", "bias_lr_factor", "conversion_threshold"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: 0 or more")
        if not 0 <= self.compactor_momentum < 1:
            raise ValueError(f"--compactor_momentum {self.compactor_momentum}: in [0, 1)")

    def __str__(self) -> str:
        extras = ", residual groups tied" * self.tied_groups + f", widths of {self.round_to}" * (self.round_to > 1)
        return f"ResRep, flops_target {self.flops_target}{extras}"

    def check(self, network: nn.Module) -> None:
        if not find_targets(Graph(network), self.tied_groups):
            raise ValueError(f"{type(network).__name__} has no layer whose channels ResRep could prune")

    def attach(self, network: nn.Module) -> None:
        self.graph = Graph(network)
        self.targets = find_targets(self.graph, self.tied_groups)
        for target in self.targets:
            for convolution, norm in target.hosts:
                layer, host = self.graph.modules[convolution], self.graph.modules[norm or convolution]
                host.__class__ = _COMPACTED[type(host)]
                host.compactor = Compactor(layer.out_channels, layer.groups > 1, layer.weight)
                target.compactors.append(host.compactor)

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
        compactor = {"momentum": self.compactor_momentum} | ({} if self.decay_compactors else {"weight_decay": 0.0})
        own = {
            "compactor": compactor,
            "bias": {"weight_decay": 0.0, "lr_scale": self.bias_lr_factor},
            "norm": {"weight_decay": 0.0},
            "weight": {},
        }
        return [make([{"params": groups[kind]} | own[kind] for kind in reversed(groups) if groups[kind]])]

    def step(self, run, *batches: tuple[Tensor, Tensor]) -> None:
        if self.costs is None:
            self.costs = Costs(self.graph, self.targets, batches[0][0][:1], self.round_to)
        super().step(run, *batches)

    @torch.no_grad()
    def on_gradients(self, run) -> None:
        """Rows to forget lose the loss's gradient; every row is pulled towards zero."""
        for target in self.targets:
            norms = target.norms().clamp_min(max(self.conversion_threshold, 1e-12)).view(-1, 1, 1, 1)
            for compactor in target.compactors:
                gradient = compactor.weight.grad
                gradient.mul_(compactor.mask.view(-1, 1, 1, 1)).addcdiv_(
                    compactor.weight, norms, value=self.lasso_strength
                )

    @torch.no_grad()
    def after_update(self, run) -> None:
        self._catch(run.optimizers[0])
        before = self.before_mask_iters
        if before is None:
            before = EPOCHS_BEFORE_MASKS * (len(run.loader) // run.batches_per_step)
        waited = run.iteration - before
        if waited <= 0 or waited % self.mask_interval or run.progress > self.mask_end:
            return
        norms = [target.norms() for target in self.targets]
        masked = [int((target.mask == 0).sum()) for target in self.targets]
        chosen = select(norms, masked, self.costs, self.flops_target, self.begin_granularity, self.num_at_least)
        for target, keep in zip(self.targets, chosen, strict=True):
            for compactor in target.compactors:
                compactor.mask.copy_(keep)

    def _catch(self, optimizer: torch.optim.Optimizer) -> None:
        """Rows to forget that a stride would carry across zero stay there, or they would swing around it for ever."""
        stride = optimizer.param_groups[0]["lr"] * self.lasso_strength / (1 - self.compactor_momentum)
        for target in self.targets:
            kept = ((target.mask > 0) | (target.norms() >= stride)).view(-1, 1, 1, 1)
            for compactor in target.compactors:
                compactor.weight *= kept
                momentum = optimizer.state[compactor.weight].get("momentum_buffer")
                if momentum is not None:
                    momentum *= kept

    @torch.no_grad()
    def settle(self, network: nn.Module) -> None:
        for target in self.targets:
            dead = target.norms() < self.conversion_threshold
            for compactor in target.compactors:
                compactor.weight[dead] = 0

    @torch.no_grad()
    def figures(self, network: nn.Module) -> dict[str, float]:
        norms = torch.cat([target.norms() for target in self.targets])
        mask = torch.cat([target.mask for target in self.targets]).bool()
        told = {"masked_channels": int((~mask).sum()), "norm_remembered": float(norms[mask].mean())}
        if self.costs:
            told["macs_ratio"] = self.costs.share([int(target.mask.sum()) for target in self.targets])
        if not mask.all():
            told |= {"norm_forgotten": float(norms[~mask].mean())}
            told |= {"norm_gap": float(norms[mask].min() - norms[~mask].max())}
        return told

    @torch.no_grad()
    def finish(self, network: nn.Module) -> dict[str, dict]:
        self.settle(network)
        keep, masked = {}, {}
        for target in self.targets:
            norms, masked[target.name] = target.norms(), int((target.mask == 0).sum())
            layers = [merge(network, *host) for host in target.hosts]
            alive = sum((layer.weight != 0).flatten(1).any(1) | (layer.bias != 0) for layer in layers) > 0
            width = rounded_up(max(int(alive.sum()), 1), self.round_to, len(norms))
            first = (norms + alive * norms.max()).argsort(descending=True, stable=True)
            keep[target.name] = first[:width].sort().values
        stayed, kept = slice_channels(network, keep), {}
        for target in self.targets:
            left, dense = len(network.get_submodule(target.name).weight), target.space.channels
            notes = [stayed.get(target.name)]
            if masked[target.name] > dense - left:
                notes.append(f"{masked[target.name]} channels to forget, {dense - left} gone")
            own = {"pattern": "channels", "width": [dense, left], "note": "; ".join(filter(None, notes))}
            kept |= {name: own for name, _ in target.hosts}
        return kept


def find_targets(graph: Graph, tied_groups: bool) -> list[Target]:
    """The channels that may go, in the order of layers: those that no sum ties, or those of whole groups, too."""
    targets, allowed = [], {SUM} if tied_groups else set()
    for space in dict.fromkeys(graph.output.values()):
        convolutions = [name for name in space.producers if isinstance(graph.modules[name], nn.Conv2d)]
        free = not space.fixed - allowed and (tied_groups or not graph.stem.intersection(convolutions))
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


class Costs:
    """Multiply-adds of a network, for any widths of its targets.

    Args:
        image: (1, 3, H, W), of the size that counts.
        round_to: widths are rounded up to multiples of it.
    """

    def __init__(self, graph: Graph, targets: list[Target], image: Tensor, round_to: int = 1):
        place = {target.space: number for number, target in enumerate(targets)}
        carried = {name: space for space in place for name in space.carriers}
        self.dense = [target.space.channels for target in targets]
        self.round_to, fixed = round_to, len(targets)
        units, outputs, inputs = [], [], []
        for name, cost in count(graph.network, image).items():
            if name not in graph.modules:  # a compactor: it will be merged
                continue
            spaces = [graph.output.get(name, carried.get(name)), graph.input.get(name)]
            places = [place.get(space, fixed) for space in spaces]
            units.append(cost.macs // int(np.prod([[*self.dense, 1][p] for p in places])))
            outputs.append(places[0])
            inputs.append(places[1])
        self.units, self.outputs, self.inputs = np.array(units), outputs, inputs
        self.total = self(self.dense)

    def __call__(self, widths: list[int]) -> int:
        pairs = zip(widths, self.dense, strict=True)
        rounded = np.array([*(rounded_up(width, self.round_to, dense) for width, dense in pairs), 1])
        return int((self.units * rounded[self.outputs] * rounded[self.inputs]).sum())

    def share(self, widths: list[int]) -> float:
        return self(widths) / self.total


def rounded_up(width: int, multiple: int, most: int) -> int:
    return min(-(-width // multiple) * multiple, most)


def select(
    norms: list[Tensor], masked: list[int], costs: Costs, goal: float, granularity: int, at_least: int
) -> list[Tensor]:
    """Which channels to forget next: those of the smallest norms until the goal is met, but only a few more than now.

    Every selection starts afresh, so a channel that has grown comes back.

    Args:
        norms: of every target's channels.
        masked: how many channels of every target are forgotten now.
        goal: share of the multiply-adds to keep.
        granularity: how many more channels than now may be looked at, while the goal is not met.
        at_least: a target keeps as many channels. Those passed over for that count as looked at, as published.

    Returns:
        a mask (channels,) for every target: 1 remember, 0 forget.
    """
    widths = [len(norm) for norm in norms]
    now = [width - gone for width, gone in zip(widths, masked, strict=True)]
    owner = [number for number, width in enumerate(widths) for _ in range(width)]
    order = torch.cat(norms).argsort(stable=True).tolist()  # of equal norms, the first target's first channel
    limit = sum(masked) + granularity if costs.share(now) > goal else len(order)
    forgotten: list[list[int]] = [[] for _ in norms]
    first = np.cumsum([0, *widths])
    for place in order[:limit]:
        if costs.share(widths) <= goal:
            break
        target = owner[place]
        if widths[target] > at_least:
            widths[target] -= 1
            forgotten[target].append(place - first[target])
    if costs.share(widths) <= goal:  # what rounding keeps anyway is remembered
        for number, gone in enumerate(forgotten):
            del gone[costs.dense[number] - rounded_up(widths[number], costs.round_to, costs.dense[number]) :]
    masks = [torch.ones_like(norm) for norm in norms]
    for mask, gone in zip(masks, forgotten, strict=True):
        mask[gone] = 0
    return masks


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
