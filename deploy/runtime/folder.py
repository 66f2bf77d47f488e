"""What a saved library's folder holds, and the checks before any of it is mapped or called.

lib.so, weights.bin and deploy.json bear one build id: lib.so in the note that linkers write, weights.bin in its first
64 bytes, deploy.json as a field. deploy.json also has the size and the SHA-256 of the other two, and the SHA-256 of
itself without that row.

A library is replaced in three steps: the new lib.so and weights.bin are written under names of their own,
.<build id>.lib.so and .<build id>.weights.bin; deploy.json is replaced by renaming, which makes the new library valid;
the other two are renamed. So a reader takes the file with the build id in its name where there is one. Whenever the
writer is stopped, the folder holds the old library or the new one, and no file that somebody has open is ever changed.
"""

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

import numpy as np

LIBRARY, WEIGHTS, DESCRIPTION = "lib.so", "weights.bin", "deploy.json"
FORMAT_VERSION = 3  # of deploy.json: of its fields, of the texts that name kernels, and of weights.bin
ALIGNMENT = 64  # bytes; of every array in weights.bin, as the kernels' vectors want it
MOST_THREADS = 4096  # that a description may ask for


def pending(folder: Path, name: str, build: str) -> Path:
    """Where a file of a new library lies until the library is valid."""
    return folder / f".{build}.{name}"


def header(build: str) -> bytes:
    """What weights.bin begins with."""
    return f"block-sparse weights {FORMAT_VERSION} ".encode().ljust(32) + build.encode()


def digest(info: dict) -> str:
    """The SHA-256 of a description without the row about itself, however it is indented."""
    files = {name: row for name, row in info["files"].items() if name != DESCRIPTION}
    text = json.dumps({**info, "files": files}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def describe(folder: Path, text: bytes) -> dict:
    """The contents of deploy.json. ValueError for another format, and for values that cannot be right."""
    path = folder / DESCRIPTION
    try:
        info = json.loads(text)
        version = info["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged, or describes no library") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}: compile again")
    try:
        right = info["files"][DESCRIPTION]["sha256"] == digest(info) and _plausible(info)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise ValueError(f"{path} is damaged: its contents do not fit its SHA-256 or each other")
    return info


def _plausible(info: dict) -> bool:
    at = ALIGNMENT
    for kind, start, end in info["weights"]:
        if not (_natural(start) and _natural(end)) or start < at or start % ALIGNMENT or end < start:
            return False
        if np.dtype(kind).kind not in "fiu" or (end - start) % np.dtype(kind).itemsize:
            return False
        at = end
    tensors = [info["input"], *info["outputs"]]
    needs = info["requires"]
    return (
        at <= info["files"][WEIGHTS]["bytes"]
        and len(tensors) > 1
        and all(_natural(n) and n for tensor in tensors for n in tensor["shape"])
        and all(isinstance(tensor["name"], str) for tensor in tensors)
        and (_natural(info["threads"]) and 1 <= info["threads"] <= MOST_THREADS)
        and isinstance(needs["architecture"], str)
        and all(isinstance(feature, str) for feature in needs["features"])
        and (isinstance(info["build_id"], str) and len(bytes.fromhex(info["build_id"])) == 16)
        and isinstance(info["tvm"], str)
    )


def _natural(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def open_file(folder: Path, name: str, info: dict) -> BinaryIO:
    """lib.so or weights.bin, opened and checked. ValueError if it is missing, damaged or of another build."""
    build, row = info["build_id"], info["files"][name]
    try:
        file = open(pending(folder, name, build), "rb")  # noqa: SIM115  # the caller closes it
    except FileNotFoundError:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}") from None
        file = open(folder / name, "rb")  # noqa: SIM115
    mark = bytes.fromhex(build) if name == LIBRARY else header(build)
    try:
        found = file.read() if name == LIBRARY else file.read(ALIGNMENT)
        if mark not in found:
            raise ValueError(f"{folder / name} is damaged, or of another build than {DESCRIPTION}")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if (file.tell(), sha256) != (row["bytes"], row["sha256"]):
            raise ValueError(f"{folder / name} is damaged: {file.tell()} bytes, which do not fit its SHA-256")
    except BaseException:
        file.close()
        raise
    return file
