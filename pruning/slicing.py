"""Channels out: a physically narrower network that computes the same.

A channel may go if every layer that reads it sees a constant there, for all pictures and all pixels: what that constant
gave the layer goes into its bias. Constants are found by running the traced network on channels instead of pictures.
"""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Constant
from pruning.graph import POOL_CALLS, POOL_MODULES, PRODUCT_CALLS, SUM, SUM_CALLS, Graph, Space


@torch.no_grad()
def slice_channels(network: nn.Module, keep: dict[str, Tensor]) -> dict[str, str]:
    """Remove output channels of layers, and all that carries or reads them.

    Args:
        network: plain layers only, eval mode; changed in place, its function stays.
        keep: name of a dense convolution or linear layer -> int64 indices of the output channels to keep. One layer
            speaks for all that share its channels (a residual sum, squeeze-excite); several must agree.

    Returns:
        layer name -> why channels stayed that were to go.

    Raises:
        ValueError: no such layer, no channel is kept, or layers that share channels disagree.
    """
    graph, refused, wanted = Graph(network), {}, {}
    for name, indices in keep.items():
        if name not in graph.output:
            raise ValueError(f"{name}: no dense convolution or linear layer that is used")
        stays = torch.zeros(len(graph.layers[name].weight), dtype=torch.bool)
        stays[indices.cpu()] = True
        if not stays.any():
            raise ValueError(f"{name}: no channel is kept")
        space = graph.output[name]
        if not torch.equal(wanted.setdefault(space, (name, stays))[1], stays):
            raise ValueError(f"{name} and {wanted[space][0]} share their channels, but are to keep different ones")

    constants = constant_inputs(graph)
    for space, (name, stays) in wanted.items():
        if space.fixed - {SUM}:
            refused[name] = ", ".join(sorted(space.fixed - {SUM}))
            continue
        needed = ~stays & needed_channels(graph, space, constants)
        if needed.any():
            refused[name] = f"{int(needed.sum())} of {int((~stays).sum())} channels are no constants to fold away"
        _slice_space(graph, space, stays | needed, constants)
    return refused


def shrink(network: nn.Module) -> None:
    """Remove, in place, every channel that nothing needs: those that masks of filters or input channels left dead."""
    slice_channels(network, living_channels(network))


def living_channels(network: nn.Module) -> dict[str, Tensor]:
    """Which output channels a layer must keep: the least `keep` that `slice_channels` obeys. One layer a space."""
    graph = Graph(network)
    constants, living = constant_inputs(graph), {}
    for space, name in {space: name for name, space in graph.output.items()}.items():
        if not space.fixed - {SUM}:
            needed = needed_channels(graph, space, constants)
            needed[0] |= not needed.any()  # a layer has at least one channel
            living[name] = needed.nonzero().flatten()
    return living


@torch.no_grad()
def remove_branches(network: nn.Module) -> list[str]:
    """Put constants in place of the branches of residual sums that give the same for every picture and pixel.

    Returns:
        the names of the layers that are gone: `Constant` stands in their place.
    """
    graph = Graph(network)
    values = _interpret(graph).env
    ends = {
        node
        for node in graph.nodes
        if node.op == "call_module"
        and isinstance(graph.modules[node.target], nn.Conv2d | nn.BatchNorm2d)
        and not values[node].isnan().any()
        and {user.target for user in node.users} <= SUM_CALLS
    }
    used = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(user in used - ends for user in node.users):
            used.add(node)
    gone = {}
    for node in graph.nodes:
        if node in ends:
            gone[node.target] = values[node]
        elif node.op == "call_module" and node not in used and [*graph.modules[node.target].parameters()]:
            gone[node.target] = values[node].new_zeros(1, 1, 1, 1)  # read by nobody but what is gone, too
    for name, value in gone.items():
        network.set_submodule(name, Constant(value.to(next(network.parameters()).dtype)))
    return list(gone)


def needed_channels(graph: Graph, space: Space, constants: dict[str, Tensor]) -> Tensor:
    """Bool (channels,): which channels of `space` some layer reads that could not do with a constant."""
    needed = torch.zeros(space.channels, dtype=torch.bool)
    for name in set(space.consumers):
        layer = graph.layers[name]
        read = (_by_channel(layer, space.channels) != 0).any(3).any(1)[0]
        needed |= read.cpu() & _foldable(layer, constants[name]).isnan().cpu()
    return needed


def constant_inputs(graph: Graph) -> dict[str, Tensor]:
    """Layer name -> float64 (input channels,): the value that a channel always has there, NaN if it varies."""
    return _interpret(graph).inputs


def _interpret(graph: Graph) -> "_Constants":
    graph.network.eval()
    interpreter = _Constants(torch.fx.GraphModule(graph.network, graph.traced))
    device = next(graph.network.parameters()).device
    interpreter.run(torch.full((1, 3, 1, 1), torch.nan, dtype=torch.float64, device=device))
    return interpreter


