"""Narrow types, and the instructions for them that TVM cannot say itself.

TVM turns arithmetic on its type bfloat16 into float32, before LLVM could see what was meant. So buffers hold the bits
of narrow numbers as integers, and the instructions come as functions in LLVM's own language, which are linked into
every kernel that needs them and vanish there.
"""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from ..onnx.graph import Grid
from ..targets import Machine

STEPS = Grid(1.0, 0)


@dataclass(frozen=True)
class Narrow:
    """A buffer that holds the bits of bfloat16 numbers, or steps of a grid."""

    buffer: object
    dtype: str | Grid

    def __getitem__(self, index):
        return self.buffer[index]


def as_steps(buffer):
    """A buffer of steps of a grid as one of the plain numbers 0 to 255; another one as it is."""
    steps = isinstance(buffer, Narrow) and isinstance(buffer.dtype, Grid)
    return Narrow(buffer.buffer, STEPS) if steps else buffer


def stored(dtype: str | Grid) -> str:
    """The type of the buffers that hold numbers of a layout's `dtype`."""
    return "uint8" if isinstance(dtype, Grid) else {"bfloat16": "uint16"}.get(dtype, dtype)


def is_narrow(dtype: str | Grid) -> bool:
    return stored(dtype) != dtype


_ROUND = """
define linkonce_odr <{n} x i16> @round_bfloat16_{n}(<{n} x float> %x) alwaysinline {{
  %narrow = fptrunc <{n} x float> %x to <{n} x bfloat>
  %bits = bitcast <{n} x bfloat> %narrow to <{n} x i16>
  ret <{n} x i16> %bits
}}
"""
_STEPS = """
declare <{n} x i32> @llvm.lrint.v{n}i32.v{n}f32(<{n} x float>)
declare <{n} x i32> @llvm.smax.v{n}i32(<{n} x i32>, <{n} x i32>)
declare <{n} x i32> @llvm.umin.v{n}i32(<{n} x i32>, <{n} x i32>)
define linkonce_odr <{n} x i8> @steps_{n}(<{n} x float> %x, <{n} x i32> %zero) alwaysinline {{
  %far = fcmp olt <{n} x float> %x, splat (float 1.0e9)
  %near = select <{n} x i1> %far, <{n} x float> %x, <{n} x float> splat (float 1.0e9)
  %whole = call <{n} x i32> @llvm.lrint.v{n}i32.v{n}f32(<{n} x float> %near)
  %shifted = add <{n} x i32> %whole, %zero
  %low = call <{n} x i32> @llvm.smax.v{n}i32(<{n} x i32> %shifted, <{n} x i32> zeroinitializer)
  %high = call <{n} x i32> @llvm.umin.v{n}i32(<{n} x i32> %low, <{n} x i32> splat (i32 255))
  %bytes = trunc <{n} x i32> %high to <{n} x i8>
  ret <{n} x i8> %bytes
}}
"""
_DOT = """
declare <16 x {sum}> @{instruction}(<16 x {sum}>, <{n} x {number}>, <{n} x {number}>)
define linkonce_odr <16 x {sum}> @dot_{name}_16(<16 x {sum}> %sum, <16 x i32> %x, <16 x i32> %y) alwaysinline {{
  %a = bitcast <16 x i32> %x to <{n} x {number}>
  %b = bitcast <16 x i32> %y to <{n} x {number}>
  %r = call <16 x {sum}> @{instruction}(<16 x {sum}> %sum, <{n} x {number}> %a, <{n} x {number}> %b)
  ret <16 x {sum}> %r
}}
"""
_BFLOAT16 = {"name": "bfloat16", "sum": "float", "n": 32, "number": "bfloat"}
_INT8 = {"name": "int8", "sum": "i32", "n": 64, "number": "i8"}
_DOTS = {  # by the feature that has the instruction
    "avx512bf16": _BFLOAT16 | {"instruction": "llvm.x86.avx512bf16.dpbf16ps.512"},
    "avx512vnni": _INT8 | {"instruction": "llvm.x86.avx512.vpdpbusd.512"},
}
_INTERLEAVE = """
define linkonce_odr <{n} x i{bits}> @interleave_{name}_{bits}(<{n} x i{bits}> %a, <{n} x i{bits}> %b) alwaysinline {{
  %r = shufflevector <{n} x i{bits}> %a, <{n} x i{bits}> %b, <{n} x i32> <{order}>
  ret <{n} x i{bits}> %r
}}
"""
# Bytes of four vectors taken in turns, each half of 16 for itself, as the processor's instructions do it.
_TURNS = """
define linkonce_odr <128 x i8> @turns_32(<32 x i8> %a, <32 x i8> %b, <32 x i8> %c, <32 x i8> %d) alwaysinline {{
  %ab0 = shufflevector <32 x i8> %a, <32 x i8> %b, <32 x i32> <{low}>
  %ab1 = shufflevector <32 x i8> %a, <32 x i8> %b, <32 x i32> <{high}>
  %cd0 = shufflevector <32 x i8> %c, <32 x i8> %d, <32 x i32> <{low}>
  %cd1 = shufflevector <32 x i8> %c, <32 x i8> %d, <32 x i32> <{high}>
  %p0 = bitcast <32 x i8> %ab0 to <16 x i16>
  %p1 = bitcast <32 x i8> %ab1 to <16 x i16>
  %q0 = bitcast <32 x i8> %cd0 to <16 x i16>
  %q1 = bitcast <32 x i8> %cd1 to <16 x i16>
  %r0 = shufflevector <16 x i16> %p0, <16 x i16> %q0, <16 x i32> <{lower}>
  %r1 = shufflevector <16 x i16> %p0, <16 x i16> %q0, <16 x i32> <{higher}>
  %r2 = shufflevector <16 x i16> %p1, <16 x i16> %q1, <16 x i32> <{lower}>
  %r3 = shufflevector <16 x i16> %p1, <16 x i16> %q1, <16 x i32> <{higher}>
  %s0 = shufflevector <16 x i16> %r0, <16 x i16> %r1, <32 x i32> <{both}>
  %s1 = shufflevector <16 x i16> %r2, <16 x i16> %r3, <32 x i32> <{both}>
  %t = shufflevector <32 x i16> %s0, <32 x i16> %s1, <64 x i32> <{all}>
  %bytes = bitcast <64 x i16> %t to <128 x i8>
  ret <128 x i8> %bytes
}}
"""
_WIDTHS = (2, 4, 8, 16, 32)


