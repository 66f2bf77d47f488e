"""Narrow types, and the instructions for them that TVM cannot say itself.

TVM turns arithmetic on its type bfloat16 into float32, before LLVM could see what was meant. So buffers hold the bits
of narrow numbers as integers, and the instructions come as functions in LLVM's own language, which are linked into
every kernel that needs them and vanish there.
"""

from tvm.script.ir_builder import tirx as T

from ..targets import Machine

STORED = {"bfloat16": "uint16"}  # the type of the buffers that hold the bits of a narrow type
_ROUND = """
define linkonce_odr <{n} x i16> @round_bfloat16_{n}(<{n} x float> %x) alwaysinline {{
  %narrow = fptrunc <{n} x float> %x to <{n} x bfloat>
  %bits = bitcast <{n} x bfloat> %narrow to <{n} x i16>
  ret <{n} x i16> %bits
}}
"""
_DOT = {
    "avx512bf16": """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @dot_bfloat16_16(<16 x float> %sum, <16 x i32> %x, <16 x i32> %y) alwaysinline {
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %y to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %r
}
"""
}
_INTERLEAVE = """
define linkonce_odr <32 x i16> @interleave_{name}(<32 x i16> %a, <32 x i16> %b) alwaysinline {{
  %r = shufflevector <32 x i16> %a, <32 x i16> %b, <32 x i32> <{order}>
  ret <32 x i16> %r
}}
"""
_WIDTHS = (2, 4, 8, 16, 32)


def instructions(machine: Machine) -> str:
    """What kernels for `machine` may call, in LLVM's language."""
    order = [i // 2 + i % 2 * 32 for i in range(64)]
    orders = {"low": order[:32], "high": order[32:]}
    shuffles = [
        _INTERLEAVE.format(name=name, order=", ".join(f"i32 {i}" for i in some)) for name, some in orders.items()
    ]
    dots = [text for feature, text in _DOT.items() if feature in machine.features]
    return "".join([*(_ROUND.format(n=n) for n in _WIDTHS), *shuffles, *dots])


def _kind(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def widen(value, lanes: int):
    """float32 from the bits of bfloat16, which are its upper half."""
    sixteen = T.uint32(16) if lanes == 1 else T.broadcast(T.uint32(16), lanes)
    return T.reinterpret(_kind("float32", lanes), T.Cast(_kind("uint32", lanes), value) << sixteen)


def narrow(value, lanes: int):
    """The bits of bfloat16 from float32, rounded to nearest even."""
    if lanes == 1:  # there is no vector of one lane
        return T.Shuffle([narrow(T.broadcast(value, 2), 2)], [0])
    return T.call_extern(f"uint16x{lanes}", f"round_bfloat16_{lanes}", value)


def interleave(a, b) -> tuple:
    """The lower halves of two vectors of 32 numbers of 16 bits, taken in turns, and the upper ones."""
    return tuple(T.call_extern("uint16x32", f"interleave_{name}", a, b) for name in ("low", "high"))


def dot(total, x, y, lanes: int):
    """total[i] + x[2 i] * y[2 i] + x[2 i + 1] * y[2 i + 1], of `lanes` pairs of bfloat16 each, as int32.

    LLVM lets the instruction read and repeat a number from memory only as its last operand, y.
    """
    return T.call_extern(f"float32x{lanes}", f"dot_bfloat16_{lanes}", total, x, y)
