"""Passes over the graph before kernels are chosen: one function each, in the order of PASSES."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..dump import forget
from .graph import Affine, Conv, Graph, Node, Window


def _merge(graph: Graph, producer: Node, node: Node, **changes) -> None:
    """Put `producer`, changed and now writing `node`'s output, in `node`'s place."""
    graph.nodes[graph.nodes.index(node)] = replace(producer, output=node.output, **changes)
    graph.nodes.remove(producer)


def _linear(node: Node | None) -> bool:
    """Whether it is a convolution without activation or residual, so that a scale can go into its weights."""
    convolution = isinstance(node, Conv) or (isinstance(node, Window) and node.kind == "conv")
    return convolution and node.activation is None and node.grid is None and len(node.inputs) == 1


def _end(node: Node) -> dict:
    """What is done to a node's output at last, as fields of the node that it is merged into."""
    return {"activation": node.activation, "grid": node.grid}


def _producers(graph: Graph) -> dict[str, Node]:
    return {node.output: node for node in graph.nodes}


def forget_unused(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.output not in graph.outputs.values() and not graph.users(node.output):
            graph.nodes.remove(node)


def fold_constants(graph: Graph) -> None:
    """A constant scale and shift (batch normalisation, a bias) goes into the convolution before it."""
    for node in list(graph.nodes):
        producer = _producers(graph).get(node.inputs[0])
        if not isinstance(node, Affine) or isinstance(node.scale, str) or isinstance(node.shift, str):
            continue
        if (
            not _linear(producer)
            or graph.only_user(producer) is not node
            or (node.scale is None and node.shift is None)
        ):
            continue
        scale = np.ones_like(producer.bias) if node.scale is None else node.scale
        shift = np.zeros_like(producer.bias) if node.shift is None else node.shift
        weight = producer.weight * scale.reshape(-1, *[1] * (producer.weight.ndim - 1))
        changes = {"weight": weight, "bias": producer.bias * scale + shift}
        if isinstance(producer, Conv) and producer.scale is not None:
            changes["scale"] = producer.scale * scale
        _merge(graph, producer, node, **changes, **_end(node))


def join_affines(graph: Graph) -> None:
    """Scale, shift and activation that stand alone, one after the other, become one node."""
    for node in list(graph.nodes):
        producer = _producers(graph).get(node.inputs[0])
        if not (isinstance(node, Affine) and isinstance(producer, Affine)) or producer.activation or producer.grid:
            continue
        if graph.only_user(producer) is node and node.scale is None and (node.shift is None or producer.shift is None):
            inputs = producer.inputs + node.inputs[1:]
            shift = producer.shift if node.shift is None else node.shift
            _merge(graph, producer, node, inputs=inputs, shift=shift, **_end(node))


def find_hard_activations(graph: Graph) -> None:
    """Exporters write hard-sigmoid as clip(x + 3, 0, 6) / 6 and hard-swish as x times that: put the names back."""
    for node in list(graph.nodes):
        producer = _producers(graph).get(node.inputs[0])
        if not (
            isinstance(node, Affine) and isinstance(node.scale, np.ndarray) and node.shift is node.activation is None
        ) or (isinstance(producer, Affine) and producer.grid):
            continue
        if not (isinstance(producer, Affine) and producer.scale is None and isinstance(producer.shift, np.ndarray)):
            continue
        alpha, shift = float(node.scale[0]), float(producer.shift[0])
        uniform = np.all(node.scale == alpha) and np.all(producer.shift == shift)
        if not uniform or not producer.activation or producer.activation[:2] != ("clip", 0.0):
            continue
        if graph.only_user(producer) is node and np.isclose(alpha * (producer.activation[2] or 0.0), 1.0):
            made = ("hard_sigmoid", alpha, alpha * shift)
            _merge(graph, producer, node, shift=None, activation=made, grid=node.grid)
    for node in list(graph.nodes):
        if not isinstance(node, Affine) or not isinstance(node.scale, str):
            continue
        for gate_name, x in ((node.scale, node.inputs[0]), (node.inputs[0], node.scale)):
            gate = _producers(graph).get(gate_name)
            if not isinstance(gate, Affine) or gate.scale is not None or gate.shift is not None or gate.grid:
                continue
            kind, *numbers = gate.activation or (None,)
            soft = kind == "sigmoid"
            hard = kind == "hard_sigmoid" and np.allclose(numbers, (1 / 6, 0.5))
            if gate.inputs == [x] and (soft or hard) and node.shift is None and node.activation is None:
                index = graph.nodes.index(node)
                swish = ("swish",) if soft else ("hard_swish",)
                graph.nodes[index] = Affine(node.name, [x], node.output, activation=swish, grid=node.grid)
                break
    forget_unused(graph)


def fuse_activations(graph: Graph) -> None:
    """An activation or a rounding alone goes into the store of whatever computes its input."""
    for node in list(graph.nodes):
        producer = _producers(graph).get(node.inputs[0])
        alone = isinstance(node, Affine) and node.scale is None and node.shift is None
        if not alone or not isinstance(producer, Conv | Window | Affine) or producer.grid:
            continue
        both = node.activation is not None and producer.activation is not None
        if not both and graph.only_user(producer) is node:
            _merge(graph, producer, node, activation=producer.activation or node.activation, grid=node.grid)


def fuse_residuals(graph: Graph) -> None:
    """A sum of two maps goes into the store of the convolution that makes one of them: the one that runs last."""
    for node in list(graph.nodes):
        if not isinstance(node, Affine) or not isinstance(node.shift, str) or node.scale is not None:
            continue
        if graph.shapes[node.shift] != graph.shapes[node.output]:
            continue
        producers = _producers(graph)
        made = [(producers.get(name), other) for name, other in zip(node.inputs, reversed(node.inputs), strict=True)]
        made = [
            (conv, other)
            for conv, other in made
            if isinstance(conv, Conv)
            and conv.activation is None
            and len(conv.inputs) == 1
            and graph.only_user(conv) is node
        ]
        if made:
            conv, other = max(made, key=lambda pair: graph.nodes.index(pair[0]))
            _merge(graph, conv, node, inputs=[conv.inputs[0], other], before=conv.grid, **_end(node))


def fuse_depthwise(graph: Graph) -> None:
    """A depthwise convolution that only a pointwise one reads is computed with it."""
    for node in list(graph.nodes):
        if not isinstance(node, Conv) or node.weight.shape[2:] != (1, 1) or node.stride != (1, 1) or node.pad != (0, 0):
            continue
        window = _producers(graph).get(node.inputs[0])
        if isinstance(window, Window) and window.kind == "conv" and graph.only_user(window) is node:
            node.depthwise, node.inputs = window, [*window.inputs, *node.inputs[1:]]
            graph.nodes.remove(window)


PASSES = [
    forget_unused,
    fold_constants,
    join_affines,
    find_hard_activations,
    fuse_activations,
    fuse_residuals,
    fuse_activations,
    fuse_depthwise,
]


def simplify(graph: Graph, dump: Callable = forget) -> Graph:
    """Run PASSES; `dump(name, graph)` sees what was read and what each pass made of it."""
    dump("read_onnx", graph)
    for run in PASSES:
        run(graph)
        dump(run.__name__, graph)
    return graph
