"""The data sets: each function reads one kind and returns its (train, val) loaders."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.loader import FolderLoader, Loader, ResidentLoader, decode

CHECKED_UP_TO = 20_000  # pictures; larger sets are checked as they are read
TRAIN_FOLDERS, VAL_FOLDERS = ("train", "ILSVRC2012_img_train"), ("val", "test")
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
Pair = tuple[Loader, Loader]


@dataclass(frozen=True)
class Request:
    """What a run asks of its data."""

    data_path: Path | None
    image_size: int
    train_batch_size: int
    eval_batch_size: int
    seed: int
    device: torch.device
    workers: int
    skip_bad: bool
    say: object = print  # where notes for the user go

    def loader_arguments(self, train: bool) -> dict:
        size = self.train_batch_size if train else self.eval_batch_size
        return {"batch_size": size, "train": train, "seed": self.seed, "device": self.device}


def digits(request: Request) -> Pair:
    """scikit-learn's 1,797 handwritten digits (8x8, grey), enlarged to RGB; every fifth of a class is held out."""
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    labels = torch.from_numpy(labels).long()
    images = torch.from_numpy(grey).float().view(-1, 1, 8, 8) * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=(request.image_size,) * 2, mode="bilinear").round().byte()
    images = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)  # (n, S, S, 3)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        held_out[(labels == label).nonzero().flatten()[::5]] = True
    make = partial(ResidentLoader, classes=[str(digit) for digit in range(10)], pad=request.image_size // 16)
    return (
        make(images[~held_out], labels[~held_out], **request.loader_arguments(train=True)),
        make(images[held_out], labels[held_out], **request.loader_arguments(train=False)),
    )


def cifar10(request: Request) -> Pair:
    """CIFAR-10 from torchvision's binary files or a `train/ test/` tree of its ten class folders; pad 4, crop, flip."""
    make = partial(ResidentLoader, classes=CIFAR10, pad=4, flip=True)
    return tuple(
        make(*_cifar10_part(_existing(request, "cifar10"), train), **request.loader_arguments(train))
        for train in (True, False)
    )


def _cifar10_part(path: Path, train: bool) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 32, 32, 3) and labels (n,)."""
    if (path / "cifar-10-batches-py").is_dir():
        from torchvision.datasets import CIFAR10 as Binary

        try:
            files = Binary(str(path), train=train)
        except (RuntimeError, OSError, KeyError) as error:
            raise ValueError(f"--data_path {path}: {str(error).splitlines()[0]}") from None
        return torch.from_numpy(files.data), torch.tensor(files.targets)
    classes, samples = _class_tree(_part(path, ("train",) if train else ("test", "val")))
    if classes != CIFAR10:
        raise ValueError(f"--data_path {path}: not the ten class folders of CIFAR-10 but {', '.join(classes[:10])}")
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(lambda sample: np.asarray(decode(sample[0])), samples))
    odd = next((s[0] for s, p in zip(samples, pictures, strict=True) if p.shape != (32, 32, 3)), None)
    if odd:
        raise ValueError(f"{odd}: a CIFAR-10 picture is 32x32")
    return torch.from_numpy(np.stack(pictures)), torch.tensor([label for _, label in samples])


def imagefolder(request: Request) -> Pair:
    """Any `train/ val/` (or `test/`) tree of class folders: random area 0.08 to 1 and flips, or the centre crop."""
    from torchvision.transforms import v2

    path, size = _existing(request, "imagefolder"), request.image_size
    enlarged = round(size * 256 / 224)
    transforms = {
        True: [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()],
        False: [v2.Resize(enlarged, antialias=True), v2.CenterCrop(size), v2.PILToTensor()],
    }
    parts = {True: _class_tree(_part(path, TRAIN_FOLDERS)), False: _class_tree(_part(path, VAL_FOLDERS))}
    (classes, _), (val_classes, _) = parts.values()
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))
        raise ValueError(f"--data_path {path}: train and val have different classes ({', '.join(odd[:5])}, ...)")
    return tuple(
        FolderLoader(
            _checked(samples, request),
            v2.Compose(transforms[train]),
            classes,
            workers=request.workers,
            skip_bad=request.skip_bad,
            **request.loader_arguments(train),
        )
        for train, (_, samples) in parts.items()
    )


def fake(request: Request) -> Pair:
    """Noise of 1000 classes, the same for a seed: for checks of everything but accuracy."""
    classes = [f"class {number}" for number in range(1000)]
    generator = torch.Generator().manual_seed(request.seed)
    return tuple(
        ResidentLoader(
            torch.randint(256, (count, request.image_size, request.image_size, 3), generator=generator).byte(),
            torch.randint(1000, (count,), generator=generator),
            classes,
            flip=True,
            **request.loader_arguments(train),
        )
        for train, count in ((True, 256), (False, 128))
    )


SOURCES = {"digits": digits, "cifar10": cifar10, "imagefolder": imagefolder, "fake": fake}
DEFAULT_SIZE = {"digits": 64, "cifar10": 32, "imagefolder": 224, "fake": 224}


def _existing(request: Request, name: str) -> Path:
    if request.data_path is None:
        raise ValueError(f"--data_set {name} needs --data_path")
    if not request.data_path.is_dir():
        raise ValueError(f"--data_path {request.data_path}: no such folder")
    return request.data_path


def _part(path: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (path / name).is_dir():
            return path / name
    raise ValueError(f"--data_path {path}: has no folder {' or '.join(names)}")


def _class_tree(path: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names and (picture, label) pairs of a folder of class folders."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, numbers = find_classes(str(path))
        return classes, make_dataset(str(path), numbers, IMG_EXTENSIONS)
    except FileNotFoundError as error:  # no class folders, or one without a picture
        raise ValueError(f"--data_path {path}: {str(error).splitlines()[0]}") from None


def _checked(samples: list[tuple[str, int]], request: Request) -> list[tuple[str, int]]:
    """The samples that decode. A bad one is named; it stops the run unless `skip_bad`."""
    if len(samples) > CHECKED_UP_TO:
        return samples
    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(_problem, samples))
    bad = [problem for problem in problems if problem]
    if bad and not request.skip_bad:
        raise ValueError(f"{bad[0]}; {len(bad)} in all; --bad_pictures skip leaves them out")
    for problem in bad:
        request.say(f"left out: {problem}")
    return [sample for sample, problem in zip(samples, problems, strict=True) if not problem]


def _problem(sample: tuple[str, int]) -> str | None:
    try:
        decode(sample[0])
    except ValueError as error:
        return str(error)
