"""Prove that a compiled network computes what ONNX Runtime computes, and time them side by side."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def peer(path: str | Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The ONNX file in ONNX Runtime, with `threads` threads, as a function of the images."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("the proof and the timing need ONNX Runtime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def openvino_peer(path: str | Path, threads: int, shape: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """The ONNX file in OpenVINO, for input `shape`, set to low latency and to float32 as it is stored."""
    try:
        import openvino
    except ImportError as error:
        raise ValueError("the comparison with OpenVINO needs it: pip install openvino") from error
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape(list(shape))
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0]


def batches(images: np.ndarray, batch: int):
    """Batches of exactly `batch`; the last one is filled up with pictures from the start."""
    for start in range(0, len(images), batch):
        yield np.take(images, range(start, start + batch), axis=0, mode="wrap")


def compare(run: Callable, reference: Callable, images: np.ndarray, batch: int) -> tuple[float, float]:
    """(largest difference / largest reference value, fraction of pictures with the same first class)."""
    difference = scale = same = count = 0.0
    for some in batches(images, batch):
        ours, theirs = run(some), reference(some)
        if not np.all(np.isfinite(ours)):
            return float("inf"), 0.0
        difference = max(difference, float(np.abs(ours - theirs).max()))
        scale = max(scale, float(np.abs(theirs).max()))
        same += float((ours.reshape(batch, -1).argmax(1) == theirs.reshape(batch, -1).argmax(1)).sum())
        count += batch
    return difference / scale if scale else difference, same / count


def race(runners: dict[str, Callable], images: np.ndarray, runs: int, pause: float = 0.02, block: int = 25) -> dict:
    """Milliseconds a call, {"median", "p10"} for every runner: blocks of calls in turn, `runs` calls each.

    Each block follows a pause and two calls that do not count: the threads of the runner before it spin for a while
    after their work, and would slow the next one down.
    """
    times = {name: [] for name in runners}
    while any(len(taken) < runs for taken in times.values()):
        for name, run in runners.items():
            time.sleep(pause)
            run(images), run(images)
            for _ in range(min(block, runs - len(times[name]))):
                start = time.perf_counter()
                run(images)
                times[name].append((time.perf_counter() - start) * 1e3)
    return {
        name: {"median": round(float(np.median(taken)), 4), "p10": round(float(np.percentile(taken, 10)), 4)}
        for name, taken in times.items()
    }
