"""Loaders: every picture once, the same batches wherever a run is taken up again, and mistakes named."""

import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data.folder import chance_of, decode, piece
from data.loader import MEAN, STD
from data.sources import CIFAR, SAMPLES

CPU = torch.device("cpu")


def request(path=None, size: int = 32, workers: int = 0, batch: int = 4, **more) -> dict:
    sizes = {"image_size": size, "train_batch_size": batch, "eval_batch_size": batch}
    return {"data_path": path, "seed": 1, "device": CPU, "workers": workers, "skip_bad": False, **sizes, **more}


def loaders(data_set: str, path=None, **more):
    return data.create_loaders(data_set, **request(path, **more))


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


@pytest.mark.parametrize(("source", "use_dali"), [("digits", False), ("imagefolder", False), ("imagefolder", True)])
def test_training_epochs_differ_and_a_resumed_one_does_not(source: str, use_dali: bool, tree):
    def fresh():
        return loaders(source, tree, size=16, batch=4, use_dali=use_dali)[0]

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


@pytest.mark.parametrize("source", ["digits", "imagefolder"])
def test_the_first_pictures_are_whole_batches_and_leave_the_position(source: str, tree):
    """Every process sees the same ones, whatever its share and wherever in the training it is."""
    path = tree if source == "imagefolder" else None
    whole, half = (loaders(source, path, rank=rank, world=world)[0] for rank, world in ((0, 1), (1, 2)))
    expected = [(images.clone(), labels) for images, labels in whole][:2]
    half.load_state_dict({"epoch": 3, "batch": 1})
    random = torch.get_rng_state()
    for _ in range(2):
        found = list(half.first(6))
        assert [len(labels) for _, labels in found] == [4, 2]
        for (images, labels), (theirs, their_labels) in zip(found, expected, strict=True):
            assert torch.equal(images, theirs[: len(labels)])
            assert torch.equal(labels, their_labels[: len(labels)])
    next(half.first(6))  # one that is left in the middle
    assert half.state_dict() == {"epoch": 3, "batch": 1}
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("source", ["digits", "imagefolder"])
def test_the_first_pictures_can_be_seen_as_evaluation_sees_them(source: str, tree):
    """Catches random crops in what is to say what a network computes on pictures as they are; training keeps its."""
    train, _ = loaders(source, tree if source == "imagefolder" else None)
    training = [images.clone() for images, _ in train]
    train.load_state_dict({"epoch": 0, "batch": 0})
    whole = [images.clone() for images, _ in train.first(len(train) * train.batch_size, augmented=False)]
    assert not torch.equal(whole[0], training[0])
    if source == "digits":
        pad, numbers = train.pad, train._order()[: train.batch_size]
        clean = train.images[numbers, pad:-pad, pad:-pad].permute(0, 3, 1, 2)
        assert torch.equal(whole[0], train._normalise(clean))
    again = [images for images, _ in train]
    assert all(torch.equal(a, b) for a, b in zip(again, training, strict=True))


def test_crops_are_shifts_of_the_picture():
    loader, _ = loaders("digits", size=16, batch=8)
    clean = loader.images[:, 1:-1, 1:-1]  # without the padding of one
    numbers = loader._order()[:8]
    images, labels = next(iter(loader))
    assert torch.equal(labels, loader.labels[numbers])
    for picture, number in zip(pixels(images).round().byte().permute(0, 2, 3, 1), numbers, strict=True):
        padded = torch.nn.functional.pad(clean[number], (0, 0, 1, 1, 1, 1))
        shifts = [padded[y : y + 16, x : x + 16] for y in range(3) for x in range(3)]
        assert any(torch.equal(picture, shift) for shift in shifts)


@pytest.fixture
def slopes(tmp_path):
    """Pictures whose red and green tell row and column, so that what was cut out can be read off."""
    y, x = np.mgrid[0:100, 0:120]
    for part, count in (("train", 7), ("val", 5)):
        for number in range(count):
            (tmp_path / part / "slope").mkdir(parents=True, exist_ok=True)
            pixels = np.stack([2 * y, 2 * x, 0 * x + 30 * number], -1).astype(np.uint8)
            Image.fromarray(pixels[: 100 - 5 * number]).save(tmp_path / part / "slope" / f"{number}.png")
    return tmp_path


