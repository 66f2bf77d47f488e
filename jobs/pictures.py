"""The pictures of a run: how they are prepared, its loaders, or only whether all pictures decode."""

import torch
from rich.console import Console

import data
from models import libraries
from utils.options import Options
from utils.ranks import Ranks


def image_size(options: Options) -> int:
    """Pixels a side: what was asked for, or what the data set has."""
    return options.image_size or data.known(options.data_set).size


def preparation(options: Options) -> dict[str, object]:
    """How pictures are prepared: `mean`, `std`, `interpolation` and `resize`, evaluation's shorter side.

    Each is what was asked for, or else what the network's library says, or else as for ImageNet.
    """
    prepared = {"mean": list(data.MEAN), "std": list(data.STD), "interpolation": "bilinear", "crop": 224 / 256}
    asked = {name: getattr(options, name) for name in prepared if getattr(options, name) is not None}
    said = {} if asked.keys() == prepared.keys() else libraries.preprocessing(options.arch)
    if said.get("interpolation") not in (None, "bilinear", "bicubic"):  # timm has "random" for a few
        del said["interpolation"]
    prepared |= said | asked
    return prepared | {"resize": round(image_size(options) / prepared.pop("crop"))}


def create_loaders(
    options: Options, device: torch.device, here: Ranks, screen: Console
) -> tuple[data.Loader, data.Loader]:
    """The training and the validation pictures, of which this process sees its share.

    Raises:
        ValueError: batches do not divide among the processes, or what is wrong with the data.
    """
    if options.train_batch_size % here.world:
        raise ValueError(f"--train_batch_size {options.train_batch_size}: must divide among {here.world} processes")
    share = {"rank": here.rank, "world": here.world, "limit": 6 if options.debug else None}
    train, val = data.create_loaders(**_request(options, device, screen), **share)
    if val.batch_size < here.world:
        raise ValueError(
            f"--eval_batch_size {options.eval_batch_size}: {here.world} processes share every batch, and the largest "
            f"of {val.count} pictures has {val.batch_size}"
        )
    return train, val


def check_steps(options: Options, train: data.Loader, batches_per_step: int, screen: Console) -> None:
    """Say how many pictures every epoch leaves out.

    Raises:
        ValueError: an epoch has fewer batches than a training step takes.
    """
    if not options.num_epochs:
        return
    left_over = train.left_over(batches_per_step)
    if train.batch_size < options.train_batch_size:
        screen.print(
            f"--train_batch_size {options.train_batch_size}: of {train.count} pictures it is {train.batch_size}"
        )
    if left_over:
        screen.print(
            f"every epoch leaves out {left_over} of {train.count} training pictures, others each time: a step takes "
            f"{batches_per_step * train.batch_size}"
        )


def check(options: Options, device: torch.device, screen: Console) -> None:
    """List the pictures that do not decode; status 1 if there are any."""
    problems = data.check(**_request(options, device, screen))
    for problem in problems:
        screen.print(problem)
    screen.print(f"{len(problems)} pictures do not decode")
    if problems:
        raise SystemExit(1)


def _request(options: Options, device: torch.device, screen: Console) -> dict:
    return {
        "data_set": options.data_set,
        "data_path": options.data_path,
        "image_size": image_size(options),
        "train_batch_size": options.train_batch_size,
        "eval_batch_size": options.eval_batch_size,
        "seed": options.seed,
        "device": device,
        "workers": options.workers,
        "skip_bad": options.bad_pictures == "skip",
        "use_dali": options.use_dali,
        "say": screen.print,
        **preparation(options),
        "classes": options.classes,
    }
