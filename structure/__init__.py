"""What the graph of a network says about its channels, and changes of structure that keep the network's function.

Nothing here knows a pruning method or one of our networks: only layers of `torch.nn`, read from the traced network.
"""

from structure.capture import evaluating, layer_inputs
from structure.constants import Constant, constant_inputs
from structure.graph import Graph, norms_after_convolutions
from structure.merging import fuse_batch_norm, fuse_pointwise
from structure.permutation import permute
from structure.plain import SamePadding, plainify
from structure.slicing import living_channels, narrow, remove_branches, shrink, slice_channels, widths
from structure.spaces import LOGITS, SUM, Space, Spaces
from structure.walk import CHANGED, DENSE, Walk

__all__ = [
    "CHANGED",
    "DENSE",
    "LOGITS",
    "SUM",
    "Constant",
    "Graph",
    "SamePadding",
    "Space",
    "Spaces",
    "Walk",
    "constant_inputs",
    "evaluating",
    "fuse_batch_norm",
    "fuse_pointwise",
    "layer_inputs",
    "living_channels",
    "narrow",
    "norms_after_convolutions",
    "permute",
    "plainify",
    "remove_branches",
    "shrink",
    "slice_channels",
    "widths",
]
