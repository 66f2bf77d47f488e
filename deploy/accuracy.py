"""Top-1 of compiled networks and of other runtimes on pictures whose class is known."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np


def numbers_of(classes: Sequence[str], named: Sequence[str] | None, logits: int) -> np.ndarray:
    """The column of the logits for each of the data's `classes`: int64 (len(classes),).

    Args:
        named: the network's classes, if they are known; the data may lack some of them, and their order is their own.
        logits: how many columns there are.

    Raises:
        ValueError: a class that the network does not know, or another number of classes where it names none.
    """
    if not named:
        if len(classes) != logits:
            raise ValueError(f"--data has {len(classes)} classes, and the network {logits}, whose names it does not say")
        return np.arange(logits)
    if unknown := sorted(set(classes) - set(named)):
        raise ValueError(f"--data has classes that the network does not know: {', '.join(unknown[:5])}")
    return np.array([named.index(name) for name in classes])


def evaluate(
    runners: dict[str, Callable], pictures: Iterable[tuple[np.ndarray, np.ndarray]], batch: int, numbers: np.ndarray
) -> dict:
    """How often each runner finds the class of a picture, and how often the others agree with the first runner.

    Args:
        runners: functions of float32 (batch, C, H, W) that give logits, or several outputs by name, the logits first.
        pictures: images, of any number up to `batch`, and labels; they are read one batch after the other.
        numbers: the column of the logits for every label.

    Returns:
        {"pictures": how many there were, "top1": {name: per cent}, "agreement": {name: per cent, of all but the first}}
    """
    right, same, count = dict.fromkeys(runners, 0), dict.fromkeys(list(runners)[1:], 0), 0
    for images, labels in pictures:
        images, labels = np.ascontiguousarray(images, np.float32), numbers[np.asarray(labels)]
        filled = np.take(images, range(batch), axis=0, mode="wrap")  # a library takes whole batches only
        found = {name: _classes(run(filled))[: len(images)] for name, run in runners.items()}
        first = next(iter(found.values()))
        for name, classes in found.items():
            right[name] += int((classes == labels).sum())
        for name in same:
            same[name] += int((found[name] == first).sum())
        count += len(images)
    top1, agreement = ({name: 100 * n / count for name, n in counts.items()} for counts in (right, same))
    return {"pictures": count, "top1": top1, "agreement": agreement}


def _classes(made: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    logits = next(iter(made.values())) if isinstance(made, dict) else made
    return logits.reshape(len(logits), -1).argmax(1)
