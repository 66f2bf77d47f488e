"""A compiled network: run it, save it, load it.

A saved folder needs only TVM's runtime, neither this repository nor PyTorch:

    import json, os, numpy as np, tvm
    from tvm import relax

    info = json.load(open("deploy/deploy.json"))
    os.environ["TVM_NUM_THREADS"] = str(info["threads"])
    network = relax.VirtualMachine(tvm.runtime.load_module("deploy/lib.so"), tvm.cpu())["main"]
    images = np.zeros(info["input"]["shape"], "float32")  # (B, 3, H, W), normalised as in training
    print(network(tvm.runtime.tensor(images)).numpy().argmax(1))
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

LIBRARY, DESCRIPTION = "lib.so", "deploy.json"


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


class Library:
    """`run` maps float32 (B, C, H, W) to logits; `info` says what was compiled (the fields of deploy.json)."""

    def __init__(self, module, info: dict, runs_here: bool = True):
        self.module = module  # an executable just compiled, or a module loaded from a file
        self.info = info
        self.runs_here = runs_here
        self._main = None

    def _function(self):
        from tvm import cpu, relax

        if not self.runs_here:
            raise ValueError(f"this computer cannot run a library for {self.info['target']}")
        if self._main is None:
            set_threads(self.info["threads"])
            self._main = relax.VirtualMachine(self.module, cpu())["main"]
        return self._main

    def run(self, images: np.ndarray) -> np.ndarray:
        import tvm

        images, shape = np.asarray(images), tuple(self.info["input"]["shape"])
        if images.shape != shape or images.dtype != np.float32:
            raise ValueError(f"this library takes float32 {shape}, not {images.dtype} {images.shape}")
        return self._function()(tvm.runtime.tensor(np.ascontiguousarray(images))).numpy()

    def save(self, folder: str | Path) -> None:
        """Write lib.so and deploy.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not hasattr(self.module, "export_library"):
            raise ValueError("a loaded library is already a file: copy its folder")
        try:
            with _silence():
                self.module.export_library(str(folder / LIBRARY))
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{folder / LIBRARY} could not be linked: TVM needs a C++ compiler (g++) for it"
            ) from error
        (folder / DESCRIPTION).write_text(json.dumps(self.info, indent=2) + "\n")


def load(folder: str | Path) -> Library:
    """The library that `save` or model_tune.py wrote into `folder`."""
    import tvm

    folder = Path(folder)
    for name in (LIBRARY, DESCRIPTION):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}")
    info = json.loads((folder / DESCRIPTION).read_text())
    with _silence():
        return Library(tvm.runtime.load_module(str(folder / LIBRARY)), info)
