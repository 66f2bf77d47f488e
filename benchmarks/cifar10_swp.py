"""Stripe-wise pruning on CIFAR-10: accuracy after a short run, cost by our count and the publication's, and latency.

python benchmarks/cifar10_swp.py --data_path CIFAR10 --pretrained_model resnet56.th

Fine-tunes the dense network, prunes stripes from there (`imagenet.py`), and compiles both (`model_tune.py`); beside
them a VGG16 whose shapes are learned on digits, in minutes. Interrupted, it goes on where it was. Writes
`results/cifar10_swp.md` and pictures of the filters' shapes.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
from benchmarks.jobs import RESULTS, ROOT, command, finished, medians, run, summary
from benchmarks.published_cost import PublishedCost, published_cost
from utils import machine
from utils.files import save_text
from utils.report import markdown

PUBLISHED = [  # from scratch, 160 epochs
    ["VGG16, published", "+0.4", "-92.66 %", "-71.16 %"],
    ["ResNet-56, published", "-0.12", "-75.6 %", "-77.7 %"],
]


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
    tuning = ["--method", "dense", "--num_epochs", options.dense_epochs, "--lr", 0.02]
    train(options, dense, options.pretrained_model, *tuning)
    pruning = ["--method", "stripe", "--pr_target", options.pr_target, "--lr", options.lr]
    train(options, stripes, dense / "checkpoint" / "final.pt", *pruning, "--num_epochs", options.num_epochs)
    learn_vgg(options)
    if options.no_latency:
        return
    for name in ("dense", "stripes", "vgg_dense", "vgg_stripes"):  # after all training: nothing else may run now
        run("model_tune.py", "--onnx_path", options.job_dir / name / "model.onnx", "--threads", options.threads)
    save_text(RESULTS / "cifar10_swp.md", text(options))
    for name, job in {"cifar10_swp": "stripes", "cifar10_swp_vgg": "vgg"}.items():
        shutil.copy(options.job_dir / job / "shapes.png", RESULTS / f"{name}.png")


def learn_vgg(options: argparse.Namespace) -> None:
    """VGG16 from scratch on digits of 16x16, then exported for CIFAR's 32x32, as is the dense one."""
    common, learned = ["--arch", "vgg16_bn", "--data_set", "digits"], options.job_dir / "vgg"
    if not finished(learned):
        training = ["--image_size", 16, "--train_batch_size", 64, "--lr", 0.1, "--weight_decay", 1e-4, "--amp"]
        pruning = ["--method", "stripe", "--pr_target", 0.7, "--pr_unit", "macs", "--num_epochs", 12]
        run("imagenet.py", *common, *training, *pruning, "--job_dir", learned)
    dense = options.job_dir / "vgg_dense.pt"
    torch.save(models.create_model("vgg16_bn", 10).state_dict(), dense)
    for name, file in {"vgg_dense": dense, "vgg_stripes": learned / "checkpoint" / "final.pt"}.items():
        job_dir = options.job_dir / name
        if not (job_dir / "model.onnx").exists():
            run("imagenet.py", *common, "--image_size", 32, "--evaluate", file, "--export_onnx", "--job_dir", job_dir)


def train(options: argparse.Namespace, job_dir: Path, start: Path, *arguments: object) -> None:
    if finished(job_dir):
        return
    common = ["--arch", options.arch, "--data_set", "cifar10", "--data_path", options.data_path, "--amp", "--resume"]
    common += ["--train_batch_size", 128, "--weight_decay", 1e-4, "--pretrained_model", start, "--export_onnx"]
    run("imagenet.py", *common, *arguments, "--job_dir", job_dir)


def cost(arch: str, file: Path | None = None) -> PublishedCost:
    """By the publication's count at 32x32, of a finished network or the dense one."""
    network = models.create_model(arch, 10)
    if file:
        models.load_checkpoint(network, file)
    return published_cost(network, torch.zeros(1, 3, 32, 32), skeletons=bool(file))


