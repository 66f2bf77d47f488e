"""Which processor to compile for, and what the choice of kernels must know of it."""

from dataclasses import dataclass, replace

from .runtime import processor


@dataclass(frozen=True)
class Core:
    """What one core does in a cycle: the facts from which the cycles of kernels are counted. None depends on its clock.

    The defaults are the usual ones of cores with AVX-512, and stand for processors of which nothing better is known.
    """

    multiply_adds: float = 2  # vectors
    latency: float = 4  # cycles of a multiply-add
    loads: float = 2  # vectors from the first cache, at best
    load_cycles: float = 0.6  # of a load among multiply-adds
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 1024 * 1024
    l2_line_cycles: float = 2.2  # to fetch a line from the second cache, here and there
    l2_rate: float = 32  # bytes a cycle from the second cache, one line after the other
    l3_rate: float = 20  # the same from the third
    line_bytes: int = 64
    page_bytes: int = 4096
    fork_cycles: int = 6000  # of work from which on a second thread gains more than the fork and join cost


@dataclass(frozen=True)
class Row:
    """A core that is known."""

    core: Core
    features: frozenset[str]  # LLVM's: without them, another processor bears this one's name
    fitted: bool  # the numbers were fitted to kernels that were timed on it; else they are published ones


# By LLVM's name. Where this computer's processor has no fitted row, its core is measured (tuning/core.py): so Sapphire
# Rapids needs none, of which nothing is known here that differs from the usual.
CORES = {
    # A vector of 512 bits takes each of its 256-bit units twice.
    "znver4": Row(Core(multiply_adds=1), frozenset({"avx512bf16", "avx512vnni"}), fitted=True),
    # Not measured here: bandwidths of a virtual machine (128-253 and 104-120 GB/s) at 4.1 GHz.
    "znver5": Row(Core(l1_bytes=48 * 1024, l2_rate=45, l3_rate=27), frozenset({"avx512bf16", "avxvnni"}), fitted=False),
}

# Features of which kernels for a type need one.
DTYPES = {"float32": frozenset(), "bfloat16": frozenset({"avx512bf16"}), "int8": frozenset({"avx512vnni"})}


