"""Compile a pruned network from ONNX, prove it equal, measure it.

    python model_tune.py --onnx_path job/model.onnx --bsr 4 --bsc 1 --threads 2

Reads the file, finds the blocks in its weights, compiles it twice (block sparse, and dense as its twin), proves the
outputs equal to ONNX Runtime's, times the three side by side, and writes lib.so, weights.bin,
deploy.json and deploy.md. Needs no PyTorch.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from utils.options import OneLineParser

# flag, type, default, help
OPTIONS = [
    ("onnx_path", str, None, "the network (required)"),
    ("bsr", int, None, "rows of a block, the N of 1xN; found in the weights if not given"),
    ("bsc", int, None, "columns of a block; 1xN blocks have 1"),
    ("sparsity", float, 0.0, "least fraction of zero blocks that a layer needs to be compiled sparse"),
    ("threads", int, None, "threads of every runtime; default: all cores"),
    ("batch", int, None, "batch size, where the file leaves it open; default: 1"),
    ("target", str, "native", "native, x86-avx2, x86-avx512, aarch64, or any TVM target"),
    (
        "images",
        str,
        None,
        "pictures to prove the equality on, float32 (B, 3, H, W) .npy; default: inputs.npy beside the file",
    ),
    ("runs", int, 200, "timed calls of each runtime"),
    ("tolerance", float, 1e-4, "largest relative error that is accepted"),
    ("out", str, None, "folder to write; default: deploy/ beside the file"),
]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, kind, default, text in OPTIONS:
        parser.add_argument(f"--{name}", type=kind, default=default, help=text, required=name == "onnx_path")
    options = parser.parse_args(argv)
    if options.bsc not in (None, 1):
        raise ValueError(f"--bsc {options.bsc}: blocks are N rows of one column (1xN), so only --bsc 1 can be compiled")
    if options.bsr is not None and options.bsr < 1:
        raise ValueError(f"--bsr {options.bsr} is no number of rows")
    if not 0 <= options.sparsity <= 1:
        raise ValueError(f"--sparsity {options.sparsity} lies outside of [0, 1]")
    for name in ("threads", "batch", "runs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} is less than 1")
    return options


def pictures(options: argparse.Namespace, shape: list[int]) -> np.ndarray:
    """Random pictures, and the given ones behind them: (B, *shape[1:])."""
    random = np.random.default_rng(0).standard_normal((4 * shape[0], *shape[1:])).astype(np.float32)
    beside = Path(options.onnx_path).parent / "inputs.npy"
    path = Path(options.images) if options.images else beside
    if not options.images and not beside.is_file():
        return random
    try:
        given = np.load(path, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"--images {path} cannot be read as .npy: {error}") from error
    if list(given.shape[1:]) != list(shape[1:]) or not len(given):
        raise ValueError(f"--images {path} holds {given.shape}, the network takes {tuple(shape)}")
    return np.concatenate([random, given])


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse(argv)
        from deploy import blocks, compiler, measure, passes, reader, report, targets

        if not targets.runs_here(targets.find_machine(options.target)):
            raise ValueError(
                f"--target {options.target}: this computer cannot run it, so nothing could be proven or timed"
            )
        network = passes.simplify(reader.read_onnx(options.onnx_path, options.batch))
        blocks.check(network, options.bsr)
        common = {"target": options.target, "threads": options.threads}
        sparse = compiler.compile_graph(network, options.onnx_path, sparsity=options.sparsity, **common)
        dense = compiler.compile_graph(network, options.onnx_path, dense=True, **common)
        shape, threads = sparse.info["input"]["shape"], sparse.info["threads"]
        reference = measure.peer(options.onnx_path, threads)
        images = pictures(options, shape)
    except ValueError as error:
        print(f"model_tune.py: {error}", file=sys.stderr)
        return 2

    error, top1 = measure.compare(sparse.run, reference, images, shape[0])
    if not error <= options.tolerance:
        print(f"model_tune.py: relative error {error:.1e} exceeds --tolerance {options.tolerance:.0e}", file=sys.stderr)
        return 1
    runners = {"onnxruntime_dense": reference, "tvm_dense": dense.run, "tvm_sparse": sparse.run}
    latency = measure.race(runners, images[: shape[0]], options.runs)
    sparse.info = report.describe(sparse.info, options.tolerance, error, top1, latency, options.runs)
    report.show(sparse.info)

    out = Path(options.out) if options.out else Path(options.onnx_path).parent / "deploy"
    try:
        sparse.save(out)
    except (ValueError, OSError) as error:
        print(f"model_tune.py: --out {out}: {error}", file=sys.stderr)
        return 2
    (out / "deploy.md").write_text(report.markdown(sparse.info))
    print(f"wrote {out / 'lib.so'}, weights.bin, deploy.json, deploy.md")
    job_dir = Path(options.onnx_path).parent
    if out == job_dir / "deploy" and (job_dir / "summary.json").exists():  # complete the report of imagenet.py
        from utils import report as job_report

        job_report.write(job_dir, job_report.screen())
    return 0


if __name__ == "__main__":
    sys.exit(main())
