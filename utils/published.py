"""What published code does beside what its paper says, and users rely on: by the network's own name, or by an option.

Wrapped blocks are `--blocks reference`; other ways of published code are `--fidelity reference` of their method.
"""

from collections.abc import Callable


def _every_second(names: list[str]) -> set[str]:
    """Every second layer, so that projections stay and expansions are sorted; squeeze-excite layers are not counted."""
    chosen, sort_next = set(), False
    for name in names:
        if sort_next:
            chosen.add(name)
        sort_next = not sort_next and "fc" not in name
    return chosen


# 1xN pruning: which layers of its five networks are rearranged, from the names of all layers that are pruned.
REARRANGED: dict[str, Callable[[list[str]], set[str]]] = {
    "mobilenet_v1": set,
    "mobilenet_v2": _every_second,
    "mobilenet_v3_small": _every_second,
    "mobilenet_v3_large": _every_second,
    "resnet50": lambda names: {name for name in names if not name.endswith("conv3")},
}

# BiP: after which shares of the training the step schedule of the scores has their rate at a tenth, a hundredth.
BIP_DECAYS = {"paper": (0.75, 0.9), "reference": (0.5, 0.75)}

# ResRep: how many multiply-adds it counts for one, by network, from a layer's name. On CIFAR it takes projections for
# 2x2 convolutions, which are 1x1.
COUNTED_MACS: dict[str, Callable[[str], int]] = dict.fromkeys(
    ("resnet56_b", "resnet110_b"), lambda name: 4 if name.endswith("downsample.0") else 1
)

# Stripe-wise pruning trains these networks from batch-norm scales of one half.
FIRST_NORM_SCALE = dict.fromkeys(("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn", "resnet56_projection"), 0.5)

# 1xN pruning: the step policy of the learning rate decays once more from this epoch on, whatever the interval is.
EXTRA_DECAY_FROM = 80
