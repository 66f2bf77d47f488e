"""Read the operators that slide a window over a map: convolution and pooling."""

import numpy as np

from .bounds import title
from .graph import Conv, Window


def _sliding(reader, node, kernel) -> dict:
    """Stride, dilation, pad and output size of a convolution or pooling."""
    a, size = reader.attributes(node), reader.shape(node.input[0])[2:]
    if len(size) != 2 or len(kernel) != 2:
        raise ValueError(f"{title(node)} is not two-dimensional")
    stride, dilation = tuple(a.get("strides", (1, 1))), tuple(a.get("dilations", (1, 1)))
    pads = tuple(a.get("pads", (0, 0, 0, 0)))
    mode = a.get("auto_pad", b"NOTSET").decode()
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"{title(node)} has auto_pad {mode!r}: NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    if mode != "NOTSET" and any(pads):
        raise ValueError(f"{title(node)} has both auto_pad {mode} and pads: ONNX allows one of them")
    if mode.startswith("SAME"):
        total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, stride, reach, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = (*small, *large) if mode == "SAME_UPPER" else (*large, *small)
    out = []
    for axis in range(2):
        extra = size[axis] + pads[axis] + pads[axis + 2] - reach[axis]
        length = (-(-extra // stride[axis]) if a.get("ceil_mode") else extra // stride[axis]) + 1
        if a.get("ceil_mode") and (length - 1) * stride[axis] >= size[axis] + pads[axis]:
            length -= 1  # no window starts in the padding below
        if length < 1:
            raise ValueError(f"{title(node)} leaves nothing of a map of {size[0]} x {size[1]}")
        out.append(length)
    return {"stride": stride, "dilation": dilation, "pad": pads[:2], "out": tuple(out), "pads": pads}


def read_conv(reader, node) -> None:
    weight = reader.constant(node, 1).astype(np.float32)
    bias = reader.constant(node, 2, np.zeros(len(weight))).astype(np.float32)
    s = _sliding(reader, node, weight.shape[2:])
    batch, channels = reader.shape(node.input[0])[:2]
    groups = reader.attributes(node).get("group", 1)
    if weight.shape[1] * groups != channels or len(weight) % groups or len(bias) != len(weight):
        sizes = f"a weight {weight.shape} and a bias {bias.shape} in {groups} groups"
        raise ValueError(f"{title(node)} has {sizes}, which do not fit {channels} channels")
    kernel = reader.attributes(node).get("kernel_shape", weight.shape[2:])
    if tuple(kernel) != weight.shape[2:]:
        raise ValueError(f"{title(node)} has kernel_shape {list(kernel)} and a weight {weight.shape}")
    common = {"bias": bias, "stride": s["stride"], "pad": s["pad"], "dilation": s["dilation"]}
    shape = (batch, len(weight), *s["out"])
    if groups == channels == len(weight):
        kernel = tuple(weight.shape[2:])
        reader.add(Window, node, node.input[:1], shape, kind="conv", kernel=kernel, weight=weight[:, 0], **common)
        return
    if groups > 1:  # an ordinary convolution with zeros, which the search for blocks will find
        whole = np.zeros((len(weight), channels, *weight.shape[2:]), np.float32)
        each = len(weight) // groups
        for g in range(groups):
            rows, part = slice(g * each, (g + 1) * each), channels // groups
            whole[rows, g * part : (g + 1) * part] = weight[rows]
        weight = whole
    scale = reader.scale(node, len(weight))
    reader.add(Conv, node, node.input[:1], shape, weight=weight, scale=scale, **common)


def read_pool(reader, node) -> None:
    a = reader.attributes(node)
    kernel = tuple(a["kernel_shape"])
    s = _sliding(reader, node, kernel)
    if any(pad >= k for pad, k in zip(a.get("pads", ()), kernel * 2, strict=False)):
        raise ValueError(
            f"{title(node)} has pads {list(a['pads'])}; each must be less than kernel_shape {list(kernel)}"
        )
    kind = "max" if node.op_type == "MaxPool" else "average"
    if kind == "average" and a.get("ceil_mode"):
        raise ValueError(f"{title(node)} rounds its size up, which is not supported for an average")
    if kind == "average" and any(s["pads"]) and not a.get("count_include_pad"):
        raise ValueError(f"{title(node)} averages without the padding, which is not supported")
    if len(node.output) > 1:
        raise ValueError(f"{title(node)} also returns indices, which is not supported")
    sliding = {k: s[k] for k in ("stride", "pad", "dilation")}
    shape = (*reader.shape(node.input[0])[:2], *s["out"])
    reader.add(Window, node, node.input[:1], shape, kind=kind, kernel=kernel, **sliding)
