"""Compile a pruned network from ONNX, prove it equal, measure it.

    python model_tune.py --onnx_path job/model.onnx --bsr 4 --bsc 1 --threads 2

Reads the file, finds the blocks in its weights, compiles it twice (block sparse, and dense as its twin), proves the
outputs equal to ONNX Runtime's, times these three and OpenVINO, if there is one, in turns, and writes lib.so,
weights.bin, deploy.json and deploy.md. With --rpc the library runs on another computer. Needs no PyTorch.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from utils import machine
from utils.options import OneLineParser


def image_size(text: str) -> tuple[int, int]:
    """224 or 192x256 as (height, width)."""
    sides = tuple(map(int, text.split("x")))
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(text)
    return sides * 2 if len(sides) == 1 else sides


# flag, type, default, help
OPTIONS = [
    ("onnx_path", str, None, "the network (required)"),
    ("bsr", int, None, "rows of a block, the N of 1xN; found in the weights if not given"),
    ("bsc", int, None, "columns of a block; 1xN blocks have 1"),
    ("sparsity", float, 0.0, "least fraction of zero blocks that a layer needs to be compiled sparse"),
    ("threads", int, None, "threads of every runtime; default: all cores"),
    ("batch", int, None, "batch size, where the file leaves it open; default: 1"),
    ("image_size", image_size, None, "height and width, 224 or 192x256, where the file leaves them open"),
    ("target", str, "native", "native, x86-avx2, x86-avx512, aarch64, or any TVM target"),
    (
        "images",
        str,
        None,
        "pictures to prove the equality on, float32 (B, 3, H, W) .npy; default: inputs.npy beside the file",
    ),
    ("tune", str, None, "choose kernels by measuring, and keep the times in this file; without it, by a rule"),
    ("rpc", str, None, "HOST:PORT of a TVM RPC server, or of a tracker (with --key), to prove, time and tune on"),
    ("key", str, None, "name of the device at the tracker"),
    ("runs", int, 200, "timed calls of each runtime"),
    ("tolerance", float, 1e-4, "largest relative error that is accepted"),
    ("out", str, None, "folder to write; default: deploy/ beside the file"),
    ("dump_dir", str, None, "folder for the program after each pass, as text"),
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
    if options.key and not options.rpc:
        raise ValueError(f"--key {options.key} names a device of a tracker: --rpc HOST:PORT is missing")
    if not options.rpc and (options.threads or 0) > machine.cores():
        raise ValueError(f"--threads {options.threads}: this computer has {machine.cores()} cores")
    options.out = Path(options.out) if options.out else Path(options.onnx_path).parent / "deploy"
    there = next(folder for folder in (options.out, *options.out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {options.out} cannot be written: {there} is no folder that one can write to")
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


class Differs(Exception):
    """A library computes something else than ONNX Runtime."""


def prove(options: argparse.Namespace, device, sparse, dense) -> dict:
    """What the libraries computed and how fast, and where: here, on the device, or nowhere (for want of one)."""
    from deploy.runtime import remote
    from deploy.tuning import measure

    if not device and not sparse.runs_here:
        return {"measured_on": None, "max_relative_error": None, "top1_agreement": None, "latency_ms": {}}
    shape, reference = sparse.info["input"]["shape"], measure.peer(options.onnx_path, sparse.info["threads"])
    images = pictures(options, shape)
    runners = {"tvm_dense": dense, "tvm_sparse": sparse}
    if device:
        runners = {name: remote.RemoteLibrary(library, device) for name, library in runners.items()}
    proofs = [measure.compare(library.run, reference, images, shape[0]) for library in runners.values()]
    error, top1 = max(error for error, _ in proofs), min(top1 for _, top1 in proofs)
    if not error <= options.tolerance:
        raise Differs(f"relative error {error:.1e} exceeds --tolerance {options.tolerance:.0e}")
    if device:
        timers = {name: runner.time for name, runner in runners.items()}
    else:
        racers = {"onnxruntime_dense": reference}
        try:
            racers["openvino_dense"] = measure.openvino_peer(options.onnx_path, sparse.info["threads"], shape)
        except ValueError as problem:
            print(f"OpenVINO is not timed: {problem}")
        racers |= {name: library.run for name, library in runners.items()}
        timers = {name: measure.timer(run) for name, run in racers.items()}
    return {
        "measured_on": device.name if device else "this computer",
        "max_relative_error": error,
        "top1_agreement": top1,
        "latency_ms": measure.race(timers, images[: shape[0]], options.runs),
    }


def main(argv: list[str] | None = None) -> int:
    try:
        options = parse(argv)
        from deploy import compiler, dump, report
        from deploy.onnx import blocks, passes, reader
        from deploy.runtime import remote, startup

        write = dump.into(options.dump_dir) if options.dump_dir else dump.forget
        network = reader.read_onnx(options.onnx_path, options.batch, options.image_size)
        network = passes.simplify(network, write)
        blocks.check(network, options.bsr)
        device = remote.Device(options.rpc, options.key) if options.rpc else None
        common = {"target": options.target, "threads": options.threads, "tune": options.tune, "device": device}
        sparse = compiler.compile_graph(network, options.onnx_path, sparsity=options.sparsity, dump=write, **common)
        dense = compiler.compile_graph(network, options.onnx_path, dense=True, **common)
        found = prove(options, device, sparse, dense)
        found["saved"] = report.better(found["latency_ms"], sparse.info["layers"])
        saved = {"tvm_sparse": sparse, "tvm_dense": dense}[found["saved"]]
        saved.info = report.describe(saved.info, options.tolerance, found, options.runs)
        report.show(saved.info)
        saved.save(options.out)
        if saved.runs_here:
            saved.info["start_up"] = startup.measure(options.out)
            saved.describe(options.out)
        (options.out / "deploy.md").write_text(report.markdown(saved.info))
    except (ValueError, OSError) as error:
        print(f"model_tune.py: {error}", file=sys.stderr)
        return 2
    except Differs as error:
        print(f"model_tune.py: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.out / 'lib.so'}, weights.bin, deploy.json, deploy.md")
    job_dir = Path(options.onnx_path).parent
    if options.out == job_dir / "deploy" and (job_dir / "summary.json").exists():  # complete the report of imagenet.py
        from utils import report as job_report

        job_report.write(job_dir, job_report.screen())
    return 0


if __name__ == "__main__":
    sys.exit(main())
