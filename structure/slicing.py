"""Remove channels: a physically narrower network that computes the same.

A channel can be removed if every layer that reads it reads a constant there, the same for all pictures and all pixels.
What that constant added to the layer's outputs goes into the layer's bias.
"""

import torch
from torch import Tensor, nn

from structure.constants import Constant, by_channel, constant_inputs, foldable, interpret
from structure.graph import SUM, SUM_CALLS, Graph, Space
from structure.resizing import replace


@torch.no_grad()
def slice_channels(network: nn.Module, keep: dict[str, Tensor]) -> dict[str, str]:
    """Remove output channels of layers, with all that carries or reads them.

    Args:
        network: plain layers only; changed in place, its function in eval mode stays.
        keep: name of a dense convolution or linear layer -> int64 indices of the output channels to keep. It holds for
            all layers that share these channels (a residual sum, squeeze-excite); if several are named, they must
            agree.

    Returns:
        layer name -> why some of its channels stayed that were to go.

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
    """Remove, in place, every channel that no layer needs, such as those that a mask of whole filters left dead."""
    slice_channels(network, living_channels(network))


def living_channels(network: nn.Module) -> dict[str, Tensor]:
    """The smallest `keep` that `slice_channels` can obey: layer name -> int64 indices, for one layer of each space."""
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
    """Replace the branches of residual sums whose outputs are the same for every picture and pixel by constants.

    Returns:
        the names of the removed layers: a `Constant` has taken the place of each.
    """
    graph = Graph(network)
    values = interpret(graph).env
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
            gone[node.target] = values[node].new_zeros(1, 1, 1, 1)  # only removed layers read it
    for name, value in gone.items():
        network.set_submodule(name, Constant(value.to(next(network.parameters()).dtype)))
    return list(gone)


def needed_channels(graph: Graph, space: Space, constants: dict[str, Tensor]) -> Tensor:
    """Bool (channels,): the channels of `space` that vary, or whose constant some layer cannot add to its bias."""
    needed = torch.zeros(space.channels, dtype=torch.bool)
    for name in set(space.consumers):
        layer = graph.layers[name]
        read = (by_channel(layer, space.channels) != 0).any(3).any(1)[0]
        needed |= read.cpu() & foldable(layer, constants[name]).isnan().cpu()
    return needed


def _slice_space(graph: Graph, space: Space, stays: Tensor, constants: dict[str, Tensor]) -> None:
    stays = stays.to(next(graph.network.parameters()).device)
    kept = stays.nonzero().flatten()
    for name in set(space.consumers):
        layer = graph.layers[name]
        # A channel that varies and goes all the same is read with zero weights only, so that it adds nothing.
        gone = torch.where(stays, 0, constants[name].nan_to_num(0))
        columns = layer.weight.unflatten(1, (space.channels, -1))
        shift = (columns.flatten(2).double().sum(2) * gone).sum(1)
        if shift.any():
            _add_to_bias(graph, name, shift)
        replace(layer, {"weight": columns[:, kept].flatten(1, 2)})
    for name in {*space.producers, *space.carriers}:
        module = graph.modules[name]
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        replace(module, {key: tensor[kept] for key, tensor in own if tensor.dim()})  # num_batches_tracked has no rows


def _add_to_bias(graph: Graph, name: str, shift: Tensor) -> None:
    """Add `shift` (outputs,) to the outputs of a layer: to its bias, or else in the batch norm that alone reads it."""
    layer = graph.layers[name]
    if layer.bias is not None:
        layer.bias += shift
    elif norm := graph.norm_after(name):
        graph.modules[norm].running_mean -= shift
    else:
        layer.bias = nn.Parameter(shift.to(layer.weight))
