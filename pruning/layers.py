"""Layers with a mask beside their weight, fixed or decided by scores that are learned.

Under a fixed mask the weight itself is kept at zero where the mask is zero. Holding the zeros in the weight (after
every update, `hold`) gives the same kept weights as multiplying by the mask in every forward pass, since an elementwise
optimiser never mixes entries, and costs no memory traffic in forward and backward. It also means that every checkpoint
holds exactly what the network computes with.

Under scores the weight stays dense, since what is pruned now may be kept later; forward makes the product.
"""

import torch
from torch import Tensor, nn


class MaskedConv2d(nn.Conv2d):
    """`nn.Conv2d` with a buffer `mask` (0 or 1, of the weight's shape)."""


class MaskedLinear(nn.Linear):
    """`nn.Linear` with a buffer `mask` (0 or 1, of the weight's shape)."""


class _Chosen(torch.autograd.Function):
    """weight * mask(|scores|). Backward takes the mask's step function for the identity (straight-through)."""

    @staticmethod
    def forward(ctx, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scores, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, scores, mask = ctx.saved_tensors
        to_weight, to_scores, _ = ctx.needs_input_grad
        return gradient * mask if to_weight else None, gradient * weight * scores.sign() if to_scores else None, None


class ScoredConv2d(nn.Conv2d):
    """`nn.Conv2d` with parameters `popup_scores` and a buffer `mask`, both of the weight's shape."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _Chosen.apply(self.weight, self.popup_scores, self.mask), self.bias)


class ScoredLinear(nn.Linear):
    """`nn.Linear` with parameters `popup_scores` and a buffer `mask`, both of the weight's shape."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, _Chosen.apply(self.weight, self.popup_scores, self.mask), self.bias)


_MASKED = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}
_SCORED = {nn.Conv2d: ScoredConv2d, nn.Linear: ScoredLinear}
_PLAIN = {ours: plain for table in (_MASKED, _SCORED) for plain, ours in table.items()}


def check_plain(layers: dict[str, nn.Module]) -> None:
    """Raise ValueError if one of `layers` (by name) is not a plain layer, whose weight alone says what it computes.

    Subclasses compute something else; weight_norm, spectral_norm and torch.nn.utils.prune compute the weight anew in
    every forward pass, so that a mask in it would be lost.
    """
    for name, layer in layers.items():
        if type(layer) not in _MASKED:
            raise ValueError(f"{name} is a {type(layer).__name__}: only plain Conv2d and Linear layers can be pruned")
        if "weight" not in layer._parameters:
            raise ValueError(f"{name}: its weight is computed from other tensors: undo that before pruning it")


def add_mask(layer: nn.Module, mask: Tensor) -> None:
    """Turn a plain layer into a masked one, in place: its parameters, hooks and names stay what they are."""
    layer.__class__ = _MASKED[type(layer)]
    layer.register_buffer("mask", torch.empty_like(layer.weight).copy_(mask))
    hold([layer])


def add_scores(layer: nn.Module, scores: Tensor) -> None:
    """Turn a plain layer into a scored one that keeps everything so far, in place."""
    layer.__class__ = _SCORED[type(layer)]
    layer.popup_scores = nn.Parameter(scores)
    layer.register_buffer("mask", torch.ones_like(layer.weight))


def remove_mask(layer: nn.Module) -> None:
    """Turn a masked or scored layer back into a plain one whose weight has the mask folded in."""
    hold([layer])
    del layer.mask
    layer._parameters.pop("popup_scores", None)
    layer.__class__ = _PLAIN[type(layer)]


def masked_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Masked and scored layers by name."""
    return {name: module for name, module in network.named_modules() if type(module) in _PLAIN}


@torch.no_grad()
def hold(layers: list[nn.Module]) -> None:
    """Zero what the masks of `layers` say must be zero."""
    if layers:
        torch._foreach_mul_([layer.weight for layer in layers], [layer.mask for layer in layers])
