"""Kill runs of every method again and again, resume them, and compare them with runs that nobody disturbed.

python benchmarks/kills.py --kills 5 --job_dir experiments/kills

A process kills itself (SIGKILL) at a moment that is given: in a training step, while a file is written, between the
method's folding away and its proof, in the export, in the report, in model_tune.py. What is finished in the folder is
not repeated. Writes `results/reliability.md`; ends with status 1 if a run was lost or differs in a single bit.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pruning.options
from benchmarks.jobs import RESULTS, ROOT, command
from utils import machine
from utils.files import save_text, sha256
from utils.report import markdown

RUN = "--arch resnet20 --data_set digits --image_size 8 --train_batch_size 128 --lr 0.05 --num_epochs 4 --ema 0.9"
OWN = {  # options under which a run this short selects, forgets and shrinks
    "block_l1": "--N 4 --rearrange --schedule cubic --schedule_every 2",
    "block_random": "--N 4",
    "imp": "--rounds 2",
    "resrep": "--flops_target 0.6 --before_mask_iters 0 --mask_interval 1 --lasso_strength 1.0",
    "stripe": "--schedule_end 0.5",
}
# Moment -> (module, function) at a call of which the process kills itself, and how many calls there may be before.
MOMENTS = {
    "in a step": ("utils.run", "Run.step", 20),
    "while a file is written": ("os", "fsync", 16),
    "while finishing": ("pruning.method", "_demand_equal", 2),
    "while exporting": ("utils.export", "atomic", 2),
    "before a file takes its place": ("os", "replace", 8),
    "while reporting": ("utils.report", "draw", 1),
}
TUNING = {
    "while compiling": ("deploy.compiler", "compile_graph", 2),
    "while measuring": ("deploy.tuning.measure", "race", 1),
    "while the library is written": ("deploy.report", "markdown", 1),
}
CHILD = """
import importlib, os, runpy, signal, sys
module, path, calls, script = sys.argv[1], sys.argv[2].split("."), int(sys.argv[3]), sys.argv[4]
sys.argv[:] = sys.argv[4:]
sys.path.insert(0, os.getcwd())
owner = importlib.import_module(module)
for name in path[:-1]:
    owner = getattr(owner, name)
whole = getattr(owner, path[-1])
def deadly(*arguments, **named):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments, **named)
setattr(owner, path[-1], deadly)
runpy.run_path(script, run_name="__main__")
"""


@dataclass
class Result:
    """What became of one run: how often it was killed and when, and whether it is the undisturbed one to the bit."""

    name: str
    killed: dict[str, int]
    lost: bool
    equal: bool
    seconds: float
    commit: str = field(default_factory=lambda: machine.describe()["commit"])  # results of several may be kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(pruning.options.METHODS))
    parser.add_argument("--kills", type=int, default=5, help="of every method")
    parser.add_argument("--no_tuning", action="store_true", help="leave model_tune.py out")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--job_dir", type=Path, default=Path("experiments/kills"))
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.md")
    options = parser.parse_args()
    done = []
    for result in results(options):
        done.append(result)
        print(result, flush=True)
        save_text(options.out, report(done))
    sys.exit(int(any(result.lost or not result.equal for result in done)))


def results(options: argparse.Namespace) -> Iterator[Result]:
    for name in options.methods:
        yield once(options.job_dir / name, lambda name=name: disturb(name, options))
    if not options.no_tuning:
        folder = options.job_dir / options.methods[0]
        yield once(folder / "tuning", lambda: disturb_tuning(folder / "undisturbed", folder / "tuning"))


def once(folder: Path, make) -> Result:
    """The result that is kept in the folder, or a new one."""
    kept = folder / "kills.json"
    if not kept.exists():
        save_text(kept, json.dumps(asdict(make())))
    return Result(**json.loads(kept.read_text()))


def disturb(name: str, options: argparse.Namespace) -> Result:
    """Kill a run of the method so many times, and let it end."""
    began, chance, folder = time.perf_counter(), random.Random(f"{options.seed} {name}"), options.job_dir / name
    shutil.rmtree(folder, ignore_errors=True)
    words = [*RUN.split(), "--method", name, *OWN.get(name, "").split(), "--export_onnx", "--resume", "--job_dir"]
    whole, job_dir = folder / "undisturbed", folder / "disturbed"
    call("imagenet.py", *words, whole)
    killed, lost = {}, False
    moments = list(MOMENTS) * (1 + options.kills // len(MOMENTS))
    for moment in moments[: options.kills]:
        module, function, calls = MOMENTS[moment]
        status = call("imagenet.py", *words, job_dir, dying=(module, function, chance.randrange(calls)))
        killed[moment] = killed.get(moment, 0) + (status == -9)
        lost |= status not in (0, -9)
    lost |= call("imagenet.py", *words, job_dir) != 0
    return Result(name, killed, lost, not lost and same(whole, job_dir), time.perf_counter() - began)


def disturb_tuning(job_dir: Path, folder: Path) -> Result:
    """Kill model_tune.py at every moment, each time on the library of before, and let it end."""
    began, killed, lost = time.perf_counter(), {}, False
    words = ["--onnx_path", job_dir / "model.onnx", "--threads", "1", "--runs", "3", "--out"]
    call("model_tune.py", *words, folder / "undisturbed")
    for moment, (module, function, calls) in TUNING.items():
        status = call("model_tune.py", *words, folder / "disturbed", dying=(module, function, calls - 1))
        killed[moment] = int(status == -9)
        lost |= status not in (0, -9)
    lost |= call("model_tune.py", *words, folder / "disturbed") != 0
    equal = packed_weights(folder / "undisturbed") == packed_weights(folder / "disturbed")
    return Result("model_tune.py", killed, lost, equal, time.perf_counter() - began)


def packed_weights(folder: Path) -> bytes:
    """A saved library's weights without the id of its build, which is drawn by chance."""
    build = json.loads((folder / "deploy.json").read_text())["build_id"].encode()
    before, _, weights = (folder / "weights.bin").read_bytes().partition(build)
    return before + weights


