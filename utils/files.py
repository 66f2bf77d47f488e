"""Files that are either the old ones or the new ones, never half of each, and folders that belong to one process."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
HALF = ".part"  # the end of the name of a file that is being written
# Why a file cannot be written although the program is right, as the system says it and as the user is told.
UNWRITABLE = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "no space left for this user (disk quota exceeded)",
    errno.EFBIG: "no space left for a file of this size (file too large)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


class NotWritten(OSError):
    """A file could not be written. The message names it, says why, and what is safe."""


def unwritable(error: BaseException) -> str | None:
    """Why nothing can be written, if that is what `error` or one of its causes means.

    Libraries hide the system's error behind one of their own, or quote what a compiler has printed.
    """
    while error:
        for number, words in UNWRITABLE.items():
            if getattr(error, "errno", None) == number or f"{os.strerror(number)}" in str(error):
                return words
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def writing(path: Path, safe: str = "") -> Iterator[None]:
    """In this block `path` is written.

    Args:
        safe: what to tell of what is safe; by default whether there was a file at `path`, which is then unchanged.

    Raises:
        NotWritten: there is no space, or no right to write.
    """
    try:
        yield
    except Exception as error:
        reason = unwritable(error)
        if isinstance(error, NotWritten) or not reason:
            raise
        left = "what was there before is unchanged" if path.is_file() else "no part of it was left behind"
        raise NotWritten(f"{path} could not be written: {reason}; {safe or left}") from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator:
    """A binary file to write in; it takes the place of `path` when the block ends well, and vanishes otherwise.

    Raises:
        NotWritten: there is no space, or no right to write; a file that was there before is unchanged.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=HALF)
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
    """Remove what `atomic` left half written in `folder` when a process was killed."""
    for path in folder.glob(f".*{HALF}"):
        path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `folder` to this process until the block ends or the process dies; create it if it is not there.

    The lock is the kernel's, on a file in the folder, so a killed process leaves none. It is not inherited: processes
    that decode pictures may outlive the run by seconds.

    Raises:
        ValueError: another process keeps the folder to itself.
        NotWritten: the folder cannot be written.
    """
    path, new = folder / LOCK, not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(path)
    try:
        with contextlib.suppress(OSError):  # the name of the owner is a comfort: a full disk has no space for it
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        if new:
            with contextlib.suppress(OSError):  # it goes again if nothing was written into it
                folder.rmdir()


def _lock(path: Path) -> int:
    """The handle of the locked file `path`."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ValueError(f"{path.parent} is in use by {owner}: a folder belongs to one run at a time") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # the owner before has removed the file that was locked here


def sha256(path: Path) -> str | None:
    """The digest of a file in hexadecimal digits; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(path: Path, content: dict) -> None:
    import torch  # here, so that reports can be written without it

    with atomic(path) as file:
        torch.save(content, file)


def save_text(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


def save_json(path: Path, content: object) -> None:
    save_text(path, json.dumps(content, indent=1) + "\n")
