"""Pruning methods behind one interface: `create_method(name, **options)`, then attach, step, finish."""

import dataclasses
from collections.abc import Callable
from functools import partial

from pruning.bip import BiP
from pruning.hydra import Hydra
from pruning.imp import IMP
from pruning.method import Method, finish, proven_copy
from pruning.oneshot import ROWS, OneShot
from pruning.resrep import ResRep
from pruning.slicing import shrink
from pruning.stripe import Stripe
from pruning.surgery import find_blocks, gather_blocks

__all__ = [
    "ALIASES",
    "METHODS",
    "Method",
    "create_method",
    "find_blocks",
    "finish",
    "gather_blocks",
    "option_names",
    "proven_copy",
    "shrink",
]

METHODS: dict[str, Callable[..., Method]] = {
    "dense": Method,
    **{row: partial(OneShot, row) for row in ROWS},
    "bip": BiP,
    "hydra": Hydra,
    "imp": IMP,
    "resrep": ResRep,
    "stripe": Stripe,
}
# What methods that learn masks are before and after their own phase: dense training, then training under fixed masks.
PHASES: dict[str, Callable[..., Method]] = {"pretrain": Method, "finetune": partial(IMP, rounds=1)}
LEARNED = ("bip", "hydra")

# The layer names of the 1xN publication, as its users type them.
ALIASES = {
    "DenseConv": "dense",
    "BlockL1Conv": "block_l1",
    "BlockRandomConv": "block_random",
    "UnstructureConv": "weight",
    "StructureConv": "filter",
}


def option_names(name: str) -> set[str]:
    """The options that the method called `name` takes."""
    return _open_fields(METHODS[name])


def _open_fields(maker: Callable[..., Method]) -> set[str]:
    cls, args, keywords = (maker.func, maker.args, maker.keywords) if isinstance(maker, partial) else (maker, (), {})
    fields = dataclasses.fields(cls)[len(args) :] if dataclasses.is_dataclass(cls) else ()
    return {field.name for field in fields if field.init} - keywords.keys()


def create_method(name: str, exp_mode: str = "prune", **options) -> Method:
    """A method by its name or the paper's layer name; options bear the names of the command line's flags.

    Options that concern only other methods are left out, so one set of flags serves all.

    Args:
        exp_mode: the phase of a method that learns masks: "pretrain", "prune" or "finetune".

    Raises:
        ValueError: no such method, an option that no method knows, or a value out of range.
    """
    key = ALIASES.get(name, name)
    if key not in METHODS:
        raise ValueError(f"unknown method {name!r}: one of {', '.join([*METHODS, *ALIASES])}")
    unknown = options.keys() - set().union(*map(option_names, METHODS))
    if unknown:
        raise ValueError(f"no pruning method has an option {', '.join(sorted(unknown))}")
    if exp_mode not in ("prune", *(PHASES if key in LEARNED else ())):
        raise ValueError(f"--exp_mode {exp_mode}: one of prune, {', '.join(PHASES)}, for {' and '.join(LEARNED)} only")
    maker = PHASES.get(exp_mode, METHODS[key])
    wanted = _open_fields(maker)
    return maker(**{option: value for option, value in options.items() if option in wanted})
