"""Damaged inputs of every kind are read rightly or refused in one line. `benchmarks/fuzz.py` does thousands of them."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from benchmarks.fuzzing import KINDS

# How many of each are tried here; compiled networks take too long.
COUNTS = {
    "checkpoint files": 30,
    "checkpoint contents": 30,
    "recipes": 60,
    "command lines": 40,
    "command lines of model_tune": 60,
    "pictures": 150,
    "tune files": 40,
    "ONNX files": 40,
}


@pytest.mark.filterwarnings("ignore")  # of PIL and PyTorch, about what they found
@pytest.mark.parametrize("name", COUNTS)
def test_damage_is_found_or_does_no_harm(name: str, tmp_path: Path):
    """An exception of another type, a long message, a long time, much memory, or a value that is not the input's."""
    kind = KINDS[name](tmp_path)

    @settings(
        max_examples=COUNTS[name], deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(st.randoms(use_true_random=False))
    def judge(random) -> None:
        verdict, note, reason = fuzz.judge(kind, random)
        assert verdict in fuzz.LAWFUL, f"{verdict}: {note}: {reason}"

    judge()


@pytest.mark.parametrize(("name", "count"), [("LMDB records", 30), ("saved libraries", 30)])
def test_damage_ends_no_process(name: str, count: int, tmp_path: Path):
    """As above, for files that are mapped or run as code: each is read in a process that may die."""
    for seed, verdict, note, reason in fuzz.verdicts(KINDS[name](tmp_path), list(range(count))):
        assert verdict in fuzz.LAWFUL, f"{verdict} of seed {seed}: {note}: {reason}"
