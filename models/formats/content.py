"""What a file holds, and the translation of names in it."""

import os
import re
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

FACTS = {"kept": dict, "widths": dict, "deps": list}  # facts that are tables


@dataclass
class Content:
    """Tensors and facts of a file. Readers make of a file's own content what our own format would hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, object]  # what the file says about itself: numbers, strings, and the tables in `FACTS`
    form: str  # the key under which the file holds its tensors, or "flat" if it holds nothing else
    arch: str | None  # the network's name, where the file says it and it is a name of ours
    narrow: bool = False  # layers may have fewer channels than the network's, or be missing
    identities: list[str] = field(default_factory=list)  # modules that the file's network does not have
    extras: dict[str, Tensor] = field(default_factory=dict)  # tensors that only a pruning method understands
    note: str = ""  # in what the file's network differs from ours though the weights fit


# How others name the layers of a network: a tensor that only their files have, and rows of regular expressions for
# whole layer names: theirs, and ours. The first row that fits counts.
Names = tuple[str, tuple[tuple, ...]]


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


def renamed(content: Content, rows: tuple[tuple, ...]) -> Content:
    """The content with the names of all layers translated. What it calls the network is then no name of ours."""

    def ours(layer: str) -> str:
        row = next((row for row in rows if re.fullmatch(row[0], layer)), None)
        return re.sub(*row, layer) if row else layer

    def our_tensor(name: str) -> str:
        layer, dot, tensor = name.rpartition(".")
        return ours(layer) + dot + tensor

    tensors = {our_tensor(name): tensor for name, tensor in content.tensors.items()}
    facts = {
        key: {ours(layer): value for layer, value in fact.items()} if isinstance(fact, dict) else fact
        for key, fact in content.facts.items()
    }
    return replace(content, tensors=tensors, facts=facts, arch=None)
