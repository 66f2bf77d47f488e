"""Which processor to compile for, and what the kernels must know of it: vector width and number of vector registers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A TVM target and the two numbers from which every tile size follows."""

    name: str
    target: object  # tvm.target.Target
    lanes: int  # float32 lanes of a vector register
    registers: int  # vector registers

    @property
    def accumulators(self) -> int:
        """Registers a kernel may hold sums in; the rest carry pixels and weights."""
        return self.registers * 3 // 4


# prefer-256-bit is LLVM's default for Intel's AVX-512; it would split our vectors in two
_AVX512 = ["-prefer-256-bit"]
ROWS = {
    "x86-avx2": {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "haswell"},
    "x86-avx512": {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "skylake-avx512", "mattr": _AVX512},
    "aarch64": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"},
}


def runs_here(machine: Machine) -> bool:
    """Whether this computer's processor executes what is compiled for `machine`."""
    here = find_machine("native")
    families = {"aarch64" in str(m.target.attrs.get("mtriple", "")) for m in (here, machine)}
    return len(families) == 1 and machine.lanes <= here.lanes


def find_machine(name: str = "native") -> Machine:
    """The machine called `name`: native, a row of the table, or any TVM target. ValueError names the choices."""
    try:
        from tvm.target import Target, codegen
    except ImportError as error:
        raise ValueError("compiling needs TVM: pip install apache-tvm") from error
    try:
        target = Target.from_device("cpu") if name == "native" else Target(ROWS.get(name, name))
    except Exception as error:  # TVM raises several kinds for a bad target
        raise ValueError(f"target {name!r} is unknown: native, {', '.join(ROWS)}, or a TVM target") from error
    if target.kind.name != "llvm":
        raise ValueError(f"target {name!r} is no processor that LLVM compiles for: native, {', '.join(ROWS)}")
    if "aarch64" in str(target.attrs.get("mtriple", "")):
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
    return Machine(name, target, lanes, registers)
