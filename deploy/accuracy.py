"""Top-1 of compiled networks and of other runtimes on pictures whose class is known."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np


def preparation(said: dict | None, shape: Sequence[int], mean=None, std=None, resize: int | None = None) -> dict:
    """How pictures are made for a network: size, resize (None: in proportion to the size), mean, std.

    Args:
        said: what its ONNX file says about them.
        shape: of its input.
        mean, std, resize: what the user says, which wins.

    Raises:
        ValueError: the input is no square of three channels, or nobody says how it is normalised.
    """
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"--data: pictures are cut to squares of three channels, the network takes {tuple(shape)}")
    said = said or {}
    facts = {"size": shape[2], "resize": resize or said.get("resize")}
    for name, given in (("mean", mean), ("std", std)):
        if given and len(given) != 3:
            raise ValueError(f"--{name} {' '.join(map(str, given))}: must be three numbers, of red, green and blue")
        facts[name] = given or said.get(name)
        if not facts[name]:
            raise ValueError(f"--data: the file does not say how its pictures are normalised: --{name} is missing")
    return facts


def columns(classes: Sequence[str], named: Sequence[str] | None, logits: int) -> np.ndarray:
    """The column of the logits for each of the data's `classes`: int64 (len(classes),).

    Args:
        named: the network's classes, if they are known; the data may lack some of them, and their order is their own.
        logits: how many columns there are.

    Raises:
        ValueError: a class that the network does not know, or another number of classes where it names none.
    """
    if not named:
        if len(classes) != logits:
            raise ValueError(
                f"--data has {len(classes)} classes, and the network {logits}, whose names it does not say"
            )
        return np.arange(logits)
    if unknown := sorted(set(classes) - set(named)):
        raise ValueError(f"--data has classes that the network does not know: {', '.join(unknown[:5])}")
    return np.array([named.index(name) for name in classes])


def predict(
    runners: dict[str, Callable], pictures: Iterable[tuple[np.ndarray, np.ndarray]], batch: int, columns: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The class of every picture, and the one that each runner finds, as columns of the logits: int64 (pictures,).

    Args:
        runners: functions of float32 (batch, C, H, W) that give logits, or several outputs by name, the logits first.
        pictures: images, of any number up to `batch`, and labels; they are read one batch after the other.
        columns: the column of the logits for every label.
    """
    right, found = [], {name: [] for name in runners}
    for images, labels in pictures:
        images = np.ascontiguousarray(images, np.float32)
        filled = np.take(images, range(batch), axis=0, mode="wrap")  # a library takes whole batches only
        for name, run in runners.items():
            found[name].append(_classes(run(filled))[: len(images)])
        right.append(columns[np.asarray(labels)])
    return np.concatenate(right), {name: np.concatenate(classes) for name, classes in found.items()}


def top1(right: np.ndarray, found: np.ndarray) -> float:
    """Per cent of the pictures whose class was found."""
    return 100 * float((right == found).mean())


def evaluate(
    runners: dict[str, Callable], pictures: Iterable[tuple[np.ndarray, np.ndarray]], batch: int, columns: np.ndarray
) -> dict:
    """How often each runner finds the class of a picture, and how often the others agree with the first runner.

    Args are those of `predict`.

    Returns:
        {"pictures": how many there were, "top1": {name: per cent}, "agreement": {name: per cent, of all but the first}}
    """
    return compared(*predict(runners, pictures, batch, columns))


def compared(right: np.ndarray, found: dict[str, np.ndarray]) -> dict:
    """What `evaluate` returns, of what `predict` returned."""
    first, *others = found
    rates = {name: top1(right, classes) for name, classes in found.items()}
    agreement = {name: top1(found[first], found[name]) for name in others}
    return {"pictures": len(right), "top1": rates, "agreement": agreement}


def _classes(made: np.ndarray | dict[str, np.ndarray]) -> np.ndarray:
    logits = next(iter(made.values())) if isinstance(made, dict) else made
    return logits.reshape(len(logits), -1).argmax(1)
