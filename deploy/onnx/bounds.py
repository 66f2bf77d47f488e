"""What is refused before a node is read or computed: shapes that do not fit, and sizes that nothing could hold."""

import math

import numpy as np

MOST_VALUES = 2**29  # of a tensor: kernels count in 32 bits, and a halo and padding come on top
MOST_PIXELS, LONGEST = 2**22, 2**18  # of a map and of its sides: the places of its tiles are listed one by one
MOST_CONSTANTS = 2**28  # values of all constants that are computed here, together
MOST_TAPS = 1024  # of a window, for each of which there is code
SMALL = 4096  # values of a constant whose values may decide a shape


def name(node) -> str:
    return node.name or node.output[0]


def title(node) -> str:
    return f"node {name(node)!r} (operator {node.op_type})"


def check_window(node, attributes: dict) -> None:
    """ValueError for strides, dilations, kernels and padding that no convolution or pooling has."""
    for key, least in {"strides": 1, "dilations": 1, "kernel_shape": 1, "pads": 0}.items():
        numbers = attributes.get(key, ())
        if any(number < least for number in numbers):
            raise ValueError(f"{title(node)} has {key} {list(numbers)}; each must be at least {least}")
    if math.prod(attributes.get("kernel_shape", ())) > MOST_TAPS:
        raise ValueError(
            f"{title(node)} has a window of {list(attributes['kernel_shape'])}, at most {MOST_TAPS} pixels"
        )


def check_outputs(node, attributes: dict) -> None:
    """ValueError for a number of outputs that is not that of the node, for which ONNX's rules would make as many."""
    count = attributes.get("num_outputs", len(node.output))
    if count != len(node.output):
        raise ValueError(f"{title(node)} has num_outputs {count} and {len(node.output)} outputs")


def inferred(node, opsets: dict[str, int], shapes: dict, constants: dict) -> dict[str, tuple[int, ...]]:
    """The shape of every output that ONNX's rules can tell from the inputs. ValueError where those do not fit."""
    from onnx import defs, helper, numpy_helper, shape_inference

    opset = opsets.get(node.domain, 1)
    if node.op_type == "MaxPool":  # the rule of older opsets counts windows that start in the padding below
        opset = max(opset, 22)
    try:
        schema = defs.get_schema(node.op_type, opset, node.domain)
    except defs.SchemaError:
        raise ValueError(f"{title(node)} is no operator of opset {opsets.get(node.domain)}") from None
    types, data = {}, {}
    for name in filter(None, node.input):
        if name in constants:
            value = np.asarray(constants[name])
            types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            if value.size <= SMALL:
                data[name] = numpy_helper.from_array(value, name)
        elif name in shapes:
            types[name] = helper.make_tensor_type_proto(
                helper.np_dtype_to_tensor_dtype(np.dtype("float32")), shapes[name]
            )
        else:
            return {}
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    try:
        found = shape_inference.infer_node_outputs(schema, node, types, data, opset_imports=imports)
    except Exception as error:  # of C++
        reason = str(error).strip().splitlines()[0].split("] ")[-1]
        raise ValueError(f"{title(node)} does not fit its inputs ({reason})") from error
    outputs = {}
    for name, kind in found.items():
        dims = kind.tensor_type.shape.dim if kind.tensor_type.HasField("shape") else [None]
        if all(dim is not None and dim.HasField("dim_value") for dim in dims):
            outputs[name] = tuple(dim.dim_value for dim in dims)
            check_size(node, outputs[name])
    return outputs


def small_map(shape) -> bool:
    """Whether a tensor is no map, or one of a size that can be compiled in seconds."""
    return len(shape) != 4 or (math.prod(shape[2:]) <= MOST_PIXELS and max(shape[2:]) <= LONGEST)


def check_size(node, shape) -> None:
    if math.prod(shape) > MOST_VALUES:
        raise ValueError(f"{title(node)} makes a tensor {tuple(shape)}, which holds more than {MOST_VALUES} values")
