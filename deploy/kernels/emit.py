"""Small words of the kernels: whole-vector loads, stores and shuffles on TVM's IR builder, and the activations."""

from collections.abc import Callable, Sequence

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..onnx.graph import Activation
from .tiles import pieces


def kernel(buffers: Sequence[tuple[str, int, str]], body: Callable):
    """A TVM function over flat buffers (name, length, dtype); `body` receives them and emits the loops."""
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        body(*(T.arg(name, T.buffer((length,), dtype)) for name, length, dtype in buffers))
    return builder.get()


WORTH_SHARING = 6000  # cycles of work from which on a second thread gains more than the fork and join cost


def tasks(count: int, cycles: float):
    """A loop over tasks that take `cycles` together, shared by the threads if that pays."""
    return (T.parallel if cycles > WORTH_SHARING and count > 1 else T.serial)(count)


def load(buffer, at, lanes: int):
    return buffer[at] if lanes == 1 else buffer[T.ramp(at, 1, lanes)]


def store(buffer, at, value, lanes: int) -> None:
    T.buffer_store(buffer, value, [at if lanes == 1 else T.ramp(at, 1, lanes)])


def prefetch(buffer, at) -> None:
    """Bring the cache line that holds buffer[at] near; it may lie behind the buffer's end."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[at]), 0, 3, 1))


class Sums:
    """Vectors that stay in registers, by their number.

    Each is a buffer of its own. TVM puts small buffers on the stack, from where LLVM promotes them; for large ones, and
    for all of scope "local", it calls its allocator whenever control comes by.
    """

    def __init__(self, count: int, lanes: int):
        self.buffers = [T.alloc_buffer((lanes,), "float32") for _ in range(count)]
        self.lanes = lanes

    def __getitem__(self, index: int):
        return load(self.buffers[index], 0, self.lanes)

    def __setitem__(self, index: int, value) -> None:
        store(self.buffers[index], 0, value, self.lanes)


def splat(value, lanes: int):
    value = T.float32(value) if isinstance(value, int | float) else value
    return value if lanes == 1 else T.broadcast(value, lanes)


def pick(value, chosen: Sequence[int], lanes: int):
    """The `chosen` lanes of a vector, in that order."""
    chosen = list(chosen)
    if chosen == list(range(lanes)):
        return value
    if lanes == 1:
        return splat(value, len(chosen))
    return T.Shuffle([value] * -(-len(chosen) // lanes), chosen)  # a shuffle may not be wider than what it is given


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


LINE = 16  # floats of a cache line
AHEAD = 1024  # floats of a page of memory


def columns(g, group, pointer, weight, body: Callable) -> None:
    """Emit `body(weight index, offset index, u)` for every kept column of the group; u counts within a step.

    g: a product's `group`, `columns`, `unroll` and `sparse`. Weights come from memory, once an image, and a processor
    forgets at every page what it was reading, so they are fetched a page ahead.
    """

    def steps(count, first) -> None:
        with T.serial(*count) as step:
            place = step * g.unroll
            for at in range(0, g.unroll * g.group, LINE):
                prefetch(weight, (first + place) * g.group + AHEAD + at)
            for u in range(g.unroll):
                body(first + place + u, place + u, u)

    if g.sparse:
        steps((pointer[group], pointer[group + 1]), 0)
    else:
        steps((g.columns // g.unroll,), group * g.columns)


def over(length: int, lanes: int, body: Callable) -> None:
    """Emit `body(at, lanes)` so that it covers 0..length: one loop of whole vectors and, if need be, a last one."""
    runs = pieces(length, lanes)
    width = runs[0][1]
    whole = length // width
    if whole == 1:
        body(0, width)
    else:
        with T.serial(whole) as i:
            body(i * width, width)
    if length % width:
        body(length - width, width)


def branch(index, ends: Sequence[int], bodies: Sequence[Callable]) -> None:
    """Emit bodies[i] for the first i with index < ends[i]; the last needs no test."""
    if len(bodies) == 1:
        bodies[0]()
        return
    with T.If(index < ends[0]):
        with T.Then():
            bodies[0]()
        with T.Else():
            branch(index, ends[1:], bodies[1:])
