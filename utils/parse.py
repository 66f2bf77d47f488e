"""The options of a run of `imagenet.py`, from its command line and its YAML file. Needs no torch.

An option belongs to the run, to the pruning methods that declare it, or to --evaluate. A flag or a key that belongs to
none of those at work is refused.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Protocol

from utils import command_line
from utils.command_line import Answers, Sections
from utils.declare import Declared, check, flags_of, options_of, sections_of
from utils.options import EvaluateOptions, Options

RUN = {field.name: field for field in options_of(Options)}
EVALUATION = {field.name: field for field in options_of(EvaluateOptions)}
EPILOG = """Dashes and underscores mean the same in every flag (--pr-target, --pr_target); --no_NAME switches off what
--NAME switches on. Every pruning method has options of its own: --method NAME --help shows them, too."""

# Flags of the published code that did nothing there, and why they are not taken here.
REFUSED = {
    "--test_only": "use --evaluate CHECKPOINT",
    "--random_rule": "weights come from --pretrained_model, chance from --seed",
    "--bn_type": "networks have the batch-norm of their papers",
    "--first_layer_type": "the first layer is always dense",
    "--nonlinearity": "networks start as their papers say",
    "--init": "networks start as their papers say",
    "--mode": "networks start as their papers say",
}


class Row(Protocol):
    """What is asked of a pruning method here: the class of its own options."""

    options: type[Declared]


class Methods(Protocol):
    """What is asked of the table of pruning methods, which stands above this room (`pruning/options.py`)."""

    METHODS: Mapping[str, Row]

    def row(self, name: str) -> Row: ...

    def owners(self, option: str) -> list[str]: ...


def parse(argv: list[str], methods: Methods, description: str = "", answers: Answers | None = None) -> Options:
    """Options from the command line over those of the `--config` file over the defaults.

    Args:
        methods: the table of pruning methods.
        description: the head of --help.
        answers: flag -> (function that gives a text to print, help), for flags that are answered with a text.

    Raises:
        ValueError: one line with the flag or key, the value and the valid choices.
    """
    argv = command_line.underscored(argv)
    # First who takes part: the file of options, the method, and whether a checkpoint is to be evaluated.
    deciding = command_line.peek(argv, [RUN[name] for name in ("config", "conv_type", "evaluate")])
    recipe = command_line.read_yaml(deciding["config"]) if "config" in deciding else {}
    names = _by_flag(RUN.values())
    deciding = {names.get(f"--{key}", key): value for key, value in recipe.items()} | deciding
    method = deciding.get("conv_type", RUN["conv_type"].default)
    check(RUN["conv_type"], method)  # a file may give anything
    scope = Scope(methods, method, evaluating="evaluate" in deciding)

    in_help = "conv_type" in deciding or not command_line.asks_for_help(argv)
    parser = command_line.create_parser(scope.sections(with_method=in_help), description, EPILOG, answers)
    if not command_line.asks_for_help(argv):
        for flag in command_line.flags_in(argv):
            if flag not in command_line.ANSWERS | (answers or {}):
                scope.check(flag, f"unrecognized arguments: {flag}")
    return scope.options(_recipe_values(deciding.get("config"), recipe, scope) | vars(parser.parse_args(argv)))


class Scope:
    """Whose options a user may give: the run's, those of the method called `name`, and those of an evaluation."""

    def __init__(self, methods: Methods, name: str, evaluating: bool = False):
        self.methods, self.name = methods, name
        self.cls = methods.row(name).options
        self.own = {field.name: field for field in options_of(self.cls)}
        self.evaluation = EVALUATION if evaluating else {}
        self.known = self.evaluation | self.own | RUN
        self.names = _by_flag(self.known.values())

    def sections(self, with_method: bool) -> Sections:
        """The groups of --help."""
        sections = {command_line.heading(owner): fields for owner, fields in sections_of(Options).items()}
        if with_method:
            sections[f"Options of --method {self.name}"] = [f for key, f in self.own.items() if key not in RUN]
        evaluation = [field for key, field in self.evaluation.items() if key not in self.own]
        return sections | {command_line.heading(EvaluateOptions): evaluation}

    def check(self, flag: str, unknown: str) -> None:
        """Raise ValueError, naming the owners, if the flag belongs to others; with the words `unknown` if to nobody."""
        if flag in self.names:
            return
        if flag in REFUSED:
            raise ValueError(f"{flag} had no effect in the published code and is not taken here: {REFUSED[flag]}")
        foreign = _by_flag(EVALUATION.values()) | flags_of_methods(self.methods)
        if flag in foreign:
            owners = self.methods.owners(foreign[flag]) + ["--evaluate"] * (foreign[flag] in EVALUATION)
            raise ValueError(f"{flag} belongs to {', '.join(owners)}, not to {self.name}")
        raise ValueError(unknown + command_line.guess(flag, self.names | foreign))

    def options(self, values: dict[str, object]) -> Options:
        """The options of a run that is given `values`; the method is given the run's for names that they share."""
        run = Options(**{key: value for key, value in values.items() if key in RUN})
        asked = {key: value for key, value in values.items() if key in self.own}
        shared = {key: getattr(run, key) for key in self.own if key in RUN}
        evaluation = EvaluateOptions(**{key: value for key, value in values.items() if key in self.evaluation})
        return dataclasses.replace(run, own=self.cls(**asked | shared), evaluation=evaluation, given=frozenset(values))


def _recipe_values(path: Path | None, recipe: dict[str, object], scope: Scope) -> dict[str, object]:
    """The values of a file, each checked. Raises ValueError that names the file."""
    values = {}
    try:
        for key, value in recipe.items():
            scope.check(f"--{key}", f"unknown key {key}")
            name = scope.names[f"--{key}"]
            if name == "config" or key.startswith("no_"):
                raise ValueError(f"unknown key {key}: a file names no other file, and switches off by NAME: false")
            values[name] = command_line.value_from_yaml(scope.known[name], value)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    return values


def flags_of_methods(methods: Methods) -> dict[str, str]:
    """Flag -> name of the option, of all methods together."""
    return _by_flag(field for row in methods.METHODS.values() for field in options_of(row.options))


def _by_flag(fields: Iterable[Field]) -> dict[str, str]:
    return {flag: field.name for field in fields for flag in flags_of(field)}
