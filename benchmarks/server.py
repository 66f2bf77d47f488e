"""A server in small: four threads in two processes, each pinned to a core, and a library that is replaced meanwhile.

python benchmarks/server.py --seconds 20

Every answer must be that of the library before or after the replacement, whole. The same threads then serve the dense
network by ONNX Runtime. Writes `results/server.md`.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.jobs import RESULTS, command
from benchmarks.sparse_inference import DENSE, Point, export, in_a_process
from utils import machine
from utils.files import save_text
from utils.report import markdown

THREADS = 2  # of each process
PROCESSES = 2
RELOAD_EVERY = 0.5  # seconds; a server looks for a new library so often


def compiled(path: Path, folder: Path) -> None:
    """Compile `path` for one thread and save it in `folder`, over what is there."""
    import deploy

    deploy.compile_onnx(path, threads=1).save(folder)


def replace(path: Path, folder: Path, ready, go) -> None:
    """As `compiled`, but what is compiled is saved when told, so that compiling takes no time from the servers."""
    import deploy

    library = deploy.compile_onnx(path, threads=1)
    ready.set()
    go.wait()
    library.save(folder)


def answers(path: Path, images: np.ndarray) -> np.ndarray:
    """What ONNX Runtime answers to every picture: float32 (n, classes)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])


class OnnxRuntime:
    """ONNX Runtime's session on one thread, with the face of a library."""

    def __init__(self, path: str):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"images": images})[0]


def serve(core: int, what: str, images: np.ndarray, right: list[np.ndarray], seconds: float, results) -> None:
    """Answer as fast as possible, and count calls, wrong answers, libraries seen, and whether the core was kept."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    import deploy

    make = OnnxRuntime if what.endswith(".onnx") else deploy.load
    current, end = [make(what)], time.perf_counter() + seconds
    counts, wrong, seen = [0] * THREADS, [0] * THREADS, [set() for _ in range(THREADS)]

    def work(number: int) -> None:
        turn = number
        while time.perf_counter() < end:
            place = turn % len(images)
            logits = current[0].run(images[place : place + 1])[0]
            errors = [float(np.abs(logits - known[place]).max() / np.abs(known[place]).max()) for known in right]
            if min(errors) < 1e-4:
                seen[number].add(int(np.argmin(errors)))
            else:
                wrong[number] += 1
            counts[number] += 1
            turn += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(RELOAD_EVERY)
        if make is deploy.load:
            current[0] = make(what)
    kept = not hasattr(os, "sched_getaffinity") or os.sched_getaffinity(0) == {core}
    results.put((sum(counts), sum(wrong), sorted(set().union(*seen)), kept))


def race(what: str, images: np.ndarray, right: list[np.ndarray], seconds: float, meanwhile=None) -> tuple:
    """Serve from both processes at once: calls a second, wrong answers, libraries seen, cores kept, exit statuses."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (what, images, right, seconds, results)
    servers = [context.Process(target=serve, args=(core, *arguments)) for core in range(PROCESSES)]
    for server in servers:
        server.start()
    if meanwhile:
        time.sleep(seconds / 2)
        meanwhile()
    for server in servers:
        server.join()
    statuses = [server.exitcode for server in servers]
    told = [results.get(timeout=5) for status in statuses if status == 0]
    rate = sum(calls for calls, *_ in told) / seconds
    libraries = sorted(set().union(*(seen for _, _, seen, _ in told)))
    return rate, sum(wrong for _, wrong, *_ in told), libraries, all(kept for *_, kept in told), statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="mobilenet_v2")
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, points = Path(temporary), {"dense": DENSE, "before": Point(16, 50), "after": Point(16, 75)}
        files = {name: folder / name / "model.onnx" for name in points}
        for name, point in points.items():
            in_a_process(export, options.network, options.image_size, point, files[name])
        images = np.random.default_rng(0).standard_normal((16, 3, *[options.image_size] * 2), dtype=np.float32)
        right = {name: answers(path, images) for name, path in files.items()}
        serving = folder / "serving"
        in_a_process(compiled, files["before"], serving)
        rows = [["", "calls a second", "wrong answers", "libraries answered", "affinity kept", "exit statuses"]]
        known = [right["before"], right["after"]]
        context = multiprocessing.get_context("spawn")
        ready, go = context.Event(), context.Event()
        replacing = context.Process(target=replace, args=(files["after"], serving, ready, go))
        replacing.start()
        ready.wait()
        ours = race(str(serving), images, known, options.seconds, go.set)
        replacing.join()
        peer = race(str(files["dense"]), images, [right["dense"]], options.seconds)
        for label, (rate, wrong, seen, kept, statuses) in {"this library": ours, "ONNX Runtime, dense": peer}.items():
            rows.append([label, f"{rate:.0f}", str(wrong), str(len(seen)), "yes" if kept else "no", str(statuses)])
    text = f"""# A library that is served and replaced

{options.network} at {options.image_size}x{options.image_size}, 1x16 blocks at 50 %, replaced by 75 % in the middle of
{options.seconds:g} seconds while two processes of two threads each, pinned to one core each, answer without a pause.

{markdown(rows)}
`{command()}`: {machine.line()}
"""
    save_text(RESULTS / "server.md", text)
    print(markdown(rows))
    if ours[1] or any(ours[4]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
