"""What a file holds: unpacked, and its names translated."""

import os
import re
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from models.formats.reading import MOST_NUMBERS

TABLES = ("kept", "widths")  # facts about every layer, by its name
FACTS = {"deps": list, "classes": list, "options": dict, "accuracy": dict, "arch_options": dict}
FACTS |= dict.fromkeys(TABLES, dict)
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict")
CONTAINERS = (*AVERAGES, "state_dict", "model", "model_state_dict", "net", "network", "module")
TENSORS = Tensor | np.ndarray


@dataclass
class Content:
    """Tensors and facts of a file: at first as they stand in it, then as our own format would hold them."""

    tensors: dict[str, Tensor]
    facts: dict[str, object]  # what the file says about itself: numbers, strings, and those of `FACTS`
    form: str  # the key under which the file holds its tensors; "flat" if it holds nothing else
    arch: str | None  # what the file calls the network, if that is meant as a name of ours
    narrow: bool = False  # whether layers may have fewer channels than in the network, or be missing
    identities: list[str] = field(default_factory=list)  # modules of the network that the file's network lacks
    extras: dict[str, Tensor] = field(default_factory=dict)  # tensors that only a pruning method understands
    note: str = ""  # how the file's network differs from ours although the weights fit
    remarks: list[str] = field(default_factory=list)  # which part of the file was taken, and what was left out


# How others name the layers of a network: the name of a tensor that only their files have, and rows (their name, ours),
# where theirs is a regular expression for the whole name of a layer. The first row that fits counts.
Names = tuple[str, tuple[tuple, ...]]


def unpack(container: dict, path: str | os.PathLike, network: nn.Module) -> Content:
    """The content of a file: it is a state_dict, or a dictionary that holds one under a name of `CONTAINERS`.

    If it holds an average of the weights too, that is what its trainer evaluates, and it is taken. The names of
    tensors lose what wrappers put before them (`module.`, `_orig_mod.`, Lightning's `model.`, ...). The masks of
    `torch.nn.utils.prune` become ours, and sparse tensors dense ones.

    Raises:
        ValueError: there are no tensors, something else stands among them, or one is quantised or has no values.
    """
    tensors, form, remarks = container, "flat", []
    for _ in range(3):  # some hold one in another
        inside = next((key for key in CONTAINERS if isinstance(tensors.get(key), dict)), None)
        if inside is None:
            break
        if inside in AVERAGES:
            remarks.append(f"its average of the weights is taken ({inside})")
        elif inside not in ("state_dict", "model"):
            remarks.append(f"its {inside} is taken")
        tensors, form = tensors[inside], inside
    if form in AVERAGES:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}  # a counter
    facts = {} if form == "flat" else _facts(container)
    strays = [str(n) for n, value in tensors.items() if not (isinstance(n, str) and isinstance(value, TENSORS))]
    if strays or not tensors:
        raise ValueError(f"{path}: no state_dict in it ({strays[0] + ' is no tensor' if strays else 'nothing at all'})")
    try:
        tensors = {name: _dense(name, tensor) for name, tensor in tensors.items()}
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None
    names, prefix = _without_wrappers(list(tensors), network)
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: has {max(names, key=names.count)} twice, with and without a wrapper's prefix")
    if prefix:
        remarks.append(f"the names of its tensors are taken without {prefix}")
    tensors = _masks_of_torch(dict(zip(names, tensors.values(), strict=True)))
    return Content(tensors, facts, form, facts.get("arch"), remarks=remarks)


def _facts(container: dict) -> dict:
    values = {k: v.item() if isinstance(v, Tensor | np.generic) and v.ndim == 0 else v for k, v in container.items()}
    return {k: v for k, v in values.items() if isinstance(v, FACTS.get(k, str | int | float))}


def _dense(name: str, tensor: Tensor | np.ndarray) -> Tensor:
    try:
        tensor = torch.as_tensor(tensor).detach()
    except TypeError:
        raise ValueError(f"{name} holds {tensor.dtype}, no numbers") from None
    if tensor.is_quantized:
        raise ValueError(f"{name} is quantised ({tensor.dtype}): only networks of floating-point weights are read")
    if tensor.is_meta:
        raise ValueError(f"{name} has a shape but no values")
    if tensor.layout is not torch.strided:
        if tensor.numel() > MOST_NUMBERS:
            raise ValueError(f"{name}: a sparse tensor of {tuple(tensor.shape)} is too large for a network's")
        tensor = tensor.to_dense()
    return tensor


def _without_wrappers(names: list[str], network: nn.Module) -> tuple[list[str], str]:
    """The names without what modules around the network put before them, and that prefix where it is no common one."""
    names = [name.replace("_orig_mod.", "") for name in names]  # torch.compile, of the network or of parts of it
    while any(name.startswith("module.") for name in names):  # DataParallel
        names = [name.removeprefix("module.") for name in names]
    own, prefix = {name.partition(".")[0] for name in network.state_dict()}, ""
    while len(first := {name.partition(".")[0] for name in names}) == 1 and not first & own:
        rest = [name.partition(".")[2] for name in names]
        if not any("." in name for name in rest):
            break
        names, prefix = rest, f"{prefix}{first.pop()}."
    return names, prefix


def _masks_of_torch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weight_orig` and `weight_mask` of `torch.nn.utils.prune` as a layer's `weight` and `mask`; a bias multiplied."""
    ours = dict(tensors)
    for name in tensors:
        whole = name.removesuffix("_orig")
        if whole != name and f"{whole}_mask" in tensors:
            weight, mask = ours.pop(name), ours.pop(f"{whole}_mask")
            layer, dot, kind = whole.rpartition(".")
            ours |= {whole: weight, f"{layer}{dot}mask": mask} if kind == "weight" else {whole: weight * mask}
    return ours


def has_names(content: Content, network: nn.Module, table: dict[str, Names]) -> bool:
    """Whether the tensors have the names that `table` (arch -> names) lists for this network."""
    sign, _ = table.get(getattr(network, "arch", None), ("", ()))
    return sign in content.tensors


def renamed(content: Content, network: nn.Module, table: dict[str, Names]) -> Content:
    """The content with the names of layers that `table` lists for this network translated, if it has them.

    What the file calls the network is then taken for no name of ours.
    """
    if not has_names(content, network, table):
        return content
    _, rows = table[network.arch]

    def ours(layer: str) -> str:
        row = next((row for row in rows if re.fullmatch(row[0], layer)), None)
        return re.sub(*row, layer) if row else layer

    def our_tensor(name: str) -> str:
        layer, dot, tensor = name.rpartition(".")
        return ours(layer) + dot + tensor

    tensors = {our_tensor(name): tensor for name, tensor in content.tensors.items()}
    tables = {key: content.facts[key] for key in TABLES if key in content.facts}
    tables = {key: {ours(str(layer)): value for layer, value in fact.items()} for key, fact in tables.items()}
    return replace(content, tensors=tensors, facts=content.facts | tables, arch=None)
