"""What learning masks costs: selecting the scores to keep, and whole training steps beside dense ones.

python benchmarks/bip_cost.py --arch resnet18 resnet50

The selection is timed on as many scores as ResNet-50 has, beside the full sort that the published code does at every
forward pass. Steps take turns in one process, on equally many pictures: BiP's two levels see half of a batch each.
Writes `results/bip_cost.md`.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
import pruning
from benchmarks.jobs import RESULTS
from benchmarks.train_throughput import Batch, race
from pruning.budget import lowest
from utils import machine
from utils.files import save_text
from utils.loss import Loss
from utils.report import markdown
from utils.run import Run

KEPT = 0.1
METHODS = {"dense": {}, "bip": {"k": KEPT}, "hydra": {"k": KEPT}, "imp": {"k": KEPT}}


def by_sorting(scores: torch.Tensor, pruned: int) -> torch.Tensor:
    """The published selection: the first `pruned` of the ascending order are cleared."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    mask[scores.sort().indices[:pruned]] = False
    return mask


def step_of(arch: str, name: str, images: torch.Tensor, labels: torch.Tensor):
    """A step of `imagenet.py` on these pictures, in as many batches as the method draws."""
    network = models.create_model(arch).to(images.device, memory_format=torch.channels_last)
    method = pruning.create_method(name, **METHODS[name])
    method.attach(network)

    def make(parameters):
        return torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4, fused=True)

    images = images.contiguous(memory_format=torch.channels_last)
    run = Run(network, method, Batch(images, labels), Loss(), 1, lambda *_: 0.01, make)
    batches = list(zip(images.chunk(method.batches_per_step), labels.chunk(method.batches_per_step), strict=True))
    return lambda: run.step(*batches)


def selections(device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round. Scores are shuffled normal noise; both selections must agree."""
    count = sum(p.numel() for p in models.create_model("resnet50").parameters() if p.dim() > 1)
    scores = torch.randn(count, device=device).abs()
    pruned = int((1 - KEPT) * count)
    assert torch.equal(~lowest(scores, pruned), by_sorting(scores, pruned)), "the two selections differ"
    times = {"full sort": [], "one selection": []}
    for _ in range(rounds):
        for name, select in (("full sort", by_sorting), ("one selection", lowest)):
            start = time.perf_counter()
            select(scores, pruned).any().item()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {f"{name}, {count:,} scores": values for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, _ = machine.pick_device(0)

    times = selections(device, options.rounds)
    slow, fast = (statistics.median(values) for values in times.values())
    selection = [["", "median", "against the sort"]]
    for name, values in times.items():
        median = statistics.median(values)
        selection.append([name, f"{median:.0f} ms", f"{slow / median:.1f} x"])
    print(f"one selection is {slow / fast:.1f} x faster than the sort", flush=True)

    steps = [["network", "method", "step, median", "against dense"]]
    for arch in options.arch:
        images = torch.randn(options.batch_size, 3, *[options.image_size] * 2, device=device)
        labels = torch.randint(1000, (options.batch_size,), device=device)
        variants = {name: step_of(arch, name, images, labels) for name in METHODS}
        seconds = {
            name: [options.batch_size / rate for rate in rates]
            for name, rates in race(variants, options.batch_size, options.rounds, device).items()
        }
        for name, values in seconds.items():
            paired = statistics.median(a / b for a, b in zip(values, seconds["dense"], strict=True))
            steps.append([arch, name, f"{1e3 * statistics.median(values):.0f} ms", f"{paired:.2f} x"])
            print(*steps[-1], sep="  ", flush=True)
    where = machine.describe()
    what = where["gpus"][0] if device.type == "cuda" else f"{where['cpu']}, {torch.get_num_threads()} thread(s)"
    command = f"python benchmarks/bip_cost.py --arch {' '.join(options.arch)} --batch_size {options.batch_size}"
    text = f"""# What learning masks costs

## Selecting the {100 * KEPT:g} % of the highest scores

{options.rounds} rounds, the two in turns; their masks are equal.

{markdown(selection)}
## A training step

{options.batch_size} pictures of {options.image_size}x{options.image_size}, float32; variants take turns,
{options.rounds} rounds; the last column is the median of the ratios within a round. A selection is part of every step
of bip and hydra.

{markdown(steps)}
- Command: `{command} --image_size {options.image_size} --rounds {options.rounds}`
- Machine: {what}; torch {torch.__version__}; commit {where["commit"]}
"""
    save_text(RESULTS / "bip_cost.md", text)


if __name__ == "__main__":
    main()
