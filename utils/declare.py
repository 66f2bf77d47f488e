"""Options as dataclass fields: type, default, help, range and choices stand in one declaration.

The parser, the YAML keys, `create_method` and the documentation are read from these declarations. This module needs no
torch, so that `--help` and a mistyped flag are answered at once.
"""

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

REQUIRED = dataclasses.MISSING  # the default of an option that must be given

LARGEST = 2**63 - 1  # as whole numbers are stored nearly everywhere


def option(
    default: object,
    help: str,
    *spellings: str,
    within: str | None = None,
    choices: tuple[str, ...] | None = None,
    alone: object = None,
    read: Callable[[str], object] | None = None,
):
    """A field of an options class.

    Args:
        default: its value where it is not given; `REQUIRED` if it must be.
        help: one line for the user.
        spellings: further flags that mean the same.
        within: the interval of valid numbers as mathematics writes it: "[0, 1)", "(0, inf)".
        choices: the valid words.
        alone: the value of a flag that is given without one.
        read: makes the value of a word of the command line, where the field's type alone does not say how.
    """
    metadata = {"help": help, "spellings": spellings, "within": within, "choices": choices, "alone": alone}
    metadata["read"] = read
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    required = {"kw_only": True} if default is REQUIRED else {}  # else no field with a default could stand before it
    return dataclasses.field(default=default, metadata=metadata, **required)


@dataclasses.dataclass(frozen=True)
class Declared:
    """The base of options classes: every value is checked against its declaration when an instance is made.

    Raises:
        ValueError: one line with the flag, the value and the valid ones.
    """

    def __post_init__(self) -> None:
        for field in options_of(type(self)):
            check(field, getattr(self, field.name))

    def to_json(self) -> dict[str, object]:
        """The values by name, paths as text."""
        values = {field.name: getattr(self, field.name) for field in options_of(type(self))}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def options_of(cls: type) -> list[dataclasses.Field]:
    """The fields of an options class that are options: those declared by `option`."""
    return [field for field in dataclasses.fields(cls) if "help" in field.metadata]


def sections_of(cls: type) -> dict[type, list[dataclasses.Field]]:
    """The options of a class by the class that declares them: its bases are the groups in which a reader finds them."""
    sections = {}
    for field in options_of(cls):
        owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        sections.setdefault(owner, []).append(field)
    return {base: sections[base] for base in cls.__mro__ if base in sections}


def flags_of(field: dataclasses.Field) -> list[str]:
    """Every flag that sets the option; `--no_NAME` switches off what `--NAME` switches on."""
    flags = [f"--{field.name}", *field.metadata["spellings"]]
    return flags + [f"--no_{flag[2:]}" for flag in flags] if kind_of(field)[0] is bool else flags


def default_of(field: dataclasses.Field) -> object:
    """The value of an option that is not given; `REQUIRED` if it must be."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def default_in_words(field: dataclasses.Field) -> str:
    """The default for a reader; empty where it is off, not set, or explained by the help."""
    default = default_of(field)
    if default is None or default is False or default is REQUIRED:
        return ""
    return "on" if default is True else " ".join(map(str, default)) if isinstance(default, list) else str(default)


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
            shown = (
                f"is a {type(one).__name__}" if isinstance(one, list | dict | set) else repr(one)
            )  # which may be huge
            raise ValueError(f"--{field.name} {shown}: not {_article(kind)}")
        if choices and one not in choices:
            raise ValueError(f"--{field.name} {one}: one of {', '.join(choices)}")
        if kind is float and not abs(one) <= sys.float_info.max:  # a whole number may be larger
            raise ValueError(f"--{field.name} {one}: must be a finite number")
        if kind is int and abs(one) > LARGEST:
            raise ValueError(f"--{field.name} {one}: must be at most {LARGEST}")
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
    if kind is Path:
        return isinstance(value, Path | str) and value != ""  # which pathlib takes for the current folder
    return isinstance(value, kind)


def _article(kind: type) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", Path: "a path"}
    return words.get(kind, f"a {kind.__name__}")


def _lies(value: float, within: str) -> bool:
    low, high = map(float, within[1:-1].split(", "))
    above = low <= value if within[0] == "[" else low < value
    below = value <= high if within[-1] == "]" else value < high
    return above and below
