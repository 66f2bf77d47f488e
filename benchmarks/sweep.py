"""Accuracy against sparsity, methods side by side: a run of `imagenet.py` for every method, share kept and seed.

python benchmarks/sweep.py --k 0.8 0.64 0.512 0.41 --method bip hydra "imp --rounds 3" --job_dir experiments/sweep \\
    --arch resnet20 --data_set cifar10 --data_path CIFAR10 --pretrained_model resnet20.th --num_epochs 3

Options that are not its own go to every run whose method has them. A point that is finished is not repeated, an
interrupted one goes on. Writes `sweep.md` and `sweep.png` to the folder, of what is finished there.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pruning.options
from benchmarks.jobs import finished, run, summary
from utils import machine
from utils.command_line import underscored
from utils.files import atomic, save_text
from utils.parse import RUN, flags_of_methods
from utils.report import markdown

Points = dict[str, dict[float, list[float]]]  # method -> share kept -> top-1 of every seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, nargs="+", help="each with further options of its own, quoted")
    parser.add_argument("--k", required=True, type=float, nargs="+", help="shares kept")
    parser.add_argument("--seed", default=[0], type=int, nargs="+")
    parser.add_argument("--job_dir", required=True, type=Path)
    parser.add_argument("--no_dense", action="store_true", help="do not train the dense network for comparison")
    options, common = parser.parse_known_args()

    points: Points = {}
    for method in [*([] if options.no_dense else ["dense"]), *options.method]:
        for k in [1.0] if method == "dense" else options.k:
            top1 = [point(options.job_dir, method, k, seed, common) for seed in options.seed]
            points.setdefault(method, {})[k] = top1
    rows = [["method", "kept", *(f"seed {seed}" for seed in options.seed), "mean"]]
    for method, curve in points.items():
        for k, top1 in curve.items():
            rows.append([method, f"{k:g}", *(f"{v:.2f}" for v in top1), f"{statistics.mean(top1):.2f}"])
    how = f"`python benchmarks/sweep.py {shlex.join(sys.argv[1:])}`; {machine.line()}"
    text = f"# Top-1 by method and share kept\n\n{markdown(rows)}\n![curves](sweep.png)\n\n{how}\n"
    save_text(options.job_dir / "sweep.md", text)
    draw(points, "accuracy against sparsity", options.job_dir / "sweep.png")


def point(folder: Path, method: str, k: float, seed: int, common: list) -> float:
    """Top-1 of one run, made now if it is not there yet; `method` may have further options."""
    job_dir = job(folder, method, k, seed)
    if not finished(job_dir):
        own = [*shlex.split(method), "--seed", seed, "--resume", "--job_dir", job_dir]
        run("imagenet.py", *for_method(own[0], [*common, "--k", k]), "--method", *own)
    return summary(job_dir)["accuracy"]["tuned"]["top1"]


def for_method(name: str, words: list) -> list:
    """The `words` of a command line but for flags, and their values, that belong to other methods than `name`."""
    mine, taken = [], True
    for word in underscored([str(word) for word in words]):
        if word.startswith("--"):
            option = flags_of_methods(pruning.options).get(word.partition("=")[0])
            taken = option is None or option in RUN or option in pruning.options.row(name).own
        if taken:
            mine.append(word)
    return mine


def job(folder: Path, method: str, k: float, seed: int) -> Path:
    return folder / f"{'_'.join(word.lstrip('-') for word in shlex.split(method))}_k{k:g}_seed{seed}"


def draw(points: Points, title: str, path: Path) -> None:
    """A line a method, a dot a seed; what has no share kept but one is a level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (method, curve) in enumerate(points.items()):
        colour = f"C{number}"
        curve = {k: curve[k] for k in sorted(curve, reverse=True) if curve[k]}
        if not curve:
            continue
        if list(curve) == [1.0]:
            axes.axhline(statistics.mean(curve[1.0]), color="#777777", linestyle="--", label=method)
            continue
        sparsity, values = [100 * (1 - k) for k in curve], list(curve.values())
        axes.plot(sparsity, [statistics.mean(top1) for top1 in values], color=colour, label=method)
        for place, top1 in zip(sparsity, values, strict=True):
            axes.plot([place] * len(top1), top1, "o", color=colour, alpha=0.5, markersize=4)
    axes.set(title=title, xlabel="pruned, %", ylabel="top-1, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=130)


if __name__ == "__main__":
    main()
