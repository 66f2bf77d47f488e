"""Where a library's time goes, kernel by kernel; and how fast a saved one answers several callers at once."""

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from ..runtime.library import Library, load
from ..targets import Machine
from . import clock, measure

PERCENTILES = (10, 50, 90, 99)


def profile(library: Library, machine: Machine, images: np.ndarray, runs: int) -> dict:
    """{"peak_gflops", "kernels"}: the calls of one run in order, and the peak that they are held against.

    Of each call: the median milliseconds, the bytes of all that it is given and makes and, if it computes layers, their
    names and the GFLOP/s of multiply-adds with kept weights. A depthwise convolution inside of its successor's kernel
    counts with its time there, but not with its work.
    """
    calls = measure.kernel_calls(library, images, runs)
    times, layers, rows = Counter(name for name, _, _ in calls), library.info["layers"], []
    waiting = {name: [layer for layer in layers if layer["function"] == name] for name in times}
    each = {name: len(waiting[name]) // count for name, count in times.items()}  # layers that one call computes
    for name, ms, size in calls:
        row = {"kernel": name, "ms": round(ms, 5), "bytes": size}
        some, waiting[name] = waiting[name][: each[name]], waiting[name][each[name] :]
        if some:
            flop = sum(2 * np.prod(layer["shape"]) * layer["density"] * layer["pixels"] for layer in some) * len(images)
            row |= {"layers": [layer["name"] for layer in some], "gflops": round(float(flop) / ms / 1e6, 2)}
        rows.append(row)
    return {"peak_gflops": clock.peak_gflops(machine), "kernels": rows}


def benchmark(folder: str | Path, sessions: int, runs: int) -> dict:
    """A saved library called by `sessions` threads at once, `runs` times by each.

    {"threads", "batch", "sessions", "runs", "latency_ms": {"p10", "p50", "p90", "p99"}, "images_per_second"}.
    ValueError for a folder that `load` refuses.
    """
    with load(folder) as library:
        ((name, shape),) = library.inputs.items()
        images = {name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        library.run(images)  # what it cannot do is said here, and not in a thread
        taken, ready, start = [[] for _ in range(sessions)], threading.Barrier(sessions + 1), threading.Event()

        def client(times: list[float]) -> None:
            library.run(images), library.run(images)  # which are not counted
            ready.wait()
            start.wait()
            for _ in range(runs):
                before = time.perf_counter()
                library.run(images)
                times.append(1e3 * (time.perf_counter() - before))

        clients = [threading.Thread(target=client, args=(times,), daemon=True) for times in taken]
        for thread in clients:
            thread.start()
        ready.wait()
        began = time.perf_counter()
        start.set()
        for thread in clients:
            thread.join()
        seconds = time.perf_counter() - began
    numbers = np.percentile(np.concatenate(taken), PERCENTILES)
    return {
        "threads": library.info["threads"],
        "batch": shape[0],
        "sessions": sessions,
        "runs": runs,
        "latency_ms": {f"p{p}": round(float(ms), 4) for p, ms in zip(PERCENTILES, numbers, strict=True)},
        "images_per_second": round(sessions * runs * shape[0] / seconds, 2),
    }
