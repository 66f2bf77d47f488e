"""What masks cost in training: images a second of dense, pruned and naively pruned networks, side by side.

python benchmarks/train_throughput.py --arch mobilenet_v2 resnet20

Steps of all variants take turns in one process. "naive" is the published form: `mask * weight` in every forward pass,
float32, NCHW, plain SGD. Writes `results/train_throughput_<device>.md`.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
import pruning
from benchmarks.jobs import RESULTS
from utils import machine
from utils.files import save_text
from utils.loss import Loss
from utils.report import markdown
from utils.run import Run

SIZE = {"resnet20": 32, "resnet56": 32, "vgg16_bn": 32}


class Batch:
    """One batch for ever: what of a loader a step needs."""

    epoch, batch = 0, 1

    def __init__(self, images: torch.Tensor, labels: torch.Tensor):
        self.images, self.labels, self.device = images, labels, images.device

    def __len__(self) -> int:
        return 1


class NaiveConv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def ours(arch: str, images, labels, name: str, amp: bool):
    """A step of `imagenet.py`: dense or pruned, channels_last, fused optimiser."""
    network = models.create_model(arch).to(images.device, memory_format=torch.channels_last)
    method = pruning.create_method(name, **({} if name == "dense" else {"N": 4, "pr_target": 0.5}))
    method.attach(network)

    def make(parameters):
        return torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=4e-5, fused=True)

    images = images.contiguous(memory_format=torch.channels_last)
    run = Run(network, method, Batch(images, labels), Loss(), 1, lambda *_: 0.01, make, amp=amp)
    return lambda: run.step((images, labels))


def naive(arch: str, images, labels):
    """The published form of masked training."""
    network = models.create_model(arch).to(images.device)
    pruning.create_method("block_l1", N=4, pr_target=0.5).attach(network)
    for module in network.modules():
        if hasattr(module, "mask") and isinstance(module, nn.Conv2d):
            module.__class__ = NaiveConv2d
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=4e-5)
    network.train()

    def step():
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def race(steps: dict, images: int, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Images a second of every round."""
    rates = {name: [] for name in steps}
    for round_ in range(-2, rounds):  # two rounds to warm up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_ >= 0:
                rates[name].append(images / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["mobilenet_v2", "resnet20"])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=64, help="of networks that are not CIFAR's")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    device, _ = machine.pick_device(0)

    table = [["network", "variant", "images/s, median", "p10", "against dense in the same precision"]]
    for arch in options.arch:
        size = SIZE.get(arch, options.image_size)
        images = torch.randn(options.batch_size, 3, size, size, device=device)
        labels = torch.randint(1000, (options.batch_size,), device=device)
        steps = {
            "dense, float32": ours(arch, images, labels, "dense", amp=False),
            "1x4 blocks, float32": ours(arch, images, labels, "block_l1", amp=False),
            "naive 1x4 blocks, float32": naive(arch, images, labels),
            "dense, bfloat16": ours(arch, images, labels, "dense", amp=True),
            "1x4 blocks, bfloat16": ours(arch, images, labels, "block_l1", amp=True),
        }
        rates = race(steps, options.batch_size, options.rounds, device)
        for name, values in rates.items():
            base = rates["dense, bfloat16" if "bfloat16" in name else "dense, float32"]
            paired = statistics.median(a / b for a, b in zip(values, base, strict=True))
            p10 = sorted(values)[len(values) // 10]
            row = [f"{arch} {size}x{size}", name, f"{statistics.median(values):.0f}", f"{p10:.0f}", f"{paired:.3f}"]
            table.append(row)
            print(*row, sep="  ", flush=True)
    where = machine.describe()
    what = where["gpus"][0] if device.type == "cuda" else f"{where['cpu']}, {torch.get_num_threads()} threads"
    command = f"python benchmarks/train_throughput.py --arch {' '.join(options.arch)} --rounds {options.rounds}"
    text = f"""# Training throughput, {device.type}

Whole training steps on one synthetic batch of {options.batch_size}; variants take turns, {options.rounds} rounds;
the last column is the median of the ratios within a round.

{markdown(table)}
- Command: `{command}`
- Machine: {what}; torch {torch.__version__}; commit {where["commit"]}
"""
    save_text(RESULTS / f"train_throughput_{device.type}.md", text)


if __name__ == "__main__":
    main()
