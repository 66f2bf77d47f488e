"""What a checkpoint says about itself, held against what it is used on."""

import dataclasses
from pathlib import Path

import models
import pruning.options
from jobs.pictures import preparation
from models import libraries
from utils.options import PUBLISHED, Options


def complete(options: Options) -> Options:
    """The options, where those that were not given come from the checkpoint that is evaluated or started from.

    Both say which network they hold. An evaluated one also says its picture size, the length of its blocks, and the
    method, with its options, that can make a dense network of it. Files of others say nothing that is taken.

    Raises:
        ValueError: the file cannot be read.
    """
    path = options.evaluate or options.pretrained_model
    path = None if path == PUBLISHED else path
    said = models.read_checkpoint(path) if path else {}
    if "classes" not in said:
        return options
    try:
        found = _network(options, path, said)
        if options.evaluate:
            found |= {"image_size": said["image_size"]} | _of_method(options, said["options"])
            found |= {name: said["options"].get(name) for name in ("mean", "std", "interpolation", "crop")}
            if "N" not in options.given:
                lengths = [layer.get("N", 1) for layer in said.get("kept", {}).values()]
                lengths = lengths or [said["options"].get("N") or options.evaluation.N]
                found["evaluation"] = dataclasses.replace(options.evaluation, N=max(lengths))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: what it says about itself is damaged ({error!r})") from None
    return dataclasses.replace(options, **{k: value for k, value in found.items() if k not in options.given})


def _network(options: Options, path: Path, said: dict) -> dict[str, object]:
    """The network that the file holds, and the arguments that make it, unless another one is asked for.

    Raises:
        ValueError: it is made by code of the user's own, which a file alone does not make us run.
    """
    arch = said["arch"]
    if "arch" not in options.given:
        if libraries.of_function(arch):
            raise ValueError(f"{path}: its network is made by code: --arch {arch} allows to run it")
        if not models.rebuildable(arch):
            return {}
    elif models.known(options.arch) != arch:
        return {}
    words = [f"{name}={value!r}" for name, value in said.get("arch_options", {}).items()]
    return {"arch": arch} | ({"arch_options": words} if words else {})


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
    check_normalisation(path, said, options)


def check_normalisation(path: Path, said: dict, options: Options) -> None:
    """Raise ValueError if the checkpoint was trained on pictures that were normalised in another way."""
    for name, ours in normalisation(options).items():
        if said.get(name, ours) != ours:
            raise ValueError(f"{path} was trained on pictures normalised by {name} {said[name]}, not {ours}")


def normalisation(options: Options) -> dict[str, list[float]]:
    """What is subtracted from the channels of pictures (0 to 1) and what they are divided by."""
    prepared = preparation(options)
    return {"mean": prepared["mean"], "std": prepared["std"]}
