"""A network as a short list of nodes with NumPy weights. Every tensor is (B, C, H, W) or (B, C), float32."""

from dataclasses import dataclass, field, fields

import numpy as np

# ("clip", low, high), ("hard_swish",), ("hard_sigmoid", alpha, beta), ("leaky_relu", alpha), ("sigmoid",), ("swish",)
Activation = tuple | None


@dataclass(frozen=True)
class Grid:
    """The values that a quantised tensor may have: (q - zero) * scale for the integers q from 0 to 255.

    Those of a signed tensor are shifted by 128.
    """

    scale: float
    zero: int


@dataclass
class Node:
    name: str
    inputs: list[str]
    output: str
    activation: Activation = field(default=None, kw_only=True)
    grid: Grid | None = field(default=None, kw_only=True)  # the output is rounded to it, at last


@dataclass
class Conv(Node):
    """A convolution or classifier. inputs: the map x and, optionally, a map that is added before the activation."""

    weight: np.ndarray  # (O, C, kh, kw)
    bias: np.ndarray  # (O,)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)  # above, left
    dilation: tuple[int, int] = (1, 1)
    depthwise: "Window | None" = None  # computed first, and read by nothing else; inputs[0] is its input
    before: Grid | None = None  # what the sums are rounded to before the other map is added
    scale: np.ndarray | None = None  # (O,): the weights are whole multiples of it, -127 to 127 of them


@dataclass
class Window(Node):
    """A sum or maximum over each channel's own taps: depthwise convolution and pooling."""

    kind: str  # conv (depthwise), max, average
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    weight: np.ndarray | None = None  # (C, kh, kw)
    bias: np.ndarray | None = None  # (C,)


@dataclass
class Affine(Node):
    """act(x * scale + shift); each operand is absent, constant (C,), or the name of a tensor, (B, C, 1, 1) or as x."""

    scale: np.ndarray | str | None = None
    shift: np.ndarray | str | None = None


@dataclass
class Mean(Node):
    """The mean over height and width."""


@dataclass
class SlicePad(Node):
    """y[i] = x[starts + steps * i] on every axis, `fill` where that lies outside of x: slices and pads."""

    starts: tuple[int, ...]
    steps: tuple[int, ...]
    fill: float = 0.0


@dataclass
class Concat(Node):
    """Side by side along an axis."""

    axis: int


@dataclass
class View(Node):
    """The same numbers under another shape."""


@dataclass
class Graph:
    nodes: list[Node]
    shapes: dict[str, tuple[int, ...]]
    input: str
    output: str  # the first one
    results: dict[str, str] = field(
        default_factory=dict
    )  # tensors by the names of the file's outputs, if not just this
    pictures: dict | None = None  # what the file says about them

    @property
    def outputs(self) -> dict[str, str]:
        """The tensors that are put out, by name."""
        return self.results or {self.output: self.output}

    @property
    def quantised(self) -> bool:
        """Whether the file says what some maps are rounded to."""
        return any(node.grid for node in self.nodes)

    def grid(self, tensor: str) -> Grid | None:
        """What a tensor's values are rounded to."""
        return next((node.grid for node in self.nodes if node.output == tensor), None)

    def users(self, tensor: str) -> list[Node]:
        return [node for node in self.nodes if tensor in node.inputs]

    def only_user(self, node: Node) -> Node | None:
        """The one node that reads `node`'s output, and reads it once, if nobody else and nobody outside sees it."""
        users = self.users(node.output)
        once = len(users) == 1 and users[0].inputs.count(node.output) == 1
        return users[0] if once and node.output not in self.outputs.values() else None

    def script(self) -> str:
        """A line a node: output shape = kind(inputs) and what else it holds; arrays by shape and non-zero share."""
        lines = [f"{self.input} {self.shapes[self.input]}"]
        for node in self.nodes:
            rest = {f.name: getattr(node, f.name) for f in fields(node) if f.name not in ("name", "inputs", "output")}
            rest = ", ".join(f"{name}={_value(value)}" for name, value in rest.items() if value is not None)
            kind, inputs = type(node).__name__, ", ".join(node.inputs)
            lines.append(f"{node.output} {self.shapes[node.output]} = {kind}({inputs}; {rest})  # {node.name}")
        return "\n".join([*lines, f"return {', '.join(self.outputs.values())}"]) + "\n"


def _value(value) -> str:
    if not isinstance(value, np.ndarray):
        return str(value)
    return f"{value.dtype}{list(value.shape)} {np.count_nonzero(value) / max(1, value.size):.0%} non-zero"
