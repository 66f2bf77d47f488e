"""What a kernel does with its sums before it stores them: add a residual, apply the activation."""

from dataclasses import dataclass, replace

from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout
from ..onnx.graph import Activation, Conv, Grid, Node
from .emit import load, splat, store
from .instructions import Narrow, rounded


@dataclass(frozen=True)
class Epilogue:
    activation: Activation = None
    residual: bool = False  # another map of the output's shape is added first
    grid: Grid | None = None  # what is stored is rounded to it
    before: Grid | None = None  # to which the value is rounded before the other map is added

    @classmethod
    def of(cls, node: Node) -> "Epilogue":
        return cls(node.activation, isinstance(node, Conv) and len(node.inputs) > 1, node.grid, _before(node))

    def store(self, y, at, value, lanes: int, residual=None, residual_at=None) -> None:
        """y[at] = activation(value + residual[residual_at]), a vector; the residual lies like y if not said."""
        value = rounded(value, self.before, lanes)
        if self.residual:
            value = value + load(residual, at if residual_at is None else residual_at, lanes)
        store(y, at, self.end(value, y, lanes), lanes)

    def end(self, value, y, lanes: int):
        """What y shall hold for a value, as float32."""
        value = activate(value, self.activation, lanes)
        return value if isinstance(y, Narrow) and y.dtype == self.grid else rounded(value, self.grid, lanes)


def in_steps(node: Node, y: Layout) -> tuple[Layout, Epilogue, float]:
    """How a kernel whose sums count steps of y's grid stores a node's output: (y, epilogue, length of a step).

    So scales are in the constants, and layers that differ in nothing else share their code.
    """
    if not isinstance(y.dtype, Grid) or node.activation is not None or (isinstance(node, Conv) and node.inputs[1:]):
        return y, Epilogue.of(node), 1.0
    steps = replace(y.dtype, scale=1.0)
    return replace(y, dtype=steps), Epilogue(grid=steps), y.dtype.scale


def _before(node: Node) -> Grid | None:
    return node.before if isinstance(node, Conv) else None


def activate(value, activation: Activation, lanes: int):
    match activation:
        case None:
            return value
        case ("clip", low, high):
            value = value if low is None else T.max(value, splat(low, lanes))
            return value if high is None else T.min(value, splat(high, lanes))
        case ("hard_swish",):
            gate = activate(value + splat(3.0, lanes), ("clip", 0.0, 6.0), lanes)
            return value * gate * splat(1 / 6, lanes)
        case ("hard_sigmoid", alpha, beta):
            return activate(value * splat(alpha, lanes) + splat(beta, lanes), ("clip", 0.0, 1.0), lanes)
        case ("sigmoid",):
            return splat(1.0, lanes) / (splat(1.0, lanes) + exponential(splat(0.0, lanes) - value, lanes))
        case ("swish",):
            return value * activate(value, ("sigmoid",), lanes)
        case ("leaky_relu", alpha):
            return T.max(value, splat(0.0, lanes)) + T.min(value, splat(0.0, lanes)) * splat(alpha, lanes)
    raise AssertionError(activation)


def exponential(value, lanes: int):
    """e to the power of a vector, by a polynomial (of the Cephes library); LLVM would call expf for every lane."""
    value = activate(value, ("clip", -87.3, 88.3), lanes)
    power = T.floor(value * splat(1.4426950408889634, lanes) + splat(0.5, lanes))
    rest = value - power * splat(0.693359375, lanes) + power * splat(2.12194440e-4, lanes)  # ln 2 in two parts
    result = splat(1.9875691500e-4, lanes)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        result = result * rest + splat(factor, lanes)
    whole, float32 = (kind if lanes == 1 else f"{kind}x{lanes}" for kind in ("int32", "float32"))
    bits = (T.Cast(whole, power) + _constant(127, lanes)) * _constant(1 << 23, lanes)  # 2 ** power
    return result * T.reinterpret(float32, bits)


def _constant(number: int, lanes: int):
    return T.int32(number) if lanes == 1 else T.broadcast(T.int32(number), lanes)
