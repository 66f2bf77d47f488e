"""What an ONNX file says about its pictures: how they are made for the network, and what its classes are called.

`imagenet.py --export_onnx` writes it as JSON under the key "pictures" of the file's `metadata_props`:

    {"size": 224, "resize": 256, "interpolation": "bilinear", "crop": "center",
     "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "classes": ["tench", ...]}

The shorter side of a picture is resized to `resize`, with antialiasing; a square of `size` pixels a side is cut out of
its middle; of its RGB channels (0 to 1), `mean` is subtracted, and they are divided by `std`. `classes` has a name for
every column of the logits.
"""

import json
import math

KEY = "pictures"
INTERPOLATIONS, CROPS = ("bilinear",), ("center",)


def read_pictures(model, path) -> dict | None:
    """What the ONNX model, read from `path`, says about its pictures; None where it says nothing.

    Raises:
        ValueError: the entry is no such JSON.
    """
    said = next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
    if said is None:
        return None
    try:
        pictures = json.loads(said)
        right = _right(pictures)
    except (ValueError, KeyError, TypeError, RecursionError):
        right = False
    if not right:
        raise ValueError(f"{path}: its metadata {KEY!r} does not describe pictures: {said[:80]!r}")
    return pictures


def _right(pictures: dict) -> bool:
    sides, classes = (pictures["size"], pictures["resize"]), pictures["classes"]
    channels = [*pictures["mean"], *pictures["std"]]
    return (
        all(type(side) is int and side > 0 for side in sides)
        and all(type(value) in (int, float) and math.isfinite(value) for value in channels)
        and len(channels) == 6
        and min(pictures["std"]) > 0
        and pictures["interpolation"] in INTERPOLATIONS
        and pictures["crop"] in CROPS
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
    )
