"""Files of networks: the one place that knows what others call their tensors, and how they store a network.

A format is a module with two functions and a row in `FORMATS`:

- `recognise(content, network) -> bool`: whether a file with this content has this format;
- `read(content, network) -> Content`: the same content as our own file would hold it.

The first row that recognises a file reads it. Then `own.read` folds what pruning methods store beside the weights, and
`fitting` fills the network: what no rule covers is an error that lists the tensors that do not fit.
"""

import os
import warnings
from dataclasses import replace
from pathlib import Path

from torch import nn

from models import libraries
from models.formats import bip, own, resrep, stripe, torchvision
from models.formats.content import unpack
from models.formats.fitting import fill, with_fresh_classifier
from models.formats.own import describe, save_checkpoint
from models.formats.reading import read_checkpoint
from structure import plainify
from utils.options import PUBLISHED

__all__ = ["FORMATS", "describe", "load_checkpoint", "read_checkpoint", "save_checkpoint"]

FORMATS = {"bip": bip, "resrep": resrep, "stripe": stripe, "torchvision": torchvision}  # any other file is our own


def load_checkpoint(
    network: nn.Module,
    path: str | os.PathLike,
    classes: list[str] | None = None,
    fresh_classifier: bool = False,
    **facts: object,
) -> dict:
    """Fill `network` from the file, every tensor or none.

    If the file's network is narrower, layers take its shapes. Layers that it lacks are replaced by `nn.Identity` or
    `structure.Constant`. If the file's network is a library's whose layers were made plain, so is this one first.

    Args:
        path: of the file; or "published", for the weights that the network's library downloads.
        classes: the names of what the network is to tell apart, in order, where they are known. A file that names its
            classes must name these.
        fresh_classifier: where the file's network tells other classes apart, all but its classifier is taken, and the
            network's own one stays as it is.
        facts: what is known about the file, where it does not say so itself: `threshold` of the scales of stripes.

    Returns:
        what the file says about itself (arch, epoch, best_prec1, kept, ...), and
        `format`: the name of a row in `FORMATS`, or for our own where the tensors stand: under "state_dict", under
            another name of `content.CONTAINERS`, or "flat" at the top;
        `masks`: layer -> mask (of the weight's shape), which has been multiplied into the weight;
        `extras`: name -> tensor that only a pruning method understands (BiP's scores);
        `note`: only if there is something that the user should know: which part of the file was taken, that the
            classifier starts anew, that the weights fit although the file's network computes another function.

    Raises:
        ValueError: the file cannot be read, or does not fit the network; then the network is unchanged.
    """
    if Path(path) == PUBLISHED:
        container = libraries.published(getattr(network, "arch", None), getattr(network, "arch_options", {}))
    else:
        container = read_checkpoint(path)
    content = unpack(container, path, network)
    if content.facts.get("plain"):
        plainify(network)
    content = replace(content, facts=facts | content.facts)
    try:
        source = next((name for name, form in FORMATS.items() if form.recognise(content, network)), None)
        if source:
            content = FORMATS[source].read(content, network)
        content = own.read(content, network)
    except (RuntimeError, IndexError, KeyError, TypeError, AttributeError) as error:  # of shapes that no format has
        raise ValueError(f"{path}: its tensors do not belong together ({' '.join(str(error).split())})") from None
    if fresh_classifier:
        content = with_fresh_classifier(content, network, classes)
    masks, misfits = fill(network, content, classes)
    if misfits:
        name = getattr(network, "arch", type(network).__name__)
        raise ValueError(f"{path}: does not fit {name}: {' '.join('; '.join(misfits).split())}")
    extras = {name: tensor for name, tensor in content.extras.items() if name.rpartition(".")[0] not in masks}
    info = {**content.facts, "format": source or content.form, "masks": masks, "extras": extras}
    if content.note:
        warnings.warn(f"{path}: {content.note}", stacklevel=2)
    if notes := [*content.remarks, *filter(None, [content.note])]:
        info["note"] = "; ".join(notes)
    return info
