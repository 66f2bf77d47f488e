"""Prove that a compiled network computes what ONNX Runtime computes, and time it beside its peers."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .onnx.graph import Grid
from .tuning import measure

# The largest relative error that is accepted.
# bfloat16: rounding moves a number by at most 2^-8 of itself, and by 0.4 of that in the mean square. A layer rounds its
# weights and its map. These errors are independent, so their squares add up: a chain of 50 layers differs by about
# 0.4 * sqrt(2 * 50) = 4 times 2^-8. MobileNets and ResNets with random weights were measured at 0.7 to 1.5 times 2^-8.
# int8: four of the 255 rounding steps that a map has. ONNX Runtime computes in whole numbers, too, but where a value
# lies half-way between two steps, the last bits of a scale decide, and one layer's step may become one of the next.
# With random weights such steps grow on their way: there, ONNX Runtime shows by itself how much is to be expected.
TOLERANCE = {"float32": 1e-4, "bfloat16": 4 * 2**-8, "int8": 4 / 255}
STEPS = 255  # of a quantised tensor's range
ONNX_RUNTIME = "ONNX Runtime"  # what proves a library, if it reads the file

# What is said of libraries that can run nowhere.
NOTHING = dict.fromkeys(
    ("measured_on", "tolerance", "proven_by", "max_relative_error", "top1_agreement", "rounding_steps")
)
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
        return measure.peer(onnx_path, threads), ONNX_RUNTIME
    except measure.Unreadable as problem:
        print(f"ONNX Runtime is left out: {problem}")
        return measure.evaluator(onnx_path), "onnx's reference evaluator"


def allowed(dtype: str, onnx_path: str | Path, images: np.ndarray, batch: int, ranges: Sequence = ()) -> float:
    """The largest relative error that is accepted of a library of this type.

    In int8 it is TOLERANCE, or twice what ONNX Runtime, without its optimisations, differs from itself.
    """
    if dtype != "int8":
        return TOLERANCE[dtype]
    plain, usual = measure.peer(onnx_path, 1, optimised=False), measure.peer(onnx_path, 1)
    return max(TOLERANCE[dtype], 2 * measure.compare(plain, usual, images, batch, ranges)[0])


def prove(
    libraries: dict,
    right: Callable,
    images: np.ndarray,
    batch: int,
    tolerance: float,
    grids: Sequence[Grid | None] = (),
) -> dict:
    """What deploy.json says of equality: the largest error of the libraries on the pictures, and the least agreement.

    Args:
        grids: of each output, what its values are rounded to. An error is relative to the largest value of the output,
            of an output on a grid to the grid's whole range; rounding_steps counts the values that are others there.

    Raises:
        Differs: the error exceeds the tolerance.
    """
    ranges = whole_ranges(grids)
    proofs = [measure.compare(library.run, right, images, batch, ranges) for library in libraries.values()]
    error, top1 = max(error for error, _ in proofs), min(top1 for _, top1 in proofs)
    if not error <= tolerance:
        raise Differs(f"relative error {error:.1e} exceeds --tolerance {tolerance:.1e}")
    found = {"max_relative_error": error, "top1_agreement": top1, "rounding_steps": None}
    if any(grids):
        counts = [rounding_steps(library.run, right, images, batch, grids) for library in libraries.values()]
        found["rounding_steps"] = max(counts, key=lambda count: (count["largest"], count["differ"]))
    return found


def whole_ranges(grids: Sequence[Grid | None]) -> list[float | None]:
    """How far apart the ends of each grid are."""
    return [grid and STEPS * grid.scale for grid in grids]


def rounding_steps(
    run: Callable, right: Callable, images: np.ndarray, batch: int, grids: Sequence[Grid | None]
) -> dict[str, int]:
    """Of the outputs on a grid: by how many steps a value differs at most, how many differ, and how many there are."""
    steps = []
    for some in measure.batches(images, batch):
        for (ours, theirs), grid in zip(measure.paired(run(some), right(some)), grids, strict=True):
            steps += [np.rint(np.abs(ours - theirs) / grid.scale).astype(int).ravel()] if grid else []
    steps = np.concatenate(steps)
    return {"largest": int(steps.max()), "differ": int(np.count_nonzero(steps)), "values": steps.size}


def race(libraries: dict, others: dict[str, Callable], images: np.ndarray, runs: int) -> dict[str, dict]:
    """Milliseconds a call of the peers and of the libraries, in turns; libraries on a device by its clock."""
    timers = {name: measure.timer(run) for name, run in others.items()}
    for name, library in libraries.items():
        timers[name] = library.time if hasattr(library, "time") else measure.timer(library.run)
    return measure.race(timers, images, runs)
