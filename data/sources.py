"""The data sets: each function reads one kind and returns its (train, val) loaders."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from torch import Tensor

from data.dali import DaliLoader
from data.folder import FolderLoader, decode
from data.loader import MEAN, STD, Loader, ResidentLoader
from data.records import Records
from data.trees import class_names, class_tree, numbered_classes, unread

CHECKED_UP_TO = 20_000  # pictures; larger sets are checked as they are read
TRAIN_FOLDERS, VAL_FOLDERS = ("train", "ILSVRC2012_img_train"), ("val", "test")
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm""".split()  # noqa: SIM905
Sample = tuple[str, int]  # a picture's path and label
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
    use_dali: bool = False
    say: Callable[[str], object] = print  # where notes for the user go
    rank: int = 0  # of every batch, this process takes picture `rank` of each `world`
    world: int = 1
    limit: int | None = None  # batches an epoch at most
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    resize: int | None = None  # the shorter side before evaluation's centre crop; default: 256 where the crop is 224
    interpolation: str = "bilinear"  # where pictures of folders are resized
    classes: Path | None = None  # a file of class names: their numbers, of which the folders may hold a part
    augment: bool = True  # else the training pictures, too, are seen as evaluation sees them

    def loader_arguments(self, train: bool) -> dict:
        """The arguments that every loader takes."""
        train = train and self.augment
        size = self.train_batch_size if train else self.eval_batch_size
        share = {"rank": self.rank, "world": self.world, "limit": self.limit, "mean": self.mean, "std": self.std}
        return {"batch_size": size, "train": train, "seed": self.seed, "device": self.device, **share}

    def folder_arguments(self) -> dict:
        """The further arguments of loaders that decode pictures as they are needed."""
        own = {"size": self.image_size, "resize": self.resize, "interpolation": self.interpolation}
        return own | {"workers": self.workers, "skip_bad": self.skip_bad}


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


def cifar(data_set: str, request: Request) -> Pair:
    """CIFAR-10 or -100 from torchvision's binary files or a `train/ test/` tree of class folders; pad 4, crop, flip."""
    _sided(request, 32, data_set)
    make = partial(ResidentLoader, classes=CIFAR[data_set], pad=4, flip=True)
    return tuple(
        make(*(_cifar_binary(data_set, request, train) or _stacked(samples, 32)), **request.loader_arguments(train))
        for train, samples in _cifar_samples(data_set, request).items()
    )


def _cifar_binary(data_set: str, request: Request, train: bool) -> tuple[Tensor, Tensor] | None:
    from torchvision import datasets

    binary = getattr(datasets, data_set.upper())
    if not (request.data_path / binary.base_folder).is_dir():
        return None
    try:
        files = binary(str(request.data_path), train=train)
    except (RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"--data_path {request.data_path}: {str(error).splitlines()[0]}") from None
    return torch.from_numpy(files.data), torch.tensor(files.targets)


def _cifar_samples(data_set: str, request: Request) -> dict[bool, list[Sample]]:
    from torchvision import datasets

    path, expected = _existing(request, data_set), CIFAR[data_set]
    if (path / getattr(datasets, data_set.upper()).base_folder).is_dir():
        return {True: [], False: []}
    trees = {True: class_tree(_part(path, ("train",))), False: class_tree(_part(path, ("test", "val")))}
    for classes, _ in trees.values():
        if classes != expected:
            found = ", ".join(classes[:10])
            raise ValueError(f"--data_path {path}: not the {len(expected)} class folders of {data_set} but {found}")
    return {train: samples for train, (_, samples) in trees.items()}


def tiny_imagenet(request: Request) -> Pair:
    """Tiny-ImageNet-200 as it is published (200 classes of 64x64 pictures), all of it in memory; pad 4, crop, flip."""
    _sided(request, 64, "tiny_imagenet")
    classes, parts = _tiny_imagenet_parts(request)
    return tuple(
        ResidentLoader(*_stacked(samples, 64), classes, pad=4, flip=True, **request.loader_arguments(train))
        for train, samples in parts.items()
    )


def _tiny_imagenet_parts(request: Request) -> tuple[list[str], dict[bool, list[Sample]]]:
    path = _existing(request, "tiny_imagenet")
    train, val = (_part(path, (name,)) for name in ("train", "val"))
    try:
        classes = sorted((path / "wnids.txt").read_text().split())
        notes = (val / "val_annotations.txt").read_text().splitlines()  # picture, class, box
    except OSError as error:
        raise ValueError(f"--data_path {path}: has no {Path(error.filename).relative_to(path)}") from None
    found, samples = class_tree(train)
    if found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise ValueError(f"--data_path {path}: train and wnids.txt have different classes ({', '.join(odd[:5])}, ...)")
    number = {name: label for label, name in enumerate(classes)}
    rows = [line.split("\t")[:2] for line in notes if line.strip()]
    odd = next((row for row in rows if len(row) < 2 or row[1] not in number), None)
    if odd:
        raise ValueError(f"{val / 'val_annotations.txt'}: {' '.join(odd)}: no class of wnids.txt")
    return classes, {True: samples, False: [(str(val / "images" / name), number[label]) for name, label in rows]}


