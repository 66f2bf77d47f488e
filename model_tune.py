"""Compile a pruned network from ONNX, prove it equal, measure it.

    python model_tune.py --onnx_path job/model.onnx --bsr 4 --bsc 1 --threads 2

Reads the file, finds the blocks in its weights, compiles it twice (block sparse, and dense as its twin), proves the
outputs equal to ONNX Runtime's, times these three and what else is installed (OpenVINO, MNN; in int8, too) in turns,
and writes lib.so, weights.bin, deploy.json and deploy.md. With --data it counts how many validation pictures are
classified right. With --rpc the library runs on another computer. Needs no PyTorch, but for --data.

    python model_tune.py --onnx_path job/model.onnx --data pictures --dtype auto --max_loss 0.5

Compiles in float32, bfloat16 and int8, and saves the fastest library that loses at most half a point of top-1.

    python model_tune.py --benchmark job/deploy --sessions 4 --runs 200

Times a library that was written: latency and throughput with so many threads that call it at once.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from utils import command_line, errors, files, machine
from utils.declare import REQUIRED, Declared, option


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
    dtype: str | None = option(
        None,
        "type of weights and maps; auto: the fastest within --max_loss; default: float32, or int8 for a quantised file",
        choices=("float32", "bfloat16", "int8", "auto"),
    )
    max_loss: float = option(0.5, "points of float32's top-1 that --dtype auto may lose on val/", within="[0, 100]")
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
class PictureOptions(Declared):
    """Pictures and int8"""

    data: str | None = option(
        None, "folder with train/ and val/ of class folders: top-1 is measured on val/, ranges for int8 on train/"
    )
    mean: list[float] | None = option(None, "of the channels, 0 to 1, as in training; default: as the file says")
    std: list[float] | None = option(None, "their standard deviation; default: as the file says", within="(0, inf)")
    resize: int | None = option(
        None,
        "the shorter side before the middle is cut out; default: as the file says, or 256 for 224",
        within="[1, inf)",
    )
    calibration: int = option(128, "training pictures that the ranges for int8 are found on", within="[1, inf)")
    quantizer: str = option("onnxruntime", "what makes the int8 file", choices=("onnxruntime", "nncf"))
    quantise_method: str = option(
        "minmax", "how ONNX Runtime finds the range of a map", choices=("minmax", "entropy", "percentile")
    )
    per_tensor: bool = option(False, "one scale for all weights of a layer, instead of one a channel, in the int8 file")
    keep_float: list[str] | None = option(None, "nodes that stay float32 in the int8 file, as deploy.md names them")


@dataclass(frozen=True)
class ProofOptions(Declared):
    """Proof, times and files"""

    images: str | None = option(
        None,
        "pictures to prove the equality on, float32 (B, 3, H, W) .npy; default: inputs.npy beside the file",
    )
    tolerance: float | None = option(
        None,
        "largest relative error that is accepted; default: 0.0001 in float32, 0.016 in bfloat16 and int8",
        within="[0, inf)",
    )
    runs: int = option(200, "timed calls of each runtime, or of each session of --benchmark", within="[1, inf)")
    peers: list[str] | None = option(None, "runtimes to time beside it, as deploy.json names them; default: all")
    profile: bool = option(False, "measure every kernel of the saved library, and write its table into deploy.md")
    out: str | None = option(None, "folder to write; default: deploy/ beside the file")
    dump_dir: str | None = option(None, "folder for the program after each pass, as text")


@dataclass(frozen=True)
class Options(NetworkOptions, ProcessorOptions, PictureOptions, ProofOptions):  # in the order of --help
    """What a user can ask of `model_tune.py`. Field names are flag names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bsc not in (None, 1):
            raise ValueError(
                f"--bsc {self.bsc}: blocks are N rows of one column (1xN), so only --bsc 1 can be compiled"
            )
        if self.dtype == "auto" and not self.data:
            raise ValueError(
                "--dtype auto: --data is missing, on whose validation pictures the loss of top-1 is measured"
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
    with errors.uninterrupted():
        from jobs.tune import compile_and_save
    with files.locked(job_dir if ours else options.folder):
        compile_and_save(options)
        print(f"wrote {options.folder / 'lib.so'}, weights.bin, deploy.json, deploy.md")
        if ours:
            complete_report(job_dir)


def complete_report(job_dir: Path) -> None:
    """Write the report of imagenet.py again, with the times of the library if it was made from that run's export."""
    from utils import report

    summary = report.read(job_dir)
    if summary and not report.latency_of(job_dir, summary):
        print(f"{job_dir / 'summary.md'} shows no times: the library was made from another file, or not timed here")
    report.write(job_dir, report.screen())


if __name__ == "__main__":
    sys.exit(main())
