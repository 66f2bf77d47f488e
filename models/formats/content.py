"""What a file holds: read without running any code in it, unpacked, and its names translated."""

import os
import re
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

HDF5 = b"\x89HDF\r\n\x1a\n"  # how such a file begins
FACTS = {"kept": dict, "widths": dict, "deps": list}  # facts that are tables


@dataclass
class Content:
    """Tensors and facts of a file: at first as they stand in it, then as our own format would hold them."""

    tensors: dict[str, Tensor]
    facts: dict[str, object]  # what the file says about itself: numbers, strings, and the tables in `FACTS`
    form: str  # the key under which the file holds its tensors; "flat" if it holds nothing else
    arch: str | None  # what the file calls the network, if that is meant as a name of ours
    narrow: bool = False  # whether layers may have fewer channels than in the network, or be missing
    identities: list[str] = field(default_factory=list)  # modules of the network that the file's network lacks
    extras: dict[str, Tensor] = field(default_factory=dict)  # tensors that only a pruning method understands
    note: str = ""  # how the file's network differs from ours although the weights fit


# How others name the layers of a network: the name of a tensor that only their files have, and rows (their name, ours),
# where theirs is a regular expression for the whole name of a layer. The first row that fits counts.
Names = tuple[str, tuple[tuple, ...]]


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dictionary in the file, its tensors on the CPU.

    Raises:
        ValueError: no such file, a broken one, one that needs code to be rebuilt, or no dictionary in it.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(HDF5))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not head:
        raise ValueError(f"{path}: is empty")
    return read_hdf5(path) if head == HDF5 else read_torch(path)


def read_torch(path: str | os.PathLike) -> dict:
    """What `torch.save` wrote."""
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises a dozen types: RuntimeError, KeyError, EOFError, OSError, ...
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"holds {foreign[1]}, which only code could rebuild" if foreign else "truncated, or no checkpoint"
        raise ValueError(f"{path}: {reason} (code in a checkpoint is never run)") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary")
    return content


def read_hdf5(path: str | os.PathLike) -> dict:
    """A file with one data set for each tensor. In ResRep's there is also `deps`: the widths of all convolutions."""
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: an .hdf5 file needs h5py: pip install h5py") from None
    try:
        with h5py.File(path) as file:
            arrays = {name: torch.from_numpy(np.asarray(array)) for name, array in file.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or no flat file of tensors ({str(error).splitlines()[0]})") from None
    deps = arrays.pop("deps", None)
    return {"state_dict": arrays} | ({} if deps is None else {"deps": deps.tolist()})


def unpack(container: dict, path: str | os.PathLike) -> Content:
    """The content of a file: it is a state_dict, or a dictionary that holds one as `state_dict` or `model`.

    The names of tensors may start with `module.`, which is removed.

    Raises:
        ValueError: there are no tensors, or something else stands among them.
    """
    form = next((key for key in ("state_dict", "model") if isinstance(container.get(key), dict)), "flat")
    tensors, facts = (container, {}) if form == "flat" else (container[form], _facts(container))
    strays = [str(name) for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strays or not tensors:
        raise ValueError(f"{path}: no state_dict in it ({strays[0] + ' is no tensor' if strays else 'nothing at all'})")
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Content(tensors, facts, form, facts.get("arch"))


def _facts(container: dict) -> dict:
    values = {k: v.item() if isinstance(v, Tensor) and v.ndim == 0 else v for k, v in container.items()}
    return {k: v for k, v in values.items() if isinstance(v, str | int | float | FACTS.get(k, str))}


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
    tables = {key: fact for key, fact in content.facts.items() if isinstance(fact, dict)}  # by layer
    tables = {key: {ours(layer): value for layer, value in fact.items()} for key, fact in tables.items()}
    return replace(content, tensors=tensors, facts=content.facts | tables, arch=None)
