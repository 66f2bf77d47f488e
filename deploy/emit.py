"""Small words of the kernels: whole-vector loads, stores and shuffles on TVM's IR builder, and the activations."""

from collections.abc import Callable, Sequence

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .graph import Activation
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
    raise AssertionError(activation)


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
