"""Files of torchvision's MobileNets. The names of its ResNets are ours, too."""

from dataclasses import replace

from torch import nn

from models.formats.content import Content, Names, has_names, renamed

MOBILENET_V3 = (
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
MOBILENET_V2 = (
    "features.1.conv.0.0.weight",
    (
        (r"features\.1\.conv\.0\.([01])", r"features.1.conv.\1"),  # depthwise: the first block does not expand
        (r"features\.1\.conv\.([12])", lambda m: f"features.1.conv.{2 + int(m[1])}"),  # project
        (r"features\.(\d+)\.conv\.0\.([01])", r"features.\1.conv.\2"),  # expand
        (r"features\.(\d+)\.conv\.1\.([01])", lambda m: f"features.{m[1]}.conv.{3 + int(m[2])}"),  # depthwise
        (r"features\.(\d+)\.conv\.([23])", lambda m: f"features.{m[1]}.conv.{4 + int(m[2])}"),  # project
    ),
)
NAMES: dict[str, Names] = {
    "mobilenet_v2": MOBILENET_V2,
    "mobilenet_v3_large": MOBILENET_V3,
    "mobilenet_v3_small": MOBILENET_V3,
}
V3_NOTE = (
    "torchvision's MobileNetV3 squeezes after the activation, with a batch norm epsilon of 1e-3; this one squeezes "
    "before it, with 1e-5: the weights fit and are a start for training, but do not give torchvision's accuracy"
)


def recognise(content: Content, network: nn.Module) -> bool:
    return has_names(content, network, NAMES)


def read(content: Content, network: nn.Module) -> Content:
    return replace(renamed(content, network, NAMES), note=V3_NOTE if "v3" in network.arch else "")
