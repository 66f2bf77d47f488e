"""Files that are either the old ones or the new ones, never half of each."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator:
    """A binary file to write in; it takes the place of `path` when the block ends well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp makes it private
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(folder: Path) -> None:
    """Remove what `atomic` left half written when a process was killed."""
    for path in folder.glob(".*"):
        path.unlink()


def save_checkpoint(path: Path, content: dict) -> None:
    import torch  # here, so that reports can be written without it

    with atomic(path) as file:
        torch.save(content, file)


def save_text(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


def save_json(path: Path, content: object) -> None:
    save_text(path, json.dumps(content, indent=1) + "\n")
