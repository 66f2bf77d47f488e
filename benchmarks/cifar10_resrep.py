"""ResRep on CIFAR-10: accuracy before and after conversion, widths, latency of the dense and the narrow network.

python benchmarks/cifar10_resrep.py --data_path CIFAR10 --pretrained_model resnet56.th

Fine-tunes the trained network on these pictures, prunes it, compiles both. Finished runs are not repeated, interrupted
ones go on. Writes `results/cifar10_resrep.md` and `.png`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.jobs import RESULTS, ROOT, command, fewer, finished, medians, run, summary
from utils import machine
from utils.files import atomic, save_text
from utils.report import beside, markdown

PUBLISHED_UPDATES, PUBLISHED_STRENGTH = 480 * 781, 1e-4
SCHEDULE = (
    "flops_target", "num_epochs", "train_batch_size", "lasso_strength", "compactor_momentum", "before_mask_iters",
    "begin_granularity", "mask_end",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=Path)
    parser.add_argument("--pretrained_model", required=True, type=Path)
    parser.add_argument("--arch", default="resnet56")
    parser.add_argument("--flops_target", default=0.471, type=float)
    parser.add_argument("--fine_tune_epochs", default=3, type=int)
    parser.add_argument("--pictures", default=20_000, type=int, help="that pruning trains on, of 50,000")
    parser.add_argument("--num_epochs", default=1, type=int, help="of pruning")
    parser.add_argument("--train_batch_size", default=32, type=int, help="of pruning")
    parser.add_argument("--lasso_strength", default=0.012, type=float)
    parser.add_argument("--compactor_momentum", default=0.98, type=float)
    parser.add_argument("--before_mask_iters", default=50, type=int)
    parser.add_argument("--begin_granularity", default=8, type=int)
    parser.add_argument("--mask_end", default=0.4, type=float)
    parser.add_argument("--threads", default=1, type=int, help="of the compiled networks")
    parser.add_argument("--job_dir", default=ROOT / "experiments" / "cifar10_resrep", type=Path)
    parser.add_argument("--no_latency", action="store_true", help="only train, to measure later on a quiet machine")
    options = parser.parse_args()

    dense, narrow = options.job_dir / "fine_tuned", options.job_dir / "resrep"
    tuning = ["--num_epochs", options.fine_tune_epochs, "--lr", 0.02, "--train_batch_size", 128]
    train(options, options.data_path, dense, options.pretrained_model, ["--method", "dense", *tuning])
    asked = [word for name in SCHEDULE for word in (f"--{name}", getattr(options, name))]
    fixed = ["--mask_interval", 1, "--lr", 0.01, "--lr_policy", "cos_step", "--warmup_length", 0]
    part = fewer(options.data_path, options.job_dir / f"part_{options.pictures}", options.pictures // 10)
    train(options, part, narrow, dense / "checkpoint" / "final.pt", ["--method", "resrep", *asked, *fixed])
    if options.no_latency:
        return
    for job_dir in (dense, narrow):
        if not (job_dir / "deploy" / "deploy.json").exists():
            run("model_tune.py", "--onnx_path", job_dir / "model.onnx", "--threads", options.threads)
    save_text(RESULTS / "cifar10_resrep.md", text(options, dense, narrow))
    draw(summary(narrow)["layers"], RESULTS / "cifar10_resrep.png")


def train(options: argparse.Namespace, data_path: Path, job_dir: Path, start: Path, own: list) -> None:
    if finished(job_dir):
        return
    common = ["--arch", options.arch, "--data_set", "cifar10", "--data_path", data_path, "--amp", "--resume"]
    common += ["--pretrained_model", start, "--weight_decay", 1e-4, "--export_onnx", "--job_dir", job_dir]
    run("imagenet.py", *common, *own)


def text(options: argparse.Namespace, dense: Path, narrow: Path) -> str:
    rows = [["", "top-1", "multiply-adds", "parameters", "ONNX Runtime", "compiled by model_tune.py"]]
    for name, job_dir in (("dense, fine-tuned", dense), ("narrow, converted", narrow)):
        of, (runtime, _, compiled) = summary(job_dir), medians(job_dir)
        sums, times = of["totals"], [f"{ms:.3f} ms" for ms in (runtime, compiled)]
        share = f"{100 * sums['macs_kept'] / sums['macs']:.1f} %"
        counts = [f"{sums['macs_kept'] / 1e6:.2f} M ({share})", f"{sums['parameters_kept'] / 1e6:.3f} M"]
        rows.append([name, f"{of['accuracy']['tuned']['top1']:.2f} %", *counts, *times])
    start, tuned = (summary(dense)["accuracy"][stage]["top1"] for stage in ("dense", "tuned"))
    converted = summary(narrow)["accuracy"]["tuned"]["top1"]
    lines = [json.loads(line) for line in (narrow / "metrics.jsonl").read_text().splitlines()]
    end = {split: [line for line in lines if line["split"] == split][-1] for split in ("train", "val")}
    told, layers = end["train"], summary(narrow)["layers"]
    channels = [sum(layer["shape"][0] for layer in layers), sum(width(layer) for layer in layers)]
    sums = summary(narrow)["totals"]
    share = sums["macs_kept"] / sums["macs"]
    verdict = "reached" if share <= options.flops_target else "not reached: rows above the threshold stay"
    updates = options.num_epochs * (options.pictures // options.train_batch_size)
    stronger = options.lasso_strength / PUBLISHED_STRENGTH
    return f"""# CIFAR-10, {options.arch}: ResRep

The pictures were JPEG-compressed, so published accuracies do not transfer: the published weights score {start:.2f} % on
them as they are; {options.fine_tune_epochs} epochs of fine-tuning make the dense network below.

Pruning took {updates:,} updates of {options.train_batch_size} pictures, of {options.pictures:,} of the 50,000:
{updates / PUBLISHED_UPDATES:.2%} of the published {PUBLISHED_UPDATES:,} updates. For that the penalty is {stronger:.0f}
times the published one, the compactors' momentum {options.compactor_momentum} instead of 0.99. Channels are chosen
after {options.before_mask_iters} updates, then after every update until {options.mask_end:.0%} of the run,
{options.begin_granularity} more each time. Target, cosine and learning rate are the published ones.

{markdown(rows)}
- Target: {options.flops_target:.1%} of the multiply-adds, {verdict}. Kept: {share:.1%}.
- Output channels: {channels[0]} before, {channels[1]} after.
- Validation top-1 before conversion {end["val"]["top1"]:.2f} %, after it {converted:.2f} %; of the dense network
  {tuned:.2f} %.
- {told["masked_channels"]} channels to forget, mean norm {told["norm_forgotten"]:.1e}; mean norm of the others
  {told["norm_remembered"]:.2f}; from the largest forgotten to the least remembered {told["norm_gap"]:.1e}.
- One run, one seed, without a dense control of equal training; its settings were chosen for so few updates after
  trials on the embedded digits and shorter runs.
- Published, with 480 epochs and other pictures: 93.71 % before, 93.71 % after, at 47.1 %.

![widths by layer](cifar10_resrep.png)

Latency: batch 1, 32x32, {options.threads} thread(s), medians; a network's runtimes interleaved by `model_tune.py`.

- Command: `{command()}`
- Machine: {machine.line()}
"""


def width(layer: dict) -> int:
    return layer.get("left", layer["shape"])[0]


def draw(layers: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    beside(figure.subplots(), [(layer["shape"][0], width(layer)) for layer in layers], "width by layer", "channels")
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=130)


if __name__ == "__main__":
    main()
