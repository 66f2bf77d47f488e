"""Damage for good inputs: bytes, values, trees of values and ONNX models, with chance drawn from a `random.Random`.

Every function returns the damaged thing and a few words that say what was changed. `tests/test_fuzz.py` gives them the
random numbers of hypothesis, `benchmarks/fuzz.py` those of a seed.
"""

import copy
import math
from random import Random

# Numbers at which programs break: limits of types, sizes that nobody can store, and numbers that are none.
NUMBERS = (0, -1, 1, 2, 7, 255, 65536, 10**6, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 10**30, 10**400)
NUMBERS += (0.5, -0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf)
WORDS = ("", " ", "x", "nan", "inf", "1e-4", "0x10", "true", "-1", "ümlaut", "a" * 500, "line\nline", "../..", "\0")

ATTRIBUTES = ["group", "strides", "pads", "dilations", "ceil_mode", "auto_pad", "axis", "kernel_shape", "transB"]
OPERATORS = ["Add", "Mul", "Sub", "Div", "Relu", "Conv", "Gemm", "MaxPool", "Flatten", "Reshape", "Transpose"]
OPERATORS += ["Sigmoid", "Identity", "Softmax", "Shape", "Clip", "HardSwish", "AveragePool", "BatchNormalization"]


def odd(random: Random) -> object:
    """A value that a program may not expect: a number, a word, or a container of them."""
    return random.choice(
        [
            lambda: random.choice(NUMBERS),
            lambda: random.choice(WORDS),
            lambda: random.choice([None, True, False, [], {}, [[]], {"": None}, [None], [1, "2"], {"a": {"b": 1}}]),
            lambda: [random.choice(NUMBERS), random.choice(WORDS)],
        ]
    )()


def damaged_bytes(content: bytes, random: Random, head: int = 256) -> tuple[bytes, str]:
    """One to three changes of a file's bytes, half of them among its first `head`, where headers are."""
    content, notes = bytearray(content), []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        length = len(content)
        if not length:
            break
        at = random.randrange(min(head, length) if random.random() < 0.5 else length)
        how = random.choice(["flip", "flip", "flip", "set", "cut", "zero", "remove", "repeat"])
        span = min(length - at, random.choice([1, 4, 64, 4096]))
        if how == "flip":
            content[at] ^= 1 << random.randrange(8)
        elif how == "set":
            content[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif how == "cut":
            del content[at:]
        elif how == "zero":
            content[at : at + span] = bytes(span)
        elif how == "remove":
            del content[at : at + span]
        else:
            content[at:at] = content[at : at + span]
        notes.append(f"{how} at {at}")
    return bytes(content), ", ".join(notes)


def damaged_tree(tree: object, random: Random) -> tuple[object, str]:
    """A copy of dictionaries and lists with one value changed, removed or doubled."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree, ()))
    if not places:
        return odd(random), "all"
    path, container, key = random.choice(places)
    how = random.choice(["odd", "odd", "odd", "remove", "rename"])
    note = "/".join(map(str, path))
    if how == "odd":
        container[key] = odd(random)
        return tree, f"{note} = {container[key]!r:.60}"
    value = container.pop(key)
    if how == "rename" and isinstance(container, dict):
        container[f"{key}x"] = value
    return tree, f"{how} {note}"


def _places(tree: object, path: tuple):
    """(path, container, key) of everything in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key), tree, key
        yield from _places(value, (*path, key))


