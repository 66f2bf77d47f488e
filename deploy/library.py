"""A compiled network: run it, save it, load it.

A saved folder needs only TVM's runtime, neither this repository nor PyTorch (deploy/example/main.cc does it in C++):

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

import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .targets import Machine, find_machine, linker, runs_here

LIBRARY, WEIGHTS, DESCRIPTION = "lib.so", "weights.bin", "deploy.json"
ALIGNMENT = 64  # bytes; of every array in the file, as the kernels' vectors want it


@dataclass
class Built:
    """A program, TVM's executable or a loaded module, whose `main` takes the images and then these TVM tensors."""

    executable: object
    weights: list


def set_threads(threads: int) -> None:
    """How many threads TVM's kernels use from now on, in this process."""
    import tvm_ffi

    # The pool's size is read once, when it starts, and would be half the cores; later it can only be less.
    os.environ["TVM_NUM_THREADS"] = str(max(threads, os.cpu_count() or 1, int(os.environ.get("TVM_NUM_THREADS", 0))))
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)


@contextmanager
def _silence():
    """Hide what TVM's C++ writes to stderr: a warning for every constant it saves or loads."""
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
    """`run` maps float32 (B, C, H, W) to logits; `info` says what was compiled (the fields of deploy.json)."""

    def __init__(self, built: Built, info: dict, machine=None):
        self.built = built
        self.info = info
        self.machine = machine or find_machine()
        self._network = None

    @property
    def runs_here(self) -> bool:
        return runs_here(self.machine)

    def _function(self):
        from tvm import cpu

        if self._network is None:
            if not self.runs_here:
                raise ValueError(f"this computer cannot run a library for {self.info['target']}")
            set_threads(self.info["threads"])
            self._network = bind(self.built.executable, self.built.weights, cpu())["network"]
        return self._network

    def run(self, images: np.ndarray) -> np.ndarray:
        import tvm

        images, shape = np.asarray(images), tuple(self.info["input"]["shape"])
        if images.shape != shape or images.dtype != np.float32:
            raise ValueError(f"this library takes float32 {shape}, not {images.dtype} {images.shape}")
        return self._function()(tvm.runtime.tensor(np.ascontiguousarray(images))).numpy()

    def save(self, folder: str | Path) -> None:
        """Write lib.so, weights.bin and deploy.json."""
        folder = Path(folder)
        if not hasattr(self.built.executable, "export_library"):
            raise ValueError("a loaded library is already a file: copy its folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.link(folder / LIBRARY)
        self.info["weights"], at = [], 0
        with open(folder / WEIGHTS, "wb") as file:
            for array in (tensor.numpy() for tensor in self.built.weights):
                self.info["weights"].append([str(array.dtype), at, at + array.nbytes])
                at += file.write(array.tobytes().ljust(-(-array.nbytes // ALIGNMENT) * ALIGNMENT, b"\0"))
            file.truncate(max(at, ALIGNMENT))  # an empty file cannot be mapped
        self.describe(folder)

    def describe(self, folder: Path) -> None:
        """Write deploy.json alone."""
        (folder / DESCRIPTION).write_text(_json(self.info) + "\n")

    def link(self, path: Path) -> None:
        """Write lib.so alone."""
        link(self.built.executable, self.machine, path)


def link(executable, machine: Machine, path: Path) -> None:
    """Write what TVM compiled for `machine` as a shared library. ValueError without a compiler that links for it."""
    from tvm.support import cc

    compiler = linker(machine)
    if compiler and not shutil.which(compiler):
        raise ValueError(f"{path} could not be linked: a library for {machine.name} needs {compiler}")
    try:
        with _silence():
            executable.export_library(str(path), fcompile=compiler and cc.cross_compiler(compiler))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} could not be linked: TVM needs a C++ compiler (g++) for it") from error


def _json(info: dict) -> str:
    """Indented, but a list of numbers or words on one line."""
    return re.sub(r"\[\n[^][{}]*\]", lambda found: json.dumps(json.loads(found[0])), json.dumps(info, indent=2))


def load(folder: str | Path) -> Library:
    """The library that `save` or model_tune.py wrote into `folder`."""
    import tvm

    folder = Path(folder)
    for name in (LIBRARY, WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}")
    info = json.loads((folder / DESCRIPTION).read_text())
    machine = find_machine(info["target"])
    if not runs_here(machine):
        raise ValueError(f"this computer cannot run {folder}, a library for {info['target']}")
    data = np.memmap(folder / WEIGHTS, mode="c")
    weights = [tvm.runtime.from_dlpack(data[start:end].view(kind)) for kind, start, end in info["weights"]]
    with _silence():
        return Library(Built(tvm.runtime.load_module(str(folder / LIBRARY)), weights), info, machine)
