"""Loaders: every picture once, the same batches wherever a run is taken up again, and mistakes named."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data.loader import MEAN, STD
from data.sources import CIFAR10

CPU = torch.device("cpu")


def loaders(
    data_set: str, path=None, size: int = 32, workers: int = 0, skip_bad: bool = False, batch: int = 4, say=print
):
    return data.create_loaders(
        data_set,
        data_path=path,
        image_size=size,
        train_batch_size=batch,
        eval_batch_size=batch,
        seed=1,
        device=CPU,
        workers=workers,
        skip_bad=skip_bad,
        say=say,
    )


@pytest.fixture
def tree(tmp_path):
    """Class folders with 5 training and 2 validation pictures each, of many sizes."""
    chance = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = chance.integers(0, 256, (40 + 7 * number, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path


def test_digits_are_split_without_overlap_and_in_all_classes():
    train, val = loaders("digits", batch=100)
    assert (train.count, val.count) == (1433, 364)
    assert train.classes == [str(digit) for digit in range(10)]
    assert set(torch.cat([labels for _, labels in val]).tolist()) == set(range(10))
    images, labels = next(iter(train))
    assert images.shape == (100, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("kind", ["digits", "fake"])
def test_evaluation_sees_every_picture_once(kind: str):
    _, val = loaders(kind, size=16, batch=50)
    assert sum(len(labels) for _, labels in val) == val.count
    next(iter(val))  # an abandoned pass leaves no trace
    assert sum(len(labels) for _, labels in val) == val.count


@pytest.mark.parametrize("source", ["digits", "imagefolder"])
def test_training_epochs_differ_and_a_resumed_one_does_not(source: str, tree):
    def fresh():
        return loaders(source, tree, size=16, batch=4)[0]

    def epochs(loader, count):
        return [[images.clone() for images, _ in loader] for _ in range(count)]

    first, second = epochs(fresh(), 2)
    assert not torch.equal(first[0], second[0])
    stopped = fresh()
    stopped.load_state_dict({"epoch": 1, "batch": 1})
    (rest,) = epochs(stopped, 1)
    assert len(rest) == len(second) - 1
    assert all(torch.equal(a, b) for a, b in zip(rest, second[1:], strict=True))


def test_position_counts_batches_that_were_handed_out():
    loader, _ = loaders("digits", batch=100)
    batches = iter(loader)
    next(batches)
    next(batches)
    assert loader.state_dict() == {"epoch": 0, "batch": 2}
    for _ in batches:
        pass
    assert loader.state_dict() == {"epoch": 1, "batch": 0}


def test_batches_do_not_depend_on_workers_and_leave_random_state_alone(tree):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    alone = [images for images, _ in loaders("imagefolder", tree)[0]]
    assert torch.equal(torch.get_rng_state(), before)
    shared = [images for images, _ in loaders("imagefolder", tree, workers=2)[0]]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_crops_are_shifts_of_the_picture():
    loader, _ = loaders("digits", size=16, batch=8)
    clean = loader.images[:, 1:-1, 1:-1]  # without the padding of one
    numbers = loader._order()[:8]
    images, labels = next(iter(loader))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    pixels = ((images * std + mean) * 255).round().byte().permute(0, 2, 3, 1)
    assert torch.equal(labels, loader.labels[numbers])
    for picture, number in zip(pixels, numbers, strict=True):
        padded = torch.nn.functional.pad(clean[number], (0, 0, 1, 1, 1, 1))
        shifts = [padded[y : y + 16, x : x + 16] for y in range(3) for x in range(3)]
        assert any(torch.equal(picture, shift) for shift in shifts)


def cifar_tree(path, pictures):
    for part in ("train", "test"):
        for label, name in enumerate(CIFAR10):
            (path / part / name).mkdir(parents=True)
            Image.fromarray(pictures[part][label]).save(path / part / name / "0.png")


def cifar_binary(path, pictures, monkeypatch):
    """torchvision's files, ten pictures a batch."""
    from torchvision.datasets import CIFAR10 as Binary

    folder = path / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    monkeypatch.setattr(Binary, "_check_integrity", lambda self: True)
    monkeypatch.setattr(Binary, "_load_meta", lambda self: None)
    for part, files in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        for name in files:
            rows = pictures[part].transpose(0, 3, 1, 2).reshape(10, -1)
            (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(10))}))


def test_cifar10_from_a_tree_and_from_binary_files_is_the_same(tmp_path, monkeypatch):
    chance = np.random.default_rng(0)
    pictures = {part: chance.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    cifar_tree(tmp_path / "tree", pictures)
    cifar_binary(tmp_path / "binary", pictures, monkeypatch)
    _, from_tree = loaders("cifar10", tmp_path / "tree", batch=10)
    _, from_binary = loaders("cifar10", tmp_path / "binary", batch=10)
    (a, labels_a), (b, labels_b) = next(iter(from_tree)), next(iter(from_binary))
    assert torch.equal(a, b)
    assert torch.equal(labels_a, labels_b)
    assert from_tree.classes[3] == "cat"


def test_a_picture_that_does_not_decode_stops_the_run_or_is_left_out(tree):
    bad = tree / "train" / "cat" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cat/1\.jpg: not a picture"):
        loaders("imagefolder", tree)
    said = []
    train, _ = loaders("imagefolder", tree, skip_bad=True, say=said.append)
    assert train.count == 9
    assert "cat/1.jpg" in said[0]


def test_a_large_set_replaces_a_bad_picture_as_it_is_read(tree, monkeypatch):
    monkeypatch.setattr("data.sources.CHECKED_UP_TO", 1)
    (tree / "train" / "cat" / "1.jpg").write_bytes(b"no picture")
    train, _ = loaders("imagefolder", tree, skip_bad=True)
    assert sum(len(labels) for _, labels in train) == 8
    for workers in (0, 1):
        train, _ = loaders("imagefolder", tree, workers=workers)
        with pytest.raises(ValueError, match=r"cat/1\.jpg: not a picture") as error:
            for _ in range(3):
                list(train)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: loaders("holiday", path), "unknown data set 'holiday': one of digits"),
        (lambda path: loaders("imagefolder"), "imagefolder needs --data_path"),
        (lambda path: loaders("imagefolder", path / "none"), "none: no such folder"),
        (lambda path: loaders("imagefolder", path), "has no folder train"),
        (lambda path: loaders("cifar10", path), "has no folder train"),
    ],
)
def test_missing_data_is_told(make, message: str, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_empty_and_mismatched_folders_are_told(tree, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "train").mkdir()
    (empty / "val").mkdir()
    with pytest.raises(ValueError, match="find any class folder"):
        loaders("imagefolder", empty)
    (tree / "val" / "dog").rename(tree / "val" / "wolf")
    with pytest.raises(ValueError, match=r"train and val have different classes \(dog, wolf"):
        loaders("imagefolder", tree)
    with pytest.raises(ValueError, match="not the ten class folders of CIFAR-10"):
        loaders("cifar10", tree)