def pixels(images):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (images * std + mean) * 255


def test_both_folder_loaders_cut_the_same_pieces(slopes):
    for ours, dali in zip(loaders("imagefolder", slopes), loaders("imagefolder", slopes, use_dali=True), strict=True):
        for (images, labels), (others, other_labels) in zip(ours, dali, strict=True):
            assert torch.equal(labels, other_labels)
            assert others.is_contiguous(memory_format=torch.channels_last)
            assert (pixels(images) - pixels(others)).abs().max() < 1.5  # of 255: two ways to round the same resize


@pytest.mark.parametrize("use_dali", [False, True])
def test_folder_batches_are_the_pieces_that_were_drawn(use_dali: bool, slopes):
    train, _ = loaders("imagefolder", slopes, use_dali=use_dali)
    order = train._order()
    for numbers, (images, _) in zip(order.split(4), train, strict=False):
        for number, picture in zip(numbers.tolist(), pixels(images), strict=True):
            height = 100 - 5 * number
            top, left, h, w, mirrored = piece(height, 120, chance_of(1, 0, number))
            rows, columns = picture[0].mean(1) / 2, picture[1].mean(0) / 2
            columns = columns.flip(0) if mirrored else columns
            assert abs(rows.mean() - (top + (h - 1) / 2)) < 0.6
            assert abs(columns.mean() - (left + (w - 1) / 2)) < 0.6
            assert abs((rows[-1] - rows[0]) - h * 31 / 32) < 1.5
            assert abs((columns[-1] - columns[0]) - w * 31 / 32) < 1.5


def test_pieces_follow_the_law_of_random_resized_crop():
    from torchvision.transforms import RandomResizedCrop

    drawn = [piece(300, 400, chance_of(0, 0, number)) for number in range(4000)]
    torch.manual_seed(0)
    canvas = torch.empty(3, 300, 400)
    reference = [RandomResizedCrop.get_params(canvas, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    for index in range(4):  # top, left, height, width: the same deciles
        ours, theirs = (np.quantile([p[index] for p in many], np.arange(0.1, 1, 0.1)) for many in (drawn, reference))
        assert np.abs(ours - theirs).max() < 12
    assert abs(np.mean([p.mirrored for p in drawn]) - 0.5) < 0.03
    assert all(p.top + p.height <= 300 and p.left + p.width <= 400 for p in drawn)
    assert piece(10, 1000, chance_of(0, 0, 0))[:4] == (0, 493, 10, 13)  # too long a picture: its middle


@pytest.mark.parametrize("use_dali", [False, True])
def test_evaluation_of_a_folder_sees_every_picture_once(use_dali: bool, slopes):
    _, val = loaders("imagefolder", slopes, batch=2, use_dali=use_dali)

    def blues():
        return [round(p[2].mean().item() / 30) for images, _ in val for p in pixels(images)]

    next(iter(val))  # an abandoned pass leaves no trace
    assert blues() == blues() == [0, 1, 2, 3, 4]
    assert len(val) == 3


def test_evaluation_is_torchvisions_resize_and_centre_crop(slopes):
    from torchvision.transforms import v2

    _, val = loaders("imagefolder", slopes, size=28)
    reference = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(28)])
    for picture, number in zip((p for images, _ in val for p in pixels(images)), range(5), strict=True):
        expected = reference(decode(str(slopes / "val" / "slope" / f"{number}.png")))
        assert torch.equal(picture.round().byte(), expected)


@pytest.mark.parametrize("use_dali", [False, True])
def test_evaluation_resizes_and_normalises_as_it_is_told(use_dali: bool, slopes):
    """Networks of others have other numbers than ours; a default that stays somewhere costs them accuracy."""
    from torchvision.transforms import v2

    how = {"resize": 40, "mean": (0.5, 0.25, 0), "std": (1, 0.5, 0.2)}
    images, _ = next(iter(loaders("imagefolder", slopes, size=28, use_dali=use_dali, **how)[1]))
    reference = v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(28)])
    right = torch.stack([reference(decode(str(slopes / "val" / "slope" / f"{number}.png"))) for number in range(4)])
    mean, std = (torch.tensor(how[key])[:, None, None] for key in ("mean", "std"))
    assert torch.allclose(images * std + mean, right / 255, atol=0.01)  # DALI rounds another way


