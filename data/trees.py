"""Folders of class folders, and files of class names. What is hidden, or is no regular file, is no data."""

import os
from pathlib import Path


def class_tree(path: Path, known: list[str] | None = None) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names and (picture, label) pairs of a folder of class folders.

    Args:
        known: all class names in the order of their numbers, of which the folder may hold a part.
    """
    found = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not _hidden(entry))
    if not found:
        raise ValueError(f"--data_path {path}: has no class folders")
    classes = known or found
    if foreign := sorted(set(found) - set(classes)):
        raise ValueError(f"--data_path {path}: has folders that --classes does not name: {', '.join(foreign[:5])}")
    number = {name: label for label, name in enumerate(classes)}
    samples = [(picture, number[name]) for name in found for picture in _pictures(str(path / name))]
    empty = sorted({number[name] for name in found} - {label for _, label in samples})
    if empty:
        raise ValueError(f"--data_path {path}: no pictures in {', '.join(classes[label] for label in empty[:5])}")
    return classes, samples


def unread(path: Path) -> list[str]:
    """A line for each picture in a folder of class folders that `class_tree` leaves out because of its name."""
    from PIL import Image
    from torchvision.datasets.folder import IMG_EXTENSIONS

    others = tuple(Image.registered_extensions().keys() - set(IMG_EXTENSIONS))
    known = ", ".join(IMG_EXTENSIONS)
    return [f"{name}: not read: its name ends in none of {known}" for name in _files(str(path), others)]


def _pictures(folder: str) -> list[str]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return _files(folder, IMG_EXTENSIONS)


def _files(folder: str, endings: tuple[str, ...]) -> list[str]:
    """The paths of all files with these endings in a folder and the folders in it, sorted by folder and name."""
    found, folders = [], [folder]
    while folders:
        here = folders.pop()
        with os.scandir(here) as entries:
            for entry in entries:
                if _hidden(entry):
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.is_file() and entry.name.lower().endswith(endings):  # not a pipe or a device
                    found.append((here, entry.name))
    return [os.path.join(*parts) for parts in sorted(found)]


def _hidden(entry: os.DirEntry) -> bool:
    """Whether tools put it there for themselves: `.ipynb_checkpoints`, `.DS_Store`, `._1.png`."""
    return entry.name.startswith(".")


def numbered_classes(path: Path) -> list[str]:
    """The class names of --classes FILE. Raises ValueError if there are none, or one stands there twice."""
    names = class_names(path)
    if not names:
        raise ValueError(f"--classes {path}: has no class names")
    if len(set(names)) < len(names):
        raise ValueError(f"--classes {path}: names {max(names, key=names.count)} twice")
    return names


def class_names(path: Path) -> list[str]:
    """The lines of a file of class names, each a name that may have spaces in it; none if there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a list of class names in UTF-8 ({error})") from None
    return [line.strip() for line in lines if line.strip()]
