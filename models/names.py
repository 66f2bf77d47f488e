"""What other files call the tensors of our networks."""

import re

from torch import Tensor

TORCHVISION_V3 = (
    "features.1.block.0.0.weight",
    (
        (r"features\.1\.block\.0\.([01])", r"features.1.conv.\1"),  # depthwise: the first block does not expand
        (r"features\.1\.block\.1\.fc([12])", lambda m: f"features.1.conv.3.fc.{2 * int(m[1]) - 2}"),
        (r"features\.1\.block\.[12]\.([01])", lambda m: f"features.1.conv.{4 + int(m[1])}"),  # project
        (r"features\.(\d+)\.block\.0\.([01])", r"features.\1.conv.\2"),  # expand
        (r"features\.(\d+)\.block\.1\.([01])", lambda m: f"features.{m[1]}.conv.{3 + int(m[2])}"),  # depthwise
        (r"features\.(\d+)\.block\.2\.fc([12])", lambda m: f"features.{m[1]}.conv.5.fc.{2 * int(m[2]) - 2}"),
        (r"features\.(\d+)\.block\.[23]\.([01])", lambda m: f"features.{m[1]}.conv.{7 + int(m[2])}"),  # project
        (r"features\.1[26]\.([01])", r"conv.\1"),  # the 1x1 convolution after the last block
    ),
)
TORCHVISION_V2 = (
    "features.1.conv.0.0.weight",
    (
        (r"features\.1\.conv\.0\.([01])", r"features.1.conv.\1"),  # depthwise: the first block does not expand
        (r"features\.1\.conv\.([12])", lambda m: f"features.1.conv.{2 + int(m[1])}"),  # project
        (r"features\.(\d+)\.conv\.0\.([01])", r"features.\1.conv.\2"),  # expand
        (r"features\.(\d+)\.conv\.1\.([01])", lambda m: f"features.{m[1]}.conv.{3 + int(m[2])}"),  # depthwise
        (r"features\.(\d+)\.conv\.([23])", lambda m: f"features.{m[1]}.conv.{4 + int(m[2])}"),  # project
    ),
)
BIP = ("linear.weight", ((r"linear", "fc"), (r"(layer\d\.\d+)\.shortcut\.([01])", r"\1.downsample.\2")))
RESREP_RESNET = (
    "stage1.block0.conv1.conv.weight",
    (
        (r"(?:stage1\.)?conv1\.conv", "conv1"),
        (r"(?:stage1\.)?conv1\.bn", "bn1"),
        (r"stage(\d)\.block(\d+)\.conv(\d)\.(conv|bn)", r"layer\1.\2.\4\3"),
        (r"stage(\d)\.block(\d+)\.conv(\d)\.compactor(?:\.pwc)?", r"layer\1.\2.bn\3.compactor"),
        (r"stage(\d)\.projection\.conv", r"layer\1.0.downsample.0"),
        (r"stage(\d)\.projection\.bn", r"layer\1.0.downsample.1"),
    ),
)
RESREP_V1 = (
    "stem.0.pointwise.conv.weight",
    (
        (r"conv1\.conv", "conv1.0"),
        (r"conv1\.bn", "conv1.1"),
        (r"stem\.(\d+)\.depthwise\.conv", r"features.\1.0"),
        (r"stem\.(\d+)\.depthwise\.bn", r"features.\1.1"),
        (r"stem\.(\d+)\.pointwise\.conv", r"features.\1.3"),
        (r"stem\.(\d+)\.pointwise\.bn", r"features.\1.4"),
        (r"stem\.(\d+)\.pointwise\.compactor(?:\.pwc)?", r"features.\1.4.compactor"),
        (r"linear", "classifier.0"),
    ),
)
# arch -> whose file -> (a name that only their file has, rows of (their name, ours), the first that fits counts);
# the other networks have the names of torchvision or their publication already
FOREIGN = {
    "mobilenet_v1": {"resrep": RESREP_V1},
    "mobilenet_v2": {"torchvision": TORCHVISION_V2},
    "mobilenet_v3_large": {"torchvision": TORCHVISION_V3},
    "mobilenet_v3_small": {"torchvision": TORCHVISION_V3},
    **{f"resnet{depth}_cifar": {"bip": BIP} for depth in (18, 34, 50)},
    **{arch: {"resrep": RESREP_RESNET} for arch in ("resnet50", "resnet56_b", "resnet110_b")},
}


def translated(tensors: dict[str, Tensor], arch: str | None) -> tuple[str | None, dict[str, Tensor]]:
    """Whose names the tensors have, if they are foreign, and the tensors under ours."""
    for source, (sign, rows) in FOREIGN.get(arch, {}).items():
        if sign in tensors:
            return source, {_ours(name, rows): tensor for name, tensor in tensors.items()}
    return None, tensors


def _ours(name: str, rows: tuple) -> str:
    layer, _, tensor = name.rpartition(".")
    row = next((row for row in rows if re.fullmatch(row[0], layer)), None)
    return f"{re.sub(*row, layer)}.{tensor}" if row else name