def instructions(machine: Machine) -> str:
    """What kernels for `machine` may call, in LLVM's language."""
    shuffles = []
    for bits in (8, 16):
        n = 512 // bits
        order = [f"i32 {i // 2 + i % 2 * n}" for i in range(2 * n)]
        for name, some in (("low", order[:n]), ("high", order[n:])):
            shuffles.append(_INTERLEAVE.format(n=n, bits=bits, name=name, order=", ".join(some)))
    shuffles.append(_TURNS.format(**_turns()))
    dots = [_DOT.format(**facts) for feature, facts in _DOTS.items() if feature in machine.features]
    return "".join([*(text.format(n=n) for text in (_ROUND, _STEPS) for n in _WIDTHS), *shuffles, *dots])


def _turns() -> dict[str, str]:
    """The orders of _TURNS: those of the halves of two vectors of `each` numbers that are put together."""

    def halves(each: int, first: int) -> list[int]:
        n = each // 2
        return [half * n + first + i // 2 + i % 2 * each for half in range(2) for i in range(n)]

    orders = {"low": halves(32, 0), "high": halves(32, 8), "lower": halves(16, 0), "higher": halves(16, 4)}
    orders |= {"both": range(32), "all": range(64)}
    return {name: ", ".join(f"i32 {i}" for i in order) for name, order in orders.items()}


def _kind(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def widen(value, dtype: str | Grid, lanes: int):
    """float32 from what a narrow buffer holds."""
    if isinstance(dtype, Grid):
        value = T.Cast(_kind("float32", lanes), T.Cast(_kind("int32", lanes), value))
        value = value if dtype.zero == 0 else value - _splat(float(dtype.zero), lanes)
        return value if dtype.scale == 1 else value * _splat(dtype.scale, lanes)
    sixteen = T.uint32(16) if lanes == 1 else T.broadcast(T.uint32(16), lanes)  # bfloat16 is the upper half of float32
    return T.reinterpret(_kind("float32", lanes), T.Cast(_kind("uint32", lanes), value) << sixteen)


def narrow(value, dtype: str | Grid, lanes: int):
    """What a narrow buffer holds for float32 values: rounded to nearest even."""
    if lanes == 1:  # there is no vector of one lane
        return T.Shuffle([narrow(T.broadcast(value, 2), dtype, 2)], [0])
    if isinstance(dtype, Grid):
        value = value if dtype.scale == 1 else value * _splat(1 / dtype.scale, lanes)
        return T.call_extern(f"uint8x{lanes}", f"steps_{lanes}", value, T.broadcast(T.int32(dtype.zero), lanes))
    return T.call_extern(f"uint16x{lanes}", f"round_bfloat16_{lanes}", value)


def rounded(value, grid: Grid | None, lanes: int):
    """float32 values of the grid that are nearest; as they are without one."""
    if grid is None:
        return value
    steps = T.nearbyint(value * _splat(1 / grid.scale, lanes))  # of two, the even one
    least, most = (_splat(float(q - grid.zero), lanes) for q in (0, 255))
    return T.min(T.max(steps, least), most) * _splat(grid.scale, lanes)


def _splat(value: float, lanes: int):
    return T.float32(value) if lanes == 1 else T.broadcast(T.float32(value), lanes)


def interleave(a, b, bits: int) -> tuple:
    """The lower halves of two registers of numbers of so many bits, taken in turns, and the upper ones."""
    kind = f"uint{bits}x{512 // bits}"
    return tuple(T.call_extern(kind, f"interleave_{name}_{bits}", a, b) for name in ("low", "high"))


def turns(vectors: list):
    """The bytes of four vectors of 32, taken in turns; byte i of each is in the tuple of number turned(i)."""
    return T.call_extern("uint8x128", "turns_32", *vectors)


def turned(i: int) -> int:
    return i // 32 * 32 + i % 16 // 4 * 8 + i % 32 // 16 * 4 + i % 4


def dot(total, x, y, lanes: int, kind: str):
    """total[i] + the sum over j of x[n i + j] * y[n i + j], for the n numbers in 32 bits.

    kind: bfloat16, or int8, where x is unsigned. LLVM lets the instruction read and repeat numbers from memory only as
    its last operand, y.
    """
    sums = "float32" if kind == "bfloat16" else "int32"
    return T.call_extern(f"{sums}x{lanes}", f"dot_{kind}_{lanes}", total, x, y)