def damaged_tensors(tensors: dict, random: Random) -> tuple[dict, str]:
    """A state_dict with one tensor of another type, shape or place, with numbers that are none, or gone."""
    import torch

    tensors, name = dict(tensors), random.choice(sorted(tensors))
    tensor = tensors[name]
    values = tensor.clone().flatten()
    if random.random() < 0.3:
        values[random.randrange(len(values))] = random.choice(
            [math.nan, math.inf] if values.is_floating_point() else [9]
        )
    kinds = ["float64", "float16", "bfloat16", "float8_e4m3fn", "int8", "int64", "bool", "complex64", "uint16"]
    how = random.choice(["type", "type", "shape", "shape", "values", "remove", "rename", "add", "stray", "kind"])
    note = how
    if how == "type":
        note = random.choice(kinds)
        tensors[name] = tensor.to(getattr(torch, note))
    elif how == "shape":
        note, make = random.choice(
            [
                ("flat", lambda t: t.flatten()),
                ("turned", lambda t: t.transpose(0, -1) if t.dim() else t[None]),
                ("one more axis", lambda t: t[None]),
                ("shorter", lambda t: t[1:] if t.dim() else t.reshape(1, 1)),
                ("empty", lambda t: t.flatten()[:0]),
                ("a terabyte by a stride of 0", lambda t: t.flatten()[:1].expand(1 << 19, 1 << 19)),
                ("long by a stride of 0", lambda t: t.flatten()[:1].expand(*t.shape[:1], 1 << 30)),
                ("one value", lambda t: torch.full_like(t, t.flatten()[0])),
            ]
        )
        tensors[name] = make(tensor)
    elif how == "values":
        tensors[name] = values.reshape(tensor.shape)
    elif how in ("remove", "rename"):
        del tensors[name]
        if how == "rename":
            tensors[random.choice([name + "x", "module." + name, "x." + name, name.upper()])] = tensor
    elif how == "add":
        layer = name.rpartition(".")[0]
        end = random.choice(["mask", "FilterSkeleton", "compactor.weight", "popup_scores", "weight_orig", "value", "x"])
        note = f"{layer}.{end}"
        tensors[note] = random.choice([tensor, torch.ones(3), torch.ones(()), torch.zeros(0), torch.ones_like(tensor)])
    elif how == "stray":
        tensors[random.choice([name, "odd", ""])] = odd(random)
    else:
        note, make = random.choice(
            [
                ("sparse", lambda t: t.float().to_sparse() if t.dim() else t),
                ("huge and sparse", lambda _: torch.sparse_coo_tensor([[0], [0]], [1.0], (1 << 30, 1 << 30))),
                ("quantised", lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
                ("without values", lambda t: t.to("meta")),
                ("numpy", lambda t: t.numpy()),
                ("parameter", lambda t: torch.nn.Parameter(t.float())),
            ]
        )
        tensors[name] = make(tensor)
    return tensors, f"{name}: {note}"


def damaged_model(model, random: Random) -> tuple[object, str]:
    """An onnx.ModelProto with one to two changed attributes, wires, nodes, initialisers, or shapes."""
    from onnx import AttributeProto, helper

    model = copy.deepcopy(model)
    graph, notes = model.graph, []
    whole = [number for number in NUMBERS if isinstance(number, int) and abs(number) < 2**63]
    names = [name for node in graph.node for name in (*node.input, *node.output)] + ["", "nowhere"]
    for _ in range(random.choice([1, 1, 2])):
        node = random.choice(graph.node)
        how = random.choice(["attribute", "attribute", "new", "wire", "wire", "node", "constant", "constant", "input"])
        how = "wire" if how == "attribute" and not node.attribute else how
        if how == "attribute":
            attribute = random.choice(node.attribute)
            notes.append(f"{node.op_type}.{attribute.name}")
            if attribute.type == AttributeProto.INTS and attribute.ints and random.random() < 0.8:
                attribute.ints[random.randrange(len(attribute.ints))] = random.choice(whole)
            elif attribute.type == AttributeProto.INT:
                attribute.i = random.choice(whole)
            elif attribute.type == AttributeProto.FLOAT:
                attribute.f = random.choice([0.0, -1.0, math.nan, math.inf, 1e30])
            else:
                node.attribute.remove(attribute)
        elif how == "new":
            key = random.choice(ATTRIBUTES)
            value = random.choice([0, 1, 2, [1, 1], [0, 1, 1, 0], [2, 2], [0, 0], "SAME_UPPER", 1.5, [10**6] * 2])
            node.attribute.append(helper.make_attribute(key, value))
            notes.append(f"{node.op_type}.{key} = {value}")
        elif how == "wire":
            wires = random.choice([node.input, node.input, node.output])
            if wires:
                at = random.randrange(len(wires))
                wires[at] = random.choice(names)
                notes.append(f"wire {at} of {node.op_type} to {wires[at]!r}")
        elif how == "node":
            step = random.choice(["type", "remove", "double", "move", "domain"])
            notes.append(f"{step} of {node.op_type}")
            if step == "type":
                node.op_type = random.choice(OPERATORS)
            elif step == "domain":
                node.domain = random.choice(["com.microsoft", "nowhere"])
            elif step == "double":
                graph.node.append(node)
            else:
                twin = copy.deepcopy(node)
                graph.node.remove(node)
                if step == "move" or not graph.node:
                    graph.node.insert(random.randrange(len(graph.node) + 1), twin)
        elif how == "constant" and graph.initializer:
            tensor = random.choice(graph.initializer)
            step = random.choice(["length", "length", "values", "type", "turned", "remove"])
            notes.append(f"{step} of {tensor.name}")
            if step == "length" and tensor.dims:
                tensor.dims[random.randrange(len(tensor.dims))] = random.choice(whole)
            elif step == "values":
                tensor.raw_data = random.choice([b"\xff", b"\0"]) * len(tensor.raw_data)
            elif step == "type":
                tensor.data_type = random.randrange(24)
            elif step == "turned":
                tensor.dims[:] = list(tensor.dims)[::-1]
            else:
                graph.initializer.remove(tensor)
        else:
            step = random.choice(["length", "length", "opset", "output", "type"])
            notes.append(f"{step} of the input")
            shape = graph.input[0].type.tensor_type.shape.dim
            if step == "length" and shape:
                random.choice(shape).dim_value = random.choice(whole)
            elif step == "opset":
                model.opset_import[0].version = random.choice([0, 1, 6, 7, 9, 12, 13, 17, 21, 99])
            elif step == "output":
                graph.output[0].name = random.choice(names)
            else:
                graph.input[0].type.tensor_type.elem_type = random.randrange(24)
    return model, ", ".join(notes)
