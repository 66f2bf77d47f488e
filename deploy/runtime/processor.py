"""What this computer's processor can do, as it says itself: the flags of Linux's /proc/cpuinfo, under LLVM's names.

A model name is not asked: virtual machines report another one than they run on.
"""

import platform
from functools import cache
from pathlib import Path

# Flags of /proc/cpuinfo that LLVM calls otherwise. All other names that start like these are the same without "_".
LLVM_NAMES = {
    "sse4_1": "sse4.1", "sse4_2": "sse4.2", "abm": "lzcnt", "bmi1": "bmi",
    "amx_tile": "amx-tile", "amx_bf16": "amx-bf16", "amx_int8": "amx-int8", "amx_fp16": "amx-fp16",
    "asimd": "neon", "asimdhp": "fullfp16", "asimddp": "dotprod", "asimdrdm": "rdm", "atomics": "lse", "lrcpc": "rcpc",
}  # fmt: skip
SAME_NAMES = ("avx", "f16c", "fma", "bmi2", "popcnt", "movbe", "ssse3", "gfni", "i8mm", "bf16", "sve")


def architecture() -> str:
    """As a target's triple begins: x86_64, aarch64, ..."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def llvm_name(flag: str) -> str | None:
    """LLVM's name of a flag of /proc/cpuinfo; None for one that no kernel depends on."""
    if flag in LLVM_NAMES:
        return LLVM_NAMES[flag]
    return flag.replace("_", "") if flag.startswith(SAME_NAMES) else None


def matters(feature: str) -> bool:
    """Whether one of LLVM's features is among those that `features` reports."""
    return feature in LLVM_NAMES.values() or feature.startswith(SAME_NAMES)


@cache
def features() -> frozenset[str] | None:
    """LLVM's names of the features that the processor has; None where the system does not list them."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(filter(None, map(llvm_name, flags.split())))
    return None


def lacking(requires: dict) -> list[str]:
    """What this computer lacks of {"architecture", "features"}, as deploy.json lists them; empty if nothing."""
    if requires.get("architecture", architecture()) != architecture():
        return [requires["architecture"]]
    have = features()
    return [] if have is None else sorted(set(requires.get("features", ())) - have)
