"""Largest error of compiled networks against ONNX Runtime, for every network, block length and share of kept blocks.

python benchmarks/equality.py

Blocks are dropped at random from the weights of every convolution of a dense network, wherever its rows divide. Writes
`results/equality.md`; ends with status 1 if an error exceeds the tolerance.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.jobs import RESULTS
from utils import machine

NETWORKS = (
    "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "resnet18", "resnet50", "resnet20",
    "resnet56", "vgg16_bn",
)  # fmt: skip
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--N", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--kept", nargs="+", type=float, default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "equality.md")
    options = parser.parse_args()
    rows, worst = [], 0.0
    for name in options.networks:
        errors = {}
        with tempfile.TemporaryDirectory() as folder:
            dense = export(name, Path(folder) / "dense.onnx")
            for kept in options.kept:
                for N in options.N if kept < 1 else options.N[:1]:
                    path = drop(dense, Path(folder) / "pruned.onnx", N, kept) if kept < 1 else dense
                    errors[kept, N] = error(path, options.threads)
                    print(f"{name}, N={N}, {kept:.0%} kept: {errors[kept, N]:.1e}", flush=True)
        worst = max(worst, *errors.values())
        for kept in options.kept:
            cells = [f"{errors[kept, N]:.0e}" if (kept, N) in errors else "" for N in options.N]
            rows.append(f"| {name} | {kept:.0%} | {' | '.join(cells)} |")
    how = [
        f"- Command: `python {' '.join(sys.argv)}`",
        f"- Machine: {machine.line()}",
    ]
    head = ["network", "kept", *(f"N={N}" for N in options.N)]
    lines = ["# Compiled networks against ONNX Runtime: largest relative error of the outputs", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows, "", *how]
    options.out.write_text("\n".join(lines) + "\n")
    print(f"largest: {worst:.1e}; written: {options.out}")
    sys.exit(int(worst > TOLERANCE))


def export(name: str, path: Path) -> Path:
    import torch

    import models
    from utils.export import export_onnx

    torch.manual_seed(0)
    size = 32 if name in ("resnet20", "resnet56", "vgg16_bn") else 64
    network, images = models.create_model(name, 10), torch.randn(4, 3, size, size)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1  # one pass sets the statistics
    with torch.no_grad():
        network.train()(images)
    export_onnx(network.eval(), images, path)
    return path


def drop(dense: Path, path: Path, N: int, kept: float) -> Path:
    """Zero blocks of N rows of every convolution with that many, and make up for what is lost."""
    import onnx
    from onnx import numpy_helper

    model, rng = onnx.load(dense), np.random.default_rng(0)
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for tensor in model.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if tensor.name in weights and weight.shape[1] > 3 and len(weight) % N == 0:
            keep = rng.random((len(weight) // N, weight.shape[1], 1, 1)) < kept
            weight = weight * np.repeat(keep, N, axis=0) / kept**0.5
            tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), tensor.name))
    onnx.save(model, path)
    return path


def error(path: Path, threads: int) -> float:
    import deploy
    from deploy.tuning import measure

    library = deploy.compile_onnx(path, threads=threads, batch=1)
    images = np.random.default_rng(1).standard_normal(library.info["input"]["shape"]).astype(np.float32)
    return measure.compare(library.run, measure.peer(path, threads), images, 1)[0]


if __name__ == "__main__":
    main()
