"""Run and time libraries on another computer, through TVM's RPC.

There: python -m tvm.exec.rpc_server --port 9090                    here: --rpc HOST:9090
or:    python -m tvm.exec.rpc_server --tracker HOST:9190 --key K    here: --rpc HOST:9190 --key K

The tracker is python -m tvm.exec.rpc_tracker, which needs tornado. A server does whatever it is sent: keep it inside a
network that you trust.
"""

import socket
import tempfile
from pathlib import Path

import numpy as np

from .library import Library, bind
from .measure import summary

PATIENCE = 10  # seconds for a tracker's answer


class Device:
    """The computer behind a server or, if there is a key, one of those that a tracker knows by it."""

    def __init__(self, address: str, key: str | None = None):
        from tvm import rpc

        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--rpc {address} is no HOST:PORT")
        self.name = address + (f", key {key}" if key else "")
        try:
            self.session = _request(host, int(port), key) if key else rpc.connect(host, int(port))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--rpc {self.name}: no device answers ({_last_line(error)})") from error

    def load(self, library: Library, name: str) -> "RemoteLibrary":
        """Upload a library under a name, and its weights. ValueError if the device cannot load it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.so"
            library.link(path)
            try:
                self.session.upload(str(path))
                module = self.session.load_module(path.name)
            except RuntimeError as error:
                words = f"cannot load a library for {library.machine.name}: {_last_line(error)}"
                raise ValueError(f"--rpc {self.name} {words}") from error
        return RemoteLibrary(self.session, module, library)


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
    """`run` maps float32 (B, C, H, W) to logits, over there."""

    def __init__(self, session, module, library: Library):
        import tvm

        self.device = session.cpu()
        session.get_function("runtime.config_threadpool")(1, library.info["threads"])
        weights = [tvm.runtime.tensor(tensor.numpy(), self.device) for tensor in library.built.weights]
        self.machine = bind(module, weights, self.device)

    def run(self, images: np.ndarray) -> np.ndarray:
        import tvm

        return self.machine["network"](tvm.runtime.tensor(images, self.device)).numpy()

    def time(self, images: np.ndarray, runs: int) -> list[float]:
        """Milliseconds of `runs` calls, by the device's own clock."""
        import tvm

        there = tvm.runtime.tensor(images, self.device)
        self.machine.save_function("network", "timed", there, include_return=False)
        clock = self.machine.time_evaluator("timed", self.device, number=1, repeat=runs)
        return [1e3 * seconds for seconds in clock().results]


def race(libraries: dict[str, RemoteLibrary], images: np.ndarray, runs: int, block: int = 25) -> dict:
    """Milliseconds a call over there, {"median", "p10"} for every library: blocks of calls in turn."""
    times = {name: [] for name in libraries}
    while any(len(taken) < runs for taken in times.values()):
        for name, library in libraries.items():
            times[name] += library.time(images, min(block, runs - len(times[name])))
    return summary(times)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