def call(script: str, *words: object, dying: tuple | None = None) -> int:
    """The status of a script of this repository, which kills itself at a call of a function if that is given."""
    start = ["-c", CHILD, *map(str, dying)] if dying else []
    done = subprocess.run(
        [sys.executable, *start, script, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (0, -9):
        print(done.stderr, file=sys.stderr)
    return done.returncode


def same(whole: Path, disturbed: Path) -> bool:
    """Whether weights, records and exported network are equal, and nothing half-written is left."""
    import torch

    def weights(job_dir: Path) -> dict:
        return torch.load(job_dir / "checkpoint" / "final.pt")["state_dict"]

    def records(job_dir: Path) -> list[dict]:
        lines = map(json.loads, (job_dir / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]

    ours, theirs = weights(disturbed), weights(whole)
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    equal = equal and sha256(disturbed / "model.onnx") == sha256(whole / "model.onnx")
    return equal and records(disturbed) == records(whole) and not list(disturbed.rglob(".*"))


def report(results: list[Result]) -> str:
    """The page."""
    rows = [["run", "killed", "when", "lost", "equal to the undisturbed run", "commit"]]
    for result in results:
        when = ", ".join(f"{count} {moment}" for moment, count in result.killed.items() if count)
        killed = str(sum(result.killed.values()))
        lost, equal = "yes" if result.lost else "no", "to the bit" if result.equal else "NO"
        rows.append([result.name, killed, when, lost, equal, result.commit])
    killed, lost = sum(sum(r.killed.values()) for r in results), sum(r.lost for r in results)
    lines = [
        "# Killed and resumed runs",
        "",
        f"{killed} processes were killed (SIGKILL), {lost} runs were lost, "
        f"{sum(r.equal for r in results)} of {len(results)} ended as if nobody had disturbed them.",
        "",
        markdown(rows),
        "- Equal: every tensor of `final.pt`, every byte of `model.onnx`, every line of `metrics.jsonl` but for the",
        "  speed; and no half-written file is left. For `model_tune.py`: every byte of `weights.bin` but for the",
        "  build's id.",
        f"- Every run: `imagenet.py {RUN} --export_onnx --resume`, and the method's own options.",
        f"- Command: `{command()}`",
        f"- Machine: {machine.line()}; {sum(r.seconds for r in results) / 60:.0f} minutes",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
