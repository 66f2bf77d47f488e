"""The facts of an unknown processor's core, measured by small kernels in a second or two.

The clock is taken out by a chain of additions and exclusive ors of one number, each of which takes every processor one
cycle. Facts are rounded, so that two measurements of one processor agree.
"""

import json
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
STEPS, CHAIN = 2000, 32  # of a loop, and operations that depend on each other in each of its steps
ROUNDS, RUNS = 15, 3


def _chain():
    """2 * STEPS * CHAIN operations of one cycle, one after the other."""

    def body(x, y):
        value = T.alloc_buffer((1,), "int32")
        T.buffer_store(value, x[0], [0])
        with T.serial(STEPS):
            for _ in range(CHAIN):
                T.buffer_store(value, T.bitwise_xor(value[0], x[1]) + x[2], [0])
        T.buffer_store(y, value[0], [0])

    return kernel([("x", 3, "int32"), ("y", 1, "int32")], body)


def _multiply_adds(count: int, lanes: int):
    """STEPS * count multiply-adds of vectors, as many chains of them side by side."""

    def body(x, y):
        sums, factor = Sums(count, lanes), T.bind(load(x, 0, lanes))
        for i in range(count):
            sums[i] = factor
        with T.serial(STEPS):
            for i in range(count):
                sums[i] = sums[i] * factor + factor
        for i in range(count):
            store(y, i * lanes, sums[i], lanes)

    return kernel([("x", lanes, "float32"), ("y", count * lanes, "float32")], body)


def _loads(count: int, lanes: int, broadcast: bool):
    """STEPS * (count + broadcast) loads from the first cache: broadcast to multiply-adds, or vectors to a maximum."""

    def body(x, weight, y):
        sums = Sums(count, lanes)
        for i in range(count):
            sums[i] = splat(0.0, lanes)
        with T.serial(STEPS) as step:
            row = T.bind(load(weight, step % 16 * lanes, lanes))
            for i in range(count):
                at = step % 16 * count + i
                if broadcast:
                    sums[i] = sums[i] + splat(x[at], lanes) * row
                else:
                    sums[i] = T.max(sums[i], load(x, at * lanes, lanes))
        for i in range(count):
            store(y, i * lanes, sums[i], lanes)

    sizes = {"x": 16 * count * lanes, "weight": 16 * lanes, "y": count * lanes}
    return kernel([(name, size, "float32") for name, size in sizes.items()], body)


def _stream(values: int, lanes: int):
    """A sum over `values` that lie one after the other."""
    count = 8

    def body(x, y):
        sums = Sums(count, lanes)
        for i in range(count):
            sums[i] = splat(0.0, lanes)
        with T.serial(values // (count * lanes)) as step:
            for i in range(count):
                sums[i] = sums[i] + load(x, (step * count + i) * lanes, lanes)
        for i in range(count):
            store(y, i * lanes, sums[i], lanes)

    return kernel([("x", values, "float32"), ("y", count * lanes, "float32")], body)


def _scattered(values: int, places: int, lanes: int):
    """A sum over `places` vectors that lie here and there in `values`."""
    count = 8

    def body(x, offset, y):
        sums = Sums(count, lanes)
        for i in range(count):
            sums[i] = splat(0.0, lanes)
        with T.serial(places // count) as step:
            for i in range(count):
                sums[i] = sums[i] + load(x, offset[step * count + i], lanes)
        for i in range(count):
            store(y, i * lanes, sums[i], lanes)

    return kernel([("x", values, "float32"), ("offset", places, "int32"), ("y", count * lanes, "float32")], body)


def measure(machine: Machine) -> Core:
    """This computer's core; `machine` says which vectors to use."""
    one, lanes, count, usual = replace(machine, threads=1), machine.lanes, machine.accumulators // 2, Core()
    # A core that takes a whole register in two steps multiplies at half its rate, too: loads would not be seen.
    half = max(1, lanes // 2)
    sizes = processor.caches()
    l1, l2 = sizes.get(1, usual.l1_bytes), sizes.get(2, usual.l2_bytes)
    near, far = l2 // 8, sizes.get(3, 8 * l2) // 32 * 3  # values: half of the second cache, 3/8 of the shared third
    places = np.random.default_rng(0).permutation(near // 16)[: near // 16 // 8 * 8].astype(np.int32) * 16
    functions = {
        "chain": _chain(),
        "latency": _multiply_adds(1, lanes),
        "multiply_adds": _multiply_adds(count, lanes),
        "loads": _loads(count, half, False),
        "broadcasts": _loads(count, half, True),
        "l2": _stream(near, lanes),
        "l2_lines": _scattered(near, len(places), lanes),
        "l3": _stream(far, lanes),
    }
    calls = []
    for name, function in functions.items():
        arrays = [np.ones(int(b.shape[0]), str(b.dtype)) for b in function.params]
        if name == "l2_lines":
            arrays[1] = places
        calls.append((name, arrays))
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    taken = dict(zip(functions, clock.seconds(module, calls, one, clock.Here(), RUNS, ROUNDS), strict=True))
    cycles = {name: seconds / taken["chain"] * 2 * STEPS * CHAIN for name, seconds in taken.items()}
    return Core(
        multiply_adds=max(0.5, round(2 * STEPS * count / cycles["multiply_adds"]) / 2),
        latency=round(cycles["latency"] / STEPS),
        loads=max(0.5, round(2 * STEPS * (count + 1) / cycles["loads"]) / 2),
        load_cycles=round(cycles["broadcasts"] / STEPS / (count + 1), 1),
        l1_bytes=l1,
        l2_bytes=l2,
        l2_line_cycles=round(cycles["l2_lines"] / len(places) * 64 / (4 * lanes), 1),
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