@dataclass(frozen=True)
class Machine:
    """A processor to compile for."""

    name: str
    target: object  # tvm.target.Target
    features: frozenset[str]  # those of processor.CHECKED that its code may use
    lanes: int  # float32 values of a vector register
    registers: int  # vector registers
    core: Core = Core()
    known: bool = True  # False: no row fits this computer, so `core` is the usual one until it is measured
    threads: int = 1  # that share the work
    dtype: str = "float32"  # of maps in NCHWc: float32, bfloat16, or int8 (those that a quantised file has rounded)

    @property
    def requires(self) -> dict:
        """What a processor needs to run what is compiled for this one, as deploy.json lists it."""
        return {"architecture": _family(self.target), "features": sorted(self.features)}

    @property
    def itemsize(self) -> int:
        """Bytes of a value of a map in NCHWc."""
        return {"float32": 4, "bfloat16": 2, "int8": 1}[self.dtype]

    def block(self, channels: int, itemsize: int) -> int:
        """Channels of a block of an NCHWc map of values of `itemsize` bytes; 1 for pictures that are read one by one.

        A register full, or fewer where a map has fewer channels, but enough to fill 32 bits.
        """
        if itemsize == 4:
            return self.lanes if channels >= self.lanes else 1
        return min(4 * self.lanes // itemsize, max(4 // itemsize, 1 << (channels - 1).bit_length()))

    def with_dtype(self, dtype: str) -> "Machine":
        """This machine for maps of `dtype`. ValueError if it has no instructions for them."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: {' or '.join(DTYPES)}")
        if dtype != "float32" and not self.features & DTYPES[dtype]:
            needed = ", ".join(sorted(DTYPES[dtype]))
            raise ValueError(f"dtype {dtype}: {self.name} has none of {needed}, by which kernels multiply it")
        return replace(self, dtype=dtype)

    @property
    def accumulators(self) -> int:
        """Registers a kernel may hold sums in; the rest carry pixels and weights."""
        return self.registers * 3 // 4

    @property
    def sums_in_flight(self) -> int:
        """Independent sums that hide the latency of multiply-adds, two of which begin in a cycle."""
        return round(2 * self.core.latency)

    @property
    def window_sums(self) -> int:
        """Sums of a tile of a depthwise convolution or pooling; more would gain nothing."""
        return min(14, self.registers - 2)


# prefer-256-bit is LLVM's default for Intel's AVX-512; it would split our vectors in two
_AVX512 = "-prefer-256-bit"
TARGETS = {
    "x86-avx2": {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "haswell"},
    "x86-avx512": {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "skylake-avx512", "mattr": [_AVX512]},
    "aarch64": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"},
}


def find_machine(name: str = "native") -> Machine:
    """The machine called `name`: native, a row of TARGETS, or any TVM target. ValueError names the choices.

    A TVM target is a tag (raspberry-pi/4b-aarch64), JSON ({"kind": "llvm", "mcpu": "znver4"}) or llvm with flags
    (llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a53).
    """
    try:
        from tvm.target import Target
    except ImportError as error:
        raise ValueError("compiling needs TVM: pip install apache-tvm") from error
    try:
        target = _this_computer() if name == "native" else Target(TARGETS.get(name) or _from_flags(name))
    except Exception as error:  # TVM raises several kinds for a bad target
        raise ValueError(f"target {name!r} is unknown: native, {', '.join(TARGETS)}, or a TVM target") from error
    if target.kind.name != "llvm":
        raise ValueError(f"target {name!r} is no processor that LLVM compiles for: native, {', '.join(TARGETS)}")
    _check(name, target)
    features = _features(target)
    if _family(target) == "aarch64":
        lanes, registers = 4, 32
    else:
        lanes, registers = next(s for f, s in _VECTORS.items() if f is None or f in features)
    row = CORES.get(str(target.attrs.get("mcpu")))
    row = row if row and row.features <= features else None
    known = name != "native" or bool(row and row.fitted)
    return Machine(name, target, features & processor.CHECKED, lanes, registers, row.core if row else Core(), known)


_VECTORS = {"avx512f": (16, 32), "avx2": (8, 16), None: (4, 16)}  # lanes, registers


def _features(target) -> frozenset[str]:
    from tvm.target import codegen

    return frozenset(map(str, codegen.llvm_get_cpu_features(target)))


def _this_computer():
    """LLVM's target of this computer, with the features that the processor says it has instead of its name's."""
    from tvm.target import Target

    target = Target.from_device("cpu")
    named, have = _features(target), processor.features()
    have = named & processor.CHECKED if have is None else have
    wrong = [f"+{name}" for name in sorted(have - named)]
    wrong += [f"-{name}" for name in sorted((named & processor.CHECKED) - have)]
    if "avx512f" in have and "prefer-256-bit" in named:
        wrong.append(_AVX512)
    if not wrong:
        return target
    same = {k: str(target.attrs[k]) for k in ("mtriple", "mcpu") if k in target.attrs}
    return Target({"kind": "llvm", **same, "mattr": wrong})


def linker(machine: Machine) -> str | None:
    """The compiler that links for another kind of processor, by its GNU name; None where this computer's own does."""
    if _family(machine.target) == processor.architecture():
        return None
    return "-".join(part for part in _triple(machine.target).split("-") if part not in ("unknown", "pc")) + "-g++"


def _from_flags(name: str) -> str | dict:
    """`llvm -mcpu=... -mattr=+a,-b` as the mapping that TVM takes instead; other names as they are."""
    kind, *flags = name.split()
    if not flags or not all(flag.startswith("-") for flag in flags):
        return name
    options = dict(flag.lstrip("-").split("=", 1) for flag in flags)
    if "mattr" in options:
        options["mattr"] = options["mattr"].split(",")
    return {"kind": kind, **options}


def _check(name: str, target) -> None:
    """ValueError for a processor that LLVM does not know: it would crash, or take a generic one and only log it."""
    from tvm.target import Target, codegen

    if not _family(target).startswith(tuple(codegen.llvm_get_targets())):
        raise ValueError(f"target {name!r}: LLVM knows no processor family {_family(target)!r}")
    cpu = str(target.attrs.get("mcpu", "generic"))
    known = codegen.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": _triple(target)}))
    if cpu != "generic" and cpu not in map(str, known):
        raise ValueError(f"target {name!r}: LLVM knows no {_family(target)} processor {cpu!r}")


def _triple(target) -> str:
    from tvm.target import codegen

    return str(target.attrs.get("mtriple") or codegen.llvm_get_system_triple())


def _family(target) -> str:
    """The kind of processor as triples write it: x86_64, aarch64, ..."""
    return _triple(target).split("-")[0]
