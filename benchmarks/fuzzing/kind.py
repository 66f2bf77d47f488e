"""What a kind of damaged inputs is.

The law: what is read is right, or is refused with a ValueError or an OSError of one line.
"""

from pathlib import Path
from random import Random


class Wrong(Exception):
    """An input was accepted, and what became of it is not what it says."""


class Kind:
    """One kind of input.

    `prepare` writes good inputs into `folder`; `damage` then makes a bad one of them and says what was changed; `read`
    gives this to the program. `together` inputs are read in one process, one after the other, with `seconds` for each.
    """

    together, seconds = 100, 10.0
    one_line = True  # whether a message must be one; imagenet.py makes one of each

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.prepare()

    def prepare(self) -> None:
        """Make the good inputs."""

    def damage(self, random: Random) -> str:
        """Make a damaged input."""
        raise NotImplementedError

    def read(self) -> str:
        """Why it is right to accept the damaged input."""
        raise NotImplementedError
