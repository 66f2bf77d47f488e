"""Run, time and tune libraries on another computer, through TVM's RPC.

There: python -m tvm.exec.rpc_server --port 9090                    here: --rpc HOST:9090
or:    python -m tvm.exec.rpc_server --tracker HOST:9190 --key K    here: --rpc HOST:9190 --key K

The tracker is python -m tvm.exec.rpc_tracker, which needs tornado. A server does whatever it is sent: keep it inside a
network that you trust.
"""

import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from .library import arrays, bind

PATIENCE = 10  # seconds for a tracker's answer
LOST = "the device stopped answering"


class Linkable(Protocol):
    """What can be linked for another computer: codegen's Executable, or a library that was just compiled."""

    machine: object  # with the fields name and threads

    def link(self, path: Path) -> None: ...


class Device:
    """The computer behind a server or, if there is a key, one of those that a tracker knows by it."""

    def __init__(self, address: str, key: str | None = None):
        from tvm import rpc

        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--rpc {address} is no HOST:PORT")
        self.name = address + (f", key {key}" if key else "")
        self.processor, self.uploads = key or address, 0  # all devices of one key are alike
        with self.asked("no device answers"):
            self.session = _request(host, int(port), key) if key else rpc.connect(host, int(port))
        self.device = self.session.cpu()

    @contextmanager
    def asked(self, problem: str):
        """Errors of TVM and of the network become a ValueError of one line."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--rpc {self.name}: {problem} ({_last_line(error)})") from error

    def runs(self, machine) -> bool:
        return True  # if it does not, loading fails and says so

    def load(self, executable: "Linkable"):
        """What TVM compiled, as a module on the device."""
        self.uploads += 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self.uploads}.so"  # a loaded library's name cannot be used again
            executable.link(path)
            with self.asked(f"cannot load a library for {executable.machine.name}"):
                self.session.upload(str(path))
                self.session.get_function("runtime.config_threadpool")(1, executable.machine.threads)
                return self.session.load_module(path.name)


def _request(host: str, port: int, key: str):
    from tvm import rpc

    usual = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        socket.create_connection((host, port)).close()  # TVM would try for a minute
        tracker = rpc.connect_tracker(host, port)
        keys = sorted({server["key"].removeprefix("server:") for server in tracker.summary()["server_info"]})
        if key not in keys:
            raise RuntimeError(f"the tracker knows {', '.join(keys) or 'none yet'}")
        return tracker.request(key, max_retry=1)
    finally:
        socket.setdefaulttimeout(usual)


class RemoteLibrary:
    """A library that was just compiled; `run` maps float32 (B, C, H, W) to logits on the device."""

    def __init__(self, library, device: Device):
        import tvm

        self.place, self.device, self.info = device, device.device, library.info
        module = device.load(library)
        with self.place.asked(LOST):
            weights = [tvm.runtime.tensor(tensor.numpy(), self.device) for tensor in library.weights]
            self.machine = bind(module, weights, self.device)

    def run(self, images: np.ndarray) -> np.ndarray:
        import tvm

        with self.place.asked(LOST):
            return arrays(self.machine["network"](tvm.runtime.tensor(images, self.device)), self.info)

    def time(self, images: np.ndarray, runs: int) -> list[float]:
        """Milliseconds of `runs` calls, by the device's own clock."""
        import tvm

        with self.place.asked(LOST):
            there = tvm.runtime.tensor(images, self.device)
            self.machine.save_function("network", "timed", there, include_return=False)
            clock = self.machine.time_evaluator("timed", self.device, number=1, repeat=runs)
            return [1e3 * seconds for seconds in clock().results]


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
