"""The pruned files of stripe-wise pruning (Meng et al. 2020), `pruned.pth.tar`."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from models.formats.content import Content

SKELETON = ".FilterSkeleton"


def recognise(content: Content, network: nn.Module) -> bool:
    """Whether skeletons hold true or false. Before pruning they hold numbers, as in our own files."""
    return any(name.endswith(SKELETON) and tensor.dtype == torch.bool for name, tensor in content.tensors.items())


def read(content: Content, network: nn.Module) -> Content:
    """Put zeros in the place of removed stripes and removed blocks.

    A skeleton (O, kh, kw) says which stripes a layer still has. Its weight (stripes, I, 1, 1) lists them, first all
    stripes at the first position of the kernel, in the order of their filters, then those at the next position.
    """
    tensors = dict(content.tensors)
    for name, skeleton in content.tensors.items():
        layer = name.removesuffix(SKELETON)
        stripes = tensors.get(f"{layer}.weight")
        if not name.endswith(SKELETON) or stripes is None:
            continue
        if stripes.shape[2:] == (1, 1) and len(stripes) == skeleton.sum():
            row, column, filter = skeleton.permute(1, 2, 0).nonzero().T
            weight = stripes.new_zeros(len(skeleton), stripes.shape[1], *skeleton.shape[1:])
            weight[filter, :, row, column] = stripes[:, :, 0, 0]
            tensors[f"{layer}.weight"] = weight
            del tensors[name]
    tensors, without_relu = put_back_removed_blocks(tensors, network)
    return replace(content, tensors=tensors, arch=None, narrow=True, identities=without_relu)


def put_back_removed_blocks(tensors: dict[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under our names, and the names of ReLUs that the file's network does not have.

    If one of a block's convolutions lost all its stripes, the publication puts the block's shortcut in the place of the
    whole block: nothing, or a convolution and a batch norm called `0` and `1`. No ReLU follows the latter.
    """
    tensors, without_relu = dict(tensors), []
    for block, module in network.named_modules():
        if not hasattr(module, "conv1") or not hasattr(module, "downsample") or f"{block}.conv1.weight" in tensors:
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d | nn.BatchNorm2d):
                tensors[f"{block}.{name}.value"] = torch.zeros(1, 1, 1, 1)
        moved = [name for name in tensors if name.startswith((f"{block}.0.", f"{block}.1."))]
        tensors |= {f"{block}.downsample{name.removeprefix(block)}": tensors.pop(name) for name in moved}
        without_relu += [f"{block}.relu"] * bool(moved)
    return tensors, without_relu
