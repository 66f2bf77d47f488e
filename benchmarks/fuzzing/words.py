"""Damaged recipes and command lines."""

import contextlib
import dataclasses
import io
from pathlib import Path
from random import Random

import numpy as np
import yaml

from benchmarks.fuzzing import mutations
from benchmarks.fuzzing.kind import Kind, Wrong

COMMON = ["1", "2", "0.5", "0.1", "1e-3"] * 5  # words that many options take


class Recipes(Kind):
    """YAML files of options, with other keys and values and with damaged text, for `imagenet.py`."""

    one_line = False

    TEXTS = ("&a [*a]", "!!int ''", "!!timestamp x", "2001-99-99", "!!python/name:os.system", "{a: 1", "? [a]", "\t")
    TEXTS += (
        "[" * 3000,
        "1_0",
        "0b1",
        "!!binary x",
        "!!float x",
        "9" * 5000,
        "\x07",
        "*b",
        "<<: 3",
        "- a",
        "---\na: 1",
    )

    def prepare(self) -> None:
        import imagenet  # noqa: F401  # what is imported once does not count as an input's time
        from utils.parse import RUN

        root = Path(__file__).resolve().parents[2] / "configs"
        self.texts = [path.read_text() for path in sorted(root.glob("**/*.yml"))]
        self.keys = [*sorted(RUN), "N", "pr_target", "rearrange", "lr_new", "--lr", "no_ema", "method", "config", "x"]
        self.path = self.folder / "recipe.yml"

    def damage(self, random: Random) -> str:
        text = random.choice(self.texts)
        how = random.choice(["value", "value", "key", "key", "other", "other", "text", "bytes", "aliases"])
        note = how
        if how in ("value", "key"):
            recipe = yaml.safe_load(text)
            key = random.choice(sorted(recipe) if how == "value" else self.keys)
            recipe[key] = mutations.odd(random)
            text, note = yaml.safe_dump(recipe), f"{key}: {recipe[key]!r:.60}"
        elif how == "other":
            key, value = random.choice(sorted(yaml.safe_load(random.choice(self.texts)).items()))
            text, note = yaml.safe_dump(yaml.safe_load(text) | {key: value}), f"{key} of another recipe"
        elif how == "text":
            note = random.choice(self.TEXTS)
            text += random.choice(["\n", "\nlr: ", "\ngpus: ", "\nx: "]) + note
        elif how == "aliases":
            rows = [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}' if n else '0'] * 10)}]" for n in range(9)]
            text = "\n".join([*rows, random.choice(["lr: *x8", "gpus: *x8", "job_dir: *x8", "method: *x8", "x: 1"])])
        content = text.encode()
        if how == "bytes":
            content, note = mutations.damaged_bytes(content, random)
        self.path.write_bytes(content)
        return f"{note:.100}"

    def read(self) -> str:
        import imagenet

        options = imagenet.parse(["--config", str(self.path)])
        got = _values(options)
        flags = {"method": "conv_type", "layer": "conv_type"}
        for key, value in (yaml.safe_load(self.path.read_text()) or {}).items():
            name = flags.get(key, str(key).replace("-", "_"))
            if value is not None and name in got and not _means(value, got[name]):
                raise Wrong(f"{key}: {value!r:.60} became {got[name]!r:.60}")
        return "every value is one that its option declares"


class CommandLines(Kind):
    """Words for `imagenet.py`."""

    one_line = False

    def prepare(self) -> None:
        import imagenet
        import pruning.options
        from utils.declare import flags_of
        from utils.parse import EVALUATION, RUN, flags_of_methods

        self.parse = imagenet.parse
        fields = [*RUN.values(), *EVALUATION.values()]
        self.flags = sorted(
            {flag for field in fields for flag in flags_of(field)} | set(flags_of_methods(pruning.options))
        )
        self.words = ["resnet20", "resnet56_b", "digits", "block_l1", "resrep", "bip", "cubic", "adam", "experiments/x"]

    def damage(self, random: Random) -> str:
        words = []
        for _ in range(random.choice([1, 1, 2, 3, 5])):
            flag = random.choice(self.flags)
            flag = random.choice(
                [flag] * 20 + [flag.replace("_", "-"), flag[:-1], "--help", "--version", "-h", "--x", "--"]
            )
            word = random.choice([*self.words, *COMMON, *map(str, mutations.NUMBERS), *mutations.WORDS])
            words += random.choice([[flag, word], [flag, word], [f"{flag}={word}"], [flag], [word], [flag, word, word]])
        self.argv = words
        return " ".join(words)[:100]

    def read(self) -> str:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                options = self.parse(self.argv)
        except SystemExit as end:
            if end.code:
                raise Wrong(f"exit status {end.code} without a word") from None
            return "a question, such as --help, that was answered"
        self.check(_values(options))
        return "every value is one that its option declares"

    def check(self, got: dict) -> None:
        """Every value stands in the command line, and every number is one."""
        for name, value in got.items():
            if isinstance(value, float) and not np.isfinite(value):
                raise Wrong(f"--{name} is {value}")
        for flag, word in zip(self.argv, self.argv[1:], strict=False):
            name = flag[2:].replace("-", "_")
            last = sum(part.partition("=")[0].replace("-", "_") == flag.replace("-", "_") for part in self.argv) == 1
            text = flag.startswith("--") and isinstance(got.get(name), str | float | int) and not word.startswith("-")
            if text and last and not isinstance(got[name], bool) and not _means(word, got[name]):
                raise Wrong(f"{flag} {word!r:.40} became {got[name]!r:.40}")


class TuneCommandLines(CommandLines):
    """Words for `model_tune.py`."""

    def prepare(self) -> None:
        import model_tune
        from utils.declare import flags_of, options_of

        self.parse = lambda argv: model_tune.parse(["--onnx_path", str(self.folder / "model.onnx"), *argv])
        self.flags = sorted(flag for field in options_of(model_tune.Options) for flag in flags_of(field))
        self.words = ["native", "x86-avx2", "127.0.0.1:9090", "224", "192x256", "0x0", "1x2x3", "7x", "x"]


def _values(options) -> dict:
    """All options by name, the method's and the evaluation's too."""
    values = {}
    for part in (options, getattr(options, "own", None), getattr(options, "evaluation", None)):
        if dataclasses.is_dataclass(part):
            values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)} | values
    return values


def _means(given: object, got: object) -> bool:
    """Whether an option's value is what the user gave."""
    given = given if isinstance(given, list) else [given]
    got = got if isinstance(got, list) else [got]
    return len(given) == len(got) and all(
        str(a) == str(b) or _number(a) == _number(b) is not None for a, b in zip(given, got, strict=True)
    )


def _number(value: object) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
