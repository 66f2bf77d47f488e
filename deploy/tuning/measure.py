"""Prove that a compiled network computes what ONNX Runtime computes, and time it: beside others, and by kernel."""

import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ..runtime.library import Library, bind, set_threads


class Unreadable(ValueError):
    """A runtime is installed, but does not read the file."""


def evaluator(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """The ONNX file in the onnx package's own reference evaluator, which is slow, as a function of the images."""
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(str(path))
    return lambda images: _named(session.output_names, session.run(None, {session.input_names[0]: images}))


def peer(path: str | Path, threads: int, optimised: bool = True) -> Callable[[np.ndarray], np.ndarray]:
    """The ONNX file in ONNX Runtime, with `threads` threads, as a function of the images.

    optimised: whether it may fuse nodes, and compute quantised ones in whole numbers.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("the proof and the timing need ONNX Runtime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has many kinds
        reason = " ".join(str(error).split())
        raise Unreadable(f"ONNX Runtime {onnxruntime.__version__} cannot read {path}: {reason}") from error
    name, outputs = session.get_inputs()[0].name, [output.name for output in session.get_outputs()]
    return lambda images: _named(outputs, session.run(None, {name: images}))


def _named(names: list[str], arrays: list[np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
    """As `Library.run` gives them: one array alone, several by name."""
    return arrays[0] if len(arrays) == 1 else dict(zip(names, arrays, strict=True))


def batches(images: np.ndarray, batch: int):
    """Batches of exactly `batch`; the last one is filled up with pictures from the start."""
    for start in range(0, len(images), batch):
        yield np.take(images, range(start, start + batch), axis=0, mode="wrap")


def compare(
    run: Callable, reference: Callable, images: np.ndarray, batch: int, ranges: Sequence[float | None] = ()
) -> tuple[float, float]:
    """(largest difference / largest reference value, fraction of pictures with the same first class).

    Of several outputs the largest relative difference counts, and the classes of the first one. ValueError if the
    reference holds NaN or infinity, with which nothing can be proven equal. If only `run` computes such a value, the
    difference is infinite.

    ranges: of each output, what its differences are divided by; None, or nothing said: its largest reference value.
    """
    difference, scale, same, count = [], [], 0.0, 0
    for some in batches(images, batch):
        pairs = paired(run(some), reference(some))
        if not all(np.all(np.isfinite(right)) for _, right in pairs):
            raise ValueError("the reference computes NaN or infinity from these pictures: nothing can be proven equal")
        if not all(np.all(np.isfinite(made)) for made, _ in pairs):
            return float("inf"), 0.0
        difference.append([float(np.abs(made - right).max()) for made, right in pairs])
        scale.append([float(np.abs(right).max()) for _, right in pairs])
        made, right = (values.reshape(batch, -1).argmax(1) for values in pairs[0])
        same, count = same + float((made == right).sum()), count + batch
    largest, scales = np.max(difference, axis=0).tolist(), np.max(scale, axis=0).tolist()
    scales = [of or scale for of, scale in zip_longest(ranges, scales)]
    return max(most / (of or 1.0) for most, of in zip(largest, scales, strict=True)), same / count


def paired(ours, theirs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every output, what one function computes and what the other does."""
    return [(ours[name], theirs[name]) for name in theirs] if isinstance(theirs, dict) else [(ours, theirs)]


def timer(run: Callable, pause: float = 0.02) -> Callable[[np.ndarray, int], list[float]]:
    """A function (images, calls) that gives the milliseconds of so many calls of `run`.

    A pause and two calls that do not count come first: the threads of whatever ran before spin for a while after their
    work, and would slow this down.
    """

    def timed(images: np.ndarray, calls: int) -> list[float]:
        time.sleep(pause)
        run(images), run(images)
        taken = []
        for _ in range(calls):
            start = time.perf_counter()
            run(images)
            taken.append((time.perf_counter() - start) * 1e3)
        return taken

    return timed


def race(timers: dict[str, Callable], images: np.ndarray, runs: int, block: int = 25) -> dict:
    """Milliseconds a call, {"median", "p10"} for every `timer`: blocks of calls in turn, `runs` calls each."""
    times = {name: [] for name in timers}
    while any(len(taken) < runs for taken in times.values()):
        for name, timed in timers.items():
            times[name] += timed(images, min(block, runs - len(times[name])))
    return {
        name: {"median": round(float(np.median(taken)), 4), "p10": round(float(np.percentile(taken, 10)), 4)}
        for name, taken in times.items()
    }


def kernel_times(library: Library, images: np.ndarray, runs: int) -> list[tuple[str, float]]:
    """(name, median milliseconds) of every kernel, in the order in which one run calls them."""
    return [(name, ms) for name, ms, _ in kernel_calls(library, images, runs)]


def kernel_calls(library: Library, images: np.ndarray, runs: int) -> list[tuple[str, float, int]]:
    """(name, median milliseconds, bytes of its arguments and result) of every kernel that one run calls, in order."""
    import tvm

    set_threads(library.info["threads"])
    machine = bind(library.executable, library.weights, tvm.cpu())
    calls, started = [], []

    def instrument(function, name, before, result, *arguments) -> int:
        if before:
            started.append(time.perf_counter())
        elif started and not name.startswith("vm."):
            taken = (time.perf_counter() - started[-1]) * 1e3
            calls.append((name, taken, sum(_bytes(argument) for argument in arguments)))
        return 0  # go on

    machine.set_instrument(instrument)
    images, taken = tvm.runtime.tensor(images), []
    for _ in range(runs + 2):
        calls.clear()
        machine["network"](images)
        taken.append([ms for _, ms, _ in calls])
    medians = np.median(taken[2:], axis=0).tolist()
    return [(name, ms, size) for (name, _, size), ms in zip(calls, medians, strict=True)]


def _bytes(value) -> int:
    shape = getattr(value, "shape", None)
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(str(value.dtype)).itemsize if shape is not None else 0
