"""Compile a pruned network from ONNX, prove it equal, measure it.

    python model_tune.py --onnx_path job/model.onnx --bsr 4 --bsc 1 --threads 2

Reads the file, finds the blocks in its weights, compiles it twice (block sparse, and dense as its twin), proves the
outputs equal to ONNX Runtime's, times these three and OpenVINO, if there is one, in turns, and writes lib.so,
weights.bin, deploy.json and deploy.md. With --rpc the library runs on another computer. Needs no PyTorch.

    python model_tune.py --benchmark job/deploy --sessions 4 --runs 200

Times a library that was written: latency and throughput with so many threads that call it at once.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils import command_line, errors, files, machine
from utils.declare import REQUIRED, Declared, option

if TYPE_CHECKING:
    import numpy as np


def image_size(text: str) -> tuple[int, int]:
    """224 or 192x256 as (height, width)."""
    sides = tuple(map(int, text.split("x")))
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(text)
    return sides * 2 if len(sides) == 1 else sides


@dataclass(frozen=True)
class NetworkOptions(Declared):
    """Network"""

    onnx_path: str = option(REQUIRED, "the network (required)")
    bsr: int | None = option(
        None, "rows of a block, the N of 1xN; found in the weights if not given", within="[1, inf)"
    )
    bsc: int | None = option(None, "columns of a block; 1xN blocks have 1")
    sparsity: float = option(
        0.0, "least fraction of zero blocks that a layer needs to be compiled sparse", within="[0, 1]"
    )
    batch: int | None = option(None, "batch size, where the file leaves it open; default: 1", within="[1, inf)")
    image_size: tuple | None = option(
        None, "height and width, 224 or 192x256, where the file leaves them open", read=image_size
    )


@dataclass(frozen=True)
class ProcessorOptions(Declared):
    """Processor"""

    target: str = option("native", "native, x86-avx2, x86-avx512, aarch64, or any TVM target")
    threads: int | None = option(None, "threads of every runtime; default: all cores", within="[1, inf)")
    tune: str | None = option(
        None, "choose kernels by measuring, and keep the times in this file; without it, by a rule"
    )
    rpc: str | None = option(
        None, "HOST:PORT of a TVM RPC server, or of a tracker (with --key), to prove, time and tune on"
    )
    key: str | None = option(None, "name of the device at the tracker")


@dataclass(frozen=True)
class ProofOptions(Declared):
    """Proof, times and files"""

    images: str | None = option(
        None,
        "pictures to prove the equality on, float32 (B, 3, H, W) .npy; default: inputs.npy beside the file",
    )
    tolerance: float = option(1e-4, "largest relative error that is accepted", within="[0, inf)")
    runs: int = option(200, "timed calls of each runtime, or of each session of --benchmark", within="[1, inf)")
    profile: bool = option(False, "measure every kernel of the saved library, and write its table into deploy.md")
    out: str | None = option(None, "folder to write; default: deploy/ beside the file")
    dump_dir: str | None = option(None, "folder for the program after each pass, as text")


@dataclass(frozen=True)
class Options(NetworkOptions, ProcessorOptions, ProofOptions):  # in the order of --help
    """What a user can ask of `model_tune.py`. Field names are flag names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bsc not in (None, 1):
            raise ValueError(
                f"--bsc {self.bsc}: blocks are N rows of one column (1xN), so only --bsc 1 can be compiled"
            )
        if self.key and not self.rpc:
            raise ValueError(f"--key {self.key} names a device of a tracker: --rpc HOST:PORT is missing")
        if self.profile and self.rpc:
            raise ValueError("--profile measures on this computer, and cannot be given with --rpc")
        if not self.rpc and (self.threads or 0) > machine.cores():
            raise ValueError(f"--threads {self.threads}: this computer has {machine.cores()} cores")
        there = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"--out {self.folder} cannot be written: {there} is no folder that one can write to")

    @property
    def folder(self) -> Path:
        """Where the library goes."""
        return Path(self.out) if self.out else Path(self.onnx_path).parent / "deploy"


def parse(argv: list[str] | None = None) -> Options:
    """The options of a command line. Raises ValueError for what is wrong with them."""
    return command_line.parse(sys.argv[1:] if argv is None else argv, Options, __doc__, (BenchmarkOptions,))


def pictures(options: Options, shape: list[int]) -> "np.ndarray":
    """Random pictures, and the given ones behind them: (B, *shape[1:])."""
    import numpy as np

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


