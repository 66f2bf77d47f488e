"""What this computer's processor can do, as it says itself: the flags of Linux's /proc/cpuinfo, under LLVM's names.

A model name is not asked: virtual machines report another one than they run on.
"""

import platform
from functools import cache
from pathlib import Path

_SAME = (
    "ssse3 popcnt movbe f16c fma bmi2 gfni avx avx2 avx512f avx512cd avx512bw avx512dq avx512vl avx512ifma avx512vbmi"
    " i8mm bf16 sve sve2"
)
_WITHOUT_UNDERSCORE = (
    "avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_bf16 avx512_fp16 avx512_vp2intersect avx_vnni"
)
LLVM_NAMES = {
    **{flag: flag for flag in _SAME.split()},
    **{flag: flag.replace("_", "") for flag in _WITHOUT_UNDERSCORE.split()},
    "sse4_1": "sse4.1", "sse4_2": "sse4.2", "abm": "lzcnt", "bmi1": "bmi",
    "amx_tile": "amx-tile", "amx_bf16": "amx-bf16", "amx_int8": "amx-int8", "amx_fp16": "amx-fp16",
    "asimd": "neon", "asimdhp": "fullfp16", "asimddp": "dotprod", "asimdrdm": "rdm", "atomics": "lse", "lrcpc": "rcpc",
}  # fmt: skip
CHECKED = frozenset(LLVM_NAMES.values())  # the features of LLVM that `features` tells about


def architecture() -> str:
    """As a target's triple begins: x86_64, aarch64, ..."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@cache
def features() -> frozenset[str] | None:
    """Those of CHECKED that the processor has; None where the system does not list them."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(LLVM_NAMES[flag] for flag in flags.split() if flag in LLVM_NAMES)
    return None


def lacking(requires: dict) -> list[str]:
    """What this computer lacks of {"architecture", "features"}, as deploy.json lists them; empty if nothing."""
    if requires.get("architecture", architecture()) != architecture():
        return [requires["architecture"]]
    have = features()
    return [] if have is None else sorted(set(requires.get("features", ())) - have)


def caches() -> dict[int, int]:
    """Bytes of the data caches of one core by their level, as far as Linux lists them."""
    found = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        facts = [(index / name).read_text().strip() for name in ("level", "type", "size") if (index / name).exists()]
        if len(facts) == 3 and facts[1] != "Instruction" and facts[2].endswith("K"):
            found[int(facts[0])] = int(facts[2][:-1]) * 1024
    return found
