"""Write a program (a Graph, or TVM's module) after each of its passes, as numbered text files."""

from collections.abc import Callable
from pathlib import Path


def forget(name: str, program) -> None:
    """The dump that writes nothing."""


def into(folder: str | Path) -> Callable:
    """A function (name, program) that writes the n-th program it is given to folder/n_name.txt."""
    folder, written = Path(folder), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("[0-9][0-9]_*.txt"):
            stale.unlink()
    except OSError as error:
        raise ValueError(f"--dump_dir {folder} cannot be written: {error.strerror}") from error

    def write(name: str, program) -> None:
        written.append(name)
        (folder / f"{len(written):02}_{name}.txt").write_text(program.script())

    return write