class Differs(ValueError):
    """A library computes something else than the reference."""

    status = 1


def prove(options: Options, device, sparse, dense) -> dict:
    """What the libraries computed and how fast, and where: here, on the device, or nowhere (for want of one)."""
    from deploy.runtime import remote
    from deploy.tuning import measure

    if not device and not sparse.runs_here:
        return {
            "measured_on": None,
            "proven_by": None,
            "max_relative_error": None,
            "top1_agreement": None,
            "latency_ms": {},
        }
    shape, proven_by = sparse.info["input"]["shape"], "ONNX Runtime"
    try:
        reference = measure.peer(options.onnx_path, sparse.info["threads"])
    except measure.Unreadable as problem:
        print(f"ONNX Runtime is left out: {problem}")
        reference, proven_by = measure.evaluator(options.onnx_path), "onnx's reference evaluator"
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
        racers = {"onnxruntime_dense": reference} if proven_by == "ONNX Runtime" else {}
        try:
            racers["openvino_dense"] = measure.openvino_peer(options.onnx_path, sparse.info["threads"], shape)
        except ValueError as problem:
            print(f"OpenVINO is not timed: {problem}")
        racers |= {name: library.run for name, library in runners.items()}
        timers = {name: measure.timer(run) for name, run in racers.items()}
    return {
        "measured_on": device.name if device else "this computer",
        "proven_by": proven_by,
        "max_relative_error": error,
        "top1_agreement": top1,
        "latency_ms": measure.race(timers, images[: shape[0]], options.runs),
    }


def show_profile(library, runs: int) -> dict:
    """What every kernel of the library takes, printed as a table."""
    import numpy as np

    from deploy import report
    from deploy.tuning import profile

    images = np.random.default_rng(0).standard_normal(library.info["input"]["shape"]).astype(np.float32)
    found = profile.profile(library, library.machine, images, runs)
    print("\n".join(report.profile_table(found)))
    return found


@dataclass(frozen=True)
class BenchmarkOptions(Declared):
    """A saved library, timed with --benchmark FOLDER"""

    benchmark: str = option(REQUIRED, "folder of a library that model_tune.py wrote: times it, and compiles nothing")
    sessions: int = option(1, "threads that call it at once", within="[1, 1024]")
    runs: int = option(200, "timed calls of each session", within="[1, inf)")


def benchmark(argv: list[str]) -> None:
    """Print latency and throughput of a saved library as JSON."""
    options = command_line.parse(argv, BenchmarkOptions, __doc__)
    from deploy.tuning import profile

    print(json.dumps(profile.benchmark(options.benchmark, options.sessions, options.runs), indent=1))


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 1 if a library computes something else, 2 for whatever else is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--benchmark" for word in argv):
        return errors.answer("model_tune.py", lambda: benchmark(argv))
    return errors.answer("model_tune.py", lambda: tune(parse(argv)))


def tune(options: Options) -> None:
    """Compile, prove, measure, write. Raises ValueError and OSError, of one line, for whatever is wrong."""
    # A folder belongs to one process at a time; deploy/ is part of the folder of the run that exported the file.
    job_dir = options.folder.parent
    ours = options.folder == Path(options.onnx_path).parent / "deploy" and (job_dir / "summary.json").exists()
    with files.locked(job_dir if ours else options.folder):
        compile_and_save(options)
        print(f"wrote {options.folder / 'lib.so'}, weights.bin, deploy.json, deploy.md")
        if ours:
            complete_report(job_dir)


def compile_and_save(options: Options) -> None:
    """Write the faster of the two libraries, proven equal, and how it was made."""
    with errors.uninterrupted():
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
    with files.writing(options.folder, safe=f"{options.onnx_path} is as it was"):
        saved.save(options.folder)
        if saved.runs_here:
            saved.info["start_up"] = startup.measure(options.folder)
            if options.profile:
                saved.info["profile"] = show_profile(saved, options.runs)
            saved.describe(options.folder)
        files.save_text(options.folder / "deploy.md", report.markdown(saved.info))


def complete_report(job_dir: Path) -> None:
    """Write the report of imagenet.py again, with the times of the library if it was made from that run's export."""
    from utils import report

    summary = report.read(job_dir)
    if summary and not report.latency_of(job_dir, summary):
        print(f"{job_dir / 'summary.md'} shows no times: the library was made from another file, or not timed here")
    report.write(job_dir, report.screen())


if __name__ == "__main__":
    sys.exit(main())
