"""Is this checkout as fast as another? Training steps and compiled networks of both, in turns.

git worktree add ../before COMMIT
python benchmarks/checkouts.py ../before

Each checkout has a process of its own, which waits while the other one is timed. Where the memory of a process lies
makes a compiled MobileNet up to a fifth faster or slower for as long as it lives, so both are started several times.
Writes `results/checkouts.md`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"dense": {}, "block_l1": {"N": 4}, "bip": {}, "hydra": {}, "resrep": {}, "stripe": {}}
BATCH = 32
SIZES = {"resnet20": 32, "mobilenet_v2": 64}  # of pictures to train on


def training_step(arch: str, name: str, threads: int):
    """A step of `imagenet.py` on noise: bfloat16, channels_last, a fused optimiser."""
    import torch

    import models
    import pruning
    from benchmarks.train_throughput import Batch
    from utils.loss import Loss
    from utils.run import Run

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    network = models.create_model(arch).to(memory_format=torch.channels_last)
    method = pruning.create_method(name, **METHODS[name])
    method.attach(network)

    def make(parameters):
        return torch.optim.SGD(parameters, 0.01, momentum=0.9, fused=True)

    size = SIZES[arch]
    images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,))
    run = Run(network, method, Batch(images, labels), Loss(), 1, lambda *_: 0.01, make, amp=True)
    return lambda: run.step(*[(images, labels)] * method.batches_per_step)


def compiled_network(path: str, threads: int):
    import numpy as np

    import deploy

    library = deploy.compile_onnx(path, threads=threads)
    images = np.load(Path(path).parent / "inputs.npy")[:1]
    return lambda: library.run(images)


def serve(threads: int) -> None:
    """Times what each line of the standard input names, and answers with milliseconds."""
    known = {}
    for line in sys.stdin:
        kind, *what = json.loads(line)
        key = (kind, *what)
        if key not in known:
            known[key] = (training_step if kind == "train" else compiled_network)(*what, threads)
            known[key]()
        start = time.perf_counter()
        known[key]()
        print(1e3 * (time.perf_counter() - start), file=sys.__stdout__, flush=True)


class Checkout:
    """A process that runs the code of a checkout."""

    def __init__(self, root: Path, threads: int):
        code = f"import sys; sys.path[:0] = [{str(root)!r}]; import runpy; sys.stdout = sys.stderr; "
        code += f"runpy.run_path({str(Path(__file__).resolve())!r})['serve']({threads})"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=root, text=True, **pipes)

    def time(self, key: tuple) -> float:
        self.process.stdin.write(json.dumps(key) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the folder of the other checkout")
    parser.add_argument("--archs", nargs="*", default=list(SIZES), help="networks to train")
    networks = ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "resnet50"]
    parser.add_argument("--networks", nargs="*", default=networks, help="networks to compile")
    parser.add_argument("--starts", type=int, default=5, help="of both processes")
    parser.add_argument("--rounds", type=int, default=7, help="after every start")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    sys.path.insert(0, str(ROOT))
    from benchmarks.jobs import RESULTS, command
    from benchmarks.sparse_inference import DENSE, Point, export, in_a_process
    from utils import machine
    from utils.files import save_text
    from utils.report import markdown

    keys = {f"a training step of {arch}, {name}": ("train", arch, name) for arch in options.archs for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            for point in (DENSE, Point(16, 50)):
                path = Path(folder) / f"{name}_{point}" / "model.onnx"
                in_a_process(export, name, 224, point, path)
                keys[f"{name} compiled, {point.label}"] = ("compile", str(path))
        pairs = {label: [] for label in keys}  # of every start: medians of the other checkout and of this one
        for start in range(options.starts):
            both = [Checkout(root, options.threads) for root in (options.other.resolve(), ROOT)]
            for label, key in keys.items():
                times = [[], []]
                for number in range(-2, options.rounds):  # two rounds to warm up
                    for which in (0, 1) if number % 2 else (1, 0):
                        milliseconds = both[which].time(key)
                        if number >= 0:
                            times[which].append(milliseconds)
                pairs[label].append([statistics.median(values) for values in times])
                print(start, label, *(f"{median:.2f}" for median in pairs[label][-1]), flush=True)
            for checkout in both:
                checkout.process.kill()
    rows = [["", "other", "this one", "this one / other, median", "lowest to highest"]]
    for label, medians in pairs.items():
        ratios = [mine / theirs for theirs, mine in medians]
        middle = [f"{statistics.median(values):.2f} ms" for values in zip(*medians, strict=True)]
        rows.append([label, *middle, f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}"])
    describe = ["git", "describe", "--always"]
    head = subprocess.run(describe, cwd=options.other, capture_output=True, text=True, check=True).stdout.strip()
    text = f"""# This checkout beside commit {head}

Processes of both checkouts take turns: {options.rounds} rounds after two that are not counted, {options.starts}
starts, of which each gives a median; {options.threads} thread(s). Training in bfloat16 on {BATCH} pictures, compiled
networks at 224x224 with one picture.

{markdown(rows)}
`{command()}`: {machine.line()}
"""
    save_text(RESULTS / "checkouts.md", text)


if __name__ == "__main__":
    main()
