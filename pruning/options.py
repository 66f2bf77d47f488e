"""The options of every pruning method, and the table of methods: which class, in which module, takes which options.

An option belongs to the methods whose class declares it; other methods refuse it. Options that a run has for every
method (`lr`, `seed`) belong to the run: a class that declares a field of the same name is given the run's value. This
module needs no torch: a method's own module is imported when the method is created.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from pruning.score import SCORES
from utils.declare import Declared, option

FIDELITY = "as the paper says, or as its published code does"
BUDGET = "uniform: the same rate in every layer; global: one ranking over all layers"


@dataclass(frozen=True)
class NoOptions(Declared):
    """Dense training has none."""


@dataclass(frozen=True)
class OneShotOptions(Declared):
    """How much is pruned, in which layers and when, for masks that are chosen by a score."""

    pr_target: float = option(0.5, "share to prune in every layer (global budget: of all weights)", within="[0, 1)")
    full: bool = option(False, "prune the classifier too")
    budget: str = option("uniform", BUDGET, choices=("uniform", "global"))
    max_rate: float = option(0.9, "the most that a layer loses under a global budget", within="[0, 1)")
    rates: Path | dict | None = option(None, "YAML file of layer-name patterns and their rates, instead of --pr_target")
    schedule: str = option("oneshot", "growth of the rate while training", choices=("oneshot", "linear", "cubic"))
    schedule_end: float = option(0.5, "share of training after which the rate has grown to its end", within="(0, 1]")
    schedule_every: int = option(50, "updates between two selections of a growing rate", within="[1, inf)")
    repair: bool = option(False, "fit what is kept to the dense network, without labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget == "global" and self.rates:
            raise ValueError("--budget global: ranks all layers together, so not with --rates")


@dataclass(frozen=True)
class ScoredOptions(OneShotOptions):
    """Masks that are chosen by a score of the weights, not by chance."""

    score: str | None = option(
        None,
        "importance of a weight: its size (l1, l2), |weight x gradient| on a few batches (taylor), or what its loss "
        "costs a repaired layer (obs) (default: obs under --repair where that can serve, else l1)",
        choices=tuple(SCORES),
    )


@dataclass(frozen=True)
class RandomOptions(OneShotOptions):
    """Masks that are chosen by chance."""

    blocks: str = option(
        "aligned",
        "random groups are drawn without (aligned) or, as published, with replacement (reference)",
        choices=("aligned", "reference"),
    )
    seed: int = option(0, "of the random choice")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget == "global":
            raise ValueError("--budget global: ranks by a score, so not for random methods")


@dataclass(frozen=True)
class BlockShape(Declared):
    """What 1xN blocks have beside any other pattern."""

    N: int = option(16, "block length: output kernels that live or die together", within="[1, inf)")
    rearrange: bool = option(False, "form blocks among reordered filters")
    rearrange_by: str = option(
        "sort", "the order: by L1 norm, as published, or so that more weight is kept", choices=("sort", "cluster")
    )
    blocks: str = option(
        "aligned",
        "where N does not divide a layer: a shorter last block, or, as published, wrapped (reference)",
        choices=("aligned", "reference"),
    )
    balanced: bool = option(False, "every N rows lose equally many blocks, for threads that share the work")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks == "reference" and (self.balanced or self.rearrange_by != "sort"):
            raise ValueError("--blocks reference: as published, without --balanced and --rearrange_by cluster")


@dataclass(frozen=True)
class BlockOptions(BlockShape, ScoredOptions):
    """1xN blocks chosen by a score."""


@dataclass(frozen=True)
class RandomBlockOptions(BlockShape, RandomOptions):
    """1xN blocks chosen by chance; `blocks` "reference" also draws them with replacement, as published."""


@dataclass(frozen=True)
class SelectiveOptions(Declared):
    """What methods that keep the groups of the highest scores have in common."""

    layer_type: str = option(
        "unstructured",
        "what is kept or goes as one: weights, filters, input channels, or 1xN blocks",
        choices=("unstructured", "filter", "channel", "block"),
    )
    k: float = option(0.1, "share of weights, filters, channels or blocks to keep", within="(0, 1]")
    N: int | None = option(None, "block length of --layer_type block (default: 16)", within="[1, inf)")
    budget: str | None = option(
        None, f"{BUDGET} (default: global for single weights, else uniform)", choices=("uniform", "global")
    )
    fidelity: str = option("paper", FIDELITY, choices=("paper", "reference"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.N is not None and self.layer_type != "block":
            raise ValueError(f"--N {self.N}: for --layer_type block, not {self.layer_type}")

    @property
    def length(self) -> int:
        """How many rows share a fate."""
        return (self.N or 16) if self.layer_type == "block" else 1


@dataclass(frozen=True)
class HydraOptions(SelectiveOptions):
    """Scores that are learned beside frozen weights."""

    exp_mode: str = option(
        "prune",
        "dense training, learning masks, or training under those that were learned",
        choices=("pretrain", "prune", "finetune"),
    )
    score_init: str = option("magnitude", "scores start as the weights, or random", choices=("magnitude", "random"))


@dataclass(frozen=True)
class BiPOptions(HydraOptions):
    """Scores and weights that are learned in turn."""

    mask_lr: float = option(0.1, "peak learning rate of the scores", within="[0, inf)")
    mask_lr_policy: str = option(
        "cos", "schedule of the scores' learning rate", "--mask_lr_schedule", choices=("cos", "step")
    )
    lr2: float = option(1e-4, "weight of the implicit gradient, 1 / gamma", within="[0, inf)")
    accelerate: bool = option(False, "scores first, without the implicit gradient, then weights")
    lr: float = option(0.01, "peak learning rate of the weights", within="(0, inf)")


@dataclass(frozen=True)
class IMPOptions(SelectiveOptions):
    """Magnitude pruning in rounds."""

    rounds: int = option(1, "rounds of pruning and training; 1: one-shot magnitude", within="[1, inf)")
    rewind: bool = option(True, "rounds start from the weights that the run started from")


@dataclass(frozen=True)
class ResRepOptions(Declared):
    """The published schedules are the defaults."""

    flops_target: float = option(0.455, "multiply-adds to keep, as a share of the dense network's", within="(0, 1]")
    tied_groups: bool = option(False, "prune channels of residual sums, too, a group of layers together")
    lasso_strength: float = option(1e-4, "strength of the penalty on compactor rows", within="[0, inf)")
    before_mask_iters: int | None = option(
        None, "updates before channels are chosen (default: five epochs)", within="[0, inf)"
    )
    mask_interval: int = option(200, "updates between two choices of channels", within="[1, inf)")
    mask_end: float = option(
        1.0, "share of the training after which the choice stands, so that short runs can forget", within="(0, 1]"
    )
    begin_granularity: int = option(
        4, "by how many channels a choice grows until the target is reached", within="[1, inf)"
    )
    num_at_least: int = option(1, "channels that every layer keeps", within="[1, inf)")
    compactor_momentum: float = option(0.99, "momentum of compactors; the first beta of adam", within="[0, 1)")
    decay_compactors: bool = option(False, "apply weight decay to compactors")
    bias_lr_factor: float = option(2.0, "factor of the learning rate of biases", within="[0, inf)")
    conversion_threshold: float = option(1e-5, "compactor rows of a smaller norm are zero", within="[0, inf)")
    round_to: int = option(1, "keep widths to multiples of it", within="[1, inf)")
    fidelity: str = option("paper", FIDELITY, choices=("paper", "reference"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fidelity == "reference" and self.round_to > 1:
            raise ValueError(f"--round_to {self.round_to}: not published, so not with --fidelity reference")


@dataclass(frozen=True)
class StripeOptions(Declared):
    """The strength of the penalty as published (`sr`), or adapted so that a target is reached."""

    sr: float | None = option(
        None, "strength of the L1 penalty (default: adapts, to end at --pr_target)", within="[0, inf)"
    )
    threshold: float = option(0.05, "a stripe whose scale is this or less goes", within="(0, 1)")
    pr_target: float = option(0.5, "share to prune, where the strength adapts", within="[0, 1)")
    pr_unit: str = option(
        "stripes", "what --pr_target is a share of: stripes, or their multiply-adds", choices=("stripes", "macs")
    )
    max_rate: float = option(0.9, "the most that a layer which everything flows through loses", within="[0, 1)")
    schedule_end: float = option(0.5, "share of training after which --pr_target is reached", within="(0, 1]")
    freeze_weights: float = option(
        0.0, "share of training in which only scales are trained; alone, all of it", within="[0, 1]", alone=1.0
    )


@dataclass(frozen=True)
class Row:
    """A method: the module and class that make it, what --list says of it, and the class of its options."""

    module: str
    name: str
    about: str
    options: type[Declared] = field(default=NoOptions)

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the method's options."""
        return tuple(field.name for field in fields(self.options))


