"""The facts of an unknown processor's core, measured by small kernels in half a second.

The clock is taken out by a chain of additions and exclusive ors of one number, each of which takes every processor one
cycle. Facts are rounded, so that two measurements of one processor agree.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import tvm
from tvm.script.ir_builder import tirx as T

from utils.files import save_json
from utils.machine import cpu_name

from ..kernels.emit import Sums, kernel, load, splat, store
from ..runtime import processor
from ..targets import Core, Machine, find_machine
from . import clock

VERSION = 1  # of the file
STEPS, CHAIN = 2000, 32  # of a loop, and pairs of operations that depend on each other in each of its steps
ROUNDS, RUNS = 15, 3


def _chain(x, y) -> None:
    value = T.alloc_buffer((1,), "int32")
    T.buffer_store(value, x[0], [0])
    with T.serial(STEPS):
        for _ in range(CHAIN):
            T.buffer_store(value, T.bitwise_xor(value[0], x[1]) + x[2], [0])
    T.buffer_store(y, value[0], [0])


def _loop(count: int, lanes: int, steps: int, step: Callable) -> Callable:
    """A kernel's body: `count` vectors of sums, which `step(sums, number, *inputs)` changes `steps` times."""

    def body(*buffers) -> None:
        *inputs, y = buffers
        sums = Sums(count, lanes)
        for i in range(count):
            sums[i] = splat(0.0, lanes)
        with T.serial(steps) as number:
            step(sums, number, *inputs)
        for i in range(count):
            store(y, i * lanes, sums[i], lanes)

    return body


def measure(machine: Machine) -> Core:
    """This computer's core; `machine` says which vectors to use."""
    lanes, count, usual, sizes = machine.lanes, machine.accumulators // 2, Core(), processor.caches()
    # A core that takes a whole register in two steps multiplies at half its rate, too: loads would not be seen.
    half = max(1, lanes // 2)
    l1, l2 = sizes.get(1, usual.l1_bytes), sizes.get(2, usual.l2_bytes)
    near, far = l2 // 8, sizes.get(3, 8 * l2) // 32 * 3  # values: half of the second cache, 3/8 of the shared third
    lines = (np.random.default_rng(0).permutation(near // 16)[: near // 128 * 8] * 16).astype(np.int32)

    def multiply(sums, number, x):
        factor = load(x, 0, lanes)
        for i in range(len(sums.buffers)):
            sums[i] = sums[i] * factor + factor

    def vectors(sums, number, x):
        for i in range(count):
            sums[i] = T.max(sums[i], load(x, (number % 16 * count + i) * half, half))

    def broadcasts(sums, number, x):
        row = T.bind(load(x, number % 16 * half, half))
        for i in range(count):
            sums[i] = sums[i] + splat(x[number % 16 * count + i], half) * row

    def stream(sums, number, x):
        for i in range(8):
            sums[i] = sums[i] + load(x, (number * 8 + i) * lanes, lanes)

    def scattered(sums, number, x, offset):
        for i in range(8):
            sums[i] = sums[i] + load(x, offset[number * 8 + i], lanes)

    def values(size: int) -> np.ndarray:
        return np.ones(size, np.float32)

    some = values(16 * count * lanes)
    kernels = {  # body, inputs, output
        "chain": (_chain, [np.ones(3, np.int32)], np.ones(1, np.int32)),
        "latency": (_loop(1, lanes, STEPS, multiply), [some], values(lanes)),
        "multiply_adds": (_loop(count, lanes, STEPS, multiply), [some], values(count * lanes)),
        "vectors": (_loop(count, half, STEPS, vectors), [some], values(count * half)),
        "broadcasts": (_loop(count, half, STEPS, broadcasts), [some], values(count * half)),
        "l2": (_loop(8, lanes, near // (8 * lanes), stream), [values(near)], values(8 * lanes)),
        "l2_lines": (_loop(8, lanes, len(lines) // 8, scattered), [values(near), lines], values(8 * lanes)),
        "l3": (_loop(8, lanes, far // (8 * lanes), stream), [values(far)], values(8 * lanes)),
    }
    functions, calls = {}, []
    for name, (body, inputs, output) in kernels.items():
        arrays = [*inputs, output]
        buffers = [(f"b{i}", len(array), str(array.dtype)) for i, array in enumerate(arrays)]
        functions[name] = kernel(buffers, body).with_attr("global_symbol", name)
        calls.append((name, arrays))
    taken = clock.seconds(tvm.IRModule(functions), calls, replace(machine, threads=1), clock.Here(), RUNS, ROUNDS)
    cycles = {name: 2 * STEPS * CHAIN * seconds / taken[0] for name, seconds in zip(kernels, taken, strict=True)}
    return Core(
        multiply_adds=max(1, round(2 * STEPS * count / cycles["multiply_adds"])) / 2,
        latency=round(cycles["latency"] / STEPS),
        loads=max(1, round(2 * STEPS * (count + 1) / cycles["vectors"])) / 2,
        load_cycles=round(cycles["broadcasts"] / STEPS / (count + 1), 1),
        l1_bytes=l1,
        l2_bytes=l2,
        l2_line_cycles=round(cycles["l2_lines"] / len(lines) * 16 / lanes, 1),
        l2_rate=4 * round(near / cycles["l2"]),
        l3_rate=4 * round(far / cycles["l3"]),
    )


@cache
def _this_core() -> Core:
    return measure(find_machine())


def described(machine: Machine, tune: str | Path | None = None) -> Machine:
    """`machine` with this computer's core measured: once a process or, beside the file of --tune, once for all."""
    if tune is None:
        return replace(machine, core=_this_core())
    path, name = Path(tune).with_suffix(".core.json"), cpu_name()
    try:
        state = json.loads(path.read_text()) if path.exists() else {"version": None}
        if state["version"] == VERSION and state["cpu"] == name:
            return replace(machine, core=Core(**state["core"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no file of a measured core: remove it, and it is measured again") from None
    save_json(path, {"version": VERSION, "cpu": name, "core": asdict(_this_core())})
    return replace(machine, core=_this_core())
