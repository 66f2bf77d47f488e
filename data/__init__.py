"""Where batches come from: `create_loaders` returns the (train, val) pair of a data set."""

from data.loader import MEAN, STD, Loader
from data.sources import DEFAULT_SIZE, SOURCES, Request

__all__ = ["DEFAULT_SIZE", "MEAN", "SOURCES", "STD", "Loader", "create_loaders"]


def create_loaders(data_set: str, **request) -> tuple[Loader, Loader]:
    """The training and the validation loader of `data_set`; the other arguments are the fields of `Request`.

    Raises:
        ValueError: in one line, what is wrong with the folder, a class or a picture.
    """
    if data_set not in SOURCES:
        raise ValueError(f"unknown data set {data_set!r}: one of {', '.join(SOURCES)}")
    return SOURCES[data_set](Request(**request))