def change(arch: str, job_dir: Path) -> list[str]:
    dense, pruned = cost(arch), cost(arch, job_dir / "checkpoint" / "final.pt")
    pairs = ((getattr(pruned, key), getattr(dense, key)) for key in ("parameters", "flops"))
    return [f"{100 * (ours / whole - 1):+.1f} %" for ours, whole in pairs]


def text(options: argparse.Namespace) -> str:
    dense, stripes, vgg = (summary(options.job_dir / name) for name in ("dense", "stripes", "vgg"))
    top1, before = (of["accuracy"]["tuned"]["top1"] for of in (stripes, dense))
    totals = stripes["totals"]
    kept = {key: f"{totals[f'{key}_kept'] / 1e6:.3f} M of {totals[key] / 1e6:.3f} M" for key in ("macs", "parameters")}
    layers = [layer for layer in stripes["layers"] if "positions" in layer]
    left = sum(sum(map(sum, layer["positions"])) for layer in layers)
    gone = 1 - left / sum(layer["filters"] * len(layer["positions"]) ** 2 for layer in layers)
    removed = sum("branch is removed" in layer["note"] for layer in layers) // 2

    rows = [["", "top-1 against dense", "parameters", "FLOPs"], *PUBLISHED]
    ours = f"{options.arch}, here, {options.num_epochs} epochs"
    rows.append([ours, f"{top1 - before:+.2f}", *change(options.arch, options.job_dir / "stripes")])
    rows.append(["vgg16_bn, here, on digits", "", *change("vgg16_bn", options.job_dir / "vgg")])
    start = f"They were fine-tuned for {options.dense_epochs} epochs: the dense network below."
    if not options.dense_epochs:
        start = "They were not fine-tuned first, so getting used to these pictures is part of what pruning gains."

    times = [["", "ONNX Runtime", "ours, every layer dense", "ours, stripes found"]]
    for name in ("dense", "stripes", "vgg_dense", "vgg_stripes"):
        arch = "vgg16_bn" if name.startswith("vgg") else options.arch
        cells = [f"{ms:.3f} ms" for ms in medians(options.job_dir / name)]
        times.append([f"{arch}, {name.removeprefix('vgg_')}", *cells])
    commit = json.loads((options.job_dir / "stripes" / "run.json").read_text())["commit"]
    return f"""# CIFAR-10, {options.arch}: stripe-wise pruning

The published networks were trained from scratch for 160 epochs. Here the published dense weights are the start; as
they are, they score {dense["accuracy"]["dense"]["top1"]:.2f} %, since the pictures were JPEG-compressed. {start}

Then stripes were pruned for {options.num_epochs} epochs in bfloat16 with `--pr_target {options.pr_target}`, so that the
penalty on their scales adapts to what so short a schedule needs: gone at half of it, to recover in the rest.
Nothing else was tuned. Asked were {100 * options.pr_target:.1f} % of all stripes, gone are {100 * gone:.2f} %;
{removed} residual blocks lost their branch. Top-1: dense {before:.2f} %, pruned {top1:.2f} %.

By our count (a multiply-add is one, zeros are not kept): {kept["macs"]} multiply-adds, {kept["parameters"]}
parameters.
By the publication's (two FLOPs a multiply-add, batch norm and pooling counted, shapes as parameters), against dense:

{markdown(rows)}
![{options.arch}: how many filters keep each position, by layer](cifar10_swp.png)

VGG16 was trained from scratch on digits, 16x16, with `--pr_target 0.7 --pr_unit macs` for 12 epochs, to top-1
{vgg["accuracy"]["tuned"]["top1"]:.2f} %; its shapes are learned, its cost and latency are those at CIFAR's 32x32.

![VGG16: how many filters keep each position, by layer](cifar10_swp_vgg.png)

## Latency

Batch 1, 32x32, {options.threads} thread(s), medians; the runtimes of a row were timed in turns by `model_tune.py`. Rows
of stripes are broken networks: dead filters and branches are gone, filters of like shape are neighbours.

{markdown(times)}
- Command: `{command()}`
- Machine: {machine.line()}; trained at {commit}
"""


if __name__ == "__main__":
    main()
