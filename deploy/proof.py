"""Prove that a compiled network computes what ONNX Runtime computes, and time it beside its peers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .tuning import measure

# What is said of libraries that can run nowhere.
NOTHING = dict.fromkeys(("measured_on", "proven_by", "max_relative_error", "top1_agreement"))
NOTHING |= {"latency_ms": {}, "peers": {}}


class Differs(ValueError):
    """A library computes something else than the reference."""

    status = 1


def pictures(path: str | Path | None, onnx_path: str | Path, shape: list[int]) -> np.ndarray:
    """Random pictures, and the given ones behind them: (B, *shape[1:]).

    Args:
        path: a .npy file; by default `inputs.npy` beside the ONNX file, if there is one.
    """
    random = np.random.default_rng(0).standard_normal((4 * shape[0], *shape[1:])).astype(np.float32)
    beside = Path(onnx_path).parent / "inputs.npy"
    if not path and not beside.is_file():
        return random
    path = Path(path or beside)
    try:
        given = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"--images {path} cannot be read as .npy: {error}") from error
    if list(given.shape[1:]) != list(shape[1:]) or not len(given):
        raise ValueError(f"--images {path} holds {given.shape}, the network takes {tuple(shape)}")
    return np.concatenate([random, given])


def reference(onnx_path: str | Path, threads: int) -> tuple[Callable, str]:
    """The function that a library must agree with, and its name: ONNX Runtime, where it can read the file."""
    try:
        return measure.peer(onnx_path, threads), "ONNX Runtime"
    except measure.Unreadable as problem:
        print(f"ONNX Runtime is left out: {problem}")
        return measure.evaluator(onnx_path), "onnx's reference evaluator"


def prove(libraries: dict, right: Callable, images: np.ndarray, batch: int, tolerance: float) -> tuple[float, float]:
    """The libraries' largest relative error on the pictures, and the least share of pictures with the same top class.

    Raises:
        Differs: the error exceeds the tolerance.
    """
    proofs = [measure.compare(library.run, right, images, batch) for library in libraries.values()]
    error, top1 = max(error for error, _ in proofs), min(top1 for _, top1 in proofs)
    if not error <= tolerance:
        raise Differs(f"relative error {error:.1e} exceeds --tolerance {tolerance:.0e}")
    return error, top1


def race(libraries: dict, others: dict[str, Callable], images: np.ndarray, runs: int) -> dict[str, dict]:
    """Milliseconds a call of the peers and of the libraries, in turns; libraries on a device by its clock."""
    timers = {name: measure.timer(run) for name, run in others.items()}
    for name, library in libraries.items():
        timers[name] = library.time if hasattr(library, "time") else measure.timer(library.run)
    return measure.race(timers, images, runs)
