"""Store filters in another order."""

import torch
from torch import Tensor, nn

from structure.graph import Graph, Space


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
            if tensor.dim():  # num_batches_tracked has no row a channel
                tensor.copy_(tensor[order])
    for name in set(space.consumers):
        weight = graph.layers[name].weight
        # A linear layer behind a flatten has several columns a channel.
        columns = weight.unflatten(1, (space.channels, -1))
        weight.copy_(columns[:, order].reshape(weight.shape))
