"""Pruning methods behind one interface: `create_method(name, **options)`, then attach, step, finish."""

import dataclasses
from collections.abc import Callable
from functools import partial

from pruning.method import Method, finish, proven_copy
from pruning.oneshot import ROWS, OneShot
from pruning.surgery import find_blocks, gather_blocks

__all__ = [
    "ALIASES",
    "METHODS",
    "Method",
    "create_method",
    "find_blocks",
    "finish",
    "gather_blocks",
    "option_names",
    "proven_copy",
]

METHODS: dict[str, Callable[..., Method]] = {"dense": Method, **{row: partial(OneShot, row) for row in ROWS}}

# The layer names of the 1xN publication, as its users type them.
ALIASES = {
    "DenseConv": "dense",
    "BlockL1Conv": "block_l1",
    "BlockRandomConv": "block_random",
    "UnstructureConv": "weight",
    "StructureConv": "filter",
}


def option_names(name: str) -> set[str]:
    """The options that the method called `name` takes."""
    maker = METHODS[name]
    cls = maker.func if isinstance(maker, partial) else maker
    taken = len(maker.args) if isinstance(maker, partial) else 0
    fields = dataclasses.fields(cls)[taken:] if dataclasses.is_dataclass(cls) else ()
    return {field.name for field in fields if field.init}


def create_method(name: str, **options) -> Method:
    """A method by its name or the paper's layer name; options bear the names of the command line's flags.

    Options that concern only other methods are left out, so one set of flags serves all.

    Raises:
        ValueError: no such method, an option that no method knows, or a value out of range.
    """
    key = ALIASES.get(name, name)
    if key not in METHODS:
        raise ValueError(f"unknown method {name!r}: one of {', '.join([*METHODS, *ALIASES])}")
    unknown = options.keys() - set().union(*map(option_names, METHODS))
    if unknown:
        raise ValueError(f"no pruning method has an option {', '.join(sorted(unknown))}")
    wanted = option_names(key)
    return METHODS[key](**{option: value for option, value in options.items() if option in wanted})
