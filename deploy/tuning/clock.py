"""Time single kernels by the clock of the computer that runs them: this one, or a device behind TVM's RPC."""

from contextlib import nullcontext

import numpy as np
import tvm
from tvm.script.ir_builder import tirx as T

from utils.machine import cpu_name

from ..codegen.build import Executable, generate
from ..kernels import emit
from ..runtime.library import set_threads
from ..runtime.processor import lacking
from ..runtime.remote import LOST
from ..targets import Machine


class Here:
    """This computer as a place where kernels are timed; `remote.Device` is another."""

    def __init__(self):
        self.processor, self.device = cpu_name(), tvm.cpu()

    def runs(self, machine: Machine) -> bool:
        return not lacking(machine.requires)

    def asked(self, problem: str):
        return nullcontext()

    def load(self, executable: Executable):
        """A module of the compiled kernels."""
        set_threads(executable.machine.threads)
        return executable.module.jit()


def seconds(module: tvm.IRModule, calls, machine: Machine, place, number: int, repeat: int) -> list[float]:
    """Time of each call (kernel, arrays): the least of `repeat` means over `number` calls, after a warm-up."""
    loaded, found = place.load(generate(module, machine)), []
    with place.asked(LOST):
        for name, arrays in calls:
            tensors = [tvm.runtime.tensor(array, place.device) for array in arrays]
            found.append(min(loaded.time_evaluator(name, place.device, number, repeat)(*tensors).results))
    return found


def peak_gflops(machine: Machine, place=None) -> float:
    """GFLOP/s of independent multiply-adds in registers, on the machine's threads."""
    steps, lanes, count, threads = 100_000, machine.lanes, machine.accumulators, machine.threads

    def body(x, y):
        with T.parallel(threads) as core:
            sums = emit.Sums(count, lanes)
            factor = T.bind(emit.load(x, core * lanes, lanes))
            for r in range(count):
                sums[r] = factor
            with T.serial(steps):
                for r in range(count):
                    sums[r] = sums[r] * factor + factor
            for r in range(count):
                emit.store(y, (core * count + r) * lanes, sums[r], lanes)

    sizes = {"x": threads * lanes, "y": threads * count * lanes}
    function = emit.kernel([(name, size, "float32") for name, size in sizes.items()], body)
    module = tvm.IRModule({"multiply_add": function.with_attr("global_symbol", "multiply_add")})
    arrays = [np.full(size, 0.5, np.float32) for size in sizes.values()]
    (taken,) = seconds(module, [("multiply_add", arrays)], machine, place or Here(), 1, 20)
    return round(2 * threads * count * lanes * steps / taken / 1e9, 1)