def test_both_parts_can_be_seen_as_evaluation_sees_them(tree):
    """Calibration must see what evaluation sees, of every class, and none of the validation pictures."""
    facts = loaders("imagefolder", tree)[1].preparation()
    assert (facts["size"], facts["resize"], facts["classes"]) == (32, 37, ["cat", "dog"])
    train, val = data.evaluation_loaders(tree, facts | {"resize": 32}, 4)
    assert (train.count, val.count) == (10, 4)
    assert val.preparation() == facts | {"resize": 32}
    first, second = ([images for images, _ in train] for _ in range(2))
    assert sum(map(len, first)) == 10  # the last batch is not dropped
    assert all(map(torch.equal, first, second))  # no crops by chance
    spread = list(train.spread(4))
    assert torch.cat([labels for _, labels in spread]).tolist() == [0, 0, 1, 1]
    every = torch.cat(first)
    assert all(any(torch.equal(image, other) for other in every) for images, _ in spread for image in images)
    as_they_are = data.evaluation_loaders(tree, facts | {"size": 40, "resize": 40}, 4)[1]
    picture = decode(str(tree / "val" / "cat" / "0.jpg"))  # 40 rows and 50 columns
    assert torch.equal(pixels(next(iter(as_they_are))[0][0]).round().byte(), picture[:, :, 5:45])


@pytest.mark.parametrize("use_dali", [False, True])
def test_every_kind_of_picture_is_read_as_rgb(use_dali: bool, tmp_path):
    y, x = np.mgrid[0:64, 0:64]
    grey = Image.fromarray((2 * (x + y)).astype(np.uint8))
    kinds = {"L": "grey.jpg", "CMYK": "cmyk.jpg", "P": "palette.png", "RGBA": "alpha.png", "RGB": "colour.webp"}
    for part in ("train", "val"):
        (tmp_path / part / "grey").mkdir(parents=True)
        for mode, name in kinds.items():
            (grey if mode == "P" else grey.convert("RGB")).convert(mode).save(tmp_path / part / "grey" / name)
        grey.save(tmp_path / part / "grey" / "a_png_by_content.jpg", format="PNG")
    _, val = loaders("imagefolder", tmp_path, size=56, batch=6, use_dali=use_dali)
    ((images, _),) = val
    assert len(images) == 6
    expected = torch.from_numpy(np.array(grey)).float()[4:60, 4:60]
    assert (pixels(images) - expected).abs().max() < 6


def cifar_tree(path, classes, pictures):
    for part in ("train", "test"):
        for label, name in enumerate(classes):
            (path / part / name).mkdir(parents=True)
            Image.fromarray(pictures[part][label]).save(path / part / name / "0.png")


def cifar_binary(path, binary, pictures, monkeypatch):
    """torchvision's files, one picture a class in each."""
    (path / binary.base_folder).mkdir(parents=True)
    monkeypatch.setattr(binary, "_check_integrity", lambda self: True)
    monkeypatch.setattr(binary, "_load_meta", lambda self: None)
    for part, files in (("train", binary.train_list), ("test", binary.test_list)):
        rows = pictures[part].transpose(0, 3, 1, 2).reshape(len(pictures[part]), -1)
        labels = "labels" if binary.__name__ == "CIFAR10" else "fine_labels"
        for name, _ in files:
            (path / binary.base_folder / name).write_bytes(pickle.dumps({"data": rows, labels: [*range(len(rows))]}))


@pytest.mark.parametrize("data_set", ["cifar10", "cifar100"])
def test_cifar_from_a_tree_and_from_binary_files_is_the_same(data_set: str, tmp_path, monkeypatch):
    from torchvision import datasets

    classes = CIFAR[data_set]
    assert len(set(classes)) == int(data_set.removeprefix("cifar"))
    assert classes == sorted(classes)
    chance = np.random.default_rng(0)
    shape = (len(classes), 32, 32, 3)
    pictures = {part: chance.integers(0, 256, shape, dtype=np.uint8) for part in ("train", "test")}
    cifar_tree(tmp_path / "tree", classes, pictures)
    cifar_binary(tmp_path / "binary", getattr(datasets, data_set.upper()), pictures, monkeypatch)
    _, from_tree = loaders(data_set, tmp_path / "tree", batch=len(classes))
    _, from_binary = loaders(data_set, tmp_path / "binary", batch=len(classes))
    (a, labels_a), (b, labels_b) = next(iter(from_tree)), next(iter(from_binary))
    assert torch.equal(a, b)
    assert torch.equal(labels_a, labels_b)
    assert from_tree.classes == classes
    assert data.check(data_set, **request(tmp_path / "binary")) == []


