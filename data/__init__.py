"""Where batches come from: `create_loaders` returns the (train, val) pair of a data set, `check` its bad pictures."""

from itertools import chain

from data.loader import MEAN, STD, Loader
from data.sources import DEFAULT_SIZE, SAMPLES, SOURCES, UNREAD, Request, decode_all

__all__ = ["DEFAULT_SIZE", "MEAN", "SOURCES", "STD", "Loader", "check", "create_loaders"]


def create_loaders(data_set: str, **request) -> tuple[Loader, Loader]:
    """The training and the validation loader of `data_set`; the other arguments are the fields of `Request`.

    Raises:
        ValueError: in one line, what is wrong with the folder, a class or a picture.
    """
    _known(data_set)
    request = Request(**request)
    if request.use_dali and data_set != "imagefolder":
        raise ValueError(f"--use_dali is for --data_set imagefolder: {data_set} is not decoded as it is read")
    return SOURCES[data_set](request)


def check(data_set: str, **request) -> list[str]:
    """Decodes every picture to train and to validate; `path: reason` for each that does not decode, or is not read.

    A data set that is not made of encoded pictures has none. The arguments and errors are those of `create_loaders`.
    """
    _known(data_set)
    request = Request(**request)
    parts = list(SAMPLES[data_set](request).values()) if data_set in SAMPLES else []
    problems, count = [], sum(map(len, parts))
    for number, problem in enumerate(chain.from_iterable(map(decode_all, parts)), start=1):
        if problem:
            problems.append(problem)
        if number % 100_000 == 0:
            request.say(f"{number} of {count} pictures decoded, {len(problems)} bad")
    return problems + (UNREAD[data_set](request) if data_set in UNREAD else [])


def _known(data_set: str) -> None:
    if data_set not in SOURCES:
        raise ValueError(f"unknown data set {data_set!r}: one of {', '.join(SOURCES)}")
