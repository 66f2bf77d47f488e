"""The folder of a run: begun without losing an earlier one, or gone on with if it is the same run."""

from pathlib import Path

from utils import machine
from utils.files import save_json
from utils.options import FREE_ON_RESUME, Options


def begin(options: Options, argv: list[str]) -> None:
    """Write `run.json`; an earlier run's checkpoints are moved aside, not lost."""
    checkpoints = options.job_dir / "checkpoint"
    if checkpoints.exists():
        number = 1
        while (aside := checkpoints.with_name(f"checkpoint.{number}")).exists():
            number += 1
        checkpoints.rename(aside)
    save_json(options.job_dir / "run.json", {"argv": argv, "options": options.to_json(), **machine.describe()})


def check_same_run(options: Options, state: dict, path: Path) -> None:
    """Raise ValueError if the checkpoint `state` was made under options that make another run."""
    before, now = state.get("options", {}), options.to_json()
    changed = [name for name in now if name not in FREE_ON_RESUME and before.get(name) != now[name]]
    if changed:
        pairs = ", ".join(f"--{name} {before.get(name)} (now {now[name]})" for name in changed)
        raise ValueError(f"--resume: {path} was made with {pairs}")
