"""deploy.json, deploy.md and the table on the screen: every number with how it was made."""

import datetime
import platform
import sys
from pathlib import Path

from utils import machine

TITLES = {
    "onnxruntime_dense": "ONNX Runtime, dense",
    "tvm_dense": "TVM, dense (every block kept)",
    "tvm_sparse": "TVM, block sparse",
}
PACKAGES = ("apache-tvm", "onnx", "onnxruntime", "numpy")
NOISE = 1.03  # medians closer than this are called equal


def describe(info: dict, tolerance: float, error: float, top1: float, latency: dict, runs: int) -> dict:
    """`info` and what was proven and measured: the contents of deploy.json."""
    speedup = {}
    for key, peer in (("vs_onnxruntime", "onnxruntime_dense"), ("vs_tvm_dense", "tvm_dense")):
        speedup[key] = round(latency[peer]["median"] / latency["tvm_sparse"]["median"], 3)
    layers = info.pop("layers")
    return {
        **info,
        "tolerance": tolerance,
        "max_relative_error": error,
        "top1_agreement": top1,
        "latency_ms": latency,
        "runs": runs,
        "speedup": speedup,
        "layers": layers,
        "versions": {"python": platform.python_version(), **machine.versions(PACKAGES)},
        "machine": {"cpu": machine.cpu_name(), "cores": machine.cores(), "system": platform.platform()},
        "command": sys.argv,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def verdict(info: dict) -> str:
    """One sentence about sparse against dense, whichever way it went."""
    ratio = info["speedup"]["vs_tvm_dense"]
    sparse = sum(layer["sparse"] for layer in info["layers"])
    if not sparse:
        return "No layer is compiled sparse: the library is the dense one."
    if ratio < 1 / NOISE:
        return (
            f"The sparse library is SLOWER than its dense twin ({ratio:.2f}x); --sparsity can keep more layers dense."
        )
    if ratio < NOISE:
        return f"The sparse library is as fast as its dense twin ({ratio:.2f}x)."
    return f"{sparse} of {len(info['layers'])} layers are sparse; {ratio:.2f}x as fast as the dense twin."


def markdown(info: dict) -> str:
    m, v = info["machine"], info["versions"]
    lines = [
        f"# {Path(info['onnx']).name}, compiled",
        "",
        f"{verdict(info)} Largest relative error against ONNX Runtime {info['max_relative_error']:.1e} (tolerance"
        f" {info['tolerance']:.0e}), same first class on {info['top1_agreement']:.1%} of the pictures.",
        "",
        "| runtime | median ms | p10 ms |",
        "|---|---|---|",
        *(f"| {TITLES[name]} | {t['median']:.3f} | {t['p10']:.3f} |" for name, t in info["latency_ms"].items()),
        "",
        f"Speed-up of the sparse library: {info['speedup']['vs_onnxruntime']:.2f}x over ONNX Runtime,"
        f" {info['speedup']['vs_tvm_dense']:.2f}x over dense TVM (ratios of medians).",
        "",
        f"Input {info['input']['shape']}, {info['threads']} thread(s) for each, {info['runs']} calls each, in turn,"
        f" in one process, with pauses. {m['cpu']}, {m['cores']} cores, target `{info['target']}`.",
        f"Versions: {', '.join(f'{name} {number}' for name, number in v.items())}. Date: {info['date']}.",
        "",
        f"Command: `{' '.join(info['command'])}`",
        "",
        "| layer | shape | pixels | N | density | kernel |",
        "|---|---|---|---|---|---|",
        *(
            f"| {layer['name']} | {' x '.join(map(str, layer['shape']))} | {layer['pixels']} | {layer['N'] or '-'} |"
            f" {layer['density']:.2f} | {layer['kernel']} |"
            for layer in info["layers"]
        ),
    ]
    return "\n".join(lines) + "\n"


def show(info: dict) -> None:
    """The latencies as a table on the screen."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{Path(info['onnx']).name}, {info['threads']} thread(s), batch {info['batch']}")
    for column in ("runtime", "median ms", "p10 ms", "sparse is"):
        table.add_column(column, justify="left" if column == "runtime" else "right")
    ours = info["latency_ms"]["tvm_sparse"]["median"]
    for name, t in info["latency_ms"].items():
        ratio = f"{t['median'] / ours:.2f}x" if name != "tvm_sparse" else ""
        table.add_row(TITLES[name], f"{t['median']:.3f}", f"{t['p10']:.3f}", ratio)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"equal to ONNX Runtime: error {info['max_relative_error']:.1e} (tolerance {info['tolerance']:.0e}),"
        f" same first class {info['top1_agreement']:.1%}"
    )
    console.print(verdict(info))
