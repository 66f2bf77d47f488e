"""A library that was compiled in this process, and can be saved."""

import json
import re
from pathlib import Path

from ..runtime.library import DESCRIPTION, LIBRARY, WEIGHTS, Library
from .build import Executable

ALIGNMENT = 64  # bytes; of every array in the file, as the kernels' vectors want it


class Compiled(Library):
    def __init__(self, executable: Executable, weights: list, info: dict):
        super().__init__(executable.module, weights, info)
        self.compiled, self.machine = executable, executable.machine

    def save(self, folder: str | Path) -> None:
        """Write lib.so, weights.bin and deploy.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.link(folder / LIBRARY)
        self.info["weights"], at = [], 0
        with open(folder / WEIGHTS, "wb") as file:
            for array in (tensor.numpy() for tensor in self.weights):
                self.info["weights"].append([str(array.dtype), at, at + array.nbytes])
                at += file.write(array.tobytes().ljust(-(-array.nbytes // ALIGNMENT) * ALIGNMENT, b"\0"))
            file.truncate(max(at, ALIGNMENT))  # an empty file cannot be mapped
        self.describe(folder)

    def describe(self, folder: Path) -> None:
        """Write deploy.json alone."""
        (folder / DESCRIPTION).write_text(_json(self.info) + "\n")

    def link(self, path: Path) -> None:
        """Write lib.so alone."""
        self.compiled.link(path)


def _json(info: dict) -> str:
    """Indented, but a list of numbers or words on one line."""
    return re.sub(r"\[\n[^][{}]*\]", lambda found: json.dumps(json.loads(found[0])), json.dumps(info, indent=2))