def imagefolder(request: Request) -> Pair:
    """Any `train/ val/` (or `test/`) tree of class folders: random area 0.08 to 1 and flips, or the centre crop."""
    classes, parts = _imagefolder_parts(request)
    make = partial(DaliLoader if request.use_dali else FolderLoader, classes=classes, **request.folder_arguments())
    return tuple(
        make(_checked(samples, request), **request.loader_arguments(train)) for train, samples in parts.items()
    )


def _imagefolder_parts(request: Request) -> tuple[list[str], dict[bool, list[Sample]]]:
    path = _existing(request, "imagefolder")
    known = numbered_classes(request.classes) if request.classes else None
    classes, train = class_tree(_part(path, TRAIN_FOLDERS), known)
    val_classes, val = class_tree(_part(path, VAL_FOLDERS), known)
    if classes != val_classes:
        odd = sorted(set(classes) ^ set(val_classes))
        raise ValueError(f"--data_path {path}: train and val have different classes ({', '.join(odd[:5])}, ...)")
    return classes, {True: train, False: val}


def lmdb(request: Request) -> Pair:
    """`train.lmdb` and `val.lmdb`, seen as an imagefolder's pictures; a class a line in `classes.txt`, or 1000."""
    classes, parts = _lmdb_parts(request)
    make = partial(FolderLoader, classes=classes, **request.folder_arguments())
    return tuple(make(records, **request.loader_arguments(train)) for train, records in parts.items())


def _lmdb_parts(request: Request) -> tuple[list[str], dict[bool, Records]]:
    path = _existing(request, "lmdb")
    classes = class_names(path / "classes.txt") or [str(label) for label in range(1000)]
    files = {True: path / "train.lmdb", False: path / "val.lmdb"}
    for file in files.values():
        if not file.exists():
            raise ValueError(f"--data_path {path}: has no {file.name}")
    return classes, {train: Records(file, len(classes)) for train, file in files.items()}


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


CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
SOURCES = {
    "digits": digits,
    **{name: partial(cifar, name) for name in CIFAR},
    "tiny_imagenet": tiny_imagenet,
    "imagefolder": imagefolder,
    "lmdb": lmdb,
    "fake": fake,
}
SAMPLES = {  # of the data sets that are encoded pictures: the (train, val) samples
    **{name: partial(_cifar_samples, name) for name in CIFAR},
    "tiny_imagenet": lambda request: _tiny_imagenet_parts(request)[1],
    "imagefolder": lambda request: _imagefolder_parts(request)[1],
    "lmdb": lambda request: _lmdb_parts(request)[1],
}
UNREAD = {  # pictures that are in a data set's folders, but not read
    "imagefolder": lambda r: [f for part in (TRAIN_FOLDERS, VAL_FOLDERS) for f in unread(_part(r.data_path, part))],
}


def _sided(request: Request, side: int, data_set: str) -> None:
    if request.image_size != side:
        raise ValueError(
            f"--image_size {request.image_size}: the pictures of {data_set} are used as they are, {side}x{side}"
        )


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


def _stacked(samples: list[Sample], side: int) -> tuple[Tensor, Tensor]:
    """uint8 images (n, side, side, 3) and labels (n,)."""
    images = torch.empty(len(samples), side, side, 3, dtype=torch.uint8)
    with ThreadPool() as pool:
        for index, picture in enumerate(pool.imap(_decoded, samples, chunksize=64)):
            if picture.shape != (3, side, side):
                raise ValueError(f"{samples[index][0]}: a picture of this data set is {side}x{side}")
            images[index] = picture.permute(1, 2, 0)
    return images, torch.tensor([label for _, label in samples])


def _decoded(sample: Sample) -> Tensor:
    return decode(sample[0])


def _checked(samples: list[Sample], request: Request) -> list[Sample]:
    """The samples that decode. A bad one is named; it stops the run unless `skip_bad`."""
    if len(samples) > CHECKED_UP_TO:
        return samples
    problems = list(decode_all(samples))
    bad = [problem for problem in problems if problem]
    if bad and not request.skip_bad:
        raise ValueError(f"{bad[0]}; {len(bad)} in all; --bad_pictures skip leaves them out")
    for problem in bad:
        request.say(f"left out: {problem}")
    return [sample for sample, problem in zip(samples, problems, strict=True) if not problem]


def decode_all(samples: Sequence[Sample]) -> Iterator[str | None]:
    """What is wrong with each picture, in order, as the processor's cores get to it."""
    with ThreadPool() as pool:
        yield from pool.imap(partial(_problem, samples), range(len(samples)), chunksize=64)


def _problem(samples: Sequence[Sample], number: int) -> str | None:
    try:
        decode(samples[number][0])
    except ValueError as error:
        return str(error)
