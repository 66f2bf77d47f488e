"""One face for every source of batches: it knows its length, reshuffles itself, saves and restores its position.

What a batch holds depends on (seed, epoch, picture) alone: not on how many workers decode it, nor on whether the run
was interrupted. So the position in the epoch is all the state there is.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in RGB


class Loader:
    """Iterating yields what is left of the current epoch as (images, labels); training then moves on to the next.

    images: float32 (B, 3, H, W), normalised, channels_last, on `device`; labels: int64 (B,) there too.
    Training batches are shuffled and of one size (the ragged last one is dropped); evaluation sees every picture once.

    Args:
        rank, world: of every batch, this process takes picture `rank` of each `world`.
        limit: batches an epoch at most.
        mean, std: what is subtracted from the channels of pictures (0 to 1), and what they are divided by.

    Raises:
        ValueError: a training batch has fewer pictures than there are processes, or there is no picture at all.

    Attributes:
        classes: class names; a label is an index into them.
        size: height and width of what is yielded.
        resize: evaluation resizes the shorter side to this before it cuts the centre out.
        interpolation: between pixels, where pictures are resized: "bilinear" or "bicubic".
        epoch, batch: the position, in batches already yielded.
    """

    size: int
    resize: int
    interpolation = "bilinear"

    def __init__(
        self,
        count: int,
        classes: list[str],
        batch_size: int,
        train: bool,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ):
        self.count, self.classes, self.train, self.seed, self.device = count, classes, train, seed, device
        self.rank, self.world, self.limit = rank, world, limit
        self.batch_size = min(batch_size, count)
        if not count:
            raise ValueError(f"no picture to {'train' if train else 'validate'} on")
        if train and self.batch_size < world:
            raise ValueError(f"{self.batch_size} pictures in a training batch: too few for {world} processes")
        if train:
            self.batch_size -= self.batch_size % world  # all processes have equally many, of few pictures, too
        self.epoch = self.batch = 0
        self.augments = train  # whether pictures are cut and mirrored at random
        self.mean, self.std = list(mean), list(std)
        self._mean = torch.tensor(mean, device=device) * 255
        self._std = torch.tensor(std, device=device) * 255

    def __len__(self) -> int:
        """Batches an epoch."""
        batches = self.count // self.batch_size if self.train else -(-self.count // self.batch_size)
        return batches if self.limit is None else min(batches, self.limit)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self._order().split(self.batch_size)[self.batch : len(self)]
        shares = [numbers[self.rank :: self.world] for numbers in plan]
        for batch in self._on_device([numbers for numbers in shares if len(numbers)]):
            self.batch += self.train  # evaluation has no position: it always starts at the first picture
            yield batch
        self.epoch, self.batch = self.epoch + self.train, 0

    def left_over(self, batches: int = 1) -> int:
        """How many pictures an epoch leaves out, as no whole step of `batches` batches is left for them.

        Raises:
            ValueError: an epoch has fewer batches than that.
        """
        steps = len(self) // batches
        if not steps:
            raise ValueError(
                f"{self.count} pictures make {len(self)} batches of {self.batch_size}, but a step of training takes "
                f"{batches}: lower --train_batch_size or --accumulate"
            )
        return self.count - steps * batches * self.batch_size if self.limit is None else 0

    def first(self, pictures: int, augmented: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """The first batches of the first epoch, `pictures` in all: whole ones, and so the same in every process.

        The position stays as it is. Not while another iteration is under way: they share the workers.

        Args:
            augmented: as training sees them; else as evaluation does.
        """
        position, self.epoch = self.epoch, 0
        self.augments = self.train and augmented
        try:
            yield from self._on_device(self._order()[:pictures].split(self.batch_size))
        finally:
            self.epoch, self.augments = position, self.train

    def spread(self, pictures: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of `pictures` pictures, at even distances in the order in which they are stored: of all classes."""
        numbers = torch.linspace(0, self.count - 1, min(pictures, self.count)).round().long()
        yield from self._on_device(numbers.split(self.batch_size))

    def preparation(self) -> dict[str, object]:
        """What evaluation does to a picture, and the names of the classes: what travels with an exported network."""
        facts = {"size": self.size, "resize": self.resize, "interpolation": self.interpolation, "crop": "center"}
        return facts | {"mean": self.mean, "std": self.std, "classes": self.classes}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]

    def generator(self) -> torch.Generator:
        """Of this epoch's chances: the same whenever the epoch is entered."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

    def identity(self) -> dict[str, object]:
        """What tells these pictures from others: how many there are, and a digest."""
        return {"pictures": self.count, "digest": self._digest()}

    def _digest(self) -> str:
        """Of the names and sizes of files, or of the pictures themselves where they are in memory."""
        raise NotImplementedError

    def _order(self) -> Tensor:
        return torch.randperm(self.count, generator=self.generator()) if self.train else torch.arange(self.count)

    def _batches(self, plan: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images (B, 3, H, W) and labels for each tensor of picture numbers in `plan`, as `_order` gives them."""
        raise NotImplementedError

    def _on_device(self, plan: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self._batches(plan):
            yield self._normalise(images), labels.to(self.device, non_blocking=True)

    def _normalise(self, images: Tensor) -> Tensor:
        rows = images.permute(0, 2, 3, 1).flatten(2)  # (B, H, W*3): arithmetic is slow on rows of three
        mean, std = (value.repeat(images.shape[3]) for value in (self._mean, self._std))
        if self.device.type == "cpu":  # in one thread: torch's would wait for cores that decode the next pictures
            values = np.subtract(rows.numpy(), mean.numpy())
            rows = torch.from_numpy(np.divide(values, std.numpy(), out=values))
        else:
            rows = rows.to(self.device, non_blocking=True).float().sub_(mean).div_(std)
        return rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


class ResidentLoader(Loader):
    """All pictures in the device's memory; shifted crops and flips are index arithmetic on whole batches.

    Args:
        images: uint8 (n, H, W, 3).
        labels: int64 (n,).
        pad: training pictures are padded by this many black pixels and cropped back at random.
        flip: training pictures are mirrored with probability one half.
        share: rank, world, limit, mean and std of a `Loader`.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes, batch_size, train, seed, device, pad=0, flip=False, **share
    ):
        super().__init__(len(images), classes, batch_size, train, seed, device, **share)
        self.pad, self.flip = (pad, flip) if train else (0, False)
        self.size = self.resize = images.shape[1]  # pictures are used as they are
        self.images = torch.nn.functional.pad(images, (0, 0, *[self.pad] * 4)).to(device)
        self.labels = labels.to(device)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.labels, self.images):
            digest.update(tensor.cpu().numpy().data)
        return digest.hexdigest()

    def _order(self) -> Tensor:
        return super()._order().to(self.device)

    def _batches(self, plan: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        generator = self.generator()  # the chances go to the device once an epoch: a copy a batch would make it wait
        corner = torch.randint(2 * self.pad + 1, (self.count, 2), generator=generator).to(self.device)
        mirrored = (torch.rand(self.count, generator=generator) < 0.5 * self.flip).to(self.device)
        if not self.augments:
            corner, mirrored = torch.full_like(corner, self.pad), torch.zeros_like(mirrored)
        line = torch.arange(self.size, device=self.device)
        for numbers in plan:
            rows, columns = corner[numbers].T[:, :, None] + line  # (B, size) each
            columns = torch.where(mirrored[numbers, None], columns.flip(1), columns)
            images = self.images[numbers[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, size, size, 3)
            yield images.permute(0, 3, 1, 2), self.labels[numbers]
