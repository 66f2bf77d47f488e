"""Our own format: a dictionary with a plain network's `state_dict`, and what it says about itself beside it.

In the middle of a run the `state_dict` also holds what the pruning method has put into the layers.
"""

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from models import NETWORKS, libraries
from models.formats.content import Content
from structure import fuse_batch_norm, fuse_pointwise, norms_after_convolutions, widths
from utils import files

SCORES = ".popup_scores"
SCALES = ".FilterSkeleton"
COMPACTOR = ".compactor.weight"
FORGOTTEN = 1e-5  # a row of a compactor whose norm is smaller is zero (ResRep's `conversion_threshold`)


def describe(network: nn.Module, **facts: object) -> dict:
    """What a file says about its network, and `facts`: anything that can be loaded without running code.

    Of a network that is not ours it also says which options and which version of its library rebuild it, and whether
    its layers are `plain` (`structure.plainify`), since their names are others then.
    """
    own = {"arch": network.arch, "num_classes": network.num_classes, "widths": widths(network)}
    if network.arch not in NETWORKS:
        own |= {"arch_options": getattr(network, "arch_options", {}), "library": libraries.version(network.arch)}
        own |= {"plain": getattr(network, "plain", False)}
    return own | facts


def save_checkpoint(path: Path, network: nn.Module, **facts: object) -> None:
    """Write a network of plain layers, and `facts` about it, for `load_checkpoint` to read."""
    files.save_checkpoint(path, describe(network, **facts) | {"state_dict": network.state_dict()})


def read(content: Content, network: nn.Module) -> Content:
    """Fold what pruning methods keep beside the weights.

    - `<layer>.FilterSkeleton` (O, kh, kw), the scales of stripes, is multiplied into the layer's weight.
    - `<layer>.compactor` of ResRep is merged with the batch norm and the convolution before it.
    - `<layer>.popup_scores` of BiP and Hydra become extras, since only the method knows which mask they mean.
    - `<layer>.mask` stays where it is: fitting multiplies it into the layer's weight.

    A file that lists `widths`, or that has compactors, may be of a narrower network.
    """
    extras = {name: tensor for name, tensor in content.tensors.items() if name.endswith(SCORES)}
    tensors = {name: tensor for name, tensor in content.tensors.items() if name not in extras}
    tensors, merged = merge_compactors(fold_scales(tensors), network)
    narrow = content.narrow or merged or "widths" in content.facts
    return replace(content, tensors=tensors, extras=extras, narrow=narrow)


def fold_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the scales of stripes multiplied into the weights. Scales that fit no weight stay, an error."""
    folded = dict(tensors)
    for name, scales in tensors.items():
        weight = tensors.get(f"{name.removesuffix(SCALES)}.weight")
        if name.endswith(SCALES) and weight is not None and scales.shape == (len(weight), *weight.shape[2:]):
            folded[f"{name.removesuffix(SCALES)}.weight"] = weight * scales[:, None]
            del folded[name]
    return folded


def merge_compactors(tensors: dict[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], bool]:
    """The tensors with every compactor merged into the layers before it, and whether there was a compactor.

    These layers are a convolution and its batch norm, or a convolution alone. Only the convolution is left, with a
    bias, and with zeros in the rows that the compactor forgets. A compactor that fits no layer stays, an error.
    """
    hosts = [name.removesuffix(COMPACTOR) for name in tensors if name.endswith(COMPACTOR)]
    convolutions = norms_after_convolutions(network) if hosts else {}
    modules, tensors = dict(network.named_modules()), dict(tensors)
    for host in hosts:
        layer, norm = convolutions.get(host, host), modules.get(host)
        own = {key: tensors.get(f"{host}.{key}") for key in ("weight", "bias", "running_mean", "running_var")}
        weight, bias = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.bias")
        rows = tensors[host + COMPACTOR].double().flatten(1)
        known = [weight, *own.values()] if isinstance(norm, nn.BatchNorm2d) else [weight]
        if any(tensor is None or len(tensor) != len(rows) for tensor in known) or rows.shape[1] not in (1, len(rows)):
            continue
        if isinstance(norm, nn.BatchNorm2d):
            weight, bias = fuse_batch_norm(weight, bias, own, norm.eps)
        weight, bias = fuse_pointwise(weight, bias, rows * (rows.norm(dim=1, keepdim=True) >= FORGOTTEN))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{host}.")}
        tensors |= {f"{layer}.weight": weight.float(), f"{layer}.bias": bias.float()}
    return tensors, bool(hosts)
