"""Merge a convolution with the linear operations behind it, in float64."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.no_grad()
def fuse_batch_norm(
    weight: Tensor, bias: Tensor | None, norm: Mapping[str, Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """Merge a convolution with the batch norm in eval mode that reads its output.

    Args:
        weight: (O, ...).
        bias: (O,), or None for zeros.
        norm: the state of the batch norm: running_mean, running_var and, unless it is not affine, weight and bias.
        eps: of the batch norm.

    Returns:
        float64 weight (O, ...) and bias (O,) of the convolution that computes both.
    """
    own = {name: tensor.double() for name, tensor in norm.items()}
    bias = None if bias is None else bias.double()
    statistics = own["running_mean"], own["running_var"]
    return fuse_conv_bn_weights(weight.double(), bias, *statistics, eps, own.get("weight"), own.get("bias"))


@torch.no_grad()
def fuse_pointwise(weight: Tensor, bias: Tensor | None, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Merge a convolution with the 1x1 convolution without bias that reads its output.

    Args:
        weight: (O, ...).
        bias: (O,), or None for zeros.
        matrix: the weight of the 1x1 convolution: (P, O), or (O, 1) if it only scales each channel.

    Returns:
        float64 weight (P, ...) and bias (P,) of the convolution that computes both.
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    both = torch.cat([weight.flatten(1), bias.view(-1, 1)], 1).double()
    matrix = matrix.double()
    both = matrix * both if matrix.shape[1] == 1 else matrix @ both
    return both[:, :-1].unflatten(1, weight.shape[1:]), both[:, -1]
