"""One face for every source of batches: it knows its length, reshuffles itself, saves and restores its position.

What a batch holds depends on (seed, epoch, picture) alone: not on how many workers decode it, nor on whether the run
was interrupted. So the position in the epoch is all the state there is.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in RGB


class Loader:
    """Iterating yields what is left of the current epoch as (images, labels); training then moves on to the next.

    images: float32 (B, 3, H, W), normalised, channels_last, on `device`; labels: int64 (B,) there too.
    Training batches are shuffled and of one size (the ragged last one is dropped); evaluation sees every picture once.

    Attributes:
        classes: class names; a label is an index into them.
        epoch, batch: the position, in batches already yielded.
    """

    def __init__(self, count: int, classes: list[str], batch_size: int, train: bool, seed: int, device: torch.device):
        self.count, self.classes, self.train, self.seed, self.device = count, classes, train, seed, device
        self.batch_size = min(batch_size, count)
        self.epoch = self.batch = 0
        self._mean = torch.tensor(MEAN, device=device).view(3, 1, 1) * 255
        self._std = torch.tensor(STD, device=device).view(3, 1, 1) * 255

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.count // self.batch_size if self.train else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self._order().split(self.batch_size)[self.batch : len(self)]
        for images, labels in self._batches(plan):
            self.batch += self.train  # evaluation has no position: it always starts at the first picture
            yield self._normalise(images), labels.to(self.device, non_blocking=True)
        self.epoch, self.batch = self.epoch + self.train, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]

    def generator(self) -> torch.Generator:
        """Of this epoch's chances: the same whenever the epoch is entered."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

    def _order(self) -> Tensor:
        return torch.randperm(self.count, generator=self.generator()) if self.train else torch.arange(self.count)

    def _batches(self, plan: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images (B, 3, H, W) and labels for each tensor of picture numbers in `plan`."""
        raise NotImplementedError

    def _normalise(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
        return images.sub_(self._mean).div_(self._std)


class ResidentLoader(Loader):
    """All pictures in the device's memory; shifted crops and flips are index arithmetic on whole batches.

    Args:
        images: uint8 (n, H, W, 3).
        labels: int64 (n,).
        pad: training pictures are padded by this many black pixels and cropped back at random.
        flip: training pictures are mirrored with probability one half.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes, batch_size, train, seed, device, pad=0, flip=False):
        super().__init__(len(images), classes, batch_size, train, seed, device)
        self.pad, self.flip = (pad, flip) if train else (0, False)
        self.size = images.shape[1]
        self.images = torch.nn.functional.pad(images, (0, 0, *[self.pad] * 4)).to(device)
        self.labels = labels.to(device)

    def _batches(self, plan: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        generator = self.generator()
        corner = torch.randint(2 * self.pad + 1, (self.count, 2), generator=generator)
        mirrored = torch.rand(self.count, generator=generator) < 0.5 * self.flip
        line = torch.arange(self.size)
        for numbers in plan:
            rows, columns = (corner[numbers, axis, None] + line for axis in (0, 1))  # (B, size) each
            columns = torch.where(mirrored[numbers, None], columns.flip(1), columns)
            index = (numbers[:, None, None], rows[:, :, None], columns[:, None, :])
            images = self.images[tuple(i.to(self.device) for i in index)]  # (B, size, size, 3)
            yield images.permute(0, 3, 1, 2), self.labels[numbers.to(self.device)]


class FolderLoader(Loader):
    """Pictures decoded and augmented by worker processes.

    Args:
        samples: (path, label) of every picture.
        transform: PIL picture -> uint8 tensor (3, H, W); draws from torch's global generator.
        skip_bad: a picture that does not decode is replaced by the next one instead of stopping the run.
    """

    def __init__(self, samples, transform, classes, batch_size, train, seed, device, workers=0, skip_bad=False):
        super().__init__(len(samples), classes, batch_size, train, seed, device)
        self.pictures = Pictures(samples, transform, seed, skip_bad)
        self._plan: list[Tensor] = []
        self._loader = DataLoader(
            self.pictures,
            batch_sampler=_Plan(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own, so that iterating leaves the run's random state alone
        )

    def _batches(self, plan: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        self._plan = plan
        try:
            yield from self._loader
        except ValueError as error:  # a worker's comes wrapped in its whole traceback
            raise ValueError(str(error).rstrip().splitlines()[-1].removeprefix("ValueError: ")) from None


class _Plan:
    """The batch sampler of a `FolderLoader`: hands the epoch along with each picture's number."""

    def __init__(self, loader: FolderLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader._plan)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for numbers in self.loader._plan:
            yield [(self.loader.epoch, number) for number in numbers.tolist()]


class Pictures(Dataset):
    """Decoded pictures by (epoch, number); what chance does to one depends on the seed and these two alone."""

    def __init__(self, samples: list[tuple[str, int]], transform, seed: int, skip_bad: bool):
        self.samples, self.transform, self.seed, self.skip_bad = samples, transform, seed, skip_bad

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, number = key
        for attempt in range(20 if self.skip_bad else 1):
            path, label = self.samples[(number + attempt) % len(self)]
            try:
                picture = decode(path)
                break
            except ValueError as error:
                problem = error
        else:
            raise problem
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epoch, number)))
            return self.transform(picture), label


def decode(path: str | Path):
    """The RGB picture in a file, wholly decoded. Raises ValueError that names the file."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture that decodes ({str(error).splitlines()[0]})") from None
