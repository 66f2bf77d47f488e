"""Pruning methods behind one interface: `create_method(name, **options)`, then attach, step, finish."""

import importlib

from pruning.options import ALIASES, METHODS, refuse_foreign, row

# What is imported only when it is asked for, since it needs torch: name -> module.
LATE = {
    "Method": "pruning.method",
    "finish": "pruning.method",
    "proven_copy": "pruning.method",
    "find_blocks": "pruning.surgery",
    "gather_blocks": "pruning.surgery",
    "shrink": "structure",
}

__all__ = [  # noqa: PLE0604 (all are strings)
    "ALIASES",
    "METHODS",
    "create_method",
    *LATE,
]


def create_method(name: str, **options):
    """A method by its name or the paper's layer name; options bear the names of the command line's flags.

    Raises:
        ValueError: no such method, an option that is not the method's, or a value out of range.
    """
    chosen = row(name)
    refuse_foreign(name, set(options))
    cls = getattr(importlib.import_module(f"pruning.{chosen.module}"), chosen.name)
    return cls.create(ALIASES.get(name, name), chosen.options(**options))


def __getattr__(name: str):
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATE[name]), name)
