"""Pictures as users have them: every depth and mode, damaged ones, and what lies beside them in their folders."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import encoded, loaders, pixels, request, write_lmdb

import data
from data.folder import Encoded, decode

RAMP = (np.arange(64 * 64, dtype=np.uint32) * 16).astype(np.uint16).reshape(64, 64)  # 16 bits, all of their range
HALVES = np.rint(RAMP / 257)  # the nearest of 8 bits, as DALI has it; OpenCV's is at most one lower


def pgm(values: np.ndarray, white: int) -> bytes:
    return f"P5 {values.shape[1]} {values.shape[0]} {white}\n".encode() + values.astype(">u2").tobytes()


def tree_of(path, write) -> None:
    """`write(path without a suffix)` makes the pictures of two classes, to train and to validate."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (path / part / name).mkdir(parents=True)
            for number in range(3):
                write(path / part / name / str(number))


def write_jpeg(path) -> None:
    Image.new("RGB", (48, 48), (90, 60, 200)).save(f"{path}.jpg")


def bomb(path, side: int = 65500) -> None:
    """A JPEG of a few hundred bytes whose header declares side x side pixels."""
    write_jpeg(path.with_suffix(""))
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", side, side)
    path.write_bytes(content)


def png_bomb(path, side: int = 65500) -> None:
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(1000))))
    chunks = [
        struct.pack(">I", len(own)) + name + own + struct.pack(">I", zlib.crc32(name + own)) for name, own in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def test_damaged_pixels_of_a_png_are_found(tmp_path):
    """PIL skips the checksums of pixels, and reads on until it has as many as the header says."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30), np.uint8)).save(buffer, "PNG")
    content = buffer.getvalue()
    assert decode(Encoded("whole", content)).shape == (3, 24, 30)
    end = content.index(b"IEND") - 8  # of the compressed pixels: four of their bytes stand there twice
    with pytest.raises(ValueError, match=r"damaged: .* do not agree with their checksum"):
        decode(Encoded("damaged", content[:end] + content[end - 4 : end] + content[end:]))


# Depths and modes


@pytest.mark.parametrize("use_dali", [False, True])
def test_sixteen_bits_are_halved_not_cut_off(use_dali: bool, tmp_path):
    """PIL's own conversion makes nearly all of such a picture white."""

    def write(path):
        Image.fromarray(RAMP).save(f"{path}.png")
        Image.fromarray(RAMP).save(f"{path}.tif")
        path.with_suffix(".pgm").write_bytes(pgm(RAMP, 65535))

    if use_dali:
        write = lambda path: Image.fromarray(RAMP).save(f"{path}.png")  # noqa: E731
    tree_of(tmp_path, write)
    _, val = loaders("imagefolder", tmp_path, size=56, batch=6, use_dali=use_dali)
    expected = torch.from_numpy(HALVES).float()[4:60, 4:60]
    for images, _ in val:
        assert (pixels(images) - expected).abs().max() <= 1
    for picture in (tmp_path / "val" / "cat").iterdir():
        assert np.array_equal(decode(str(picture))[0], HALVES)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("1", "x.png"), ("L", "x.tif"), ("LA", "x.png"), ("P", "x.png"), ("RGBA", "x.webp"), ("CMYK", "x.tif"),
     ("YCbCr", "x.tif"), ("I;16", "x.tif")],
)  # fmt: skip
def test_every_mode_shows_the_same_picture(mode: str, name: str, tmp_path):
    grey = Image.fromarray(np.repeat(np.repeat(np.array([[0, 255], [255, 0]], np.uint8), 32, 0), 32, 1))
    saved = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert("RGB")
    if saved.mode != "I;16":
        saved = grey.convert(mode) if mode in ("1", "L", "LA", "P") else saved.convert(mode)
    saved.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert Image.open(tmp_path / name).mode in (mode, "RGB")
    shown = decode(str(tmp_path / name))
    assert (shown.float() - torch.from_numpy(np.array(grey)).float()).abs().max() <= 2


def test_transparency_and_its_palette_show_the_stored_colours(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 200, 60, 30])
    palette.save(tmp_path / "p.png", transparency=1)
    Image.new("RGBA", (8, 8), (200, 60, 30, 0)).save(tmp_path / "rgba.png")
    for name in ("p.png", "rgba.png"):
        assert decode(str(tmp_path / name))[:, 0, 0].tolist() == [200, 60, 30]


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "integers"), (np.float32, "floating-point numbers")])
def test_pixels_without_a_white_are_refused_and_listed_by_the_check(dtype, kind: str, tmp_path):
    tree_of(tmp_path, write_jpeg)
    odd = tmp_path / "train" / "cat" / "odd.tif"
    Image.fromarray(RAMP.astype(dtype)).save(odd)
    problems = data.check("imagefolder", **request(tmp_path))
    assert len(problems) == 1
    assert problems[0].startswith(f"{odd}: ")
    assert f"32-bit {kind}" in problems[0]
    with pytest.raises(ValueError, match=r"odd\.tif: .*32-bit"):
        loaders("imagefolder", tmp_path)


