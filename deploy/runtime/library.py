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
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .processor import lacking

LIBRARY, WEIGHTS, DESCRIPTION = "lib.so", "weights.bin", "deploy.json"


def set_threads(threads: int) -> None:
    """How many threads TVM's kernels use from now on, in this process."""
    import tvm_ffi

    # TVM reads the pool's size once, when it starts it (by default half the cores); later it can only be reduced.
    os.environ["TVM_NUM_THREADS"] = str(max(threads, os.cpu_count() or 1, int(os.environ.get("TVM_NUM_THREADS", 0))))
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)


@contextmanager
def silence():
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
    """`run` maps float32 (B, C, H, W) to logits; `info` says what was compiled (the fields of deploy.json).

    executable: what relax.VirtualMachine takes, whose `main` wants the images and then `weights`, TVM tensors.
    """

    def __init__(self, executable, weights: list, info: dict):
        self.executable, self.weights, self.info = executable, weights, info
        self._network = None

    @property
    def runs_here(self) -> bool:
        return not lacking(self.info.get("requires", {}))

    def run(self, images: np.ndarray) -> np.ndarray:
        import tvm

        images, shape = np.asarray(images), tuple(self.info["input"]["shape"])
        if images.shape != shape or images.dtype != np.float32:
            raise ValueError(f"this library takes float32 {shape}, not {images.dtype} {images.shape}")
        if self._network is None:
            check(self.info, "a library")
            set_threads(self.info["threads"])
            self._network = bind(self.executable, self.weights, tvm.cpu())["network"]
        return self._network(tvm.runtime.tensor(np.ascontiguousarray(images))).numpy()


def check(info: dict, what: str) -> None:
    """ValueError if this computer lacks what the library's code needs."""
    missing = lacking(info.get("requires", {}))
    if missing:
        raise ValueError(f"this computer cannot run {what} for {info['target']}: it lacks {', '.join(missing)}")


def load(folder: str | Path) -> Library:
    """The library that model_tune.py, or a compiled library's `save`, wrote into `folder`."""
    import tvm

    folder = Path(folder)
    for name in (LIBRARY, WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}")
    info = json.loads((folder / DESCRIPTION).read_text())
    check(info, f"{folder}, a library")
    data = np.memmap(folder / WEIGHTS, mode="c")
    weights = [tvm.runtime.from_dlpack(data[start:end].view(kind)) for kind, start, end in info["weights"]]
    with silence():
        return Library(tvm.runtime.load_module(str(folder / LIBRARY)), weights, info)
