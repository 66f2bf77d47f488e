"""Files of ResRep (Ding et al. 2021): other names, compactors, and `deps`, the widths of all convolutions."""

from dataclasses import replace

from torch import nn

from models.formats.content import Content, Names, has_names, renamed

RESNET = (
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
MOBILENET_V1 = (
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
NAMES: dict[str, Names] = {
    **dict.fromkeys(("resnet50", "resnet56_b", "resnet110_b"), RESNET),
    "mobilenet_v1": MOBILENET_V1,
}


def recognise(content: Content, network: nn.Module) -> bool:
    return has_names(content, network, NAMES) or "deps" in content.facts


def read(content: Content, network: nn.Module) -> Content:
    return replace(renamed(content, network, NAMES), narrow="deps" in content.facts)
