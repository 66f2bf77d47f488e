"""A compiled network: run it, save it, load it.

A saved folder needs only TVM's runtime, neither this repository nor PyTorch (deploy/example/main.cc does it in C++).
This is all that must be done, without the checks that `load` makes, and for one thread:

    import json, os, numpy as np, tvm
    from tvm import relax

    info = json.load(open("deploy/deploy.json"))
    os.environ["TVM_NUM_THREADS"] = str(info["threads"])
    machine = relax.VirtualMachine(tvm.runtime.load_module("deploy/lib.so"), tvm.cpu())
    data = np.memmap("deploy/weights.bin", mode="c")  # mapped, not copied: a page is read when it is used
    weights = [tvm.runtime.from_dlpack(data[start:end].view(kind)) for kind, start, end in info["weights"]]
    machine.save_function("main", "network", *weights)
    images = np.zeros(info["input"]["shape"], "float32")  # (B, 3, H, W), normalised as in training
    print(machine["network"](tvm.runtime.tensor(images)).numpy().argmax(1))
"""

import os
import sys
import tempfile
import threading
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from . import folder as format
from .folder import DESCRIPTION, LIBRARY, WEIGHTS
from .processor import lacking
from .threads import call, set_threads

__all__ = ["DESCRIPTION", "LIBRARY", "WEIGHTS", "Library", "bind", "load", "set_threads", "silence"]

_stderr = threading.Lock()


@contextmanager
def silence():
    """Hide what TVM's C++ writes to stderr: a warning for every constant it saves or loads."""
    with _stderr:  # two threads at once could each restore what the other had put there
        sys.stderr.flush()
        kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nothing)


def bind(module, weights: list, device):
    """TVM's virtual machine on `device`, with a function "network" of the images alone."""
    from tvm import relax

    machine = relax.VirtualMachine(module, device)
    machine.save_function("main", "network", *weights)  # binds the last parameters
    return machine


class Library:
    """A compiled network. `run` may be called by any number of threads at once; `info` is what deploy.json says.

    TVM's virtual machine can only do one call at a time, so there are as many machines as there were calls at once.
    They share the code and the weights. A `with` block closes the library at its end.

    executable: what relax.VirtualMachine takes, whose `main` wants the images and then `weights`, TVM tensors.
    """

    def __init__(self, executable, weights: list, info: dict):
        self.executable, self.weights, self.info = executable, weights, info
        self._idle: deque = deque()  # machines that no call uses
        self._lock, self._module, self._closed = threading.Lock(), None, False

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of every input by its name."""
        return {self.info["input"]["name"]: tuple(self.info["input"]["shape"])}

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of every output by its name."""
        return {output["name"]: tuple(output["shape"]) for output in self.info["outputs"]}

    @property
    def pictures(self) -> dict | None:
        """How a picture is made for this network, and the names of its classes, if the ONNX file said so.

        Keys: size, resize, interpolation, crop, mean, std, classes; `deploy/onnx/pictures.py` explains them.
        """
        return self.info.get("pictures")

    @property
    def runs_here(self) -> bool:
        return not lacking(self.info.get("requires", {}))

    def run(self, images: np.ndarray | dict[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
        """Logits of the images: float32 (B, C, H, W), or {the input's name: such an array}.

        A network of several outputs gives {name: array}.

        ValueError for other shapes, types or names, after `close`, and where the processor cannot run the library.
        """
        if self._closed:
            raise ValueError("this library was closed")
        ((name, shape),) = self.inputs.items()
        if isinstance(images, dict):
            if images.keys() != {name}:
                raise ValueError(f"this library's input is {name!r}, not {', '.join(map(repr, images)) or 'nothing'}")
            images = images[name]
        images = np.asarray(images)
        if images.shape != shape or images.dtype != np.float32:
            raise ValueError(f"this library takes float32 {shape}, not {images.dtype} {images.shape}")
        return call(self._run, self.info["threads"], np.ascontiguousarray(images))

    def _run(self, images: np.ndarray) -> np.ndarray | dict[str, np.ndarray]:
        import tvm

        try:
            network = self._idle.pop()
        except IndexError:
            network = self._machine()
        logits = arrays(network(tvm.runtime.tensor(images)), self.info)
        if not self._closed:  # after an error, the machine is left alone, too
            self._idle.append(network)
        return logits

    def _machine(self):
        import tvm

        with self._lock:
            if self._closed:
                raise ValueError("this library was closed")
            if self._module is None:
                check(self.info, "a library")
                loaded = isinstance(self.executable, tvm.runtime.Module)
                self._module = self.executable if loaded else self.executable.jit()
            return bind(self._module, self.weights, tvm.cpu())["network"]

    def close(self) -> None:
        """Refuse further calls, and give back the memory when those that are under way have ended."""
        with self._lock:
            self._closed = True
            self.weights, self.executable, self._module = [], None, None
            self._idle.clear()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def arrays(made, info: dict) -> np.ndarray | dict[str, np.ndarray]:
    """What TVM's virtual machine made, one tensor or several, as `Library.run` gives it."""
    if len(info.get("outputs", ())) <= 1:
        return made.numpy()
    return {output["name"]: tensor.numpy() for output, tensor in zip(info["outputs"], made, strict=True)}


def check(info: dict, what: str) -> None:
    """ValueError if this computer lacks what the library's code needs."""
    missing = lacking(info.get("requires", {}))
    if missing:
        raise ValueError(f"this computer cannot run {what} for {info['target']}: it lacks {', '.join(missing)}")


def load(folder: str | Path) -> Library:
    """The library that model_tune.py, or a compiled library's `save`, wrote into `folder`.

    ValueError, of one line, if a file is missing, damaged or of another build, if the library was compiled by another
    version of this project or of TVM, or if this computer's processor cannot run it.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    while True:
        if not path.is_file():
            raise ValueError(f"{folder} holds no {DESCRIPTION}")
        text = path.read_bytes()
        try:
            return _open(folder, text)
        except ValueError:
            if path.is_file() and path.read_bytes() == text:
                raise  # else the library was replaced meanwhile


def _open(folder: Path, text: bytes) -> Library:
    import tvm
    import tvm_ffi

    info = format.describe(folder, text)
    check(info, f"{folder}, a library")
    if _release(info["tvm"]) != _release(tvm.__version__):
        raise ValueError(f"{folder} was compiled by TVM {info['tvm']}, and this is {tvm.__version__}: compile it again")
    with format.open_file(folder, LIBRARY, info) as code, format.open_file(folder, WEIGHTS, info) as file:
        data = np.memmap(file, mode="c")
        weights = [tvm.runtime.from_dlpack(data[start:end].view(kind)) for kind, start, end in info["weights"]]
        with silence(), tempfile.TemporaryDirectory() as place:
            # Under a name that was loaded before, the system would take the library that this one replaced. TVM's own
            # load_module would look the link up, and so use that name.
            name = Path(place) / f"{info['build_id']}.so"
            checked = Path(f"/proc/self/fd/{code.fileno()}")
            name.symlink_to(checked if checked.exists() else Path(code.name).resolve())
            return Library(tvm_ffi.load_module(str(name)), weights, info)


def _release(version: str) -> list[str]:
    return version.split(".")[:2]
