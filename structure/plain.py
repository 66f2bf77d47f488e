"""Layers of others as plain ones: batch norms that carry an activation, convolutions and linear layers of own classes.

Everything in this project reads `nn.Conv2d`, `nn.Linear` and `nn.BatchNorm2d`. Libraries have subclasses of them that
compute more than their weights say: an activation, padding that depends on the picture's size, a weight that is
standardised first. Each of those is replaced by plain layers in a row, once both are seen to compute the same.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from structure.capture import evaluating

PLAIN = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
SIDES = (7, 8, 11, 12)  # of the pictures that two layers are compared on: padding may depend on what a stride leaves
CLOSE = 1e-6  # of the largest output: a weight that is computed is rounded to float32 where it is stored


class SamePadding(nn.Module):
    """Pads with zeros as TensorFlow's "same": so that a convolution has one output a stride, more zeros at the end."""

    def __init__(self, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]):
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def extra_repr(self) -> str:
        return f"{self.kernel_size}, stride={self.stride}, dilation={self.dilation}"

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride, dilation in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            steps = (size + stride - 1) // stride - 1
            missing = max(steps * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return nn.functional.pad(x, pads)  # B, C, H + missing, W + missing


def plainify(network: nn.Module) -> dict[str, str]:
    """Replace, in place, subclasses of convolutions, linear layers and batch norms by plain layers in a row.

    The function in eval mode stays: each new layer is compared with the old one. A layer for which no plain one is
    found stays as it is, and a pruning method that needs it plain refuses it by name. Do this after foreign weights
    are loaded: where a weight is standardised before use, the plain layer holds the standardised one.

    Returns:
        name of a replaced layer -> the class that it had. The attribute `plain` of the network is True afterwards.
    """
    replaced = {}
    with evaluating(network), torch.no_grad():
        for name, layer in list(network.named_modules()):
            if not isinstance(layer, PLAIN) or type(layer) in PLAIN or _computes_its_weight(layer):
                continue
            new = next((new for make in CANDIDATES if (new := make(layer)) and _agree(layer, new)), None)
            if new is not None:
                replaced[name] = type(layer).__name__
                _put(network, name, new.train(layer.training))
    network.plain = True
    return replaced


def in_words(replaced: dict[str, str]) -> str:
    """What `plainify` has replaced, for the screen: "46 BatchNormAct2d, 1 Linear"."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(replaced.values()).items())


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the layer called `name`. Where others hold the same layer, they go on holding it."""
    old = network.get_submodule(name)
    for parent in network.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = layer


def _computes_its_weight(layer: nn.Module) -> bool:
    """Whether its weight is computed from other tensors (weight_norm, spectral_norm, torch.nn.utils.prune)."""
    return "weight" in vars(type(layer)) or bool(layer._forward_pre_hooks) or hasattr(layer, "parametrizations")


def _norm_and_children(layer: nn.Module) -> nn.Module | None:
    """A batch norm that hands its output to its children, one after another: timm's `BatchNormAct2d`."""
    if not isinstance(layer, nn.BatchNorm2d):
        return None
    children = {key: child for key, child in layer.named_children() if not isinstance(child, nn.Identity)}
    norm = nn.BatchNorm2d(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, device="meta"
    )
    _take_tensors(norm, layer)
    return nn.Sequential(OrderedDict(norm=norm, **children)) if children else norm


def _linear(layer: nn.Module) -> nn.Module | None:
    if not isinstance(layer, nn.Linear):
        return None
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    _take_tensors(plain, layer)
    return plain


def _convolution(layer: nn.Module) -> nn.Module | None:
    """A convolution with the weight that the layer really uses, and with its padding, fixed or "same"."""
    if not isinstance(layer, nn.Conv2d):
        return None
    seen = _Convolved()
    try:
        with seen:
            layer(_inputs(layer, SIDES[1]))
    except (RuntimeError, ValueError, TypeError):
        return None
    if len(seen.calls) != 1:
        return None
    weight, bias, padding = seen.calls[0]
    settings = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    conv = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, padding=padding, bias=bias is not None,
        padding_mode=layer.padding_mode, device="meta", **settings,
    )  # fmt: skip
    _take_tensors(conv, layer)
    for key, used in (("weight", weight), ("bias", bias)):
        if used is not None and used is not getattr(layer, key):
            own = getattr(layer, key)
            setattr(conv, key, nn.Parameter(used.detach().clone().to(own), requires_grad=own.requires_grad))
    if not seen.padded:
        return conv
    return nn.Sequential(OrderedDict(pad=SamePadding(layer.kernel_size, layer.stride, layer.dilation), conv=conv))


CANDIDATES: tuple[Callable[[nn.Module], nn.Module | None], ...] = (_norm_and_children, _linear, _convolution)


class _Convolved(TorchFunctionMode):
    """Notes what `conv2d` is called with: weight, bias and padding; and whether the input is padded before."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor | None, object]] = []
        self.padded = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.pad:
            self.padded = True
        if function is torch.conv2d:
            given = dict(zip(("input", "weight", "bias", "stride", "padding"), args, strict=False)) | kwargs
            self.calls.append((given["weight"], given.get("bias"), given.get("padding", 0)))
        return function(*args, **kwargs)


def _take_tensors(plain: nn.Module, layer: nn.Module) -> None:
    """Give `plain` the very tensors of `layer`, so that what is tied stays tied."""
    for kind in ("_parameters", "_buffers"):
        for key in getattr(plain, kind):
            getattr(plain, kind)[key] = getattr(layer, kind).get(key)


def _agree(layer: nn.Module, plain: nn.Module) -> bool:
    """Whether both compute the same on random inputs of several sizes, in float64."""
    plain.eval()
    try:
        for side in SIDES:
            x = _inputs(layer, side)
            theirs, ours = _in_float64(layer, x), _in_float64(plain, x)
            if theirs.shape != ours.shape or not (ours - theirs).abs().max() <= CLOSE * theirs.abs().max():
                return False
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    return True


def _in_float64(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's outputs, computed with its tensors in float64."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    wide = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    return torch.func.functional_call(layer, wide, (x.double().clone(),))


def _inputs(layer: nn.Module, side: int) -> Tensor:
    """Random numbers that the layer can read, the same each time."""
    channels = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None) or layer.num_features
    shape = (2, channels) if isinstance(layer, nn.Linear) else (1, channels, *[side + max(_reach(layer))] * 2)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(side))
    return numbers.to(next(iter(layer.parameters()), numbers))


def _reach(layer: nn.Module) -> list[int]:
    """How many pixels the kernel spans, so that some output is left without padding."""
    if not isinstance(layer, nn.Conv2d):
        return [0]
    return [(kernel - 1) * dilation for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)]
