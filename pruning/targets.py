"""What a layer of the pruned network reads, and what it should give there, at places drawn from the pictures.

It should give what the dense network computes there. The last layer of a residual branch also corrects what the
shortcut carries (He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", 2017). Where the
activation behind the layer cuts off what the dense network computes, anything that is cut off, too, will do (Zhang,
Zou, He and Sun, "Accelerating Very Deep Convolutional Networks for Classification and Detection", 2015).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.reconstruction import Moments
from structure import CHANGED, DENSE, Walk

POSITIONS = 50_000  # that a layer looks at, at most
NUMBERS = 2**22  # in the columns of one batch, at most
FAINT = 1e-3  # a batch norm that multiplies by less hides a layer's outputs
# Between which inputs an activation tells values apart. ReLU6 is left out: EfficientNet-Lite0 on 300 pictures had 45 %
# in the one run with it, 52 % in an earlier one without.
RELU = (0.0, math.inf)
ACTIVATIONS = {nn.ReLU: RELU, torch.relu: RELU, F.relu: RELU, "relu": RELU, "relu_": RELU}


@dataclass
class Outlet:
    """What happens to the outputs y of a layer up to its activation: scale * y + shift + what a shortcut adds.

    Attributes:
        norm: the batch norm that alone reads the layer.
        scale, shift: (O,), of the dense network's batch norm; 1 and 0 without.
        shortcut: the node that is added behind.
        low, high: the activation tells no values apart below and above; infinite without.
    """

    norm: torch.fx.Node | None
    scale: Tensor
    shift: Tensor
    shortcut: torch.fx.Node | None
    low: float
    high: float

    @property
    def cuts(self) -> bool:
        return math.isfinite(self.low) or math.isfinite(self.high)


def outlet(walk: Walk, node: torch.fx.Node) -> Outlet:
    """That of the layer which `node` calls."""
    norm, ones = walk.norm_after(node), torch.ones_like(walk.module(node, DENSE).weight.flatten(1)[:, 0])
    scale, shift = ones, torch.zeros_like(ones)
    if norm:
        dense = walk.module(norm, DENSE)
        scale = (dense.running_var + dense.eps).rsqrt() * (ones if dense.weight is None else dense.weight)
        shift = (shift if dense.bias is None else dense.bias) - dense.running_mean * scale
    last = norm or node
    shortcut = walk.shortcut(last)
    if shortcut:
        (last,) = last.users
    (reader, *others) = last.users
    kind = type(walk.module(reader)) if reader.op == "call_module" else reader.target
    low, high = (-math.inf, math.inf) if others else ACTIVATIONS.get(kind, (-math.inf, math.inf))
    return Outlet(norm, scale, shift, shortcut, low, high)


def measure(walk: Walk, node: torch.fx.Node, out: Outlet) -> Moments:
    """The moments of what the layer reads in the changed network and of what it should give."""
    return reduce(Moments.plus, (Moments.of(x, y) for x, y, _ in places(walk, node, out)))


def measure_cut(walk: Walk, node: torch.fx.Node, out: Outlet, weight: Tensor, means: Moments, xx: Tensor) -> Moments:
    """The moments where errors that the activation cuts off count for nothing.

    Where the dense network's value is cut off, the layer should give what it gives under `weight` if that is cut off,
    too, and else the value at which the activation begins to cut.

    Args:
        weight: (O, p).
        means: of x and y; whatever is behind the layer adds what `weight` leaves of the mean of y.
        xx: as `measure` has summed it up, which stays.
    """
    weight = weight.float()
    bias = means.y[0].float() - weight @ means.x[0].float()
    scale = out.scale.where(out.scale.abs() >= FAINT, math.inf)

    def moments(x: Tensor, y: Tensor, added: Tensor | float) -> Moments:
        wanted, given = (value * out.scale + out.shift + added for value in (y, x @ weight.T + bias))
        new = torch.where(wanted <= out.low, given.clamp_max(out.low), wanted)
        new = torch.where(wanted >= out.high, given.clamp_min(out.high), new)
        return Moments.of(x, y + (new - wanted) / scale, squares=False)

    total = reduce(Moments.plus, (moments(x, y, added) for x, y, added in places(walk, node, out)))
    total.xx = xx
    return total


def places(walk: Walk, node: torch.fx.Node, out: Outlet) -> Iterator[tuple[Tensor, Tensor, Tensor | float]]:
    """By batch: columns x (G, places, p), what the layer should give (G, places, O / G), and what is added behind."""
    layer, generator = walk.module(node), torch.Generator().manual_seed(0)
    channels, groups = (-1, 1) if isinstance(layer, nn.Linear) else (1, layer.groups)
    most = -(-POSITIONS // sum(map(len, walk.batches)))
    inputs, outputs = walk.values(node.all_input_nodes[0], CHANGED), walk.values(node, DENSE)
    if not out.shortcut:
        for x, y in zip(inputs, outputs, strict=True):
            yield *sampled(layer, x, y, most, generator), 0.0
        return
    scale = out.scale.where(out.scale.abs() >= FAINT, math.inf)
    carried = (walk.values(out.shortcut, which) for which in (DENSE, CHANGED))
    for x, y, before, now in zip(inputs, outputs, *carried, strict=True):
        y = y + ((before - now).movedim(channels, -1) / scale).movedim(-1, channels)
        parts = zip(*(value.chunk(groups, channels) for value in (y, now.expand_as(y))), strict=True)
        both = torch.cat([part for pair in parts for part in pair], channels)  # one group after the other
        columns, both = sampled(layer, x, both, most, generator)
        yield columns, *both.chunk(2, -1)


def sampled(layer: nn.Module, x: Tensor, y: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Columns (G, positions, p) and outputs (G, positions, O / G) at the same places, `most`, of each picture."""
    if isinstance(layer, nn.Linear):  # channels last: (B, I), (B, tokens, I) or (B, H, W, I)
        x, y = (value.reshape(len(value), -1, value.shape[-1]) for value in (x, y))
        at = torch.randperm(y.shape[1], generator=generator)[: min(most, max(1, NUMBERS // x[:, 0].numel()))]
        return tuple(value[:, at.to(value.device)].flatten(0, 1)[None] for value in (x, y))
    (kh, kw), (sh, sw), (dh, dw), groups = layer.kernel_size, layer.stride, layer.dilation, layer.groups
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    most = min(most, max(1, NUMBERS // (len(y) * x.shape[1] * kh * kw)))
    at = torch.randperm(y[0, 0].numel(), generator=generator)[:most].to(x.device)
    rows = (at // y.shape[3])[:, None, None] * sh + torch.arange(kh, device=x.device)[:, None] * dh  # (L, kh, 1)
    columns = (at % y.shape[3])[:, None, None] * sw + torch.arange(kw, device=x.device) * dw  # (L, 1, kw)
    x = x.permute(0, 2, 3, 1)[:, rows, columns]  # (B, L, kh, kw, C): channels last in memory, too
    x = x.unflatten(4, (groups, -1)).permute(4, 0, 1, 5, 2, 3).reshape(groups, len(y) * len(at), -1)
    y = y.flatten(2)[:, :, at].unflatten(1, (groups, -1)).permute(1, 0, 3, 2).reshape(groups, len(y) * len(at), -1)
    return x, y
