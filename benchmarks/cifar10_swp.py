"""Stripe-wise pruning on CIFAR-10: accuracy after a short run, cost by our count and the publication's, and latency.

python benchmarks/cifar10_swp.py --data_path CIFAR10 --pretrained_model resnet56.th

Fine-tunes the dense network, prunes stripes from there (`imagenet.py`), and compiles both (`model_tune.py`).
Interrupted, it goes on where it was. Writes `results/cifar10_swp.md` and the picture of the filters' shapes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
from utils import machine  # noqa: E402
from utils.count import published_cost  # noqa: E402
from utils.files import save_text  # noqa: E402
from utils.report import markdown  # noqa: E402

PUBLISHED = [  # from scratch, 160 epochs
    ["VGG16, published", "+0.4", "-92.66 %", "-71.16 %"],
    ["ResNet-56, published", "-0.12", "-75.6 %", "-77.7 %"],
]
RUNTIMES = ("onnxruntime_dense", "tvm_dense", "tvm_sparse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=Path)
    parser.add_argument("--pretrained_model", required=True, type=Path)
    parser.add_argument("--arch", default="resnet56")
    parser.add_argument("--dense_epochs", default=3, type=int, help="of fine-tuning before pruning; 0: start as it is")
    parser.add_argument("--num_epochs", default=3, type=int, help="of pruning: half to prune, half to recover")
    parser.add_argument("--pr_target", default=0.7, type=float)
    parser.add_argument("--lr", default=0.05, type=float, help="of pruning")
    parser.add_argument("--threads", default=1, type=int, help="of the compiled networks")
    parser.add_argument("--job_dir", default=ROOT / "experiments" / "cifar10_swp", type=Path)
    parser.add_argument("--no_latency", action="store_true", help="only train, to measure later on a quiet machine")
    options = parser.parse_args()

    dense, stripes = options.job_dir / "dense", options.job_dir / "stripes"
    train(
        options,
        dense,
        options.pretrained_model,
        "--method",
        "dense",
        "--num_epochs",
        options.dense_epochs,
        "--lr",
        0.02,
    )
    pruning = ["--method", "stripe", "--pr_target", options.pr_target, "--lr", options.lr]
    train(options, stripes, dense / "checkpoint" / "final.pt", *pruning, "--num_epochs", options.num_epochs)
    if options.no_latency:
        return
    for job_dir in (dense, stripes):  # after all training: nothing else may run while latency is measured
        run("model_tune.py", "--onnx_path", job_dir / "model.onnx", "--threads", options.threads)
    results = ROOT / "benchmarks" / "results"
    save_text(results / "cifar10_swp.md", text(options, dense, stripes))
    shutil.copy(stripes / "shapes.png", results / "cifar10_swp.png")


def train(options: argparse.Namespace, job_dir: Path, start: Path, *arguments: object) -> None:
    if (job_dir / "summary.json").exists():
        return
    common = ["--arch", options.arch, "--data_set", "cifar10", "--data_path", options.data_path, "--amp", "--resume"]
    common += ["--train_batch_size", 128, "--weight_decay", 1e-4, "--pretrained_model", start, "--export_onnx"]
    run("imagenet.py", *common, *arguments, "--job_dir", job_dir)


def run(*command: object) -> None:
    command = [sys.executable, *map(str, command)]
    print("$", *command[1:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def cost(options: argparse.Namespace, job_dir: Path):
    network = models.create_model(options.arch, 10)
    models.load_checkpoint(network, job_dir / "checkpoint" / "final.pt")
    return published_cost(network, torch.zeros(1, 3, 32, 32), skeletons=True)


def text(options: argparse.Namespace, dense: Path, stripes: Path) -> str:
    jobs = {"dense": dense, "stripes": stripes}
    summaries = {name: json.loads((job_dir / "summary.json").read_text()) for name, job_dir in jobs.items()}
    top1 = {name: summary["accuracy"]["tuned"]["top1"] for name, summary in summaries.items()}
    totals = summaries["stripes"]["totals"]
    kept = {key: f"{totals[f'{key}_kept'] / 1e6:.3f} M of {totals[key] / 1e6:.3f} M" for key in ("macs", "parameters")}
    layers = [layer for layer in summaries["stripes"]["layers"] if "positions" in layer]
    stripes_left = sum(sum(map(sum, layer["positions"])) for layer in layers)
    gone = 1 - stripes_left / sum(layer["filters"] * len(layer["positions"]) ** 2 for layer in layers)
    removed = sum("branch is removed" in layer["note"] for layer in layers) // 2

    theirs = {name: cost(options, job_dir) for name, job_dir in jobs.items()}
    change = {
        key: getattr(theirs["stripes"], key) / getattr(theirs["dense"], key) - 1 for key in ("parameters", "flops")
    }
    rows = [["", "top-1 against dense", "parameters", "FLOPs"], *PUBLISHED]
    ours = [f"{top1['stripes'] - top1['dense']:+.2f}", *(f"{100 * change[key]:+.1f} %" for key in change)]
    rows.append([f"{options.arch}, here, {options.num_epochs} epochs", *ours])

    start = f"They were fine-tuned for {options.dense_epochs} epochs: the dense network below."
    if not options.dense_epochs:
        start = "They were not fine-tuned first, so getting used to these pictures is part of what pruning gains."
    times = [["", "ONNX Runtime", "ours, every layer dense", "ours, stripes found"]]
    for name, job_dir in jobs.items():
        deploy = json.loads((job_dir / "deploy" / "deploy.json").read_text())
        times.append([name, *(f"{deploy['latency_ms'][runtime]['median']:.3f} ms" for runtime in RUNTIMES)])
    where = machine.describe()
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"""# CIFAR-10, {options.arch}: stripe-wise pruning

The published networks were trained from scratch for 160 epochs. Here the published dense weights are the start; as
they are, they score {summaries["dense"]["accuracy"]["dense"]["top1"]:.2f} %, since the pictures were JPEG-compressed.
{start} Then stripes were pruned for {options.num_epochs} epochs in bfloat16 with `--pr_target {options.pr_target}`: in
the first half the penalty on the scales of stripes adapts to what so short a schedule needs, far above the published
1e-5; the second half recovers. Nothing else was tuned.

Asked were {100 * options.pr_target:.1f} % of all stripes, gone are {100 * gone:.2f} %; {removed} residual blocks lost
their branch. Top-1: dense {top1["dense"]:.2f} %, pruned {top1["stripes"]:.2f} %.

By our count (a multiply-add is one, zeros are not kept): {kept["macs"]} multiply-adds, {kept["parameters"]} parameters.
By the publication's (two FLOPs a multiply-add, batch norm and pooling counted, a shape a layer as parameters):

{markdown(rows)}
![how many filters keep each position, by layer](cifar10_swp.png)

## Latency

Batch 1, 32x32, {options.threads} thread(s), medians; the runtimes of a row were timed in turns by `model_tune.py`. The
row of stripes is the broken network: dead filters and branches are gone, filters of like shape are neighbours.

{markdown(times)}
- Command: `python benchmarks/cifar10_swp.py --data_path CIFAR10 --pretrained_model {options.pretrained_model.name}
  --arch {options.arch} --dense_epochs {options.dense_epochs} --num_epochs {options.num_epochs} --lr {options.lr}
  --pr_target {options.pr_target} --threads {options.threads}`
- Machine: {where["cpu"]}, {where["cores"]} cores; Python {where["python"]}; {versions}; commit {where["commit"]}
"""


if __name__ == "__main__":
    main()