def test_dali_is_given_no_picture_that_it_misreads(tmp_path, monkeypatch):
    """It shows 10-bit PGMs as black, and floating-point TIFFs as white."""
    monkeypatch.setattr("data.sources.CHECKED_UP_TO", 1)
    tree_of(tmp_path, write_jpeg)
    (tmp_path / "train" / "cat" / "x.pgm").write_bytes(pgm(RAMP // 64, 1023))
    assert np.abs(decode(str(tmp_path / "train" / "cat" / "x.pgm"))[0].float().numpy() - HALVES).max() <= 1
    with pytest.raises(ValueError, match=r"--use_dali: .*x\.pgm: DALI misreads"):
        loaders("imagefolder", tmp_path, use_dali=True)


def test_what_dali_alone_cannot_read_is_named(tmp_path):
    """TIFF pictures of one bit: PIL reads them."""
    tree_of(tmp_path, write_jpeg)
    Image.new("1", (64, 64)).save(tmp_path / "val" / "cat" / "1.tif")
    _, val = loaders("imagefolder", tmp_path, use_dali=True)
    with pytest.raises(ValueError, match=r"--use_dali: .*cat/1\.tif: DALI says"):
        list(val)


# Damage


@pytest.mark.parametrize("make", [bomb, png_bomb])
def test_declared_sizes_are_checked_before_anything_is_decoded(make, tmp_path, monkeypatch):
    path = tmp_path / "bomb.jpg"
    make(path)
    monkeypatch.setattr("torchvision.io.decode_jpeg", None)  # would be called, and raise TypeError
    for source in (str(path), Encoded(str(path), path.read_bytes())):
        with pytest.raises(ValueError, match=rf"{path}: not a picture that decodes \(Image size .* exceeds limit"):
            decode(source)


@pytest.mark.filterwarnings("ignore")
def test_sizes_below_the_limit_must_fit_the_number_of_bytes(tmp_path):
    """169 million pixels take two gigabytes on their way through PIL, and none of them is there."""
    bomb(tmp_path / "bomb.jpg", side=13000)
    with pytest.raises(ValueError, match=r"declares 13000x13000 pixels in \d+ bytes"):
        decode(str(tmp_path / "bomb.jpg"))
    Image.new("1", (4000, 4000)).save(tmp_path / "blank.png")
    assert decode(str(tmp_path / "blank.png")).shape == (3, 4000, 4000)


def test_dali_is_asked_for_no_picture_that_declares_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.CHECKED_UP_TO", 1)
    tree_of(tmp_path, write_jpeg)
    bomb(tmp_path / "val" / "cat" / "1.jpg", side=20000)
    _, val = loaders("imagefolder", tmp_path, use_dali=True)
    with pytest.raises(ValueError, match=r"cat/1\.jpg: not a picture that decodes \(Image size"):
        list(val)


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_refused_in_one_line(tmp_path):
    """Every tenth byte of three formats is changed: a picture comes out, or a ValueError that names the file."""
    picture = Image.fromarray((RAMP % 251).astype(np.uint8)).resize((16, 16))
    rng = np.random.default_rng(0)
    for name in ("x.jpg", "x.png", "x.tif", "x.bmp"):
        picture.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for at in range(0, min(len(whole), 400), 10):
            content = bytearray(whole)
            content[at] ^= 1 << int(rng.integers(8))
            try:
                told = ""
                assert decode(Encoded(name, bytes(content))).dtype == torch.uint8
            except ValueError as error:
                told = str(error)
            assert told == "" or told.startswith(f"{name}: not a picture that decodes (")
            assert "\n" not in told
            assert "BytesIO" not in told


# What else lies in folders


def test_hidden_files_and_folders_are_no_data(tmp_path):
    tree_of(tmp_path, write_jpeg)
    for part in ("train", "val"):
        for hidden in (".ipynb_checkpoints", "cat/.ipynb_checkpoints"):
            (tmp_path / part / hidden).mkdir()
            write_jpeg(tmp_path / part / hidden / "0-checkpoint")
    (tmp_path / "train" / "cat" / "._0.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    train, val = loaders("imagefolder", tmp_path)
    assert train.classes == val.classes == ["cat", "dog"]
    assert (train.count, val.count) == (6, 6)


def test_pictures_of_kinds_that_are_not_read_are_listed_by_the_check(tmp_path):
    """They would be left out of the run without a word."""
    tree_of(tmp_path, write_jpeg)
    odd = tmp_path / "train" / "cat" / "0.gif"
    Image.new("L", (8, 8)).save(odd)
    (tmp_path / "train" / "cat" / "readme.txt").touch()
    assert loaders("imagefolder", tmp_path)[0].count == 6
    problems = data.check("imagefolder", **request(tmp_path))
    assert [problem.split(", ")[0] for problem in problems] == [f"{odd}: not read: its name ends in none of .jpg"]


def test_pictures_come_in_the_order_of_torchvision(tmp_path):
    """So that a run goes on with the same pictures as before."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    tree_of(tmp_path, write_jpeg)
    for below in ("cat/b", "cat/b/c", "cat/a-b", "dog/B"):
        (tmp_path / "train" / below).mkdir()
        write_jpeg(tmp_path / "train" / below / "X")
    (tmp_path / "train" / "dog" / "note.txt").touch()
    (tmp_path / "train" / "dog" / "link.jpg").symlink_to(tmp_path / "train" / "dog" / "0.jpg")
    train, _ = loaders("imagefolder", tmp_path)
    expected = make_dataset(str(tmp_path / "train"), {"cat": 0, "dog": 1}, IMG_EXTENSIONS)
    assert data.trees.class_tree(tmp_path / "train")[1] == expected
    assert train.count == len(expected) == 11


def test_pipes_are_no_pictures(tmp_path):
    """Reading one waits for ever."""
    tree_of(tmp_path, write_jpeg)
    pipe = tmp_path / "train" / "cat" / "pipe.jpg"
    os.mkfifo(pipe)
    assert loaders("imagefolder", tmp_path)[0].count == 6
    with pytest.raises(ValueError, match=r"pipe\.jpg: not a picture that decodes \(not a regular file\)"):
        decode(str(pipe))


def test_classes_without_pictures_are_named(tmp_path):
    tree_of(tmp_path, write_jpeg)
    (tmp_path / "train" / "wolf").mkdir()
    with pytest.raises(ValueError, match="no pictures in wolf"):
        loaders("imagefolder", tmp_path)


# LMDB


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_classes_of_an_lmdb_file_have_spaces_in_their_names(ends: str, tmp_path):
    names = ["polar bear", "brown bear", "Löwe"]
    (tmp_path / "classes.txt").write_bytes(ends.join([*names, ""]).encode("utf-8-sig"))
    write_jpeg(tmp_path / "0")
    for part in ("train", "val"):
        write_lmdb(tmp_path / f"{part}.lmdb", encoded((tmp_path / "0.jpg", 2)))
    assert loaders("lmdb", tmp_path)[0].classes == names
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"classes\.txt: not a list of class names in UTF-8"):
        loaders("lmdb", tmp_path)


@pytest.mark.parametrize(
    "damaged",
    [
        b"\x80\x04" + b"K\x01" + b"r" + struct.pack("<I", 1 << 31) + b".",  # a memo of 2^31 places
        b"\x80\x04" + b"\x8e" + struct.pack("<Q", 1 << 40) + b"x.",  # a string of a terabyte
        b"\x80\x05" + b"\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        b"\x80\x04" + b"\x95" + struct.pack("<Q", 1 << 40) + b"x.",
        b"",
        pickle.dumps([b"0"])[:-4],
    ],
)
def test_damaged_records_take_no_memory(damaged: bytes, tmp_path):
    import resource

    write_lmdb(tmp_path / "train.lmdb", {b"0": (b"", 0)}, __keys__=bytearray(damaged))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"train\.lmdb: b'__keys__'|train\.lmdb: has no") as error:
        data.records.Records(tmp_path / "train.lmdb", 2)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_truncated_lmdb_file_is_refused(tmp_path):
    """Reading what is missing would end the process with a bus error."""
    write_jpeg(tmp_path / "0")
    path = tmp_path / "train.lmdb"
    write_lmdb(path, encoded(*[(tmp_path / "0.jpg", 0)] * 200))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train\.lmdb: truncated"):
        data.records.Records(path, 1)


@pytest.mark.parametrize("record", [(b"", -1), (b"", 2), (b"", 0.5), ("", 0), (b"",), (b"", 0, 0), 7, None])
def test_records_that_are_no_picture_and_label_are_named_by_the_check(record, tmp_path):
    write_jpeg(tmp_path / "0")
    for part in ("train", "val"):
        write_lmdb(tmp_path / f"{part}.lmdb", encoded((tmp_path / "0.jpg", 0)) | {b"odd": record})
    (tmp_path / "classes.txt").write_text("a\nb\n")
    expected = [f"{tmp_path}/{part}.lmdb: b'odd' is not a picture and a label below 2" for part in ("train", "val")]
    assert data.check("lmdb", **request(tmp_path)) == expected


# Too few


def test_too_few_pictures_for_a_step_or_the_processes_are_refused():
    train, _ = loaders("fake", size=8, batch=100)  # 256 and 128 pictures
    assert [train.left_over(batches) for batches in (1, 2)] == [56, 56]
    with pytest.raises(ValueError, match="256 pictures make 2 batches of 100, but a step of training takes 3"):
        train.left_over(3)
    with pytest.raises(ValueError, match="100 pictures in a training batch: too few for 101 processes"):
        loaders("fake", size=8, batch=100, world=101)
    few, _ = loaders("fake", size=8, batch=1000, world=3)
    assert few.batch_size == 255  # of 256: all processes have equally many
    assert few.left_over() == 1
