"""Which processor to compile for, and what the kernels must know of it: vector width and number of vector registers."""

from dataclasses import dataclass

from .runtime import processor


@dataclass(frozen=True)
class Core:
    """What one core does in a cycle: the facts from which the cycles of kernels are counted."""

    multiply_adds: float = 2  # vectors
    latency: float = 4  # cycles, of a multiply-add
    loads: float = 2  # vectors from the first cache, at best
    load_cycles: float = 0.6  # of a load among multiply-adds, sustained
    l1_bytes: int = 32 * 1024
    l2_bytes: int = 1024 * 1024
    l2_line_cycles: float = 2.2  # to fetch a line from the second cache, here and there
    l2_rate: float = 32  # bytes a cycle, one line after the other, from the second cache
    l3_rate: float = 20  # the same from the third
    line_bytes: int = 64
    page_bytes: int = 4096
    fork_cycles: int = 6000  # of work, from which on a second thread gains more than the fork and join cost


@dataclass(frozen=True)
class Machine:
    """A processor to compile for."""

    name: str
    target: object  # tvm.target.Target
    lanes: int  # float32 values of a vector register
    registers: int  # vector registers
    core: Core = Core()
    threads: int = 1  # that share the work

    @property
    def sums_in_flight(self) -> int:
        """Independent sums that hide the latency of multiply-adds."""
        return round(2 * self.core.latency)

    @property
    def window_sums(self) -> int:
        """Sums of a tile of a depthwise convolution; more would gain nothing."""
        return min(14, self.registers - 2)

    @property
    def requires(self) -> dict:
        """What a processor needs to run what is compiled for this one, as deploy.json lists it."""
        from tvm.target import codegen

        features = sorted(filter(processor.matters, map(str, codegen.llvm_get_cpu_features(self.target))))
        return {"architecture": _family(self.target), "features": features}

    @property
    def accumulators(self) -> int:
        """Registers a kernel may hold sums in; the rest carry pixels and weights."""
        return self.registers * 3 // 4


# prefer-256-bit is LLVM's default for Intel's AVX-512; it would split our vectors in two
_AVX512 = ["-prefer-256-bit"]
_HALF_WIDE = ("znver4",)  # a vector of 512 bits takes each of its 256-bit units twice
ROWS = {
    "x86-avx2": {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "haswell"},
    "x86-avx512": {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "skylake-avx512", "mattr": _AVX512},
    "aarch64": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"},
}


def linker(machine: Machine) -> str | None:
    """The compiler that links for another kind of processor, by its GNU name; None where this computer's own does."""
    if _family(machine.target) == processor.architecture():
        return None
    return "-".join(part for part in _triple(machine.target).split("-") if part not in ("unknown", "pc")) + "-g++"


def find_machine(name: str = "native") -> Machine:
    """The machine called `name`: native, a row of the table, or any TVM target. ValueError names the choices.

    A TVM target is a tag (raspberry-pi/4b-aarch64), JSON ({"kind": "llvm", "mcpu": "znver4"}) or llvm with flags
    (llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a53).
    """
    try:
        from tvm.target import Target, codegen
    except ImportError as error:
        raise ValueError("compiling needs TVM: pip install apache-tvm") from error
    try:
        target = Target.from_device("cpu") if name == "native" else Target(ROWS.get(name) or _from_flags(name))
    except Exception as error:  # TVM raises several kinds for a bad target
        raise ValueError(f"target {name!r} is unknown: native, {', '.join(ROWS)}, or a TVM target") from error
    if target.kind.name != "llvm":
        raise ValueError(f"target {name!r} is no processor that LLVM compiles for: native, {', '.join(ROWS)}")
    _check(name, target)
    if _family(target) == "aarch64":
        lanes, registers = 4, 32
    elif codegen.llvm_cpu_has_features("avx512f", target):
        lanes, registers = 16, 32
        if name == "native" and codegen.llvm_cpu_has_features("prefer-256-bit", target):
            target = Target(
                {"kind": "llvm", **{k: str(target.attrs[k]) for k in ("mtriple", "mcpu")}, "mattr": _AVX512}
            )
    elif codegen.llvm_cpu_has_features("avx2", target):
        lanes, registers = 8, 16
    else:
        lanes, registers = 4, 16
    core = Core(multiply_adds=1) if lanes == 16 and target.attrs.get("mcpu") in _HALF_WIDE else Core()
    return Machine(name, target, lanes, registers, core)


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
