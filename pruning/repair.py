"""Repair without training: layer by layer, what is kept of a pruned network is fitted to what the dense one computes.

The dense and the pruned network compute a few calibration pictures side by side. Each pruned layer gets the weight
under its mask that gives, from what the pruned network hands it, what the dense network computes there
(`reconstruction`); the last layer of a residual branch also corrects what the shortcut carries (He, Zhang and Sun,
"Channel Pruning for Accelerating Very Deep Neural Networks", 2017). What errors cost is measured once, by the Fisher
information of the dense network. No label is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.layers import ScoredConv2d, ScoredLinear, masked_layers
from pruning.reconstruction import Moments, Problem
from pruning.score import Calibration
from structure import CHANGED, DENSE, Walk, evaluating

POSITIONS = 100_000  # that a layer looks at, at most
FISHER_PICTURES = 512
LARGE = 2**24  # numbers in the pictures from which values are kept in bfloat16
WIDEST = 8192  # inputs of a filter up to which a layer is fitted
PER_INPUT = 4  # positions an input that a layer without zeros needs to be fitted
# From a layer and its least squares, the mask (O, I, ...) to repair.
Choice = Callable[[nn.Module, Problem], Tensor]


@dataclass
class Repaired:
    """What `repair` has done.

    Attributes:
        errors: layer -> the share of its outputs' variance that the pruned layer does not give.
        left_out: layer -> why it keeps its weights.
    """

    errors: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def repair(network: nn.Module, dense: nn.Module, calibration: Calibration, choose: Choice | None = None) -> Repaired:
    """Repair `network` in place: its weights, the means of its batch norms, its classifier.

    Masks stay, unless `choose` gives others. Where nothing before a tensor is pruned, it stays bit by bit.

    Args:
        dense: the network before it was pruned, of the same modules and shapes.
        choose: asked for the mask of every layer that has zeros.

    Raises:
        ValueError: there is no picture, the network cannot be traced, or `dense` has other shapes.
    """
    result = Repaired()
    masks = {name: mask for name, mask in masks_of(network).items() if not mask.all()}
    if not masks:
        return result
    check_alike(network, dense)
    batches = pictures(calibration)
    numbers = sum(map(torch.numel, batches))
    walk = Walk(dense, network, batches, torch.bfloat16 if numbers > LARGE else torch.float32)
    costs = fisher(dense, list(masks), batches)
    for node in walk:
        layer = walk.module(node)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if node.target in masks:
                fit_masked(walk, node, masks[node.target], costs[node.target], choose, result)
            elif walk.inputs_differ(node):
                fit_whole(walk, node, result)
        elif isinstance(layer, nn.BatchNorm2d) and walk.inputs_differ(node):
            shift_norm(walk, node)
    return result


def masks_of(network: nn.Module) -> dict[str, Tensor]:
    """Layer -> bool mask of its weight: the mask that it has, or, in a plain layer, where its weight is not zero."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    layers |= {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    masked = masked_layers(network)
    return {name: (layer.mask if name in masked else layer.weight) != 0 for name, layer in layers.items()}


def check_alike(network: nn.Module, dense: nn.Module) -> None:
    """Raise ValueError if a tensor of `dense` is missing in `network`, or has another shape."""
    mine, theirs = ({n: tuple(t.shape) for n, t in of.state_dict().items()} for of in (network, dense))
    for name, shape in theirs.items():
        if mine.get(name) != shape:
            raise ValueError(f"--repair: {name} is {shape} in the dense network, {mine.get(name, 'missing')} here")


