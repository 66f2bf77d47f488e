"""Write `docs/options.md` from the declarations of the options: `python docs/generate.py`."""

import sys
from dataclasses import Field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model_tune  # noqa: E402
from pruning.options import METHODS  # noqa: E402
from utils.command_line import heading  # noqa: E402
from utils.declare import default_in_words, default_of, flags_of, in_words, sections_of  # noqa: E402
from utils.files import save_text  # noqa: E402
from utils.options import EvaluateOptions, Options  # noqa: E402
from utils.parse import RUN  # noqa: E402
from utils.report import markdown  # noqa: E402

PATH = ROOT / "docs" / "options.md"
HEAD = """# All options

Written by `python docs/generate.py` from the declarations in the code: change those, not this file.

Dashes and underscores mean the same in every flag: `--pr-target` is `--pr_target`. `--no_NAME` switches off what
`--NAME` switches on. The keys of a `--config` file are the names of the flags; the command line wins over the file.

An option belongs to the run, to some pruning methods, or to `--evaluate`. One that belongs to others than those at work
is refused: `--k belongs to bip, hydra, imp, not to filter`. The same holds in a `--config` file, and for
`pruning.create_method`. Methods are given the run's `lr` and `seed`.
"""


def text() -> str:
    """The page."""
    lines = [HEAD, "## `imagenet.py`: the run\n"]
    for owner, fields in (sections_of(Options) | sections_of(EvaluateOptions)).items():
        lines += [f"### {heading(owner)}\n", table(fields)]
    lines += ["## `imagenet.py`: pruning methods\n", "Which method has which of these, one section an owner.\n"]
    for owner, fields in method_sections().items():
        names = [f"`{name}`" for name, row in METHODS.items() if issubclass(row.options, owner)]
        lines += [f"### {', '.join(names)}\n", f"{owner.__doc__.strip().splitlines()[0]}\n", table(fields)]
    lines.append("## `model_tune.py`\n")
    for owner, fields in (sections_of(model_tune.Options) | sections_of(model_tune.BenchmarkOptions)).items():
        lines += [f"### {heading(owner)}\n", table(fields)]
    return "\n".join(lines)


def method_sections() -> dict[type, list[Field]]:
    """The options that only methods have, by the class that declares them."""
    sections = {}
    for row in METHODS.values():
        for owner, fields in sections_of(row.options).items():
            own = [field for field in fields if field.name not in RUN]
            sections[owner] = max(sections.get(owner, []), own, key=len)  # a subclass may declare one of them anew
    return {owner: fields for owner, fields in sections.items() if fields}


def table(fields: list[Field]) -> str:
    """The options as a Markdown table."""
    rows = [["flag", "default", "meaning", "values"]]
    for field in fields:
        flags = [flag for flag in flags_of(field) if not flag.startswith("--no_")]
        valid = field.metadata["choices"] and ", ".join(field.metadata["choices"])
        valid = valid or (field.metadata["within"] and in_words(field.metadata["within"])) or ""
        default = "off" if default_of(field) is False else default_in_words(field)
        meaning = field.metadata["help"].replace("|", "\\|")
        rows.append([", ".join(f"`{flag}`" for flag in flags), default, meaning, valid])
    return markdown(rows)


if __name__ == "__main__":
    save_text(PATH, text())
