"""The device a run uses, and what to write down about where a number was made."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "apache-tvm", "scikit-learn")


def pick_device(gpu: int):
    """The torch device, and the line that says so. A GPU becomes the one that this process uses by default.

    There, cuDNN tries its algorithms for each convolution and takes the fastest: shapes stay the same in training.
    """
    import torch  # here, so that compiling needs none

    if torch.cuda.is_available():
        if gpu >= torch.cuda.device_count():
            raise ValueError(f"--gpus {gpu}: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(gpu)  # streams and events are the current device's
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda", gpu), f"device: GPU {gpu}, {torch.cuda.get_device_name(gpu)}"
    return torch.device("cpu"), f"device: CPU, {torch.get_num_threads()} threads (no GPU found)"


def describe() -> dict:
    """Versions, hardware and the commit of this checkout."""
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "cpu": cpu_name(),
        "cores": cores(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else [],
        "commit": _commit(),
    }


def line(where: dict | None = None) -> str:
    """What `describe` gives (or gave), as results quote it."""
    where = where or describe()
    packages = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    computer = ", ".join([where["cpu"], f"{where['cores']} cores", *where["gpus"]])
    return f"{computer}; Python {where['python']}; {packages}; commit {where['commit']}"


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    return {name: _version(name) for name in packages}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
