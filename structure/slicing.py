"""Networks with fewer channels: channels removed so that the function stays, and the shapes of narrower files taken.

A channel can be removed if every layer that reads it reads a constant there, the same for all pictures and all pixels.
What that constant added to the layer's outputs goes into the layer's bias.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from structure.constants import Constant, by_channel, constant_inputs, foldable, interpret
from structure.graph import Graph, norms_after_convolutions
from structure.operators import SUM_CALLS, needs_shape
from structure.spaces import Space, Spaces


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

    constants, kept = constant_inputs(graph), {}
    for space, (name, stays) in wanted.items():
        if space.whole:
            refused[name] = ", ".join(sorted(space.whole))
            continue
        needed = ~stays & needed_channels(graph, space, constants)
        if needed.any():
            refused[name] = f"{int(needed.sum())} of {int((~stays).sum())} channels are no constants to fold away"
        kept[space] = stays | needed
    _slice(graph, kept, constants)
    return refused


def shrink(network: nn.Module) -> None:
    """Remove, in place, every channel that no layer needs, such as those that a mask of whole filters left dead."""
    slice_channels(network, living_channels(network))


def living_channels(network: nn.Module) -> dict[str, Tensor]:
    """The smallest `keep` that `slice_channels` can obey: layer name -> int64 indices, for one layer of each space."""
    graph = Graph(network)
    constants, living = constant_inputs(graph), {}
    for space, name in {space: name for name, space in graph.output.items()}.items():
        if not space.whole:
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
        if node.op == "output" or needs_shape(node) or any(user in used - ends for user in node.users):
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
        layer, start = graph.layers[name], 0
        read = (by_channel(layer, len(constants[name])) != 0).any(3).any(1).flatten()
        read = (read & foldable(layer, constants[name]).isnan()).cpu()
        for part in graph.input[name]:
            if part is space:
                needed |= read[start : start + part.channels]
            start += part.channels
    return needed


def _slice(graph: Graph, stays: dict[Space, Tensor], constants: dict[str, Tensor]) -> None:
    """Keep of each space the channels that bool (channels,) says, in all layers that read, carry or write them."""
    device = next(graph.network.parameters()).device

    def of(spaces: Spaces) -> Tensor:
        everything = [stays.get(space, torch.ones(space.channels, dtype=torch.bool)) for space in spaces]
        return torch.cat(everything).to(device)

    for name in {name for space in stays for name in space.consumers}:
        layer, stay = graph.layers[name], of(graph.input[name])
        # A channel that varies and goes all the same is read with zero weights only, so that it adds nothing.
        gone = torch.where(stay, 0, constants[name].nan_to_num(0))
        columns = layer.weight.unflatten(1, (len(stay), -1))
        shift = (columns.flatten(2).double().sum(2) * gone).sum(1)
        if shift.any():
            _add_to_bias(graph, name, shift)
        replace(layer, {"weight": columns[:, stay].flatten(1, 2)})
    for name in {name for space in stays for name in (*space.producers, *space.carriers)}:
        module, stay = graph.modules[name], of(graph.rows(name))
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        replace(module, {key: tensor[stay] for key, tensor in own if tensor.dim()})  # num_batches_tracked has no rows


def _add_to_bias(graph: Graph, name: str, shift: Tensor) -> None:
    """Add `shift` (outputs,) to the outputs of a layer: to its bias, or else in the batch norm that alone reads it."""
    layer = graph.layers[name]
    if layer.bias is not None:
        layer.bias += shift
    elif norm := graph.norm_after(name):
        graph.modules[norm].running_mean -= shift
    else:
        layer.bias = nn.Parameter(shift.to(layer.weight))


def replace(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer tensors of other shapes; the numbers of channels that it states follow them.

    Args:
        module: a convolution, linear layer, batch norm or PReLU. A depthwise convolution keeps one group for each
            channel, any other convolution keeps its number of groups.
        tensors: name of a parameter or buffer of the module -> its new value.
    """
    for name, tensor in tensors.items():
        if name in module._parameters:
            old = module._parameters[name]
            tensor = nn.Parameter(tensor.contiguous(), requires_grad=old is None or old.requires_grad)
        setattr(module, name, tensor)
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        outputs, inputs = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:
            module.groups = outputs
        module.out_channels, module.in_channels = outputs, inputs * module.groups


def narrow(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give the layers of `network`, in place, the shapes of a narrower network's `state_dict`, but not its values.

    Where `state` has no batch norm but a bias of the convolution before it, the two were merged: `nn.Identity` replaces
    the batch norm. Where it has a `value` for a layer, the layer was removed with its branch: `Constant` replaces it.
    A layer stays as it is where `state` has a wider one, so that loading `state` fails.
    """
    convolutions = norms_after_convolutions(network)
    for name, module in list(network.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            continue
        if f"{name}.value" in state:
            network.set_submodule(name, Constant(state[f"{name}.value"].to(module.weight.device)))
        elif f"{name}.weight" in state:
            if isinstance(module, nn.Conv2d) and module.bias is None and f"{name}.bias" in state:
                module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
            replace(module, _unset_tensors(name, module, state))
        elif f"{convolutions.get(name)}.bias" in state:
            network.set_submodule(name, nn.Identity())
    return network


def _unset_tensors(layer: str, module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Uninitialised tensors for a layer: those that `state` has for it, if they have no more rows and columns."""
    unset = {}
    for name, ours in [*module.named_parameters(), *module.named_buffers()]:
        theirs = state.get(f"{layer}.{name}")
        if theirs is None or not ours.dim():
            continue
        shape = theirs.shape[: min(2, ours.dim())]  # rows and columns; kernels keep their size
        if shape and all(few <= many for few, many in zip(shape, ours.shape, strict=False)):
            unset[name] = ours.new_empty((*shape, *ours.shape[2:]))
    return unset


def widths(network: nn.Module) -> dict[str, int]:
    """Convolution or linear layer -> its number of output channels."""
    layers = network.named_modules()
    return {name: len(layer.weight) for name, layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)}
