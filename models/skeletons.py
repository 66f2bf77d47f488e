"""Files of stripe-wise pruning (Meng et al. 2020): its scales of stripes, and its pruned networks."""

import torch
from torch import Tensor, nn


def fold(tensors: dict[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], bool, list[str]]:
    """The tensors of a file with every `<layer>.FilterSkeleton` (O, kh, kw) gone into the layer's weight.

    A float skeleton scales the stripes of a whole weight. A bool one says which stripes a pruned layer has; its weight
    (stripes, I, 1, 1) holds them position by position, from the first filter to the last in each.

    Returns:
        the tensors, whether the file is the publication's `pruned.pth.tar`, and the blocks that lack their ReLU there.
    """
    suffix = ".FilterSkeleton"
    skeletons = {f"{name.removesuffix(suffix)}.weight": name for name in tensors if name.endswith(suffix)}
    folded = {name: tensor for name, tensor in tensors.items() if name not in skeletons.values()}
    for name in skeletons.keys() & folded.keys():
        weight, skeleton = tensors[name], tensors[skeletons[name]]
        if skeleton.dtype == torch.bool and weight.shape[2:] == (1, 1) and len(weight) == skeleton.sum():
            row, column, filter = skeleton.permute(1, 2, 0).nonzero().T
            folded[name] = weight.new_zeros(len(skeleton), weight.shape[1], *skeleton.shape[1:])
            folded[name][filter, :, row, column] = weight[:, :, 0, 0]
        elif skeleton.shape == (len(weight), *weight.shape[2:]):
            folded[name] = weight * skeleton[:, None]
    broken = any(tensors[name].dtype == torch.bool for name in skeletons.values())
    folded, without_relu = _name_removed_blocks(folded, network) if broken else (folded, [])
    return folded, broken, without_relu


def _name_removed_blocks(tensors: dict[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """A broken file's tensors under our names, and the blocks that end without their ReLU there.

    The publication puts a block's shortcut in its place if one of its convolutions lost all stripes.
    """
    tensors, bare = dict(tensors), []
    for block, module in network.named_modules():
        if not hasattr(module, "conv1") or not hasattr(module, "downsample") or f"{block}.conv1.weight" in tensors:
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d | nn.BatchNorm2d):
                tensors[f"{block}.{name}.value"] = torch.zeros(1, 1, 1, 1)
        moved = [name for name in tensors if name.startswith((f"{block}.0.", f"{block}.1."))]
        tensors |= {f"{block}.downsample{name.removeprefix(block)}": tensors.pop(name) for name in moved}
        bare += [block] * bool(moved)
    return tensors, bare
