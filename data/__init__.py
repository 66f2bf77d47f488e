"""Where batches come from: `create_loaders` returns the (train, val) pair of a data set, `check` its bad pictures."""

import importlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.loader import Loader


@dataclass(frozen=True)
class DataSet:
    """A row of the table: pixels a side where none are asked for, and what --list says of it."""

    size: int
    about: str


# Needs no torch: what reads a data set stands under its name in `data/sources.py`, which is imported when it is read.
DATA_SETS = {
    "digits": DataSet(64, "1,797 handwritten digits, embedded (scikit-learn's)"),
    "cifar10": DataSet(32, "CIFAR-10, torchvision's files or a train/ test/ tree of class folders"),
    "cifar100": DataSet(32, "CIFAR-100, likewise"),
    "tiny_imagenet": DataSet(64, "Tiny-ImageNet-200 as it is published"),
    "imagefolder": DataSet(224, "any train/ val/ tree of class folders, ImageNet for one"),
    "lmdb": DataSet(224, "train.lmdb and val.lmdb"),
    "fake": DataSet(224, "noise of 1000 classes, for checks of everything but accuracy"),
}

# What is imported only when it is asked for, since it needs torch: name -> module.
LATE = {"MEAN": "loader", "STD": "loader", "Loader": "loader"}

__all__ = ["DATA_SETS", "MEAN", "STD", "Loader", "check", "create_loaders", "evaluation_loaders"]


def create_loaders(data_set: str, **request) -> "tuple[Loader, Loader]":
    """The training and the validation `Loader` of `data_set`; the other arguments are the fields of `Request`.

    Raises:
        ValueError: in one line, what is wrong with the folder, a class or a picture.
    """
    known(data_set)
    from data.sources import SOURCES, Request

    request = Request(**request)
    if request.use_dali and data_set != "imagefolder":
        raise ValueError(f"--use_dali is for --data_set imagefolder: {data_set} is not decoded as it is read")
    if request.use_dali and request.interpolation != "bilinear":
        raise ValueError(f"--interpolation {request.interpolation}: --use_dali resizes with bilinear only")
    if request.classes and data_set != "imagefolder":
        raise ValueError(f"--classes {request.classes}: is for --data_set imagefolder, not {data_set}")
    return SOURCES[data_set](request)


def evaluation_loaders(folder: "str | Path", pictures: dict, batch_size: int) -> "tuple[Loader, Loader]":
    """The training and the validation part of a tree of class folders, both as evaluation sees them, on the CPU.

    Args:
        pictures: what is done to a picture: size, resize, interpolation, mean and std, as `Loader.preparation` gives
            them.

    Raises:
        ValueError: in one line, what is wrong with the folder or a picture.
    """
    try:
        import torch
    except ImportError as error:
        raise ValueError("--data needs PyTorch to read pictures: pip install torch torchvision") from error

    return create_loaders(
        "imagefolder",
        data_path=Path(folder),
        image_size=pictures["size"],
        resize=pictures["resize"],
        mean=pictures["mean"],
        std=pictures["std"],
        interpolation=pictures.get("interpolation", "bilinear"),
        train_batch_size=batch_size,
        eval_batch_size=batch_size,
        augment=False,
        seed=0,
        device=torch.device("cpu"),
        workers=0,
        skip_bad=False,
    )


def check(data_set: str, **request) -> list[str]:
    """Decodes every picture to train and to validate; `path: reason` for each that does not decode, or is not read.

    A data set that is not made of encoded pictures has none. The arguments and errors are those of `create_loaders`.
    """
    known(data_set)
    from data.sources import SAMPLES, UNREAD, Request, decode_all

    request = Request(**request)
    parts = list(SAMPLES[data_set](request).values()) if data_set in SAMPLES else []
    problems, count = [], sum(map(len, parts))
    for number, problem in enumerate(chain.from_iterable(map(decode_all, parts)), start=1):
        if problem:
            problems.append(problem)
        if number % 100_000 == 0:
            request.say(f"{number} of {count} pictures decoded, {len(problems)} bad")
    return problems + (UNREAD[data_set](request) if data_set in UNREAD else [])


def known(data_set: str) -> DataSet:
    """The row of the data set called `data_set`. Raises ValueError if none is."""
    if data_set not in DATA_SETS:
        raise ValueError(f"unknown data set {data_set!r}: one of {', '.join(DATA_SETS)}")
    return DATA_SETS[data_set]


def __getattr__(name: str):
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"data.{LATE[name]}"), name)
