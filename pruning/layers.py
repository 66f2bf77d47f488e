"""Layers with a mask beside their weight. The weight itself is kept at zero where the mask is zero.

Holding the zeros in the weight (after every update, `hold`) gives the same kept weights as multiplying by the mask in
every forward pass, since an elementwise optimiser never mixes entries, and costs no memory traffic in forward and
backward. It also means that every checkpoint holds exactly what the network computes with.
"""

import torch
from torch import Tensor, nn


class MaskedConv2d(nn.Conv2d):
    """`nn.Conv2d` with a buffer `mask` (0 or 1, of the weight's shape)."""


class MaskedLinear(nn.Linear):
    """`nn.Linear` with a buffer `mask` (0 or 1, of the weight's shape)."""


_MASKED = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}
_PLAIN = {masked: plain for plain, masked in _MASKED.items()}


def add_mask(layer: nn.Module, mask: Tensor) -> None:
    """Turn a plain layer into a masked one, in place: its parameters, hooks and names stay what they are."""
    layer.__class__ = _MASKED[type(layer)]
    layer.register_buffer("mask", mask.view_as(layer.weight).to(layer.weight))
    hold([layer])


def remove_mask(layer: nn.Module) -> None:
    """Turn a masked layer back into a plain one whose weight has the mask folded in."""
    hold([layer])
    del layer.mask
    layer.__class__ = _PLAIN[type(layer)]


def masked_layers(network: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if type(module) in _PLAIN}


@torch.no_grad()
def hold(layers: list[nn.Module]) -> None:
    """Zero what the masks of `layers` say must be zero."""
    if layers:
        torch._foreach_mul_([layer.weight for layer in layers], [layer.mask for layer in layers])
