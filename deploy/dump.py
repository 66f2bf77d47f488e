"""Write a program after each of its passes, as numbered text files."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np

from .graph import Graph


def forget(name: str, program) -> None:
    """The dump that writes nothing."""


def into(folder: str | Path) -> Callable:
    """A function (name, program) that writes the n-th program it is given to folder/n_name.txt."""
    folder, written = Path(folder), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("[0-9][0-9]_*.txt"):
            stale.unlink()
    except OSError as error:
        raise ValueError(f"--dump_dir {folder} cannot be written: {error.strerror}") from error

    def write(name: str, program) -> None:
        written.append(name)
        text = describe(program) if isinstance(program, Graph) else program.script()
        (folder / f"{len(written):02}_{name}.txt").write_text(text)

    return write


def describe(graph: Graph) -> str:
    """A line a node: output shape = kind(inputs) and what else the node holds; arrays by shape and non-zero share."""
    lines = [f"{graph.input} {graph.shapes[graph.input]}"]
    for node in graph.nodes:
        rest = {f.name: getattr(node, f.name) for f in fields(node) if f.name not in ("name", "inputs", "output")}
        rest = ", ".join(f"{name}={_value(value)}" for name, value in rest.items() if value is not None)
        kind, inputs = type(node).__name__, ", ".join(node.inputs)
        lines.append(f"{node.output} {graph.shapes[node.output]} = {kind}({inputs}; {rest})  # {node.name}")
    return "\n".join([*lines, f"return {graph.output}"]) + "\n"


def _value(value) -> str:
    if not isinstance(value, np.ndarray):
        return str(value)
    return f"{value.dtype}{list(value.shape)} {np.count_nonzero(value) / max(1, value.size):.0%} non-zero"
