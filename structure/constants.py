"""Channels that hold the same value for every picture and every pixel.

They are found by running the traced network on channels instead of pictures: a value (1, C, 1, 1) stands for whole
channels. It is the constant that a channel holds, or NaN if the channel varies.
"""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from structure.capture import evaluating
from structure.graph import Graph
from structure.merging import fuse_batch_norm
from structure.operators import (
    POOL_CALLS,
    POOL_MODULES,
    PRODUCT_CALLS,
    REDUCTIONS,
    RESIZE_CALLS,
    RESIZE_MODULES,
    ZERO_PADDING,
    argument,
)


class Constant(nn.Module):
    """Takes the place of a layer of a removed branch: returns `value`, one number a channel, whatever comes in."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def constant_inputs(graph: Graph) -> dict[str, Tensor]:
    """Layer name -> float64 (input channels,): the value that a channel always has there, NaN if it varies."""
    return interpret(graph).inputs


@torch.no_grad()
def interpret(graph: Graph) -> "Interpreter":
    """Run the traced network on channels: the result knows the value of every node, and the inputs of every layer."""
    interpreter = Interpreter(torch.fx.GraphModule(graph.network, graph.traced))
    device = next(graph.network.parameters()).device
    with evaluating(graph.network):
        interpreter.run(torch.full((1, 3, 1, 1), torch.nan, dtype=torch.float64, device=device))
    return interpreter


class Interpreter(torch.fx.Interpreter):
    """Computes with values (1, C, 1, 1) that stand for whole channels.

    NaN spreads by itself through activations, sums and reshapes. Layers, batch norms, products and pooling need rules
    of their own. The result of an operator that cannot compute with such values is taken to vary.

    Attributes:
        env: node -> value.
        inputs: layer name -> float64 (input channels,).
    """

    def __init__(self, module: torch.fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.inputs: dict[str, Tensor] = {}

    def run_node(self, node: torch.fx.Node):
        try:
            if node.target is F.pad:
                return _padded(self.map_nodes_to_values(node.args[0], node), node)
            return super().run_node(node)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return torch.tensor(torch.nan, dtype=torch.float64)

    def call_module(self, target: str, args: tuple, kwargs: dict):
        module, value = self.fetch_attr(target), args[0]
        if isinstance(module, nn.Conv2d | nn.Linear):
            channels = getattr(module, "in_channels", None) or value.numel()
            if value.numel() not in (1, channels):  # what is no value a channel, tells nothing
                value = value.new_full((), torch.nan)
            value = self.inputs[target] = value.flatten().expand(channels).clone()
            return _through_layer(module, value).view(1, -1, *[1] * (2 * isinstance(module, nn.Conv2d)))
        if isinstance(module, nn.BatchNorm2d):
            plain = type(module).forward is nn.BatchNorm2d.forward  # else it computes nobody knows what
            return _through_batch_norm(module, value) if plain else torch.full_like(value, torch.nan)
        if isinstance(module, RESIZE_MODULES):
            return value
        if isinstance(module, ZERO_PADDING):
            return _beside_zeros(value, True)
        if isinstance(module, POOL_MODULES):
            return value if not isinstance(module, nn.AvgPool2d) else _beside_zeros(value, _pads(module))
        return super().call_module(target, args, kwargs)

    def call_function(self, target, args: tuple, kwargs: dict):
        if target in PRODUCT_CALLS:
            return _product(*args)
        if target in RESIZE_CALLS:
            return args[0]
        if target in POOL_CALLS - REDUCTIONS:  # which may take the spatial axes away
            return _beside_zeros(args[0], target is F.avg_pool2d)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: str, args: tuple, kwargs: dict):
        return _product(*args) if target in PRODUCT_CALLS else super().call_method(target, args, kwargs)


def foldable(layer: nn.Module, value: Tensor) -> Tensor:
    """`value` (input channels,), with NaN also where a constant input does not add a constant to the layer's outputs.

    That is so if the layer pads with zeros, and the constant is another number.
    """
    return _beside_zeros(value, isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and _pads(layer))


def by_channel(layer: nn.Module, channels: int) -> Tensor:
    """A layer's weight as (groups, outputs a group, inputs a group, what one output reads of one input)."""
    groups = getattr(layer, "groups", 1)
    # A linear layer behind a flatten has several columns a channel.
    return layer.weight.reshape(groups, len(layer.weight) // groups, channels // groups, -1)


def _product(a: Tensor, b: Tensor | float) -> Tensor:
    zero = torch.as_tensor((a == 0) | (b == 0))
    return torch.where(zero, 0.0, a * b)  # zero times a channel that varies is zero, not NaN


def _through_batch_norm(norm: nn.BatchNorm2d, value: Tensor) -> Tensor:
    ones = torch.ones_like(norm.running_mean).view(-1, 1)
    scale, shift = fuse_batch_norm(ones, None, norm.state_dict(), norm.eps)  # of a convolution that changes nothing
    scale, shift = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
    return torch.where(scale == 0, shift, value * scale + shift)


def _through_layer(layer: nn.Module, value: Tensor) -> Tensor:
    """The outputs (outputs,) of a layer whose inputs are `value`: NaN where an output reads a channel that varies."""
    weight = by_channel(layer, len(value)).double()
    value = foldable(layer, value).view(weight.shape[0], 1, -1)
    reads_varying = ((weight != 0).any(3) & value.isnan()).any(2)
    total = (weight.sum(3) * value.nan_to_num(0)).sum(2)
    bias = 0 if layer.bias is None else layer.bias.double()
    return torch.where(reads_varying, torch.nan, total).flatten() + bias


def _padded(value: Tensor, node: torch.fx.Node) -> Tensor:
    """What `F.pad` makes of channels: where it pads pixels with a number, only that number stays constant."""
    pads, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
    if len(pads) > 4:
        return F.pad(value, list(pads), mode, argument(node, 3, "value"))
    return value.where(value == (argument(node, 3, "value") or 0), torch.nan) if mode == "constant" else value


def _beside_zeros(value: Tensor, padded: bool) -> Tensor:
    """If zeros are padded around a channel, it is still constant only where its own constant is zero."""
    return value.where(value == 0, torch.nan) if padded else value


def _pads(layer: nn.Module) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding) if isinstance(layer.padding, tuple) else layer.padding > 0
