"""Repair without training: layer by layer, what is kept of a pruned network is fitted to what the dense one computes.

The dense and the pruned network compute a few calibration pictures side by side. Each pruned layer gets the weight
under its mask that gives, from what the pruned network hands it, what the dense network computes there
(`targets`, `reconstruction`). What errors cost is measured once, by the Fisher information of the dense network. No
label is needed.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.layers import ScoredConv2d, ScoredLinear, masked_layers
from pruning.reconstruction import Moments, Problem, least_squares
from pruning.score import Calibration
from pruning.targets import Outlet, measure, measure_cut, outlet
from structure import CHANGED, DENSE, Walk, evaluating

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
def repair(
    network: nn.Module,
    dense: nn.Module,
    calibration: Calibration,
    choose: Choice | None = None,
    fisher_pictures: int = FISHER_PICTURES,
) -> Repaired:
    """Repair `network` in place: its weights, the means of its batch norms, its classifier.

    Masks stay, unless `choose` gives others. Where nothing before a tensor is pruned, it stays bit by bit.

    Args:
        dense: the network before it was pruned, of the same modules and shapes.
        choose: asked for the mask of every layer that has zeros.
        fisher_pictures: on how many pictures the Fisher information is measured; 0: an error counts as the batch norm
            behind the layer scales it.

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
    calls = Counter(node.target for node in walk.graph.nodes if node.op == "call_module")
    masks = {name: mask for name, mask in masks.items() if calls[name]}
    result.left_out = {name: "called more than once: it stays as it is" for name in masks if calls[name] > 1}
    grouped = {name for name in masks if getattr(network.get_submodule(name), "groups", 1) > 1}
    costs = fisher(dense, [name for name in masks if name not in grouped], batches, fisher_pictures)
    fitted = set()
    for node in walk:
        layer = walk.module(node)
        if calls[node.target] > 1:
            continue
        if isinstance(layer, nn.Conv2d | nn.Linear):
            mask = masks.get(node.target)
            if mask is not None and node.target not in grouped:
                done = fit_masked(walk, node, mask, costs.get(node.target), choose, result)
            else:
                done = (mask is not None or walk.inputs_differ(node)) and fit_rows(walk, node, mask, result)
            fitted |= {node} if done else set()
        elif isinstance(layer, nn.BatchNorm2d) and walk.inputs_differ(node) and fitted.isdisjoint(node.all_input_nodes):
            shift_norm(walk, node)
    return result


