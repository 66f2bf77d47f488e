"""The vocabulary of the kernels on TVM's IR builder: loads, stores and shuffles of whole vectors, loops, tasks.

`lanes` is how many values a vector holds; with 1 it is a scalar.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from ..onnx.geometry import Layout
from ..onnx.graph import Grid
from ..targets import Machine
from .instructions import Narrow, dot, instructions, is_narrow, narrow, stored, widen
from .tiles import pieces


def kernel(buffers: Sequence[tuple[str, int, str]], body: Callable, machine: Machine | None = None):
    """A TVM function over flat buffers (name, length, dtype); `body` receives them and emits the loops.

    machine: needed where a buffer is narrow, since then `body` may emit instructions.
    """
    narrow = any(is_narrow(dtype) for _, _, dtype in buffers)
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        arguments = []
        for name, length, dtype in buffers:
            buffer = T.arg(name, T.buffer((length,), stored(dtype)))
            arguments.append(Narrow(buffer, dtype) if is_narrow(dtype) else buffer)
        with T.attr(T.int32(0), "pragma_import_llvm", instructions(machine)) if narrow else nullcontext():
            body(*arguments)
    return builder.get()


def scratch(layout: Layout):
    """A buffer for one image in this layout."""
    buffer = T.alloc_buffer((layout.size,), stored(layout.dtype))
    return Narrow(buffer, layout.dtype) if is_narrow(layout.dtype) else buffer


def tasks(machine: Machine, count: int, cycles: float):
    """A loop over tasks that take `cycles` together, shared by the threads if that gains more than it costs."""
    gains = machine.threads > 1 and count > 1 and cycles > machine.core.fork_cycles
    return (T.parallel if gains else T.serial)(count)


def by_image(number, runs: int, batch: int):
    """(image, run) of a task's number."""
    return (T.bind(number // runs), T.bind(number % runs)) if batch > 1 else (0, number)


def load(buffer, at, lanes: int):
    """`lanes` values of a buffer; of a narrow one, as float32."""
    value = buffer[at] if lanes == 1 else buffer[T.ramp(at, 1, lanes)]
    return widen(value, buffer.dtype, lanes) if isinstance(buffer, Narrow) else value


def store(buffer, at, value, lanes: int) -> None:
    """Write `lanes` values; into a narrow buffer, rounded to nearest even."""
    if isinstance(buffer, Narrow):
        value, buffer = narrow(value, buffer.dtype, lanes), buffer.buffer
    T.buffer_store(buffer, value, [at if lanes == 1 else T.ramp(at, 1, lanes)])


def multiply_add(total, x, at, weight, place, lanes: int):
    """total + x * weight for the `lanes` weights from weight[place] on, where x[at] is one channel of a pixel.

    With weights of int32, which hold several narrow ones, as many neighbours of x[at] are multiplied and summed up.
    """
    if weight.dtype == "int32":
        count = 4 if isinstance(x.dtype, Grid) else 2
        some = T.broadcast(T.reinterpret("int32", x[T.ramp(at, 1, count)]), lanes)
        weights = weight[T.ramp(place, 1, lanes)]
        if count == 4:  # the instruction takes the unsigned numbers first
            return dot(total, some, weights, lanes, "int8")
        return dot(total, weights, some, lanes, "bfloat16")
    return total + splat(load(x, at, 1), lanes) * load(weight, place, lanes)


def prefetch(buffer, at) -> None:
    """Bring the cache line that holds buffer[at] near; it may lie behind the buffer's end."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[at]), 0, 3, 1))


class Sums:
    """Vectors that stay in registers, by their number. Sums are float32; a gather holds channels as they are stored.

    Each is a buffer of its own. TVM puts small buffers on the stack, from where LLVM promotes them; for large ones, and
    for all of scope "local", it calls its allocator whenever control comes by.
    """

    def __init__(self, count: int, lanes: int, dtype: str = "float32"):
        self.buffers = [T.alloc_buffer((lanes,), dtype) for _ in range(count)]
        self.place = 0 if lanes == 1 else T.ramp(0, 1, lanes)

    def __getitem__(self, index: int):
        return self.buffers[index][self.place]

    def __setitem__(self, index: int, value) -> None:
        T.buffer_store(self.buffers[index], value, [self.place])


def splat(value, lanes: int):
    """A vector of one value."""
    value = T.float32(value) if isinstance(value, int | float) else value
    return value if lanes == 1 else T.broadcast(value, lanes)


@contextmanager
def when(condition, needed: bool = True) -> Iterator[None]:
    """What is emitted inside runs under the condition; always, where that is not needed."""
    if not needed:
        yield
        return
    with T.If(condition), T.Then():
        yield


def pick(value, chosen: Sequence[int], lanes: int):
    """The `chosen` lanes of a vector, in that order."""
    chosen = list(chosen)
    if chosen == list(range(lanes)):
        return value
    if lanes == 1:
        return splat(value, len(chosen))
    return T.Shuffle([value] * -(-len(chosen) // lanes), chosen)  # a shuffle may not be wider than what it is given


def in_turns(vectors: list, lanes: int) -> list:
    """The vectors' first lanes, then their second ones and so on, in as many vectors; both are powers of two.

    Interleaving the first half of the vectors with the second rotates the bits of (vector, lane) by one.
    """
    count = len(vectors)
    vectors = [T.bind(v) for v in vectors]
    order = [i // 2 + i % 2 * lanes for i in range(2 * lanes)]
    for _ in range(count.bit_length() - 1):
        pairs = zip(vectors[: count // 2], vectors[count // 2 :], strict=True)
        vectors = [T.bind(T.Shuffle([a, b], half)) for a, b in pairs for half in (order[:lanes], order[lanes:])]
    return vectors


def transpose(vectors: list, lanes: int) -> list:
    """`lanes` vectors of len(vectors) lanes, out of len(vectors) vectors of `lanes` lanes; both are powers of two."""
    count = len(vectors)
    if lanes == 1:
        return [T.Shuffle(vectors, list(range(count)))] if count > 1 else vectors
    vectors = in_turns(vectors, lanes)
    if count <= lanes:
        return [pick(v, range(at, at + count), lanes) for v in vectors for at in range(0, lanes, count)]
    each = count // lanes
    return [T.Shuffle(vectors[i : i + each], list(range(count))) for i in range(0, count, each)]


def pairwise_sum(parts: list):
    """The sum, in pairs: neither a long chain of additions nor its rounding."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return parts[0]


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


def by_shape(number, tiles: Sequence, code: Callable) -> None:
    """Emit `code(shape)` for the shape (a Band or Strip of `tiles`) that tile `number` has: a chain of tests."""

    def rest(tiles: Sequence, begin: int) -> None:
        if len(tiles) == 1:
            code(tiles[0])
            return
        end = begin + len(tiles[0].starts)
        with T.If(number < end):
            with T.Then():
                code(tiles[0])
            with T.Else():
                rest(tiles[1:], end)

    rest(tiles, 0)


def clear_halo(layout: Layout, y, at, condition, lanes: int) -> None:
    """Zeros around the run of `lanes` channels at y[at], so that windows need no test.

    They are written by the task that fulfils `condition`.
    """
    if not layout.halo:
        return
    block, zero = layout.block, splat(0.0, lanes)
    wide = layout.halo * layout.row_stride // block
    with when(condition):
        for begin in (0, (layout.rows + layout.halo) * layout.row_stride):
            with T.serial(wide) as i:
                store(y, at + begin + i * block, zero, lanes)
        with T.serial(layout.rows) as row:
            for i in range(layout.halo):
                store(y, at + layout.at(0, i - layout.halo) + row * layout.row_stride, zero, lanes)
                store(y, at + layout.at(0, layout.columns + i) + row * layout.row_stride, zero, lanes)
