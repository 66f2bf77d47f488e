"""The files of stripe-wise pruning (Meng et al. 2020): `best.pth.tar`, trained, and `pruned.pth.tar`, broken."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.formats.content import Content
from models.formats.fitting import fit
from models.formats.own import SCALES, fold_scales
from structure import Graph, remove_branches, slice_channels

THRESHOLD = 0.05  # of the publication's results with ResNet-56; the files do not tell theirs


def recognise(content: Content, network: nn.Module) -> bool:
    """Whether there are skeletons, but no list of widths, as in the files of our own runs."""
    return any(name.endswith(SCALES) for name in content.tensors) and "widths" not in content.facts


def read(content: Content, network: nn.Module) -> Content:
    skeletons = [tensor for name, tensor in content.tensors.items() if name.endswith(SCALES)]
    broken = any(tensor.dtype == torch.bool for tensor in skeletons)
    return read_broken(content, network) if broken else read_trained(content, network)


@torch.no_grad()
def read_trained(content: Content, network: nn.Module) -> Content:
    """Prune the file's network as the publication does after training.

    Stripes whose scale is `threshold` or less go (a fact that the caller may give, or `THRESHOLD`); so does a filter
    without any, with its batch norm, unless a residual sum needs its channel. The scales of projections stay: there, a
    stripe is a whole filter. A branch that is left without stripes goes, too, but what it adds to the sum stays.
    """
    threshold = content.facts.get("threshold", THRESHOLD)
    tensors, pruned = dict(content.tensors), copy.deepcopy(network)
    graph, living, gone = Graph(pruned), {}, 0
    for name, scales in content.tensors.items():
        layer = name.removesuffix(SCALES)
        if not name.endswith(SCALES) or not isinstance(graph.layers.get(layer), nn.Conv2d):
            continue
        shape, space = graph.layers[layer].weight.shape, graph.output[layer]
        if scales.shape != (shape[0], *shape[2:]) or (space.fixed and scales[0].numel() == 1):
            continue
        stays = scales.abs() > threshold
        gone += int((scales[~stays] != 0).sum())
        tensors[name] = scales * stays
        if not space.fixed:
            alive = stays.flatten(1).any(1)
            affine = {key: tensors[key] for key in _affine(graph, space.carriers) if key in tensors}
            tensors |= {key: tensor * alive for key, tensor in affine.items() if tensor.shape == alive.shape}
            if alive.any():
                living[layer] = alive.nonzero().flatten()
    state, _, misfits = fit(fold_scales(tensors), pruned)
    if misfits:
        return content  # they are told when the network is filled
    pruned.load_state_dict(state)
    slice_channels(pruned, living)
    remove_branches(pruned)
    note = f"{gone} stripes whose scale is {threshold:g} or less are removed, as published" if gone else ""
    return replace(content, tensors=pruned.state_dict(), arch=None, narrow=True, note=note)


def _affine(graph: Graph, carriers: list[str]) -> list[str]:
    """Names of the weights and biases of the batch norms among `carriers`."""
    norms = [name for name in carriers if isinstance(graph.modules[name], nn.BatchNorm2d)]
    return [f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")]


def read_broken(content: Content, network: nn.Module) -> Content:
    """Put zeros in the place of removed stripes and removed blocks.

    A skeleton (O, kh, kw) says which stripes a layer still has. Its weight (stripes, I, 1, 1) lists them, first all
    stripes at the first position of the kernel, in the order of their filters, then those at the next position.
    """
    tensors = dict(content.tensors)
    for name, skeleton in content.tensors.items():
        layer = name.removesuffix(SCALES)
        stripes = tensors.get(f"{layer}.weight")
        if not name.endswith(SCALES) or stripes is None:
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
