"""The device a run uses, and what to write down about where a number was made."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "apache-tvm", "scikit-learn")


def pick_device(gpu: int) -> tuple[torch.device, str]:
    """The device, and the line that says so."""
    if torch.cuda.is_available():
        if gpu >= torch.cuda.device_count():
            raise ValueError(f"--gpus {gpu}: this machine has {torch.cuda.device_count()}")
        return torch.device("cuda", gpu), f"device: GPU {gpu}, {torch.cuda.get_device_name(gpu)}"
    return torch.device("cpu"), f"device: CPU, {torch.get_num_threads()} threads (no GPU found)"


def describe() -> dict:
    """Versions, hardware and the commit of this checkout."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "commit": _commit(),
    }


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
