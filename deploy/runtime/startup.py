"""How long a saved library takes to start, and what memory a run needs: measured in a process of its own.

python -m deploy.runtime.startup FOLDER
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from .library import WEIGHTS, load


def measure(folder: str | Path) -> dict | None:
    """{"load_ms", "first_ms" (to the first output), "peak_mib", "weights_mib"}; None where Linux's /proc is missing.

    peak_mib is what the process grew by while it loaded the library and ran, above TVM's own code.
    """
    if not Path("/proc/self/status").is_file():
        return None
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", f"{__package__}.startup", str(Path(folder).resolve())]
    return json.loads(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout)


def _memory(field: str) -> float:
    """MiB, of Linux's account of this process."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def _start(folder: Path) -> dict:
    from tvm import relax  # noqa: F401  # its own start does not count

    images = np.zeros(json.loads((folder / "deploy.json").read_text())["input"]["shape"], np.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is forgotten
    before, start = _memory("VmRSS"), time.perf_counter()
    library = load(folder)
    loaded = time.perf_counter()
    library.run(images)
    first = time.perf_counter()
    library.run(images)
    return {
        "load_ms": round(1e3 * (loaded - start), 1),
        "first_ms": round(1e3 * (first - start), 1),
        "peak_mib": round(_memory("VmHWM") - before, 1),
        "weights_mib": round((folder / WEIGHTS).stat().st_size / 2**20, 1),
    }


if __name__ == "__main__":
    sys.modules["torch"] = None  # TVM imports PyTorch wherever it is installed; a library needs none
    print(json.dumps(_start(Path(sys.argv[1]))))