def pictures(calibration: Calibration) -> list[Tensor]:
    """The calibration pictures in batches small enough for large pictures. Raises ValueError if there is none."""
    batches = []
    for images, _ in calibration.batches():
        batches += images.split(max(4, min(64, 2**20 // images[0, 0].numel())))
    if not batches:
        raise ValueError("--repair: there is no calibration picture")
    return batches


def fit_masked(
    walk: Walk, node: torch.fx.Node, mask: Tensor, cost: Tensor, choose: Choice | None, result: Repaired
) -> None:
    """Give a pruned layer its weight, and a mask before, where one is to be chosen."""
    name, layer, weight = node.target, walk.module(node), walk.module(node, DENSE).weight
    moments = None if weight[0].numel() > WIDEST else measure(walk, node)
    if moments is None or moments.count < weight[0].numel():
        few = "" if moments is None else f", {moments.count} positions"
        result.left_out[name] = f"{weight[0].numel()} inputs of a filter{few}: it keeps its dense weights"
        return
    means = moments.means(centred=has_mean(walk, node))
    problem = Problem(means, columns_of(weight), cost)
    if choose:
        mask = choose(layer, problem) != 0
    kept = columns_of(mask)
    fitted = problem.refit(kept)
    result.errors[name] = problem.error(fitted)
    hidden = layer.weight if isinstance(layer, ScoredConv2d | ScoredLinear) else 0.0  # by its mask, which may change
    layer.weight.copy_(torch.where(mask, weight_of(fitted, weight), hidden))
    set_bias(walk, node, means)


def fit_whole(walk: Walk, node: torch.fx.Node, result: Repaired) -> None:
    """Fit a layer without zeros, whose inputs have changed, if there are positions enough."""
    weight = walk.module(node, DENSE).weight
    inputs = weight[0].numel()
    if inputs > WIDEST:
        return
    moments = measure(walk, node)
    if moments.count < PER_INPUT * inputs:
        result.left_out[node.target] = (
            f"{inputs} inputs of a filter, {moments.count} positions, {PER_INPUT * inputs} needed: it stays as it was"
        )
        return
    means = moments.means(centred=has_mean(walk, node))
    G, p = means.x.shape
    ridge = 0.01 * means.xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
    before = columns_of(weight).double().view(G, -1, p)
    H = means.xx + ridge * torch.eye(p, dtype=torch.float64, device=weight.device)
    fitted = torch.linalg.solve(H, (means.yx + ridge * before).mT).mT
    walk.module(node).weight.copy_(weight_of(fitted.reshape(-1, p), weight))
    set_bias(walk, node, means)


def set_bias(walk: Walk, node: torch.fx.Node, means: Moments) -> None:
    """Let the layer's bias give the mean that is asked for; a batch norm behind it would do so by itself."""
    layer = walk.module(node)
    if layer.bias is None or walk.norm_after(node):
        return
    given = torch.einsum("gop,gp->go", columns_of(layer.weight).double().view(*means.yx.shape), means.x)
    layer.bias.copy_((means.y - given).flatten())


def shift_norm(walk: Walk, node: torch.fx.Node) -> None:
    """Move a batch norm's running mean by what its input's mean has changed.

    Statistics of the calibration pictures alone would not do: those that training gathered are of augmented pictures.
    """
    means = []
    for which in (CHANGED, DENSE):
        sums = [value.sum((0, 2, 3), dtype=torch.float64) for value in walk.values(node.all_input_nodes[0], which)]
        counts = [value[:, 0].numel() for value in walk.values(node.all_input_nodes[0], which)]
        means.append(sum(sums) / sum(counts))
    walk.module(node).running_mean.add_(means[0] - means[1])


def has_mean(walk: Walk, node: torch.fx.Node) -> bool:
    """Whether something adds any mean to the layer's outputs: a batch norm behind it, or its bias."""
    return walk.module(node).bias is not None or walk.norm_after(node) is not None


def measure(walk: Walk, node: torch.fx.Node) -> Moments:
    """What the layer reads in the changed network, and what it should give, at places that are drawn for each batch."""
    layer, source = walk.module(node), node.all_input_nodes[0]
    norm = walk.norm_after(node)
    shortcut, total, generator = walk.shortcut(norm or node), None, torch.Generator().manual_seed(0)
    scale = norm_scale(walk.module(norm, DENSE)) if norm else torch.ones(len(layer.weight), device=layer.weight.device)
    most = -(-POSITIONS // sum(map(len, walk.batches)))
    inputs, outputs = walk.values(source, CHANGED), walk.values(node, DENSE)
    carried = zip(*(walk.values(shortcut, which) for which in (DENSE, CHANGED)), strict=True) if shortcut else None
    for x, y in zip(inputs, outputs, strict=True):
        if carried:  # the layer is to correct it, too, as it reaches the sum through the norm
            before, now = next(carried)
            y = y + (before - now) / torch.where(scale.abs() < 1e-3, torch.inf, scale).view(-1, *[1] * (y.dim() - 2))
        part = Moments.of(*sampled(layer, x, y, most, generator))
        total = part if total is None else total.plus(part)
    return total


def norm_scale(norm: nn.BatchNorm2d) -> Tensor:
    """(O,): what a batch norm multiplies by."""
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale if norm.weight is None else norm.weight * scale


def sampled(layer: nn.Module, x: Tensor, y: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Columns (G, positions, p) and outputs (G, positions, O / G) at the same places, `most`, of each picture."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)[None], y.flatten(0, -2)[None]
    (kh, kw), (sh, sw), (dh, dw), groups = layer.kernel_size, layer.stride, layer.dilation, layer.groups
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    at = torch.randperm(y[0, 0].numel(), generator=generator)[: max(1, most // groups)].to(x.device)
    rows = (at // y.shape[3])[:, None, None] * sh + torch.arange(kh, device=x.device)[:, None] * dh  # (L, kh, 1)
    columns = (at % y.shape[3])[:, None, None] * sw + torch.arange(kw, device=x.device) * dw  # (L, 1, kw)
    x = x.permute(0, 2, 3, 1)[:, rows, columns]  # (B, L, kh, kw, C): channels last in memory, too
    x = x.unflatten(4, (groups, -1)).permute(4, 0, 1, 5, 2, 3).reshape(groups, len(y) * len(at), -1)
    y = y.flatten(2)[:, :, at].unflatten(1, (groups, -1)).permute(1, 0, 3, 2).reshape(groups, len(y) * len(at), -1)
    return x, y


def columns_of(weight: Tensor) -> Tensor:
    """(O, p) of a layer's weight, as `sampled` orders columns."""
    return weight.flatten(1)


def weight_of(columns: Tensor, like: Tensor) -> Tensor:
    """The weight of the shape of `like` from (O, p)."""
    return columns.view(like.shape).to(like)


@torch.enable_grad()
def fisher(dense: nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """Layer -> G (O, O), summed over positions, of the loss's gradients by its outputs.

    Labels are drawn from the network's own predictions: that makes it the Fisher information.
    """
    layers, outputs, result = {name: dense.get_submodule(name) for name in names}, {}, {}
    generator, seen = torch.Generator().manual_seed(0), 0

    def keep(name: str) -> Callable:
        return lambda layer, inputs, output: outputs.__setitem__(name, output)

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        with evaluating(dense):
            for images in batches:
                if seen >= FISHER_PICTURES:
                    break
                seen += len(images)
                outputs.clear()
                logits = dense(images.requires_grad_())
                labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
                gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
                images.requires_grad_(False)
                for name, gradient in zip(names, gradients, strict=True):
                    g = gradient.movedim(1, 0).flatten(1) if gradient.dim() == 4 else gradient.flatten(0, -2).mT
                    result[name] = result.get(name, 0) + (g @ g.mT).double()
    finally:
        for hook in hooks:
            hook.remove()
    return result
