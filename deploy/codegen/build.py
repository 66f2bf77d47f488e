"""From Relax to machine code, with the weights apart from it.

Relax writes constants into the library, from where they are read into a second copy: a ResNet-50 (98 MB) took 400 ms
to load and 390 MB at its peak. As parameters of `main` they can be mapped from a file instead, and are there once.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

import tvm
from tvm import relax
from tvm.support import cc

from utils.files import atomic, save_text, sweep

from ..dump import forget
from ..runtime.folder import ALIGNMENT, DESCRIPTION, FORMAT_VERSION, LIBRARY, WEIGHTS, digest, header, pending
from ..runtime.library import Library, silence
from ..targets import Machine, linker


@dataclass
class Executable:
    """What TVM compiled for a machine."""

    module: object  # relax.VMExecutable, or a tvm.runtime.Module of kernels alone
    machine: Machine

    def link(self, path: Path, build: str | None = None) -> None:
        """Write it as a shared library. build: 32 hexadecimal digits that its build id note is to say.

        ValueError without a compiler that links for the machine.
        """
        compiler = linker(self.machine)
        if compiler and not shutil.which(compiler):
            raise ValueError(f"{path} could not be linked: a library for {self.machine.name} needs {compiler}")
        try:
            with silence():
                options = {"options": [f"-Wl,--build-id=0x{build}"]} if build else {}
                self.module.export_library(str(path), fcompile=compiler and cc.cross_compiler(compiler), **options)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} could not be linked: TVM needs a C++ compiler (g++) for it") from error


@relax.expr_functor.mutator
class _Lift(relax.PyExprMutator):
    """Replaces tensors by parameters: equal ones by the same."""

    def __init__(self, module):
        super().__init__(module)
        self.parameters: dict[tuple, relax.Var] = {}
        self.tensors: list[tvm.runtime.Tensor] = []

    def visit_generic_const_(self, op):
        if not isinstance(op.value, tvm.runtime.Tensor):
            return op
        array = op.value.numpy()
        key = (array.dtype, sha256(array).digest())
        if key not in self.parameters:
            self.parameters[key] = relax.Var(f"weight_{len(self.tensors)}", op.ty)
            self.tensors.append(op.value)
        return self.parameters[key]


def lowering() -> list[tvm.transform.Pass]:
    """Ten passes of Relax. Its default pipeline expects kernels made of s_tir blocks, which ours are not."""
    t = relax.transform
    return [
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]


def build(module: tvm.IRModule, machine: Machine, dump: Callable = forget) -> tuple[Executable, list]:
    """The compiled program and its weights, TVM tensors that `main` takes behind the images.

    dump(name, module) sees the program before and after lowering.
    """
    weights = []

    @tvm.transform.module_pass(opt_level=0, name="LiftWeights")
    def lift(module, _):  # after all lowering: Relax would check every parameter's shape at every call
        main, lifted = module["main"], _Lift(module)
        body = lifted.visit_expr(main.body)
        weights.extend(lifted.tensors)
        parameters = [*main.params, *lifted.parameters.values()]
        whole = relax.Function(parameters, body, main.ret_ty, main.is_pure, main.attrs)
        module.update_func(module.get_global_var("main"), whole)
        dump("lowering", module)
        return module

    dump("kernels", module)
    return generate(module, machine, relax_pipeline=tvm.transform.Sequential([*lowering(), lift])), weights


def generate(module: tvm.IRModule, machine: Machine, **options) -> Executable:
    """A program, or kernels alone, as machine code."""
    # Sums that share one buffer with those of another loop are not promoted to registers.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        return Executable(tvm.compile(module, target=machine.target, **options), machine)


class Compiled(Library):
    """A library that was compiled in this process, and can be saved."""

    def __init__(self, executable: Executable, weights: list, info: dict):
        info = {"format_version": FORMAT_VERSION, "tvm": tvm.__version__, **info}
        super().__init__(executable.module, weights, info)
        self.compiled, self.machine = executable, executable.machine

    def save(self, folder: str | Path) -> None:
        """Write lib.so, weights.bin and deploy.json, or replace them, as runtime/folder.py says.

        Whenever this is stopped, `folder` holds the old library or the new one.
        """
        folder, build = Path(folder), uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        paths = {name: pending(folder, name, build) for name in (LIBRARY, WEIGHTS)}
        try:
            self.link(paths[LIBRARY], build)
            self._write_weights(paths[WEIGHTS], build)
            self.info |= {"build_id": build, "files": {name: _row(path) for name, path in paths.items()}}
            self.describe(folder)
        except BaseException:
            description = folder / DESCRIPTION
            if not description.is_file() or build not in description.read_text():  # it was not made valid
                for path in paths.values():
                    path.unlink(missing_ok=True)
            raise
        sweep(folder)
        for name, path in paths.items():
            os.replace(path, folder / name)
            for stale in folder.glob(f".{'[0-9a-f]' * 32}.{name}"):  # of a save that was stopped
                stale.unlink()

    def _write_weights(self, path: Path, build: str) -> None:
        self.info["weights"], at = [], 0
        with atomic(path) as file:
            at += file.write(header(build))
            for array in (tensor.numpy() for tensor in self.weights):
                self.info["weights"].append([str(array.dtype), at, at + array.nbytes])
                at += file.write(array.tobytes().ljust(-(-array.nbytes // ALIGNMENT) * ALIGNMENT, b"\0"))

    def describe(self, folder: Path) -> None:
        """Write deploy.json alone."""
        self.info["files"] = {name: self.info["files"][name] for name in (LIBRARY, WEIGHTS)}
        self.info["files"][DESCRIPTION] = {"sha256": digest(json.loads(json.dumps(self.info)))}
        save_text(folder / DESCRIPTION, _json(self.info) + "\n")

    def link(self, path: Path, build: str | None = None) -> None:
        """Write lib.so alone."""
        self.compiled.link(path, build)


def _row(path: Path) -> dict:
    """What deploy.json says of a file, which is on the disk afterwards."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": file_digest(file, "sha256").hexdigest()}


def _json(info: dict) -> str:
    """Indented, but a list of numbers or words on one line."""
    return re.sub(r"\[\n[^][{}]*\]", lambda found: json.dumps(json.loads(found[0])), json.dumps(info, indent=2))
