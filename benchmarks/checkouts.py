"""Is this checkout as fast as another? Training steps and compiled networks of both, in turns.

git worktree add ../before COMMIT
python benchmarks/checkouts.py ../before

Each checkout has a process of its own, which waits while the other one is timed. Writes `results/checkouts.md`.
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


def training_step(arch: str, name: str):
    """A step of `imagenet.py` on noise: bfloat16, channels_last, a fused optimiser."""
    import torch

    import models
    import pruning
    from benchmarks.train_throughput import Batch
    from utils.loss import Loss
    from utils.run import Run

    torch.manual_seed(0)
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
            known[key] = training_step(*what) if kind == "train" else compiled_network(*what, threads)
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
    parser.add_argument("--rounds", type=int, default=15)
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
        before, after = Checkout(options.other.resolve(), options.threads), Checkout(ROOT, options.threads)
        rows = [["", "other", "this one", "this one / other, median", "p10 to p90"]]
        for label, key in keys.items():
            pairs = []
            for number in range(options.rounds + 2):
                first, second = (before, after) if number % 2 else (after, before)
                times = {id(first): first.time(key), id(second): second.time(key)}
                pairs.append((times[id(before)], times[id(after)]))
            pairs = pairs[2:]
            ratios = sorted(mine / theirs for theirs, mine in pairs)
            low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
            medians = [f"{statistics.median(times):.2f} ms" for times in zip(*pairs, strict=True)]
            rows.append([label, *medians, f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"])
            print(*rows[-1], sep="  ", flush=True)
    describe = ["git", "describe", "--always"]
    head = subprocess.run(describe, cwd=options.other, capture_output=True, text=True, check=True).stdout.strip()
    text = f"""# This checkout beside commit {head}

Processes of both checkouts take turns; {options.rounds} rounds after two that are not counted, {options.threads}
thread(s), training in bfloat16 on {BATCH} pictures, compiled networks at 224x224 with one picture.

{markdown(rows)}
`{command()}`: {machine.line()}
"""
    save_text(RESULTS / "checkouts.md", text)


if __name__ == "__main__":
    main()
