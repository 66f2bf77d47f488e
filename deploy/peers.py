"""Other runtimes that run the same network, which a library is timed beside. All but ONNX Runtime may be absent."""

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .tuning import measure

TYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # as OpenVINO calls them
Run = Callable[[np.ndarray], object]  # of float32 (B, C, H, W)


class Peer(NamedTuple):
    """A runtime with one way to set it up.

    start(path, threads, shape) gives the function that runs an ONNX file, and the type that it computes in. ValueError
    if the runtime is not installed or cannot run the file.
    dtype: what it is asked to compute in; "own choice" if nothing is asked.
    package: its name at the package index.
    sparse: blocks of zeros make it faster, at least by intention, so it is of interest on pruned networks too.
    """

    title: str
    dtype: str
    start: Callable[[Path, int, Sequence[int]], tuple[Run, str]]
    package: str
    sparse: bool = False


def onnxruntime(dtype: str, path: Path, threads: int, shape: Sequence[int]) -> tuple[Run, str]:
    """ONNX Runtime; the type is that of the file."""
    return measure.peer(path, threads), dtype


def openvino(precision: str | None, path: Path, threads: int, shape: Sequence[int]) -> tuple[Run, str]:
    """OpenVINO set to low latency. Without a `precision` it takes the one that suits the processor, often bf16."""
    try:
        import openvino as package
    except ImportError as error:
        raise ValueError("the comparison with OpenVINO needs it: pip install openvino") from error
    core = _core(package)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision:
        settings["INFERENCE_PRECISION_HINT"] = precision
    try:
        model = core.read_model(str(path))
        model.reshape(list(shape))
        compiled = core.compile_model(model, "CPU", settings)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        request = compiled.create_infer_request()
    except RuntimeError as error:
        raise ValueError(f"OpenVINO cannot run {path}: {' '.join(str(error).split())}") from error
    return lambda images: request.infer([images], share_inputs=True)[0], TYPES.get(used, used)


@cache
def _core(package):
    """OpenVINO with its plugins. There is one a process: with a second one, later calls of subprocess have crashed."""
    return package.Core()


def mnn(path: Path, threads: int, shape: Sequence[int]) -> tuple[Run, str]:
    """MNN in float32. Its converter marks layers whose weights are zero in blocks for its sparse kernels."""
    with _quiet():
        try:
            import MNN
        except ImportError as error:
            raise ValueError("the comparison with MNN needs it: pip install MNN") from error
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "model.mnn"
            # The converter's own command installs a package and reports to its makers; this is what it calls.
            convert = [sys.executable, "-c", "import sys, _tools; _tools.mnnconvert(sys.argv)", "-f", "ONNX"]
            convert += ["--modelFile", str(path), "--MNNModel", str(made), "--bizCode", "x", "--detectSparseSpeedUp"]
            told = subprocess.run(convert, capture_output=True, text=True, check=False)
            if told.returncode or not made.is_file():
                raise ValueError(f"MNN cannot convert {path}: {' '.join((told.stderr or told.stdout).split())[-200:]}")
            interpreter = MNN.Interpreter(str(made))
        session = interpreter.createSession({"backend": "CPU", "precision": "high", "numThread": threads})
        entry = interpreter.getSessionInput(session)
        interpreter.resizeTensor(entry, tuple(shape))
        interpreter.resizeSession(session)
        result = interpreter.getSessionOutput(session)
        made = np.zeros(result.getShape(), np.float32)
        layout = MNN.Tensor_DimensionType_Caffe
        copy = MNN.Tensor(made.shape, MNN.Halide_Type_Float, made, layout)

    def run(images: np.ndarray) -> np.ndarray:
        entry.copyFrom(MNN.Tensor(images.shape, MNN.Halide_Type_Float, images, layout))
        interpreter.runSession(session)
        result.copyToHostTensor(copy)
        return np.array(copy.getNumpyData())

    return run, "float32"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what C code writes to stdout."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        libc.fflush(None)  # else it would come out later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


PEERS = {
    "onnxruntime_dense": Peer("ONNX Runtime", "float32", partial(onnxruntime, "float32"), "onnxruntime"),
    "openvino_dense": Peer("OpenVINO", "float32", partial(openvino, "f32"), "openvino"),
    "openvino_default": Peer("OpenVINO as installed", "own choice", partial(openvino, None), "openvino"),
    "mnn": Peer("MNN", "float32", mnn, "MNN", sparse=True),
    "onnxruntime_int8": Peer("ONNX Runtime int8", "int8", partial(onnxruntime, "int8"), "onnxruntime"),
    "openvino_int8": Peer("OpenVINO int8", "int8", partial(openvino, None), "openvino"),
}
PACKAGES = tuple(dict.fromkeys(peer.package for peer in PEERS.values()))


def chosen(names: Iterable[str] | None) -> list[str]:
    """The peers of these names, all for None. Raises ValueError for one that there is not."""
    names = list(PEERS if names is None else names)
    if unknown := [name for name in names if name not in PEERS]:
        raise ValueError(f"--peers {' '.join(unknown)}: from {', '.join(PEERS)}")
    return names


def start(
    names: Iterable[str], path: Path | str, int8: Path | str, threads: int, shape: Sequence[int]
) -> tuple[dict[str, Run], dict[str, dict]]:
    """The peers that can run the network, and what is known of each: {"dtype"}, or {"absent": why}.

    Args:
        path: the ONNX file in float32; or, as text, why there is none.
        int8: the same network with QuantizeLinear and DequantizeLinear; or, as text, why there is none.
        shape: of the pictures.
    """
    runners, facts = {}, {}
    for name in names:
        peer = PEERS[name]
        file = int8 if peer.dtype == "int8" else path
        try:
            if isinstance(file, str):
                raise ValueError(file)
            runners[name], used = peer.start(file, threads, shape)
            facts[name] = {"dtype": "int8" if peer.dtype == "int8" else used}
        except ValueError as problem:
            facts[name] = {"absent": str(problem)}
    return runners, facts