@pytest.fixture
def tiny(tmp_path):
    """Tiny-ImageNet's layout with two classes, whose wnids are not in order."""
    chance = np.random.default_rng(0)

    def save(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)

    for name in ("n02", "n01"):
        for number in range(3):
            save(tmp_path / "train" / name / "images" / f"{name}_{number}.JPEG")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("")
    for number in range(3):
        save(tmp_path / "val" / "images" / f"val_{number}.JPEG")
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    rows = [f"val_{number}.JPEG\t{name}\t0\t32\t44\t62\n" for number, name in enumerate(("n02", "n01", "n02"))]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(rows))
    return tmp_path


def test_tiny_imagenet_in_its_own_layout(tiny):
    train, val = loaders("tiny_imagenet", tiny, size=64)
    assert train.classes == ["n01", "n02"]
    assert sorted(train.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    ((images, labels),) = val
    assert labels.tolist() == [1, 0, 1]
    expected = torch.stack([decode(str(tiny / "val" / "images" / f"val_{n}.JPEG")) for n in range(3)])
    assert torch.equal(pixels(images).round().byte(), expected)
    assert next(iter(train))[0].shape == (4, 3, 64, 64)


def test_what_is_wrong_with_tiny_imagenet_is_told(tiny):
    notes = tiny / "val" / "val_annotations.txt"
    notes.write_text("val_0.JPEG\tn03\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt: val_0\.JPEG n03: no class of wnids\.txt"):
        loaders("tiny_imagenet", tiny, size=64)
    notes.unlink()
    with pytest.raises(ValueError, match=r"has no val/val_annotations\.txt"):
        loaders("tiny_imagenet", tiny, size=64)
    notes.write_text("val_9.JPEG\tn01\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"val_9\.JPEG: not a picture"):
        loaders("tiny_imagenet", tiny, size=64)
    assert [problem.split(": ")[0] for problem in data.check("tiny_imagenet", **request(tiny))] == [
        str(tiny / "val" / "images" / "val_9.JPEG")
    ]
    (tiny / "wnids.txt").write_text("n01\n")
    with pytest.raises(ValueError, match=r"train and wnids\.txt have different classes \(n02"):
        loaders("tiny_imagenet", tiny, size=64)


def write_lmdb(path, records: dict, **header) -> None:
    import lmdb

    header = {"__keys__": list(records), "__len__": len(records)} | header
    content = records | {key.encode(): value for key, value in header.items()}
    with lmdb.open(str(path), subdir=False, map_size=10**7) as environment, environment.begin(write=True) as put:
        for key, value in content.items():
            put.put(key, value if isinstance(value, bytearray) else pickle.dumps(value))


def encoded(*samples) -> dict:
    return {str(n).encode(): (open(path, "rb").read(), label) for n, (path, label) in enumerate(samples)}


def test_lmdb_files_are_seen_as_the_folder_they_were_made_of(tree, tmp_path):
    (tmp_path / "classes.txt").write_text("cat\r\ndog\r\n")
    parts = SAMPLES["imagefolder"](data.sources.Request(**request(tree)))
    for train, name in ((True, "train"), (False, "val")):
        write_lmdb(tmp_path / f"{name}.lmdb", encoded(*parts[train]))
    for ours, theirs in zip(loaders("lmdb", tmp_path), loaders("imagefolder", tree), strict=True):
        assert ours.classes == theirs.classes
        for (images, labels), (expected, numbers) in zip(ours, theirs, strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, numbers)


def test_what_is_wrong_with_an_lmdb_file_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"has no train\.lmdb"):
        loaders("lmdb", tmp_path)
    good = {b"0": (b"no picture", 3)}
    write_lmdb(tmp_path / "train.lmdb", good)
    write_lmdb(tmp_path / "val.lmdb", good)
    train, val = loaders("lmdb", tmp_path)
    with pytest.raises(ValueError, match=r"train\.lmdb: b'0': not a picture"):
        next(iter(train))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    train, val = loaders("lmdb", tmp_path)
    with pytest.raises(ValueError, match=r"val\.lmdb: b'0' is not a picture and a label below 2"):
        next(iter(val))
    code = bytearray(pickle.dumps(print))
    for further, message in (
        ({"__len__": 2}, "its __keys__ are not the 2"),
        ({"__keys__": code}, r"b'__keys__': holds builtins\.print, which only code could rebuild"),
    ):
        (tmp_path / "train.lmdb").unlink()
        write_lmdb(tmp_path / "train.lmdb", good, **further)
        with pytest.raises(ValueError, match=message):
            loaders("lmdb", tmp_path)
    (tmp_path / "train.lmdb").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"train\.lmdb: "):
        loaders("lmdb", tmp_path)


