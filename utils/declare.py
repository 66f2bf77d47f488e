"""Options as dataclass fields: type, default, help, range and choices stand in one declaration.

The parser, the YAML keys, `create_method` and the documentation are read from these declarations. This module needs no
torch, so that `--help` and a mistyped flag are answered at once.
"""

import dataclasses
import math
import types
import typing
from pathlib import Path


def option(
    default, help: str, *spellings: str, within: str | None = None, choices: tuple[str, ...] | None = None, alone=None
):
    """A field of an options class.

    Args:
        spellings: further flags that mean the same.
        within: the interval of valid numbers as mathematics writes it: "[0, 1)", "(0, inf)".
        choices: the valid words.
        alone: the value of a flag that is given without one.
    """
    metadata = {"help": help, "spellings": spellings, "within": within, "choices": choices, "alone": alone}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Declared:
    """The base of options classes: every value is checked against its declaration when an instance is made.

    Raises:
        ValueError: one line with the flag, the value and the valid ones.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))


def kind_of(field: dataclasses.Field) -> tuple[type, bool]:
    """The type of one value, and whether there may be several: `Path | None` -> Path, `list[int]` -> int."""
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return (typing.get_args(kind)[0], True) if typing.get_origin(kind) is list else (kind, False)


def check(field: dataclasses.Field, value: object) -> None:
    """Raise ValueError if `value` is not one that `field` declares."""
    kind, many = kind_of(field)
    choices, within = field.metadata["choices"], field.metadata["within"]
    others = typing.get_args(field.type)[1:] if isinstance(field.type, types.UnionType) else ()
    if isinstance(value, others):  # `float | None`, or `Path | dict | None` for who calls from Python
        return
    for one in value if many and isinstance(value, list) else [value]:
        if not _is_of(kind, one):
            raise ValueError(f"--{field.name} {one!r}: not {_article(kind)}")
        if choices and one not in choices:
            raise ValueError(f"--{field.name} {one}: one of {', '.join(choices)}")
        if kind is float and not math.isfinite(one):
            raise ValueError(f"--{field.name} {one}: must be a finite number")
        if within and not _lies(one, within):
            raise ValueError(f"--{field.name} {one}: must be {in_words(within)}")


def in_words(within: str) -> str:
    """The interval `within` for a reader: "(0, inf)" is "above 0", "[1, inf)" is "1 or more", "[0, 1)" "in [0, 1)"."""
    low, high = within[1:-1].split(", ")
    if high != "inf":
        return f"in {within}"
    return f"{low} or more" if within[0] == "[" else f"above {low}"


def _is_of(kind: type, value: object) -> bool:
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind | str if kind is Path else kind)


def _article(kind: type) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", Path: "a path"}
    return words.get(kind, f"a {kind.__name__}")


def _lies(value: float, within: str) -> bool:
    low, high = map(float, within[1:-1].split(", "))
    above = low <= value if within[0] == "[" else low < value
    below = value <= high if within[-1] == "]" else value < high
    return above and below
