"""The folder of a run: begun without losing an earlier one, or gone on with if it is the same run."""

import contextlib
from pathlib import Path

from rich.console import Console

import models
from data import Loader
from jobs import checkpoint
from models.formats.fitting import difference
from utils import machine, ranks
from utils.files import NotWritten, locked, save_json, sweep
from utils.options import FREE_ON_RESUME, Options
from utils.report import REPORTS

RUN = ("checkpoint", "run.json", "metrics.jsonl", "tensorboard", *REPORTS)  # what a run writes

# Files of before methods had options of their own say these where nothing was asked for.
FORMER_DEFAULTS = {"N": 16, "budget": None}


@contextlib.contextmanager
def kept_by(options: Options, here: ranks.Ranks):
    """Keep job_dir to this run for the time of the block, if it writes there, and free of half-written files.

    Raises:
        ValueError: another process writes there.
    """
    if not here.first or options.check_data or (options.evaluate and not options.export_onnx):
        yield
        return
    with locked(options.job_dir):
        for folder in (options.job_dir, options.job_dir / "checkpoint", options.job_dir / "deploy"):
            sweep(folder)
        try:
            yield
        except NotWritten as error:
            last = options.job_dir / "checkpoint" / "last.pt"
            raise NotWritten(f"{error}; --resume goes on from {last}" if last.exists() else str(error)) from error


def begin(options: Options, argv: list[str]) -> None:
    """Write `run.json`; what an earlier run has left is moved aside, not lost.

    Raises:
        ValueError: --pretrained_model is among it, so that the run could not be resumed by the same command.
    """
    last, checkpoints = to_resume(options), (options.job_dir / "checkpoint").resolve()
    if not last or last.resolve().parent != checkpoints:
        if options.pretrained_model and options.pretrained_model.resolve().is_relative_to(checkpoints):
            raise ValueError(
                f"--pretrained_model {options.pretrained_model} is of the run in --job_dir {options.job_dir}, which a "
                "new run moves aside: another --job_dir leaves it where it is"
            )
        set_aside(options.job_dir, RUN)
    if not (options.job_dir / "run.json").exists():
        save_json(options.job_dir / "run.json", {"argv": argv, "options": options.to_json(), **machine.describe()})


def set_aside(job_dir: Path, names: tuple[str, ...]) -> None:
    """Move those of the files and folders that are there into the folder `earlier.1`, or the next that is free."""
    there = [job_dir / name for name in names if (job_dir / name).exists()]
    if there:
        number = 1
        while (aside := job_dir / f"earlier.{number}").exists():
            number += 1
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)


def to_resume(options: Options) -> Path | None:
    """The checkpoint to go on from; None if none is asked for, or job_dir has none yet."""
    last = options.job_dir / "checkpoint" / "last.pt"
    if ranks.restarted() and last.exists():  # whatever the processes that died had begun with
        return last
    if options.resume == "last":
        return last if last.exists() else None
    return Path(options.resume) if options.resume else None


def resumable(options: Options, screen: Console) -> dict | None:
    """The state to go on from, if one is asked for and there.

    Raises:
        ValueError: the file is no checkpoint, or one of another run.
    """
    last = to_resume(options)
    if last is None:
        if options.resume:
            screen.print(f"--resume: no {options.job_dir / 'checkpoint' / 'last.pt'}; starting")
        return None
    state = models.read_checkpoint(last)
    try:
        epoch, batch = state["epoch"], state["loader"]["batch"]
    except (KeyError, TypeError):
        raise ValueError(f"--resume: {last} holds a network, but not the state of a run to go on with") from None
    check_same_run(options, state, last)
    screen.print(f"resuming after {epoch} epochs and {batch} steps")
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


def identity(train: Loader, val: Loader) -> dict[str, dict]:
    """What tells the pictures of a run from others, for `check_same_data`."""
    return {"train": train.identity(), "val": val.identity()}


def check_same_data(options: Options, state: dict, classes: list[str], now: dict[str, dict]) -> None:
    """Raise ValueError if the run of the checkpoint `state` began with other pictures or classes.

    Args:
        now: the `identity` of the pictures at hand.
    """
    checkpoint.check_normalisation(Path("--resume: the checkpoint"), state, options)
    changed = difference(state.get("classes"), classes)
    for part, pictures in now.items():
        before = state.get("data", now)[part]
        if before["pictures"] != pictures["pictures"]:
            changed.append(f"{part} had {before['pictures']} pictures and has {pictures['pictures']}")
        elif before["digest"] != pictures["digest"]:
            changed.append(f"{part} has as many pictures, but some have other names or sizes")
    if changed:
        raise ValueError(
            f"--resume: the data has changed: {'; '.join(changed)}; --accept_changed_data goes on with it as it is"
        )
