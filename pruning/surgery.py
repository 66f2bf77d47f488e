"""1xN blocks in a plain network: found in its weights, and gathered into consecutive rows."""

from torch import nn

from pruning.groups import blocks_intact, living_kernels
from pruning.order import gathering_order
from structure import Graph, permute


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
