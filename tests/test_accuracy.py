"""deploy/accuracy.py: counting, and what must be known about pictures before anything is counted."""

import numpy as np
import pytest

from deploy import accuracy

SQUARE = (2, 3, 8, 8)
SAID = {"size": 8, "resize": 9, "mean": [0.5] * 3, "std": [0.25] * 3, "classes": ["cat", "dog", "hen"]}


def test_right_answers_are_counted_once_in_batches_that_are_filled_up():
    """The last batch is repeated to its full size: a repeated picture must not count."""
    logits = np.eye(3, dtype=np.float32)
    images = np.arange(5, dtype=np.float32).reshape(5, 1)
    labels = np.array([0, 1, 2, 0, 1])
    parts = [(images[:2], labels[:2]), (images[2:4], labels[2:4]), (images[4:], labels[4:])]
    seen = []

    def right(batch):
        seen.append(batch.shape)
        return logits[labels[batch[:, 0].astype(int)]]

    def first(batch):  # of several outputs the logits come first
        return {"logits": np.repeat(logits[:1], len(batch), 0), "rest": np.zeros((len(batch), 9))}

    found = accuracy.evaluate({"ours": right, "theirs": first}, parts, 2, np.arange(3))
    assert found == {"pictures": 5, "top1": {"ours": 100, "theirs": 40}, "agreement": {"theirs": 40}}
    assert seen == [(2, 1)] * 3


def test_classes_are_matched_by_name_and_else_by_number():
    """Folders of some of the classes are common; by position, every picture would have another class's label."""
    assert accuracy.columns(["cat", "hen"], SAID["classes"], 3).tolist() == [0, 2]
    assert accuracy.columns(["a", "b"], None, 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="does not know: cow"):
        accuracy.columns(["cat", "cow"], SAID["classes"], 3)
    with pytest.raises(ValueError, match="--data has 2 classes, and the network 3"):
        accuracy.columns(["a", "b"], None, 3)


def test_flags_win_over_the_file_and_what_nobody_says_is_asked_for():
    facts = {name: SAID[name] for name in ("size", "resize", "mean", "std")}
    assert accuracy.preparation(SAID, SQUARE) == facts
    assert accuracy.preparation(SAID, SQUARE, mean=[0, 0, 0], resize=8) == facts | {"mean": [0, 0, 0], "resize": 8}
    assert accuracy.preparation(None, SQUARE, [0, 0, 0], [1, 1, 1])["resize"] is None  # in proportion to the size
    for said, shape, more, words in (
        (None, SQUARE, {}, "--mean is missing"),
        (None, SQUARE, {"mean": [0, 0, 0]}, "--std is missing"),
        (SAID, SQUARE, {"std": [1]}, "--std 1: must be three numbers"),
        (SAID, (1, 3, 8, 9), {}, "squares of three channels"),
        (SAID, (1, 1, 8, 8), {}, "squares of three channels"),
    ):
        with pytest.raises(ValueError, match=words):
            accuracy.preparation(said, shape, **more)
