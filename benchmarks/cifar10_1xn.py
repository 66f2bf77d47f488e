"""1xN blocks and their baselines on CIFAR-10: accuracy after a short fine-tuning, latency of the compiled networks.

python benchmarks/cifar10_1xn.py --data_path CIFAR10 --pretrained_model resnet20.th

Runs `imagenet.py` once for every row of the table and every seed, all with the same budget, the dense network too, and
`model_tune.py` for rows in blocks. Interrupted, it goes on where it was. Writes `results/cifar10_1xn.md` and `.png`.
"""

import argparse
import statistics
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.jobs import RESULTS, ROOT, command, finished, medians, run, summary
from utils import machine
from utils.files import atomic, save_text
from utils.report import markdown

METHODS = {
    "weight": ["--conv_type", "UnstructureConv"],
    **{f"1x{N}": ["--conv_type", "BlockL1Conv", "--N", N, "--rearrange"] for N in (2, 4, 8, 16)},
    "filter": ["--conv_type", "StructureConv"],
}
RATES = (0.5, 0.75)
# Row -> (what imagenet.py is told, whether it is compiled).
ROWS = {"dense": (["--conv_type", "DenseConv"], True)} | {
    f"{name} at {100 * rate:.0f} %": ([*flags, "--pr_target", rate], name.startswith("1x"))
    for rate in RATES
    for name, flags in METHODS.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=Path)
    parser.add_argument("--pretrained_model", required=True, type=Path)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--num_epochs", default=5, type=int, help="of fine-tuning, for every row")
    parser.add_argument("--seeds", default=[0, 1], type=int, nargs="+")
    parser.add_argument("--threads", default=1, type=int, help="of the compiled networks")
    parser.add_argument("--job_dir", default=ROOT / "experiments" / "cifar10_1xn", type=Path)
    parser.add_argument("--no_latency", action="store_true", help="only train, to measure later on a quiet machine")
    options = parser.parse_args()

    for seed in options.seeds:
        for row in ROWS:
            train(options, row, seed)
    if options.no_latency:
        return
    for row, (_, compiled) in ROWS.items():  # after all training: nothing else may run while latency is measured
        if compiled:
            run("model_tune.py", "--onnx_path", job(options, row) / "model.onnx", "--threads", options.threads)
    save_text(RESULTS / "cifar10_1xn.md", text(options))
    draw(options, RESULTS / "cifar10_1xn.png")


def job(options: argparse.Namespace, row: str, seed: int | None = None) -> Path:
    name = row.replace(" at ", "_").replace(" %", "")
    return options.job_dir / f"{name}_seed{options.seeds[0] if seed is None else seed}"


def train(options: argparse.Namespace, row: str, seed: int) -> None:
    job_dir = job(options, row, seed)
    if finished(job_dir):
        return
    common = ["--arch", options.arch, "--data_set", "cifar10", "--data_path", options.data_path]
    common += ["--pretrained_model", options.pretrained_model, "--seed", seed, "--amp", "--resume"]
    common += ["--num_epochs", options.num_epochs, "--lr", 0.02, "--train_batch_size", 128, "--weight_decay", 1e-4]
    run("imagenet.py", *common, *ROWS[row][0], "--export_onnx", "--job_dir", job_dir)


def tuned(options: argparse.Namespace, row: str) -> list[float]:
    """Top-1 of every seed that has run."""
    there = filter(finished, (job(options, row, seed) for seed in options.seeds))
    return [summary(job_dir)["accuracy"]["tuned"]["top1"] for job_dir in there]


def text(options: argparse.Namespace) -> str:
    seeds = [f"seed {seed}" for seed in options.seeds]
    accuracy = [["", "sparsity", "untrained", *seeds, "mean", "against dense"]]
    times = [["", "ONNX Runtime, dense", "ours, dense", "ours, sparse", "against ONNX Runtime", "against ours, dense"]]
    dense = statistics.mean(tuned(options, "dense"))
    for row, (_, compiled) in ROWS.items():
        first, top1 = summary(job(options, row)), tuned(options, row)
        figures = [f"{100 * first['totals']['sparsity']:.1f} %", f"{first['accuracy']['pruned']['top1']:.2f}"]
        figures += [f"{value:.2f}" for value in top1] + ["not run"] * (len(options.seeds) - len(top1))
        mean = statistics.mean(top1)
        accuracy.append([row, *figures, f"{mean:.2f}", f"{mean - dense:+.2f}"])
        if compiled:
            ort, ours, sparse = medians(job(options, row))
            ms = [f"{value:.3f} ms" for value in (ort, ours, sparse)]
            times.append([row, *ms, f"{ort / sparse:.2f} x", f"{ours / sparse:.2f} x"])
    before = summary(job(options, "dense"))["accuracy"]["dense"]["top1"]
    return f"""# CIFAR-10, {options.arch}: 1xN blocks and their baselines

The pictures were JPEG-compressed, so published accuracies do not transfer: the published weights score {before:.2f} %
on them as they are. Every row, the dense one too, had the same {options.num_epochs} epochs of fine-tuning in bfloat16.
Blocks are rearranged; the classifier is not pruned.

## Top-1, per cent

{markdown(accuracy)}
{" ".join(order(options, rate) for rate in RATES)}
(A block of 16 spans all filters of a CIFAR ResNet's first stage, where it can only remove whole input channels.)

![accuracy by pattern](cifar10_1xn.png)

## Latency

Batch 1, 32x32, {options.threads} thread(s), medians; the three runtimes interleaved in one process by `model_tune.py`.

{markdown(times)}
- Command: `{command()}`
- Machine: {machine.line()}
"""


def order(options: argparse.Namespace, rate: float) -> str:
    """Whether the paper's order comes out: weight, then blocks falling with N, then filter."""
    means = {name: statistics.mean(tuned(options, f"{name} at {100 * rate:.0f} %")) for name in METHODS}
    broken = [f"{a} ({means[a]:.2f}) < {b} ({means[b]:.2f})" for a, b in pairwise(METHODS) if means[a] < means[b]]
    verdict = f"does not hold: {', '.join(broken)}" if broken else "holds"
    return f"At {100 * rate:.0f} % the paper's order ({' > '.join(METHODS)}) {verdict}."


def draw(options: argparse.Namespace, path: Path) -> None:
    """Accuracy by pattern, a line a rate; dots are seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for rate, colour in zip(RATES, ("#3b6ea5", "#e08a3c"), strict=True):
        values = [tuned(options, f"{name} at {100 * rate:.0f} %") for name in METHODS]
        axes.plot(list(METHODS), [statistics.mean(v) for v in values], color=colour, label=f"{100 * rate:.0f} % pruned")
        for place, seeds in enumerate(values):
            axes.plot([place] * len(seeds), seeds, "o", color=colour, alpha=0.5, markersize=4)
    axes.axhline(statistics.mean(tuned(options, "dense")), color="#777777", linestyle="--", label="dense")
    axes.set(title=f"{options.arch} on CIFAR-10, {options.num_epochs} epochs of fine-tuning", ylabel="top-1, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=130)


if __name__ == "__main__":
    main()
