"""deploy.json, deploy.md and the table on the screen: every number with how it was made."""

import datetime
import platform
import sys
from pathlib import Path

from utils import machine

from . import peers

TITLES = {name: peer.title + (", dense" if not peer.sparse else "") for name, peer in peers.PEERS.items()} | {
    "tvm_dense": "TVM, dense (every block kept)",
    "tvm_sparse": "TVM, block sparse",
}
PACKAGES = ("apache-tvm", "onnx", *peers.PACKAGES, "numpy")
# What the sparse library is compared with: field of "speedup" -> (field of "latency_ms", name).
RIVALS = {f"vs_{name.removesuffix('_dense')}": (name, peer.title) for name, peer in peers.PEERS.items()}
RIVALS |= {"vs_tvm_dense": ("tvm_dense", "dense TVM")}
NOISE = 1.03  # medians closer than this are called equal


def better(latency: dict, layers: list[dict]) -> str:
    """Which library to save: the sparse one, unless it has sparse layers and its dense twin was measured faster."""
    slower = latency and latency["tvm_sparse"]["median"] > NOISE * latency["tvm_dense"]["median"]
    return "tvm_dense" if slower and any(layer["sparse"] for layer in layers) else "tvm_sparse"


def describe(info: dict, tolerance: float, found: dict, runs: int) -> dict:
    """`info` and what was proven and measured: the contents of deploy.json.

    found: measured_on (None: nowhere), proven_by, max_relative_error, top1_agreement, latency_ms of the runtimes timed,
    what is known of the peers, which library is saved, and, of pictures whose class is known, validation.
    """
    latency, speedup = found["latency_ms"], {}
    for key, (rival, _) in RIVALS.items():
        if rival in latency:
            speedup[key] = round(latency[rival]["median"] / latency["tvm_sparse"]["median"], 3)
    return {
        **{key: value for key, value in info.items() if key != "layers"},  # they are long, and come behind the figures
        "tolerance": tolerance,
        **found,
        "validation": found.get("validation"),
        "runs": runs if latency else 0,
        "speedup": speedup,
        "layers": info["layers"],
        "versions": {"python": platform.python_version(), **machine.versions(PACKAGES)},
        "machine": {"cpu": machine.cpu_name(), "cores": machine.cores(), "system": platform.platform()},
        "command": sys.argv,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def verdict(info: dict) -> str:
    """One sentence about sparse against dense, whichever way it went."""
    if info["measured_on"] is None:
        return (
            "NOT PROVEN AND NOT TIMED: this computer cannot run the target, so no output was compared with ONNX"
            " Runtime's. --rpc proves and times it on a device."
        )
    ratio = info["speedup"]["vs_tvm_dense"]
    sparse = sum(layer["sparse"] for layer in info["layers"])
    if info["saved"] == "tvm_dense":
        return (
            f"The sparse library was SLOWER than its dense twin ({ratio:.2f}x), so THE DENSE ONE IS SAVED; --tune can"
            " find layers that gain."
        )
    if not sparse:
        return "No layer is compiled sparse: the library is the dense one."
    if ratio < NOISE:
        return f"The sparse library is as fast as its dense twin ({ratio:.2f}x)."
    return f"{sparse} of {len(info['layers'])} layers are sparse; {ratio:.2f}x as fast as the dense twin."


def proof(info: dict) -> str:
    return (
        f"equal to {info['proven_by']}: largest relative error {info['max_relative_error']:.1e} (tolerance"
        f" {info['tolerance']:.0e}), same first class on {info['top1_agreement']:.1%} of the pictures"
    )


def measured(info: dict) -> list[str]:
    """The lines of deploy.md about a library that was run."""
    m, start, said = info["machine"], info.get("start_up"), info["peers"]
    where = f"{info['measured_on']}, by its own clock"
    if info["measured_on"] == "this computer":
        where = f"{m['cpu']}, {m['cores']} cores"
    absent = [f"{peers.PEERS[name].title} ({fact['absent']})" for name, fact in said.items() if "absent" in fact]
    chosen = [fact["dtype"] for name, fact in said.items() if name == "openvino_default" and "dtype" in fact]
    ratios = [f"{ratio:.2f}x over {RIVALS[key][1]}" for key, ratio in info["speedup"].items()]
    lines = [
        f"The library is {proof(info)}.",
        "",
        "| runtime | median ms | p10 ms |",
        "|---|---|---|",
        *(f"| {TITLES[name]} | {t['median']:.3f} | {t['p10']:.3f} |" for name, t in info["latency_ms"].items()),
        "",
        f"Speed-up of the sparse library: {', '.join(ratios)} (ratios of medians).",
        "",
        f"Measured on {where}: {info['threads']} thread(s) for each, {info['runs']} calls each, in turn, in one"
        " process, with pauses.",
    ]
    lines += [f"OpenVINO as installed computes in {dtype} here." for dtype in chosen]
    lines += [f"Not timed: {'; '.join(absent)}."] if absent else []
    if start:
        lines.append(
            f"Start-up: loaded in {start['load_ms']:.0f} ms, first output after {start['first_ms']:.0f} ms. Memory:"
            f" {start['peak_mib']:.1f} MiB at the most, {start['weights_mib']:.1f} MiB of it weights."
        )
    return lines


def validated(info: dict) -> list[str]:
    """The lines of deploy.md about pictures whose class is known."""
    found = info["validation"]
    agreement = {name: f"{share:.2f} %" for name, share in found["agreement"].items()}
    return [
        "",
        f"Top-1 on the {found['pictures']} validation pictures of `{found['data']}`:",
        "",
        "| runtime | top-1 | same class as the library |",
        "|---|---|---|",
        *(f"| {TITLES[name]} | {top1:.2f} % | {agreement.get(name, '')} |" for name, top1 in found["top1"].items()),
    ]


def profile_table(found: dict) -> list[str]:
    """What tuning/profile.py found of every kernel, in Markdown."""
    peak, total = found["peak_gflops"], sum(row["ms"] for row in found["kernels"])
    lines = ["| kernel | ms | of all | GFLOP/s | of peak | MB | layers |", "|---|---|---|---|---|---|---|"]
    for row in found["kernels"]:
        rate = f"{row['gflops']:.1f} | {row['gflops'] / peak:.0%}" if "gflops" in row else " | "
        lines.append(
            f"| {row['kernel']} | {row['ms']:.4f} | {row['ms'] / total:.1%} | {rate} | {row['bytes'] / 1e6:.3f} |"
            f" {', '.join(row.get('layers', []))} |"
        )
    told = "GFLOP/s count multiply-adds with kept weights; the peak is that of multiply-adds in registers"
    return [*lines, "", f"{total:.4f} ms in kernels. {told}: {peak} GFLOP/s."]


def markdown(info: dict) -> str:
    v = {name: number for name, number in info["versions"].items() if number}
    how = f"by measuring ({info['tuned']})" if info["tuned"] else "by a rule"
    lines = [
        f"# {Path(info['onnx']).name}, compiled",
        "",
        verdict(info),
        *(measured(info) if info["measured_on"] else []),
        *(validated(info) if info["validation"] else []),
        "",
        f"Input {info['input']['shape']}, target `{info['target']}`. Kernels chosen {how}.",
        f"Versions: {', '.join(f'{name} {number}' for name, number in v.items())}. Date: {info['date']}.",
        "",
        f"Command: `{' '.join(info['command'])}`",
        "",
        *([*profile_table(info["profile"]), ""] if "profile" in info else []),
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
    """The latencies as a table on the screen, and what was proven."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if info["measured_on"]:
        title = f"{Path(info['onnx']).name}, {info['threads']} thread(s), batch {info['batch']}, {info['measured_on']}"
        table = Table(title=title)
        for column in ("runtime", "median ms", "p10 ms", "sparse is"):
            table.add_column(column, justify="left" if column == "runtime" else "right")
        ours = info["latency_ms"]["tvm_sparse"]["median"]
        for name, t in info["latency_ms"].items():
            ratio = f"{t['median'] / ours:.2f}x" if name != "tvm_sparse" else ""
            table.add_row(TITLES[name], f"{t['median']:.3f}", f"{t['p10']:.3f}", ratio)
        console.print(table)
        console.print(proof(info))
    if info["validation"]:
        told = [f"{TITLES[name]}: {top1:.2f} %" for name, top1 in info["validation"]["top1"].items()]
        console.print(f"top-1 on {info['validation']['pictures']} validation pictures: {'; '.join(told)}")
    console.print(verdict(info))
