"""Learned masks on CIFAR-10 beside magnitude: BiP, Hydra, IMP, one-shot and dense; 1x8 blocks compiled.

python benchmarks/cifar10_bip.py --data_path CIFAR10 --pretrained_model resnet20.th

Every run of a table has the same epochs; an interrupted or repeated call does what is missing. Writes
`results/cifar10_bip.md` and `.png` of the runs that are finished.
"""

import argparse
import statistics
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.jobs import RESULTS, ROOT, command, fewer, finished, medians, run, summary
from benchmarks.sweep import draw, job, point
from utils import machine
from utils.files import save_text
from utils.report import markdown

SHARES = (0.1, 0.05)
METHODS = {  # in the paper's order at these shares
    "BiP": "bip --lr 0.1 --mask_lr 0.1",
    "Hydra": "hydra --lr 0.1",
    "IMP, {rounds} rounds": "imp --lr 0.1 --lr_policy cos_step --rounds {rounds}",  # a round is one epoch
    "one-shot magnitude": "imp --lr 0.1",
}
DENSE = "dense --lr 0.02"
BLOCKS = {
    "BiP, 1x8 blocks": "bip --layer_type block --N 8 --lr 0.02 --mask_lr 0.1 --num_epochs {epochs}",
    "BiP, 1x8 blocks, twice the epochs": "bip --layer_type block --N 8 --lr 0.02 --mask_lr 0.1 --num_epochs {twice}",
    "one-shot, 1x8 blocks": "imp --layer_type block --N 8 --lr 0.02 --num_epochs {epochs}",
    "one-shot, 1x8 blocks, rearranged": "block_l1 --N 8 --pr_target 0.75 --rearrange --lr 0.02 --num_epochs {epochs}",
}
SHARE_OF_BLOCKS = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=Path, help="a train/ test/ tree of class folders")
    parser.add_argument("--pretrained_model", required=True, type=Path)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--num_epochs", default=3, type=int, help="of every run, and rounds of IMP")
    parser.add_argument("--block_epochs", default=8, type=int, help="of the runs with 1x8 blocks, instead")
    parser.add_argument("--train_batch_size", default=128, type=int)
    parser.add_argument("--pictures", type=int, help="only the first so many of a class, and half as many to test")
    parser.add_argument("--seeds", default=[0, 1], type=int, nargs="+")
    parser.add_argument("--threads", default=1, type=int, help="of the compiled networks")
    parser.add_argument("--job_dir", default=ROOT / "experiments" / "cifar10_bip", type=Path)
    parser.add_argument("--no_latency", action="store_true", help="only train, to measure later on a quiet machine")
    parser.add_argument("--report", action="store_true", help="run nothing: write what is finished")
    options = parser.parse_args()
    if options.pictures:
        folder = options.job_dir / "pictures"
        options.data_path = fewer(options.data_path, folder, options.pictures, options.pictures // 2)

    common = ["--arch", options.arch, "--data_set", "cifar10", "--data_path", options.data_path, "--amp"]
    common += ["--pretrained_model", options.pretrained_model, "--num_epochs", options.num_epochs]
    common += ["--train_batch_size", options.train_batch_size, "--weight_decay", 1e-4, "--export_onnx"]
    if not options.report:
        for seed in options.seeds:
            for _, method, k in rows(options):
                point(options.job_dir, method, k, seed, common)
        for method in [] if options.no_latency else blocks(options).values():
            network = job(options.job_dir, method, SHARE_OF_BLOCKS, options.seeds[0]) / "model.onnx"
            run("model_tune.py", "--onnx_path", network, "--threads", options.threads)
    save_text(RESULTS / "cifar10_bip.md", text(options))
    curves = {"dense": {1.0: top1(options, DENSE, 1.0)}}
    curves |= {label: {k: top1(options, method, k) for k in SHARES} for label, method in methods(options).items()}
    draw(curves, f"{options.arch} on CIFAR-10, {options.num_epochs} epochs", RESULTS / "cifar10_bip.png")


def methods(options: argparse.Namespace) -> dict[str, str]:
    rounds = options.num_epochs
    return {label.format(rounds=rounds): method.format(rounds=rounds) for label, method in METHODS.items()}


def blocks(options: argparse.Namespace) -> dict[str, str]:
    epochs = {"epochs": options.block_epochs, "twice": 2 * options.block_epochs}  # twice: as many updates as the others
    return {label: method.format(**epochs) for label, method in BLOCKS.items()}


def rows(options: argparse.Namespace) -> list[tuple[str, str, float]]:
    """(label, method, share kept) of every run, the most telling first."""
    learned = [(label, method, k) for k in SHARES for label, method in methods(options).items()]
    return [("dense", DENSE, 1.0), *learned, *((*one, SHARE_OF_BLOCKS) for one in blocks(options).items())]


def top1(options: argparse.Namespace, method: str, k: float) -> list[float]:
    """Of every seed that has run."""
    folders = [job(options.job_dir, method, k, seed) for seed in options.seeds]
    return [summary(f)["accuracy"]["tuned"]["top1"] for f in filter(finished, folders)]


def text(options: argparse.Namespace) -> str:
    table = [["", "kept", "untrained", *(f"seed {seed}" for seed in options.seeds), "mean"]]
    for label, method, k in rows(options):
        reached = top1(options, method, k)
        cells = [f"{value:.2f}" for value in reached] + ["not run"] * (len(options.seeds) - len(reached))
        if reached:
            before = summary(job(options.job_dir, method, k, options.seeds[0]))["accuracy"]["pruned"]["top1"]
            table.append([label, f"{100 * k:g} %", f"{before:.2f}", *cells, f"{statistics.mean(reached):.2f}"])
    times = [["", "ONNX Runtime, dense", "ours, dense", "ours, sparse", "against ONNX Runtime", "top-1"]]
    for label, method in blocks(options).items():
        job_dir = job(options.job_dir, method, SHARE_OF_BLOCKS, options.seeds[0])
        if (job_dir / "deploy" / "deploy.json").exists():
            ort, ours, sparse = medians(job_dir)
            reached = statistics.mean(top1(options, method, SHARE_OF_BLOCKS))
            cells = [*(f"{value:.3f} ms" for value in (ort, ours, sparse)), f"{ort / sparse:.2f} x", f"{reached:.2f}"]
            times.append([label, *cells])
    count = {part: sum(1 for _ in (options.data_path / part).glob("*/*")) for part in ("train", "test")}
    before = summary(job(options.job_dir, DENSE, 1.0, options.seeds[0]))["accuracy"]["dense"]["top1"]
    return f"""# CIFAR-10, {options.arch}: learned masks

{options.num_epochs} epochs of {count["train"]:,} training pictures for every row, {options.block_epochs} for blocks, in
batches of {options.train_batch_size}, bfloat16; {count["test"]:,} test pictures. An epoch shows every picture once, to
BiP too, whose two levels so make half as many updates each. The pictures were JPEG-compressed, so published accuracies
do not transfer: the published weights, from which every run starts, score {before:.2f} % on them as they are.

## Top-1, per cent

{markdown(table)}
{" ".join(order(options, k) for k in SHARES)}
Weights are ranked over the whole network; 1x8 blocks in every layer, without stem and classifier.

![accuracy by share pruned](cifar10_bip.png)

## 1x8 blocks, compiled

Batch 1, 32x32, {options.threads} thread(s), medians; runtimes in turns in one process by `model_tune.py`; top-1 is the
mean of all seeds.

{markdown(times)}
- Methods: {"; ".join(f"{label}: `{method}`" for label, method, k in rows(options) if k != SHARES[1])}
- Command: `{command()}`
- Machine: {machine.line()}
"""


def order(options: argparse.Namespace, k: float) -> str:
    """Whether the paper's order comes out, of what has run."""
    reached = {label: top1(options, method, k) for label, method in methods(options).items()}
    means = {label: statistics.mean(values) for label, values in reached.items() if values}
    if len(means) < 2:
        return f"At {100 * k:g} % kept there is no order yet."
    broken = [f"{a} ({means[a]:.2f}) < {b} ({means[b]:.2f})" for a, b in pairwise(means) if means[a] < means[b]]
    verdict = f"does not hold: {', '.join(broken)}" if broken else "holds"
    return f"At {100 * k:g} % kept the paper's order ({' > '.join(means)}) {verdict}."


if __name__ == "__main__":
    main()
