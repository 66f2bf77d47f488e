"""Pictures in folders: the law of their crops and flips, and a loader that decodes them on worker processes.

Chance is drawn here, from (seed, epoch, picture) alone, so every loader cuts the same piece out of the same picture.
"""

import contextlib
import hashlib
import io
import math
import os
import random
import signal
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.loader import Loader

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a training crop; the published DALI pipeline's area up to 1.25 is a slip
TIFF_PHOTOMETRIC = 262  # the tag that says whether zero is black or white
BLANK = 1 << 24  # pixels: above, a file must have so many bytes that there may be something to see
SIZED = 20_000  # of how many files at most the digest of a data set holds the size: asking takes long on a network
SPARE = 20  # how many pictures in a row may be bad before skipping them ends


class Encoded(NamedTuple):
    """A picture that is no file of its own."""

    name: str
    content: bytes


class Piece(NamedTuple):
    """What training sees of a picture, in its pixels."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def piece(height: int, width: int, chance: random.Random) -> Piece:
    """A crop by the law of torchvision's RandomResizedCrop, mirrored with probability one half."""
    mirrored = chance.random() < 0.5
    for _ in range(10):
        area = height * width * chance.uniform(*AREA)
        ratio = math.exp(chance.uniform(*map(math.log, RATIO)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Piece(chance.randint(0, height - h), chance.randint(0, width - w), h, w, mirrored)
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))  # a very long picture: its middle
    return Piece((height - h) // 2, (width - w) // 2, h, w, mirrored)


def chance_of(seed: int, epoch: int, number: int) -> random.Random:
    return random.Random(f"{seed} {epoch} {number}")


def shorter_side(size: int) -> int:
    """What evaluation resizes the shorter side to, where nothing else is said: 256 where the crop is 224."""
    return round(size * 256 / 224)


def enlarged(height: int, width: int, short: int) -> tuple[int, int]:
    """Evaluation's height and width before the centre crop, of which the shorter one is `short`."""
    return (short, short * width // height) if height <= width else (short * height // width, short)


class FolderLoader(Loader):
    """Pictures decoded, cut and resized by torchvision on worker processes.

    Args:
        samples: (path or `Encoded`, label) of every picture, in a sequence that may read them when asked.
        size: height and width of what is yielded.
        resize: the shorter side before evaluation's centre crop; default: 256 where the crop is 224.
        skip_bad: a picture that does not decode is replaced by the next one instead of stopping the run.
    """

    def __init__(
        self,
        samples,
        size,
        classes,
        batch_size,
        train,
        seed,
        device,
        workers=0,
        skip_bad=False,
        resize=None,
        interpolation="bilinear",
        **share,
    ):
        super().__init__(len(samples), classes, batch_size, train, seed, device, **share)
        self.interpolation = interpolation
        self.size, self.resize = size, resize or shorter_side(size)
        self._plan = _Plan()
        self._loader = DataLoader(
            Pictures(samples, size, train, seed, skip_bad, self.resize, interpolation),
            batch_sampler=self._plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_stopping_to_the_run,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own, so that iterating leaves the run's random state alone
        )

    def _digest(self) -> str:
        return digest_of(self._loader.dataset.samples)

    def _batches(self, plan: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        self._plan.epoch, self._plan.batches = self.epoch if self.augments else None, plan
        try:
            for images, labels in self._loader:
                yield images.permute(0, 3, 1, 2), labels
        except ValueError as error:  # a worker's comes wrapped in its whole traceback
            raise ValueError(str(error).rstrip().splitlines()[-1].removeprefix("ValueError: ")) from None


def _leave_stopping_to_the_run(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal: one that decodes must not die before the run has saved itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def digest_of(samples) -> str:
    """A digest of the names of all pictures and of the sizes of an even choice of them, wherever their folder stands.

    Args:
        samples: as `FolderLoader` takes them; those that are no files have `names`, and the `file` that they are in.
    """
    digest = hashlib.sha256()
    if hasattr(samples, "names"):
        names, paths = samples.names, [str(samples.file)]
    else:
        paths = [path for path, _ in samples]
        names = (os.sep.join(path.split(os.sep)[-2:]) for path in paths)  # the class folder, and the picture
    for name in names:
        digest.update(f"{name}\n".encode(errors="surrogateescape"))
    for path in paths[:: -(-len(paths) // SIZED) or 1]:
        digest.update(f"{os.path.getsize(path)}\n".encode())
    return digest.hexdigest()


class _Plan:
    """A batch sampler that hands each picture's epoch along with its number; None: as evaluation sees it.

    It knows no loader: workers that are collected as part of a cycle are not told to stop, and cost five seconds each.
    """

    epoch: int | None = 0
    batches: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int | None, int]]]:
        for numbers in self.batches:
            yield [(self.epoch, number) for number in numbers.tolist()]


class Pictures(Dataset):
    """uint8 (size, size, 3) pictures and labels by (epoch, number)."""

    def __init__(
        self,
        samples: list[tuple[str, int]],
        size: int,
        train: bool,
        seed: int,
        skip_bad: bool,
        resize: int,
        mode: str = "bilinear",
    ):
        self.samples, self.size, self.train, self.seed, self.skip_bad = samples, size, train, seed, skip_bad
        self.resize, self.mode = resize, mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[Tensor, int]:
        epoch, number = key
        picture, (_, label) = readable(self.samples, number, self.skip_bad)
        if self.train and epoch is not None:
            *box, mirrored = piece(*picture.shape[1:], chance_of(self.seed, epoch, number))
            seen = resized(picture, *box, (self.size, self.size), self.mode)
            return (seen.flip(1) if mirrored else seen), label
        whole = resized(picture, 0, 0, *picture.shape[1:], enlarged(*picture.shape[1:], self.resize), self.mode)
        top, left = (round((extent - self.size) / 2) for extent in whole.shape[:2])
        return whole[top : top + self.size, left : left + self.size], label


def resized(
    picture: Tensor, top: int, left: int, height: int, width: int, size: tuple[int, int], mode: str = "bilinear"
) -> Tensor:
    """A box of a (3, H, W) picture as (*size, 3), as torchvision resizes it."""
    box = picture[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    seen = torch.nn.functional.interpolate(box, size, mode=mode, antialias=True)  # channels_last: twice as fast
    return seen[0].permute(1, 2, 0)


def readable(samples: list[tuple[str, int]], number: int, skip_bad: bool) -> tuple[Tensor, tuple[str, int]]:
    """The picture of that number and its sample; where bad ones are skipped, the next that decodes."""
    for attempt in range(SPARE if skip_bad else 1):
        sample = samples[(number + attempt) % len(samples)]
        try:
            return decode(sample[0]), sample
        except ValueError as error:
            problem = error
    raise problem


def decode(source: str | Encoded) -> Tensor:
    """The picture in a file as RGB, uint8 (3, H, W), wholly decoded.

    A transparent picture shows the colours that it stores, and 16 bits are rounded to 8, as DALI does both.

    Raises:
        ValueError: names the file: no picture, a damaged one, one that declares more pixels than PIL allows, or one
            whose pixels have no agreed black and white.
    """
    from PIL import Image, UnidentifiedImageError
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        content = bytearray(_content(source))
        with Image.open(io.BytesIO(content)) as picture:  # reads the header only, and checks the size that it declares
            width, height = picture.size
            if width * height > max(BLANK, 1000 * len(content)):  # no picture but an empty one is coded so tightly
                raise ValueError(f"declares {width}x{height} pixels in {len(content)} bytes")
            if picture.format == "PNG":
                _check_pixels_of_png(content)
            if picture.format in ("JPEG", "MPO"):
                with contextlib.suppress(RuntimeError):  # of a bad one; PIL says best what is wrong
                    return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
            return pil_to_tensor(_in_eight_bits(picture).convert("RGB"))
    except Exception as error:  # damaged pictures raise many types: OSError, SyntaxError, struct.error, EOFError, ...
        name = source if isinstance(source, str) else source.name
        known = not isinstance(error, UnidentifiedImageError)  # its text is about our buffer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0] if known else "of no known format"
        raise ValueError(f"{name}: not a picture that decodes ({reason})") from None


def _content(source: str | Encoded) -> bytes:
    if isinstance(source, Encoded):
        return source.content
    if not stat.S_ISREG(os.stat(source).st_mode):  # reading a pipe would wait for ever
        raise ValueError("not a regular file")
    with open(source, "rb") as file:
        return file.read()


def _check_pixels_of_png(content: bytes) -> None:
    """Hold the compressed pixels against their checksums, which PIL does not do. Raises ValueError for damaged ones."""
    at = 8  # behind the signature; then chunks: length, name, content, checksum
    while at + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if name == b"IDAT" and zlib.crc32(content[at + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError("its pixels do not agree with their checksum")
        at = end + 4


def _in_eight_bits(picture):
    """A PIL image of at most 8 bits a channel. PIL itself would cut 16 bits off at 255, so that all becomes white."""
    from PIL import Image

    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM"):
        if getattr(picture, "tag_v2", {}).get(TIFF_PHOTOMETRIC) == 0:
            raise ValueError("16 bits in which zero is white")
        return Image.fromarray(((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        kind = "integers" if picture.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are 32-bit {kind}, of which no rule says what is white; store 8 or 16 bits")
    return picture
