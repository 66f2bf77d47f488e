"""Give thousands of damaged inputs to the program, and count what becomes of them. Writes results/fuzz.md.

python benchmarks/fuzz.py --count 1000                          so many of every kind
python benchmarks/fuzz.py --kinds pictures --seed 7 --count 1   one input again

Every input has a seed of its own, and is read in a process of its own or together with a few others, so that a crash
costs one input. What was counted is kept in results/fuzz.json, to which a further call adds.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.fuzzing import KINDS, Kind, Wrong
from benchmarks.jobs import RESULTS, command
from utils import files, machine

LAWFUL = ("refused", "accepted")
BAD = ("wrong", "traceback", "hang", "crash", "memory")
MEMORY = 1 << 30  # bytes that one input may take: the good ones take a few MiB
LONGEST = 10_000  # characters of a message

LAW = """A damaged input is to be read rightly, or refused with an error of one line (benchmarks/fuzz.py). Wrong:
accepted, and not what it says. Traceback: an error of another type, or a message of many lines. Hang: more than 10
seconds (of a compiled network 60, of a saved library 20). Crash: the end of the process. Memory: more than a GiB."""


def judge(kind: Kind, random: Random) -> tuple[str, str, str]:
    """What becomes of an input: a word of LAWFUL or BAD, what was changed in it, and the reason."""
    note = kind.damage(random)
    before, start = _peak(), time.process_time()
    try:
        verdict, reason = "accepted", kind.read()
    except Wrong as error:
        verdict, reason = "wrong", str(error)
    except (ValueError, OSError) as error:
        verdict, reason = "refused", str(error)
        if not reason.strip() or ("\n" in reason and kind.one_line) or len(reason) > LONGEST:
            verdict, reason = "traceback", f"no one line: {reason[:200]!r} ({len(reason)} characters)"
    except BaseException as error:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
        verdict, reason = "traceback", f"{type(error).__name__}: {str(error)[:200]} ({' '.join(frames)})"
    if time.process_time() - start > kind.seconds:  # of this process alone: others may be at work, too
        verdict = "hang"
    if _peak() - before > MEMORY:
        verdict = "memory"
    return verdict, note, reason


def _peak() -> int:
    """The most bytes that this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def several(kind: Kind, seeds: list[int], pipe) -> None:
    """Judge the inputs of these seeds, and tell each verdict as it is known."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for seed in seeds:
        pipe.send(judge(kind, Random(seed)))
    pipe.close()
    os._exit(0)  # the threads of libraries are not there after a fork, and cannot be waited for


def verdicts(kind: Kind, seeds: list[int]):
    """(seed, verdict, note, reason) of every seed; a process that ends or stops costs the input that it was at."""
    context = multiprocessing.get_context("fork")
    while seeds:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=several, args=(kind, seeds[: kind.together], theirs))
        process.start()
        theirs.close()
        try:
            for seed in seeds[: kind.together]:
                try:
                    found = ours.recv() if ours.poll(10 * kind.seconds) else ("hang", kind.damage(Random(seed)), "")
                except EOFError:
                    process.join()
                    found = "crash", kind.damage(Random(seed)), f"exit status {process.exitcode}"
                seeds = seeds[1:]
                yield seed, *found
                if found[0] in ("crash", "hang"):
                    break
        finally:
            process.kill()
            process.join()


def table(counts: dict) -> str:
    """The inputs of every kind by their fate, why some were accepted, and what went wrong."""
    head = ["kind", "tried", *LAWFUL, *BAD]
    rows = [
        [name, sum(c.values()), *(c.get(word, 0) for word in (*LAWFUL, *BAD))] for name, c in counts["fates"].items()
    ]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, len(head)))])
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", "## Why inputs were accepted", ""]
    for name, reasons in counts["reasons"].items():
        lines += [f"- {name}: {number:,} x {reason}" for reason, number in sorted(reasons.items(), key=lambda r: -r[1])]
    if counts["bad"]:
        lines += ["", "## What broke the law", ""]
        lines += [
            f"- {b['verdict']} of {b['kind']}, `--seed {b['seed']}`: {b['note']}: {b['reason']}" for b in counts["bad"]
        ]
    return "\n".join(lines)


def write(counts: dict, folder: Path) -> None:
    """The counts, for a further call and for people."""
    files.save_json(folder / "fuzz.json", counts)
    lines = ["# Damaged inputs", "", LAW, "", table(counts), "", "## How", "", *(f"- {line}" for line in counts["how"])]
    files.save_text(folder / "fuzz.md", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, default=1000, help="inputs of every kind")
    parser.add_argument("--seed", type=int, default=None, help="of the first input; default: behind those of before")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop with a kind")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of fuzz.json and fuzz.md")
    arguments = parser.parse_args()
    path = arguments.out / "fuzz.json"
    counts = json.loads(path.read_text()) if path.exists() else {"fates": {}, "reasons": {}, "bad": [], "how": []}
    how = f"`{command()}` on {machine.line()}"
    counts["how"] = [*(line for line in counts["how"] if line != how), how]
    for name in arguments.kinds:
        fates, reasons = Counter(counts["fates"].get(name, {})), Counter(counts["reasons"].get(name, {}))
        first = sum(fates.values()) if arguments.seed is None else arguments.seed
        end = time.monotonic() + arguments.seconds
        with tempfile.TemporaryDirectory() as folder:
            kind = KINDS[name](Path(folder))
            for seed, verdict, note, reason in verdicts(kind, list(range(first, first + arguments.count))):
                fates[verdict] += 1
                if verdict == "accepted":
                    reasons[reason] += 1
                elif verdict in BAD:
                    bad = {"kind": name, "seed": seed, "verdict": verdict, "note": note, "reason": reason}
                    counts["bad"].append({key: str(value).replace(folder, ".") for key, value in bad.items()})
                    print(*counts["bad"][-1].values(), sep=" | ", flush=True)
                if time.monotonic() > end:
                    break
        print(name, dict(fates), flush=True)
        counts["fates"][name], counts["reasons"][name] = dict(fates), dict(reasons)
        if arguments.seed is None:
            write(counts, arguments.out)


if __name__ == "__main__":
    main()
