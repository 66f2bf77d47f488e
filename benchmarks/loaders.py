"""Loaders of image folders: training pictures per second of one processor core, against the plain PyTorch recipe.

python benchmarks/loaders.py --data_path IMAGENET --workers 2

The plain recipe (PIL, RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize on DataLoader workers) is 1.0. All
take turns, round by round. Processor time is that of the process, its threads and its workers, so that other programs
hardly matter; wall-clock figures are given too. Writes `benchmarks/results/loaders.md`.
"""

import argparse
import importlib.metadata
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from benchmarks.jobs import RESULTS
from data.loader import MEAN, STD
from data.sources import TRAIN_FOLDERS
from utils import machine
from utils.files import save_text
from utils.report import markdown

PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=Path, help="train/ and val/ of class folders")
    parser.add_argument("--image_size", default=224, type=int)
    parser.add_argument("--batch_size", default=50, type=int)
    parser.add_argument("--workers", default=os.cpu_count(), type=int, help="worker processes, or threads of DALI")
    parser.add_argument("--rounds", default=9, type=int)
    parser.add_argument("--epochs", default=3, type=int, help="passes over the training pictures, each round")
    options = parser.parse_args()

    loaders = {
        "plain PyTorch recipe": reference(options),
        "ours": ours(options),
        "ours, DALI on the CPU": ours(options, True),
    }
    rounds = {name: [] for name in loaders}
    for number in range(-1, options.rounds):  # the first starts workers and fills the file cache
        for name, loader in loaders.items():
            measured = once(loader, options.epochs)
            if number >= 0:
                rounds[name].append(measured)
                print(
                    f"{name}: {measured[0]:.0f} pictures per second of a core, {measured[1]:.0f} of the clock",
                    flush=True,
                )
    save_text(RESULTS / "loaders.md", text(options, rounds))


def reference(options: argparse.Namespace) -> torch.utils.data.DataLoader:
    from torchvision import datasets, transforms

    folder = next(options.data_path / name for name in TRAIN_FOLDERS if (options.data_path / name).is_dir())
    steps = [transforms.RandomResizedCrop(options.image_size), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    pictures = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    return torch.utils.data.DataLoader(
        pictures,
        options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )


def ours(options: argparse.Namespace, use_dali: bool = False) -> data.Loader:
    train, _ = data.create_loaders(
        "imagefolder",
        data_path=options.data_path,
        image_size=options.image_size,
        train_batch_size=options.batch_size,
        eval_batch_size=options.batch_size,
        seed=0,
        device=torch.device("cpu"),
        workers=options.workers,
        skip_bad=False,
        use_dali=use_dali,
    )
    return train


def once(loader, epochs: int) -> tuple[float, float]:
    """Pictures per second of processor time and of the clock."""
    processor, clock, count = processor_seconds(), time.perf_counter(), 0
    for _ in range(epochs):
        for images, _ in loader:
            count += len(images)
    return count / (processor_seconds() - processor), count / (time.perf_counter() - clock)


def processor_seconds() -> float:
    """Of this process with its threads, and of its worker processes."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def text(options: argparse.Namespace, rounds: dict[str, list[tuple[float, float]]]) -> str:
    table = [["", "pictures a second of one core", "least to most", "against plain", "pictures a second, wall clock"]]
    plain = statistics.median(core for core, _ in rounds["plain PyTorch recipe"])
    for name, measured in rounds.items():
        cores, clocks = zip(*measured, strict=True)
        middle = statistics.median(cores)
        spread = f"{min(cores):.0f} to {max(cores):.0f}"
        table.append([name, f"{middle:.0f}", spread, f"{middle / plain:.2f}x", f"{statistics.median(clocks):.0f}"])
    where = machine.describe()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"""# Loaders of image folders

Training pictures of {options.image_size}x{options.image_size} on the CPU: medians of {options.rounds} interleaved
rounds of {options.epochs} epochs, batches of {options.batch_size}, {options.workers} workers (threads, for DALI).
A second of one core is a second of processor time, of the process, its threads and its workers together: other programs
on the machine hardly change it, as they do the wall clock.

{markdown(table)}
- The plain recipe: PIL, RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize on DataLoader workers.
- Ours, by default: libjpeg-turbo through torchvision, a crop that is drawn before it is resized in uint8 and kept
  channels_last, flipped and sent as uint8, normalised a whole batch at a time.
- What is left is decoding. DALI decodes the crop alone, but its resize on the CPU takes back what that saves.
- Command: `python benchmarks/loaders.py --data_path IMAGENET --image_size {options.image_size}
  --batch_size {options.batch_size} --workers {options.workers} --rounds {options.rounds} --epochs {options.epochs}`
- Machine: {where["cpu"]}, {where["cores"]} cores; Python {where["python"]}; {versions}; commit {where["commit"]}
"""


if __name__ == "__main__":
    main()