def test_a_picture_that_does_not_decode_stops_the_run_or_is_left_out(tree):
    bad = tree / "train" / "cat" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cat/1\.jpg: not a picture"):
        loaders("imagefolder", tree)
    said = []
    train, _ = loaders("imagefolder", tree, skip_bad=True, say=said.append)
    assert train.count == 9
    assert "cat/1.jpg" in said[0]


@pytest.mark.parametrize("use_dali", [False, True])
def test_a_large_set_replaces_a_bad_picture_as_it_is_read(use_dali: bool, tree, monkeypatch):
    monkeypatch.setattr("data.sources.CHECKED_UP_TO", 1)
    for name in ("1.jpg", "2.jpg"):
        (tree / "train" / "cat" / name).write_bytes(b"no picture")
    train, _ = loaders("imagefolder", tree, skip_bad=True, use_dali=use_dali)
    assert sum(len(labels) for _, labels in train) == 8
    for workers in (0, 1):
        train, _ = loaders("imagefolder", tree, workers=workers, use_dali=use_dali)
        with pytest.raises(ValueError, match=r"cat/[12]\.jpg: not a picture") as error:
            for _ in range(3):
                list(train)
        assert "\n" not in str(error.value)


def test_the_check_names_every_bad_picture(tree, monkeypatch):
    assert data.check("imagefolder", **request(tree)) == []
    monkeypatch.setattr("data.sources.CHECKED_UP_TO", 1)  # of no interest to it
    bad = [tree / "train" / "cat" / "1.jpg", tree / "val" / "dog" / "0.jpg"]
    bad[0].write_bytes(bad[0].read_bytes()[:-30])
    bad[1].write_bytes(b"")
    problems = data.check("imagefolder", **request(tree))
    assert [problem.split(": not a picture that decodes (")[0] for problem in problems] == [str(path) for path in bad]
    assert data.check("digits", **request()) == []


def test_dali_is_asked_for_where_it_is_missing_or_of_no_use(tree, monkeypatch):
    with pytest.raises(ValueError, match="--use_dali is for --data_set imagefolder: digits"):
        loaders("digits", use_dali=True)
    monkeypatch.setitem(sys.modules, "nvidia.dali.experimental.dynamic", None)
    with pytest.raises(ValueError, match="--use_dali needs DALI: pip install nvidia-dali-cuda130"):
        loaders("imagefolder", tree, use_dali=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: loaders("holiday", path), "unknown data set 'holiday': one of digits"),
        (lambda path: loaders("imagefolder"), "imagefolder needs --data_path"),
        (lambda path: loaders("imagefolder", path / "none"), "none: no such folder"),
        (lambda path: loaders("imagefolder", path), "has no folder train"),
        (lambda path: loaders("cifar10", path), "has no folder train"),
        (lambda path: loaders("tiny_imagenet", path, size=64), "has no folder train"),
        (lambda path: loaders("cifar100", path, size=64), "--image_size 64: the pictures of cifar100 are used as"),
    ],
)
def test_missing_data_is_told(make, message: str, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_empty_and_mismatched_folders_are_told(tree, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "train").mkdir()
    (empty / "val").mkdir()
    with pytest.raises(ValueError, match="has no class folders"):
        loaders("imagefolder", empty)
    (tree / "val" / "dog").rename(tree / "val" / "wolf")
    with pytest.raises(ValueError, match=r"train and val have different classes \(dog, wolf"):
        loaders("imagefolder", tree)
    with pytest.raises(ValueError, match="not the 10 class folders of cifar10 but cat, dog"):
        loaders("cifar10", tree)