METHODS = {
    "dense": Row("method", "Method", "no pruning: training as usual"),
    "block_l1": Row("oneshot", "OneShot", "1xN blocks of the smallest L1 norm (Lin et al. 2022)", BlockOptions),
    "block_random": Row("oneshot", "OneShot", "1xN blocks by chance", RandomBlockOptions),
    "weight": Row("oneshot", "OneShot", "single weights of the smallest size", ScoredOptions),
    "filter": Row("oneshot", "OneShot", "filters of the smallest L1 norm", ScoredOptions),
    "kernel_l1": Row("oneshot", "OneShot", "kernels of the smallest L1 norm", ScoredOptions),
    "kernel_random": Row("oneshot", "OneShot", "kernels by chance", RandomOptions),
    "bip": Row("bip", "BiP", "by scores that are learned in turn with the weights (Zhang et al. 2022)", BiPOptions),
    "hydra": Row(
        "hydra", "Hydra", "by scores that are learned beside frozen weights (Sehwag et al. 2020)", HydraOptions
    ),
    "imp": Row("imp", "IMP", "by size, at once or in rounds with rewinding (Frankle and Carbin 2019)", IMPOptions),
    "resrep": Row(
        "resrep", "ResRep", "channels that learn to vanish: a narrower network (Ding et al. 2021)", ResRepOptions
    ),
    "stripe": Row("stripe", "Stripe", "positions of each filter's kernel (Meng et al. 2020)", StripeOptions),
}

# The layer names of the 1xN publication, as its users type them.
ALIASES = {
    "DenseConv": "dense",
    "BlockL1Conv": "block_l1",
    "BlockRandomConv": "block_random",
    "UnstructureConv": "weight",
    "StructureConv": "filter",
}


def row(name: str) -> Row:
    """The row of the method called `name`, by its own name or the paper's layer name. Raises ValueError if none is."""
    key = ALIASES.get(name, name)
    if key not in METHODS:
        raise ValueError(f"unknown method {name!r}: one of {', '.join([*METHODS, *ALIASES])}")
    return METHODS[key]


def owners(option: str) -> list[str]:
    """Names of the methods that have this option."""
    return [name for name, method in METHODS.items() if option in method.own]


def refuse_foreign(name: str, given: set[str]) -> None:
    """Raise ValueError, naming the owners, if a method called `name` is given options that it has not."""
    for foreign in sorted(given - set(row(name).own)):
        others = owners(foreign)
        raise ValueError(
            f"--{foreign} belongs to {', '.join(others)}, not to {name}"
            if others
            else f"no pruning method has an option {foreign}"
        )
