"""Folders of pictures through NVIDIA DALI: its threads decode and resize on the CPU, or the GPU does."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from data.folder import chance_of, digest_of, enlarged, piece, readable, shorter_side
from data.loader import Loader

AHEAD = 2  # batches under way while one is used
DEEP_FORMATS = (".tif", ".tiff", ".ppm", ".pgm")  # DALI misreads those whose pixels PIL opens as 32-bit numbers


class DaliLoader(Loader):
    """The same pictures, crops and flips as a `FolderLoader`; the arguments are its own."""

    def __init__(
        self, samples, size, classes, batch_size, train, seed, device, workers=0, skip_bad=False, resize=None,
        interpolation="bilinear", **share
    ):  # fmt: skip
        super().__init__(len(samples), classes, batch_size, train, seed, device, **share)
        try:
            import nvidia.dali.experimental.dynamic as dali
        except ImportError:
            raise ValueError("--use_dali needs DALI: pip install nvidia-dali-cuda130") from None
        for path, _ in samples:
            if path.lower().endswith(DEEP_FORMATS) and _mode(path) in ("I", "F"):
                raise ValueError(f"--use_dali: {path}: DALI misreads pixels of PIL's mode {_mode(path)}")
        dali.set_num_threads(max(workers, 1))
        self.samples, self.skip_bad, self._dali = list(samples), skip_bad, dali
        self.size, self.resize = size, resize or shorter_side(size)
        self._device = "cpu" if device.type == "cpu" else f"gpu:{device.index or 0}"

    def _digest(self) -> str:
        return digest_of(self.samples)

    def _batches(self, plan: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(1, initializer=self._enter) as background:
            started = deque()
            for numbers in plan:
                started.append(background.submit(self._batch, numbers.tolist()))
                if len(started) > AHEAD:
                    yield started.popleft().result()
            while started:
                yield started.popleft().result()

    def _enter(self) -> None:
        """Called in the background thread: every thread begins on GPU 0, and DALI works on the thread's GPU."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _batch(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """DALI gives up a whole batch for one bad picture: find it, then try again."""
        while True:
            try:
                images = self._dali.as_tensor(self._cut(numbers)).torch().permute(0, 3, 1, 2)
                labels = torch.tensor([self.samples[number][1] for number in numbers])
                return images, labels.pin_memory() if self.device.type == "cuda" else labels
            except RuntimeError as error:
                before = [self.samples[number] for number in numbers]
                for number in numbers:
                    self.samples[number] = readable(self.samples, number, self.skip_bad)[1]
                if before == [self.samples[number] for number in numbers]:
                    raise ValueError(f"--use_dali: {self._culprit(numbers)}: DALI says {_cause(error)}") from None

    def _culprit(self, numbers: list[int]) -> str:
        """The path of the first picture that DALI cannot read alone."""
        for number in numbers:
            try:
                self._dali.as_tensor(self._cut([number])).torch()
            except RuntimeError:
                return self.samples[number][0]
        return "a batch"

    def _cut(self, numbers: list[int]):
        """DALI's batch of (size, size, 3) pictures."""
        from PIL import Image

        dali = self._dali
        paths = [torch.frombuffer(bytearray(self.samples[number][0].encode()), dtype=torch.uint8) for number in numbers]
        files = dali.io.file.read(dali.as_batch(paths))
        shapes = dali.as_tensor(dali.peek_image_shape(files, adjust_orientation=False)).torch().tolist()
        if any(height * width > 2 * Image.MAX_IMAGE_PIXELS for height, width, _ in shapes):
            raise RuntimeError("a picture declares too many pixels")
        how = {"device": self._device, "adjust_orientation": False}
        if self.augments:
            pieces = [
                piece(height, width, chance_of(self.seed, self.epoch, number))
                for number, (height, width, _) in zip(numbers, shapes, strict=True)
            ]
            corner, extent = (dali.as_batch(torch.tensor([p[i : i + 2] for p in pieces]).int()) for i in (0, 2))
            images = dali.decoders.image_slice(files, start=corner, shape=extent, axis_names="HW", **how)
            images = dali.resize(images, size=[self.size, self.size])
            return dali.flip(images, horizontal=dali.as_batch(torch.tensor([p.mirrored for p in pieces]).int()))
        images = dali.decoders.image(files, **how)
        sizes = [enlarged(height, width, self.resize) for height, width, _ in shapes]
        images = dali.resize(images, size=dali.as_batch(torch.tensor(sizes).float()))
        corner = (torch.tensor(sizes) - self.size).div(2).round().int()  # to even, as torchvision's CenterCrop
        return dali.slice(images, start=dali.as_batch(corner), shape=[self.size, self.size], axis_names="HW")


def _mode(path: str) -> str:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.mode
    except Exception:  # no picture: that is said when it is its turn
        return ""


def _cause(error: BaseException) -> str:
    while error.__cause__:
        error = error.__cause__
    return str(error).strip().splitlines()[0]
