"""The folder of a run: begun without losing an earlier one, or gone on with if it is the same run."""

from pathlib import Path

from rich.console import Console

import models
from utils import machine, ranks
from utils.files import save_json
from utils.options import FREE_ON_RESUME, Options

# Files of before methods had options of their own say these where nothing was asked for.
FORMER_DEFAULTS = {"N": 16, "budget": None}


def begin(options: Options, argv: list[str]) -> None:
    """Write `run.json`; an earlier run's checkpoints are moved aside, not lost."""
    checkpoints = options.job_dir / "checkpoint"
    if checkpoints.exists():
        number = 1
        while (aside := checkpoints.with_name(f"checkpoint.{number}")).exists():
            number += 1
        checkpoints.rename(aside)
    save_json(options.job_dir / "run.json", {"argv": argv, "options": options.to_json(), **machine.describe()})


def resumable(options: Options, screen: Console) -> dict | None:
    """The state to go on from, if one is asked for and there.

    Raises:
        ValueError: the file is no checkpoint, or one of another run.
    """
    last = options.job_dir / "checkpoint" / "last.pt"
    again = ranks.restarted() and last.exists()  # whatever the processes that died had begun with
    if not (options.resume or again):
        return None
    if options.resume != "last" and not again:
        last = Path(options.resume)
    elif not last.exists():
        screen.print(f"--resume: no {last}; starting")
        return None
    state = models.read_checkpoint(last)
    check_same_run(options, state, last)
    screen.print(f"resuming after {state['epoch']} epochs and {state['loader']['batch']} steps")
    return state


def check_same_run(options: Options, state: dict, path: Path) -> None:
    """Raise ValueError if the checkpoint `state` was made under options that make another run."""
    before, now, defaults = state.get("options", {}), options.to_json(), options.defaults()

    def differs(name: str) -> bool:
        missing = name not in before or (name in FORMER_DEFAULTS and before[name] == FORMER_DEFAULTS[name])
        return now[name] != before.get(name) and not (missing and now[name] == defaults[name])

    changed = [name for name in now if name not in FREE_ON_RESUME and differs(name)]
    if changed:
        pairs = ", ".join(f"--{name} {before.get(name)} (now {now[name]})" for name in changed)
        raise ValueError(f"--resume: {path} was made with {pairs}")