def masks_of(network: nn.Module) -> dict[str, Tensor]:
    """Layer -> bool mask of its weight: the mask that it has, or, in a plain layer, where its weight is not zero."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
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
    walk: Walk, node: torch.fx.Node, mask: Tensor, cost: Tensor | None, choose: Choice | None, result: Repaired
) -> bool:
    """Give a pruned layer its weight, and a mask before, where one is to be chosen. Returns whether that was done."""
    name, layer, weight = node.target, walk.module(node), walk.module(node, DENSE).weight
    if weight[0].numel() > WIDEST:
        result.left_out[name] = (
            f"{weight[0].numel()} inputs of a filter, more than {WIDEST}: it keeps its dense weights"
        )
        return False
    out = outlet(walk, node)
    moments = measure(walk, node, out)
    if moments.count < weight[0].numel():
        few = f"{weight[0].numel()} inputs of a filter, {moments.count} positions"
        result.left_out[name] = f"{few}: it keeps its dense weights"
        return False
    centred, dense = out.norm is not None or layer.bias is not None, weight.flatten(1)
    cost = out.scale.square() if cost is None else cost
    problem = Problem(means := moments.means(centred), dense, cost)
    if choose:
        mask = choose(layer, problem) != 0
    fitted = problem.refit(mask.flatten(1))
    if centred and out.cuts:
        means = measure_cut(walk, node, out, fitted, means, moments.xx).means(centred)
        problem = Problem(means, dense, cost)
        fitted = problem.refit(mask.flatten(1))
    result.errors[name] = problem.moments.error(fitted)
    set_weight(layer, fitted, mask)
    set_mean(walk, node, out, fitted, means)
    return True


def fit_rows(walk: Walk, node: torch.fx.Node, mask: Tensor | None, result: Repaired) -> bool:
    """Fit each filter of a layer by itself, if there are positions enough.

    Such are layers without zeros whose inputs have changed, as depthwise convolutions and the classifier, and pruned
    ones of several groups, which keep their mask. Returns whether the mean of its outputs is set, too.
    """
    layer, weight = walk.module(node), walk.module(node, DENSE).weight
    inputs = weight[0].numel()
    if inputs > WIDEST:
        return False
    out = outlet(walk, node)
    moments = measure(walk, node, out)
    if moments.count < PER_INPUT * inputs:
        few = f"{inputs} inputs of a filter, {moments.count} positions, {PER_INPUT * inputs} needed"
        result.left_out[node.target] = f"{few}: it stays as it was"
        return False
    means = moments.means(centred=out.norm is not None or layer.bias is not None)
    fitted = least_squares(means, weight.flatten(1), None if mask is None else mask.flatten(1))
    if mask is not None:
        result.errors[node.target] = means.error(fitted)
    set_weight(layer, fitted, mask)
    if not out.norm:  # else the norm is shifted by the means over all places, which are more exact than those of a few
        set_mean(walk, node, out, fitted, means)
    return not out.norm


def set_weight(layer: nn.Module, fitted: Tensor, mask: Tensor | None) -> None:
    """Give a layer the weight (O, p), where `mask` (O, I, ...) keeps it."""
    weight = layer.weight
    fitted = fitted.view_as(weight).to(weight)
    if mask is not None:  # a weight that is hidden by its mask stays, as the mask may change
        fitted = torch.where(mask, fitted, weight if isinstance(layer, ScoredConv2d | ScoredLinear) else 0.0)
    weight.copy_(fitted)


def set_mean(walk: Walk, node: torch.fx.Node, out: Outlet, fitted: Tensor, means: Moments) -> None:
    """Let what adds a mean to the layer's outputs, the batch norm behind it or its bias, give the mean asked for."""
    layer = walk.module(node)
    given = torch.einsum("gop,gp->go", fitted.double().view(means.yx.shape), means.x).flatten()
    if out.norm:
        given += 0 if layer.bias is None else layer.bias
        walk.module(out.norm).running_mean.add_(given - means.y.flatten())
    elif layer.bias is not None:
        layer.bias.copy_(means.y.flatten() - given)


def shift_norm(walk: Walk, node: torch.fx.Node) -> None:
    """Move a batch norm's running mean by what its input's mean has changed.

    Statistics of the calibration pictures alone would not do: those that training gathered are of augmented pictures.
    """
    means = []
    for which in (CHANGED, DENSE):
        values = list(walk.values(node.all_input_nodes[0], which))
        sums = sum(value.sum((0, 2, 3), dtype=torch.float64) for value in values)
        means.append(sums / sum(value[:, 0].numel() for value in values))
    walk.module(node).running_mean.add_(means[0] - means[1])


@torch.enable_grad()
def fisher(dense: nn.Module, names: list[str], batches: list[Tensor], most: int) -> dict[str, Tensor]:
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
                if seen >= most or not names:
                    break
                seen += len(images)
                outputs.clear()
                logits = dense(images.requires_grad_())
                labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
                gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
                images.requires_grad_(False)
                for name, gradient in zip(names, gradients, strict=True):
                    channels = -1 if isinstance(layers[name], nn.Linear) else 1
                    g = gradient.movedim(channels, 0).flatten(1)
                    result[name] = result.get(name, 0) + (g @ g.mT).double()
    finally:
        for hook in hooks:
            hook.remove()
    return result
