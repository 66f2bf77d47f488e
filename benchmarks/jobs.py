"""What the accuracy benchmarks share: runs of the two commands, their reports, and folders of fewer pictures."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNTIMES = ("onnxruntime_dense", "tvm_dense", "tvm_sparse")


def run(*words: object) -> None:
    """A script of this repository, in a process of its own."""
    words = [sys.executable, *map(str, words)]
    print("$", *words[1:], flush=True)
    subprocess.run(words, cwd=ROOT, check=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})


def command() -> str:
    """What was called; of paths only what they end in."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def finished(job_dir: Path) -> bool:
    return (job_dir / "summary.json").exists()


def summary(job_dir: Path) -> dict:
    return json.loads((job_dir / "summary.json").read_text())


def medians(job_dir: Path) -> list[float]:
    """Milliseconds of the RUNTIMES, by `model_tune.py`."""
    latency = json.loads((job_dir / "deploy" / "deploy.json").read_text())["latency_ms"]
    return [latency[runtime]["median"] for runtime in RUNTIMES]


def fewer(source: Path, folder: Path, train: int, test: int | None = None) -> Path:
    """A train/ test/ tree of links to the first so many pictures of every class of `source`; None: all."""
    for part, count in (("train", train), ("test", test)):
        for label in sorted((source / part).iterdir()):
            (folder / part / label.name).mkdir(parents=True, exist_ok=True)
            for picture in sorted(label.iterdir())[:count]:
                link = folder / part / label.name / picture.name
                if not link.exists():
                    link.symlink_to(picture.resolve())
    return folder
