"""Store filters in another order."""

import torch
from torch import Tensor, nn

from structure.graph import Graph
from structure.spaces import Space, Spaces


@torch.no_grad()
def permute(network: nn.Module, orders: dict[str, Tensor]) -> dict[str, str]:
    """Store the filters of layers in new orders, through all that reads or carries them.

    Args:
        network: plain layers only; changed in place, its function stays.
        orders: layer name -> int64 permutation (O,); row j of the stored weight becomes old row `order[j]`.

    Returns:
        layer name -> why its order had to stay (a residual sum, the logits, ...), for those that could not be permuted.
    """
    graph, refused, done, taken = Graph(network), {}, {}, {}
    for name, order in orders.items():
        space = graph.output[name]
        if space in done:
            space.fixed.add(f"the order of {done[space]}")
        if space.fixed:
            refused[name] = ", ".join(sorted(space.fixed))
            continue
        done[space] = name
        taken[space] = torch.as_tensor(order, device=graph.layers[name].weight.device)
    for name in {name for space in taken for name in (*space.producers, *space.carriers)}:
        rows = _order(graph.rows(name), taken)
        for tensor in (*graph.modules[name].parameters(), *graph.modules[name].buffers()):
            if tensor.dim():  # num_batches_tracked has no row a channel
                tensor.copy_(tensor[rows])
    for name in {name for space in taken for name in space.consumers}:
        weight, order = graph.layers[name].weight, _order(graph.input[name], taken)
        # A linear layer behind a flatten has several columns a channel.
        columns = weight.unflatten(1, (len(order), -1))
        weight.copy_(columns[:, order].reshape(weight.shape))
    return refused


def _order(spaces: Spaces, orders: dict[Space, Tensor]) -> Tensor:
    """The order of a tensor's channels, if those of its `spaces` take new orders."""
    parts, start = [], 0
    like = next(iter(orders.values()))
    for space in spaces:
        own = orders.get(space)
        parts.append(start + (torch.arange(space.channels, device=like.device) if own is None else own))
        start += space.channels
    return torch.cat(parts)
