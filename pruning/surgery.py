"""Physical changes to a plain network that leave its function as it was."""

import torch
from torch import Tensor, nn

from pruning.graph import Graph, Space
from pruning.patterns import blocks_intact, gathering_order, living_kernels


def gather_blocks(network: nn.Module, lengths: dict[str, int]) -> dict[str, str]:
    """Permute filters so that 1xN blocks scattered by rearrangement become N consecutive rows.

    The order is read from the zeros of the weights, so any pruned network will do, whoever pruned it.

    Args:
        network: plain layers only; changed in place, its function stays.
        lengths: layer name -> N.

    Returns:
        layer name -> why its blocks could not be made consecutive.
    """
    layers = dict(network.named_modules())

    def scattered() -> list[str]:
        return [name for name, N in lengths.items() if not blocks_intact(layers[name].weight.cpu(), N)]

    orders = {name: gathering_order(layers[name].weight.cpu(), lengths[name]) for name in scattered()}
    refused = permute(network, orders)
    # A plain layer whose channels are multiplied with sorted ones (squeeze-excite) must follow their order.
    followers = set(scattered()) - refused.keys()
    return refused | dict.fromkeys(followers, "the order of the channels it scales")


@torch.no_grad()
def permute(network: nn.Module, orders: dict[str, Tensor]) -> dict[str, str]:
    """Store the filters of layers in new orders, through all that reads or carries them.

    Args:
        network: plain layers only; changed in place, its function stays.
        orders: layer name -> int64 permutation (O,); row j of the stored weight becomes old row `order[j]`.

    Returns:
        layer name -> why its order had to stay (a residual sum, the logits, ...), for those that could not be permuted.
    """
    graph, refused, done = Graph(network), {}, {}
    for name, order in orders.items():
        space = graph.output[name]
        if space in done:
            space.fixed.add(f"the order of {done[space]}")
        if space.fixed:
            refused[name] = ", ".join(sorted(space.fixed))
            continue
        done[space] = name
        _permute_space(graph, space, torch.as_tensor(order, device=graph.layers[name].weight.device))
    return refused


def _permute_space(graph: Graph, space: Space, order: Tensor) -> None:
    for name in {*space.producers, *space.carriers}:
        for tensor in (*graph.modules[name].parameters(), *graph.modules[name].buffers()):
            if tensor.dim():  # all but num_batches_tracked have one row a channel
                tensor.copy_(tensor[order])
    for name in set(space.consumers):
        weight = graph.layers[name].weight
        # A linear layer behind a flatten sees several columns a channel.
        columns = weight.unflatten(1, (space.channels, -1))
        weight.copy_(columns[:, order].reshape(weight.shape))


def find_blocks(network: nn.Module, N: int) -> dict[str, tuple[int, str]]:
    """Of every layer with dead kernels: the longest block length of `N` and its halves, and how the blocks lie.

    Rows are compared for the same living kernels, so blocks that a rearrangement scattered are found too.
    """
    found = {}
    for name, layer in Graph(network).masked_layers().items():
        alive = living_kernels(layer.weight.cpu())
        if alive.all():
            continue
        length = N
        while length > 1 and not blocks_intact(alive[gathering_order(alive, length)], length):
            length //= 2
        whole = "intact" if blocks_intact(alive, length) else "scattered"
        found[name] = (length, f"1x{length}, {whole}" if length > 1 else "single kernels")
    return found