class _Constants(torch.fx.Interpreter):
    """Computes with (1, C, 1, 1) values that stand for whole channels: the constant that a channel holds, or NaN.

    NaN spreads by itself through activations, sums and reshapes; layers, batch norms, products and pooling, which NaN
    does not describe, have rules here. What cannot compute with such values is taken to vary.
    """

    def __init__(self, module: torch.fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.inputs: dict[str, Tensor] = {}

    def run_node(self, node: torch.fx.Node):
        try:
            return super().run_node(node)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return torch.tensor(torch.nan, dtype=torch.float64)

    def call_module(self, target: str, args: tuple, kwargs: dict):
        module, value = self.fetch_attr(target), args[0]
        if isinstance(module, nn.Conv2d | nn.Linear):
            value = self.inputs[target] = value.flatten().expand(getattr(module, "in_channels", -1)).clone()
            return _of_layer(module, value).view(1, -1, *[1] * (2 * isinstance(module, nn.Conv2d)))
        if isinstance(module, nn.BatchNorm2d):
            scale, shift = (t.double().view(1, -1, 1, 1) for t in scale_and_shift(module))
            return torch.where(scale == 0, shift, value * scale + shift)
        if isinstance(module, POOL_MODULES):
            return value if not isinstance(module, nn.AvgPool2d) else _padded(value, _pads(module))
        return super().call_module(target, args, kwargs)

    def call_function(self, target, args: tuple, kwargs: dict):
        if target in PRODUCT_CALLS:
            return _product(*args)
        if target in POOL_CALLS and target is not torch.mean:  # mean may take the spatial axes away
            return _padded(args[0], target is F.avg_pool2d)
        return super().call_function(target, args, kwargs)

    def call_method(self, target: str, args: tuple, kwargs: dict):
        return _product(*args) if target in PRODUCT_CALLS else super().call_method(target, args, kwargs)


def _product(a: Tensor, b: Tensor | float) -> Tensor:
    product = a * b
    return torch.where(torch.as_tensor((a == 0) | (b == 0)), 0.0, product)  # whatever varies is finite


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode multiplies with and then adds: two (C,)."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _by_channel(layer: nn.Module, channels: int) -> Tensor:
    """A layer's weight as (groups, outputs a group, inputs a group, what one output sees of one input)."""
    groups = getattr(layer, "groups", 1)
    # A linear layer behind a flatten sees several columns a channel.
    return layer.weight.reshape(groups, len(layer.weight) // groups, channels // groups, -1)


def _foldable(layer: nn.Module, value: Tensor) -> Tensor:
    """`value` with NaN where a constant gives the layer's outputs no constant: its padding differs from it."""
    return _padded(value, isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and _pads(layer))


def _padded(value: Tensor, padded: bool) -> Tensor:
    """Among zeros at the border only the constant zero is one still."""
    return value.where(value == 0, torch.nan) if padded else value


def _pads(layer: nn.Module) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding) if isinstance(layer.padding, tuple) else layer.padding > 0


def _of_layer(layer: nn.Module, value: Tensor) -> Tensor:
    """The constants (outputs,) that a layer makes of those of its inputs, NaN where an output sees what varies."""
    weight = _by_channel(layer, len(value)).double()
    value = _foldable(layer, value).view(weight.shape[0], 1, -1)
    sees_variation = ((weight != 0).any(3) & value.isnan()).any(2)
    total = (weight.sum(3) * value.nan_to_num(0)).sum(2)
    bias = 0 if layer.bias is None else layer.bias.double()
    return torch.where(sees_variation, torch.nan, total).flatten() + bias


def _slice_space(graph: Graph, space: Space, stays: Tensor, constants: dict[str, Tensor]) -> None:
    kept = stays.to(next(graph.network.parameters()).device).nonzero().flatten()
    for name in set(space.consumers):
        layer = graph.layers[name]
        gone = torch.where(stays.to(kept.device), 0, constants[name].nan_to_num(0))  # what varies there, nobody reads
        columns = layer.weight.unflatten(1, (space.channels, -1))
        shift = (columns.flatten(2).double().sum(2) * gone).sum(1)
        if shift.any():
            _add_to_bias(graph, name, shift)
        _replace(layer, "weight", columns[:, kept].flatten(1, 2))
    for name in {*space.producers, *space.carriers}:
        module = graph.modules[name]
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim():  # all but num_batches_tracked have one row a channel
                _replace(module, key, tensor[kept])
    for name in {*space.producers, *space.carriers, *space.consumers}:
        _refresh(graph.modules[name])


def _add_to_bias(graph: Graph, name: str, shift: Tensor) -> None:
    """Add `shift` (outputs,) to what a layer gives: by its bias, or else by the batch norm that alone reads it."""
    layer = graph.layers[name]
    if layer.bias is not None:
        layer.bias += shift
    elif norm := graph.norm_after(name):
        graph.modules[norm].running_mean -= shift
    else:
        layer.bias = nn.Parameter(shift.to(layer.weight))


def _replace(module: nn.Module, key: str, tensor: Tensor) -> None:
    old = getattr(module, key)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor.contiguous(), old.requires_grad)
    setattr(module, key, tensor)


def _refresh(module: nn.Module) -> None:
    """Let a module's numbers tell the shapes of its tensors."""
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = len(module.running_mean)
        return
    outputs, inputs = module.weight.shape[:2]
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = outputs, inputs
    elif module.groups == 1:
        module.out_channels, module.in_channels = outputs, inputs
    else:
        module.out_channels = module.in_channels = module.groups = outputs
