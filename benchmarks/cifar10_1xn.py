"""1xN blocks on CIFAR-10: accuracy after a short fine-tuning, and latency of the compiled networks.

python benchmarks/cifar10_1xn.py --data_path CIFAR10 --pretrained_model resnet20.th

Runs `imagenet.py` and `model_tune.py` once for every row of the table, all with the same budget, the dense network too.
Interrupted, it goes on where it was. Writes `benchmarks/results/cifar10_1xn.md`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils import machine  # noqa: E402
from utils.files import save_text  # noqa: E402
from utils.report import markdown  # noqa: E402

LENGTHS = (2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=Path)
    parser.add_argument("--pretrained_model", required=True, type=Path)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--num_epochs", default=3, type=int, help="of fine-tuning, for every row")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--threads", default=1, type=int, help="of the compiled networks")
    parser.add_argument("--job_dir", default=ROOT / "experiments" / "cifar10_1xn", type=Path)
    options = parser.parse_args()

    rows = {"dense": ["--conv_type", "DenseConv"]}
    for N in LENGTHS:
        rows[f"1x{N}"] = ["--conv_type", "BlockL1Conv", "--N", str(N), "--pr_target", "0.5", "--rearrange"]
    for name, method in rows.items():
        train(options, options.job_dir / name, method)
    for name in rows:  # after all training: nothing else may run while latency is measured
        tune(options, options.job_dir / name)
    save_text(ROOT / "benchmarks" / "results" / "cifar10_1xn.md", text(options, list(rows)))


def train(options: argparse.Namespace, job_dir: Path, method: list[str]) -> None:
    if (job_dir / "summary.json").exists():
        return
    common = ["--arch", options.arch, "--data_set", "cifar10", "--data_path", options.data_path]
    common += ["--pretrained_model", options.pretrained_model, "--seed", options.seed, "--amp", "--resume"]
    common += ["--num_epochs", options.num_epochs, "--lr", 0.02, "--train_batch_size", 128, "--weight_decay", 1e-4]
    run("imagenet.py", *common, *method, "--export_onnx", "--job_dir", job_dir)


def tune(options: argparse.Namespace, job_dir: Path) -> None:
    run("model_tune.py", "--onnx_path", job_dir / "model.onnx", "--threads", options.threads)


def run(*command: object) -> None:
    command = [sys.executable, *map(str, command)]
    print("$", *command[1:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def text(options: argparse.Namespace, names: list[str]) -> str:
    table = [
        ["", "sparsity", "top-1 before tuning", "top-1 after", "against dense", "ONNX Runtime, dense", "ours, dense"]
        + ["ours, sparse", "against ONNX Runtime", "against ours, dense"]
    ]
    dense = None
    for name in names:
        summary = json.loads((options.job_dir / name / "summary.json").read_text())
        deploy = json.loads((options.job_dir / name / "deploy" / "deploy.json").read_text())
        tuned, ms = summary["accuracy"]["tuned"]["top1"], deploy["latency_ms"]
        dense = tuned if dense is None else dense
        times = [ms[key]["median"] for key in ("onnxruntime_dense", "tvm_dense", "tvm_sparse")]
        table.append(
            [name, f"{100 * summary['totals']['sparsity']:.1f} %", f"{summary['accuracy']['pruned']['top1']:.2f}"]
            + [f"{tuned:.2f}", f"{tuned - dense:+.2f}", *(f"{time:.3f} ms" for time in times)]
            + [f"{times[0] / times[2]:.2f} x", f"{times[1] / times[2]:.2f} x"]
        )
    before = json.loads((options.job_dir / names[0] / "summary.json").read_text())["accuracy"]["dense"]["top1"]
    where = machine.describe()
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"""# CIFAR-10, {options.arch}: 1xN blocks at 50 %

The pictures were JPEG-compressed, so published accuracies do not transfer: the published weights score {before:.2f} %
on them as they are. Every row, the dense one too, had the same {options.num_epochs} epochs of fine-tuning (seed
{options.seed}). Latency: batch 1, 32x32, {options.threads} thread(s), median, the three runtimes interleaved in one
process by `model_tune.py`.

{markdown(table)}
- Command: `python benchmarks/cifar10_1xn.py --data_path CIFAR10 --pretrained_model {options.pretrained_model.name}
  --num_epochs {options.num_epochs} --threads {options.threads}`
- Machine: {where["cpu"]}, {where["cores"]} cores; Python {where["python"]}; {versions}; commit {where["commit"]}
"""


if __name__ == "__main__":
    main()
