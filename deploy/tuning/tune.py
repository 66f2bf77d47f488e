"""Cycles of a kernel by measuring it, instead of counting them: what `--tune FILE` does.

A convolution (or depthwise one, or a pooling) is compiled alone with the kernel and the layout in question, and timed,
here or on the device of `--rpc`. Equal ones are timed once. FILE keeps what was measured, after every measurement: an
interrupted tuning goes on where it was, and with a complete file nothing is measured, so it can be shipped.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import tvm
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from utils.files import save_json

from ..codegen import lower
from ..kernels.schedule import Choice
from ..onnx.blocks import Pattern
from ..onnx.graph import Conv, Graph, Move, Node, Window
from ..plan.layout import Layout, borders
from ..targets import Machine
from . import clock

ROUNDS, RUNS = 5, 10  # of timed calls: the mean of a round, the least of the rounds
AROUND = ("turn", "move")  # kernels that are there only because the layer stands alone


def alone(graph: Graph, node: Node) -> Graph:
    """A network of one node; what is added to its output is cut from its input."""
    nodes, (source, *added) = [node], node.inputs
    for name in set(added) - {source}:
        axes = len(graph.shapes[name])
        nodes.insert(0, Move(name, [source], name, (0,) * axes, (1,) * axes))
    return Graph(nodes, graph.shapes, source, node.output)


def milliseconds(graph: Graph, machine: Machine, layout: Layout, place) -> float:
    """Of the kernels of a network of one node."""
    module, _ = lower.program(graph, machine, layout)
    calls = [call for call in lower.calls(module) if not call[0].startswith(AROUND)]
    kernels = {name: module[name].with_attr("global_symbol", name) for name, _ in calls}
    return 1e3 * sum(clock.seconds(tvm.IRModule(kernels), calls, machine, place, RUNS, ROUNDS))


def key(graph: Graph, node: Conv | Window, lanes: bool, choice: Choice | None, pattern: Pattern | None) -> str:
    """All that decides how long it takes, as JSON that can be read."""
    window = node if isinstance(node, Window) else node.first
    facts = {"layout": "lanes" if lanes else "planes", "x": graph.shapes[node.inputs[0]]}
    if window:
        fields = ("kind", "kernel", "stride", "pad", "dilation", "activation")
        facts["window"] = {name: getattr(window, name) for name in fields}
    if choice:
        fields = ("stride", "pad", "dilation", "activation")
        facts |= {"weight": node.weight.shape, **{name: getattr(node, name) for name in fields}}
        facts |= {"added": len(node.inputs) > 1, **asdict(choice)}
        del facts["cycles"]
        if choice.sparse:
            facts["sparse"] = {"block": pattern.block, "density": round(pattern.density, 3)}
    return json.dumps(facts)


class Tuner:
    """Measured cycles, and the file that keeps them. ValueError for a file of something else or of another computer."""

    def __init__(self, path: str | Path, machine: Machine, place=None):
        self.path, self.machine, self.place = Path(path), machine, place or clock.Here()
        here = {"target": str(machine.target), "threads": machine.threads}
        self.state = _read(self.path) if self.path.exists() else {**here, "cpu": self.place.processor, "times_ms": {}}
        for name, value in here.items():
            if self.state[name] != value:
                raise ValueError(f"{path} was measured with {name} {self.state[name]}, not {value}")

    def track(self, nodes: list[Node]) -> Iterator[Node]:
        """The nodes, with progress and the time left on the screen."""
        columns = (TextColumn("tuning: layer"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            yield from progress.track(nodes)

    def cycles(self, graph: Graph, node: Conv | Window, lanes: bool, choice=None, pattern=None) -> float:
        """Of a node and a batch on all threads together: measured now, or earlier."""
        name, times = key(graph, node, lanes, choice, pattern), self.state["times_ms"]
        if name not in times:
            self._check()
            network, inside = alone(graph, node), {node.output} if lanes else set()
            layout = Layout(inside, borders(network, inside), {node.output: choice}, {node.output: pattern})
            times[name] = round(milliseconds(network, self.machine, layout, self.place), 6)
            save_json(self.path, self.state)
        return times[name] * 1e6 * self.state["gigahertz"] * self.machine.threads

    def _check(self) -> None:
        """ValueError if nothing can be added to the file."""
        if not self.place.runs(self.machine):
            raise ValueError(f"{self.path} lacks kernels, and this computer cannot time {self.machine.name}'s")
        if self.state["cpu"] != self.place.processor:
            raise ValueError(f"{self.path} lacks kernels, and was measured on another processor ({self.state['cpu']})")
        if "gigahertz" not in self.state:
            one = replace(self.machine, threads=1)
            self.state["gigahertz"] = clock.peak_gflops(one, self.place) / (2 * one.lanes * one.multiply_adds)


def _read(path: Path) -> dict:
    try:
        state = json.loads(path.read_text())
        numbers = [state["threads"], state["gigahertz"], *state["times_ms"].values()]
        if not all(isinstance(number, int | float) for number in numbers) or {"target", "cpu"} - state.keys():
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no file of measured kernels, which --tune writes") from None
    return state
