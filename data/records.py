"""Pictures in LMDB files: `__len__` and `__keys__`, and under every key the pickled (bytes of the picture, label)."""

import contextlib
import io
import pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path

from data.folder import Encoded


class Records(Sequence):
    """(encoded picture, label) by number, read when asked for.

    Args:
        path: of the LMDB file, or of the folder that is one.
        classes: a label is below this number.

    Raises:
        ValueError: what is wrong with the file, in one line.
    """

    def __init__(self, path: Path, classes: int):
        self.path, self.classes = path, classes
        self._check_whole()
        self.keys = self._read(b"__keys__")
        count = self._read(b"__len__")
        if not (isinstance(self.keys, list) and all(isinstance(key, bytes) for key in self.keys)) or count != len(
            self.keys
        ):
            raise ValueError(f"{path}: its __keys__ are not the {count!r:.50} that its __len__ says")

    @property
    def names(self) -> list[str]:
        """What the pictures are called."""
        return [repr(key) for key in self.keys]

    @property
    def file(self) -> Path:
        """Where the pictures are."""
        return self.path / "data.mdb" if self.path.is_dir() else self.path

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> tuple[Encoded, int]:
        key = self.keys[number]
        match self._read(key):
            case (bytes(content), int(label)) if 0 <= label < self.classes:
                return Encoded(f"{self.path}: {key!r}", content), label
        raise ValueError(f"{self.path}: {key!r} is not a picture and a label below {self.classes}")

    @contextlib.contextmanager
    def _open(self):
        """An LMDB environment, opened anew for each use: an open one would not survive a fork."""
        try:
            import lmdb
        except ImportError:
            raise ValueError("--data_set lmdb needs LMDB: pip install lmdb") from None
        how = {"subdir": self.path.is_dir(), "readonly": True, "lock": False, "readahead": False}
        try:
            with lmdb.open(str(self.path), **how) as environment:
                yield environment
        except lmdb.Error as error:
            raise ValueError(f"{self.path}: {error}") from None

    def _check_whole(self) -> None:
        """LMDB maps the file: reading what is missing at its end would kill the process."""
        file = self.path / "data.mdb" if self.path.is_dir() else self.path
        if not file.is_file():
            raise ValueError(f"{file}: no regular file")
        with self._open() as environment:
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if file.stat().st_size < needed:
            raise ValueError(f"{file}: truncated: {needed} bytes are in use, {file.stat().st_size} are there")

    def _read(self, key: bytes):
        with self._open() as environment, environment.begin() as transaction:
            value = transaction.get(key)
        if value is None:
            raise ValueError(f"{self.path}: has no {key!r}")
        try:
            return _plain(value)
        except Exception as error:  # damaged pickles raise many types
            raise ValueError(f"{self.path}: {key!r}: {' '.join(str(error).split()) or type(error).__name__}") from None


def _plain(value: bytes) -> object:
    """What a pickle holds. Lengths and places in it that lie outside of it are found before any memory is taken."""
    for code, argument, _ in pickletools.genops(value):  # raises if a length exceeds what is left
        if code.name.endswith("PUT") and argument > len(value):  # the unpickler would make a table of that size
            raise pickle.UnpicklingError(f"damaged: it counts {argument} objects in {len(value)} bytes")
    return _Plain(io.BytesIO(value)).load()


class _Plain(pickle.Unpickler):
    """Bytes, numbers, lists and tuples, and nothing that code would have to rebuild."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"holds {module}.{name}, which only code could rebuild; it is not run")
