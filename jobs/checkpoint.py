"""What a checkpoint says about itself, held against what it is used on."""

import dataclasses
from pathlib import Path

import data
import models
import pruning.options
from utils.options import Options


def complete(options: Options) -> Options:
    """The options, where those that were not given come from the checkpoint that is evaluated or started from.

    Both say which network they hold. An evaluated one also says its picture size, the length of its blocks, and the
    method, with its options, that can make a dense network of it. Files of others say nothing that is taken.

    Raises:
        ValueError: the file cannot be read.
    """
    path = options.evaluate or options.pretrained_model
    said = models.read_checkpoint(path) if path else {}
    if "classes" not in said:
        return options
    try:
        found = {"arch": said["arch"]} if said["arch"] in models.NETWORKS else {}
        if options.evaluate:
            found |= {"image_size": said["image_size"]} | _of_method(options, said["options"])
            if "N" not in options.given:
                lengths = [layer.get("N", 1) for layer in said.get("kept", {}).values()]
                lengths = lengths or [said["options"].get("N") or options.evaluation.N]
                found["evaluation"] = dataclasses.replace(options.evaluation, N=max(lengths))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: what it says about itself is damaged ({error!r})") from None
    return dataclasses.replace(options, **{k: value for k, value in found.items() if k not in options.given})


def _of_method(options: Options, before: dict) -> dict[str, object]:
    """The method that the file was made with, and its options, over which those on the command line win."""
    name = options.conv_type if "conv_type" in options.given else before.get("conv_type")
    if name != before.get("conv_type") or name not in pruning.METHODS | pruning.ALIASES:
        return {}
    cls, given = pruning.options.row(name).options, vars(options.own)
    names = {field.name for field in dataclasses.fields(cls)}
    own = {key: value for key, value in before.items() if key in names and key not in options.given}
    return {"conv_type": name, "own": cls(**own | {key: given[key] for key in names & options.given if key in given})}


def check_pictures(path: Path, options: Options) -> None:
    """Raise ValueError if the checkpoint to evaluate was trained on pictures of another size or normalisation."""
    said = models.read_checkpoint(path)
    size = said.get("image_size") if "classes" in said else None
    if size and options.image_size and size != options.image_size:
        raise ValueError(f"--image_size {options.image_size}: {path} was trained on pictures of {size}x{size}")
    check_normalisation(path, said)


def check_normalisation(path: Path, said: dict) -> None:
    """Raise ValueError if the checkpoint was trained on pictures that were normalised in another way."""
    for name, ours in normalisation().items():
        if said.get(name, ours) != ours:
            raise ValueError(f"{path} was trained on pictures normalised by {name} {said[name]}, not {ours}")


def normalisation() -> dict[str, list[float]]:
    """What is subtracted from the channels of pictures (0 to 1) and what they are divided by."""
    return {"mean": list(data.MEAN), "std": list(data.STD)}
