"""The command line and YAML files, read by the declarations of options (`utils/declare.py`). Needs no torch."""

import argparse
import difflib
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import Field
from pathlib import Path

import yaml

from utils import machine
from utils.declare import (
    REQUIRED,
    Declared,
    check,
    default_in_words,
    default_of,
    flags_of,
    kind_of,
    options_of,
    sections_of,
)

# What users of other programs type for ours, where the spelling is too far off to be guessed.
SYNONYMS = {"--learning_rate": "--lr", "--batch_size": "--train_batch_size", "--model": "--arch"}

Sections = dict[str, list[Field]]  # heading -> options
Answers = dict[str, tuple[Callable[[], str], str]]  # flag -> (function that gives the text it is answered with, help)


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake as ValueError instead of printing the usage."""

    def error(self, message: str):
        raise ValueError(" ".join(message.split()))


class Answer(argparse.Action):
    """A flag that prints what `text` returns and ends the program with status 0, as --help does."""

    def __init__(self, option_strings: list[str], dest: str, text: Callable[[], str], help: str, default=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.text = text

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        print(self.text())
        parser.exit()


class Layout(argparse.RawDescriptionHelpFormatter):
    """One line an option where the terminal is wide enough."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size((120, 24)).columns, 130))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """The value's name once behind all spellings, as Python 3.13 has it."""
        if action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {values}"


def create_parser(
    sections: Sections, description: str = "", epilog: str = "", answers: Answers | None = None
) -> OneLineParser:
    """The argument parser of the options in `sections`; what is not given is left out of its result."""
    parser = OneLineParser(
        usage="%(prog)s [options]",
        description=description,
        epilog=epilog,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
        formatter_class=Layout,
    )
    for heading, fields in sections.items():
        group = parser.add_argument_group(heading)
        for field in fields:
            _add(group, field)
    group = parser.add_argument_group("Help")
    group.add_argument("-h", "--help", action="help", help="show this and exit")
    for flag, (text, about) in {**ANSWERS, **(answers or {})}.items():
        group.add_argument(flag, action=Answer, text=text, help=about)
    return parser


def _add(group, field: Field) -> None:
    kind, many = kind_of(field)
    flags, default = flags_of(field), default_in_words(field)
    about = f"{field.metadata['help']} (default: {default})" if default else field.metadata["help"]
    settings: dict[str, object] = {"dest": field.name, "help": about.replace("%", "%%")}
    if kind is bool:
        off = [flag for flag in flags if flag.startswith("--no_")]
        on = [flag for flag in flags if flag not in off]
        group.add_argument(*on, action="store_true", default=argparse.SUPPRESS, **settings)
        settings["help"] = argparse.SUPPRESS
        group.add_argument(*off, action="store_false", default=argparse.SUPPRESS, **settings)
        return
    settings["type"] = field.metadata["read"] or (path if kind is Path else kind)
    if field.metadata["choices"]:
        settings["choices"] = field.metadata["choices"]  # argparse shows them
    else:
        settings["metavar"] = settings["type"].__name__.upper()
    if many:
        settings["nargs"] = "+"
    if field.metadata["alone"] is not None:
        settings |= {"nargs": "?", "const": field.metadata["alone"]}
    group.add_argument(*flags, required=default_of(field) is REQUIRED, **settings)


def path(text: str) -> Path:
    """A path of the command line. Raises ValueError for an empty one, which pathlib takes for the current folder."""
    if not text:
        raise ValueError("empty")
    return Path(text)


def underscored(argv: list[str]) -> list[str]:
    """`argv` with the dashes inside flags as underscores, so that `--pr-target` is `--pr_target`."""

    def spell(word: str) -> str:
        flag, equals, value = word.partition("=")
        return f"--{flag[2:].replace('-', '_')}{equals}{value}"

    return [spell(word) if word.startswith("--") and len(word) > 2 else word for word in argv]


def flags_in(argv: list[str]) -> list[str]:
    """The flags of an `underscored` command line, without their values."""
    return [word.partition("=")[0] for word in argv if word.startswith("--")]


def asks_for_help(argv: list[str]) -> bool:
    """Whether the command line is answered with a text, whatever else it says."""
    return bool({"-h", "--help"} & set(argv))


def peek(argv: list[str], fields: list[Field]) -> dict[str, object]:
    """The values of a few options, before it is known which others there are."""
    parser = OneLineParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False)
    for field in fields:
        _add(parser, field)
    return vars(parser.parse_known_args(argv)[0])


def guess(flag: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown flag or key: which one may have been meant, or nothing."""
    known = list(known)
    near = [SYNONYMS[flag]] if SYNONYMS.get(flag) in known else difflib.get_close_matches(flag, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def parse(argv: list[str], cls: type[Declared], description: str = "", others: tuple[type, ...] = ()) -> Declared:
    """An instance of the options class `cls` from a command line.

    Args:
        others: options classes of the program's other commands. --help shows their options, too.

    Raises:
        ValueError: one line with the flag, the value and the valid choices.
    """
    argv = underscored(argv)
    sections, seen = {}, set()
    for shown in (cls, *others) if asks_for_help(argv) else (cls,):
        for owner, fields in sections_of(shown).items():
            sections[heading(owner)] = [field for field in fields if field.name not in seen]
            seen.update(field.name for field in fields)
    parser = create_parser(sections, description)
    known = {flag for field in options_of(cls) for flag in flags_of(field)} | {"--help", *ANSWERS}
    for flag in flags_in(argv):
        if flag not in known and not asks_for_help(argv):
            raise ValueError(f"unrecognized arguments: {flag}{guess(flag, known)}")
    return cls(**vars(parser.parse_args(argv)))


def heading(section: type) -> str:
    """The heading of a section of options: the first line of its class's docstring."""
    return section.__doc__.splitlines()[0].rstrip(".")


def read_yaml(path: Path) -> dict[str, object]:
    """The content of a file of options by the names of their flags, dashes and underscores alike.

    Raises:
        ValueError: one line with the file and what is wrong with it.
    """
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from None
    except Exception as error:  # PyYAML's own, of a malformed value: AttributeError, IndexError, RecursionError, ...
        raise ValueError(f"--config {path}: holds a value that is no YAML ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: not a mapping of options")
    return {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}


def value_from_yaml(field: Field, value: object) -> object:
    """`value` as the command line would have read it. Raises ValueError if it is not one that `field` declares."""
    kind, many = kind_of(field)
    values = value if many and isinstance(value, list) else [value]
    values = [_converted(kind, one) for one in values]
    value = values if many else values[0]
    check(field, value)
    return value


def _converted(kind: type, value: object) -> object:
    """YAML 1.1 reads `1e-4` as text and `1` as a whole number, where a float may be wanted."""
    convertible = isinstance(value, str) if kind in (int, Path) else isinstance(value, str | int)
    if kind not in (int, float, Path) or not convertible or isinstance(value, bool):
        return value
    try:
        return path(value) if kind is Path else kind(value)
    except (ValueError, OverflowError):
        return value


def version() -> str:
    """This program's version and commit, and what it runs on."""
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    where = machine.versions(("torch", "apache-tvm", "onnxruntime"))
    packages = ", ".join(f"{name} {number}" for name, number in where.items() if number)
    return f"{project['name']} {project['version']}; Python {sys.version.split()[0]}; {packages}"


ANSWERS: Answers = {"--version": (version, "show the versions and exit")}  # what every program has
