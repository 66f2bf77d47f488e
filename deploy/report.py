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


def choose(rows: list[dict], max_loss: float) -> dict:
    """The fastest of `rows`, the libraries in several types, that loses at most `max_loss` points of the first's top-1.

    Each row has its dtype, latency_ms, which of its two libraries is the better one (saved), and top1 where there are
    several rows.
    """
    first = rows[0]
    able = [row for row in rows if row is first or first["top1"] - row["top1"] <= max_loss]
    return min(able, key=lambda row: row["latency_ms"][row["saved"]]["median"])


def describe(info: dict, found: dict, runs: int) -> dict:
    """`info` and what was proven and measured: the contents of deploy.json.

    found: measured_on (None: nowhere), tolerance, proven_by, max_relative_error, top1_agreement, rounding_steps,
    latency_ms of the runtimes timed, what is known of the peers, which library is saved and, of pictures whose class is
    known, validation; of --dtype auto, what every type gave.
    """
    latency, speedup = found["latency_ms"], {}
    for key, (rival, _) in RIVALS.items():
        if rival in latency:
            speedup[key] = round(latency[rival]["median"] / latency["tvm_sparse"]["median"], 3)
    return {
        **{key: value for key, value in info.items() if key != "layers"},  # they are long, and come behind the figures
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
            f"The sparse {info['dtype']} library was SLOWER than its dense twin ({ratio:.2f}x), so THE DENSE ONE IS"
            " SAVED; --tune can find layers that gain."
        )
    if not sparse:
        return f"No layer is compiled sparse: the {info['dtype']} library is the dense one."
    if ratio < NOISE:
        return f"The sparse {info['dtype']} library is as fast as its dense twin ({ratio:.2f}x)."
    layers = f"{sparse} of {len(info['layers'])} layers are sparse"
    return f"{layers}; {ratio:.2f}x as fast as the dense twin in {info['dtype']}."


def proof(info: dict) -> str:
    """What a library was compared with, and how far it is from it."""
    other = info["proven_by"] + (" on the quantised file" if info["quantised"] else "")
    equal = f"equal to {other}" + (f" within the roundings of {info['dtype']}" if info["dtype"] != "float32" else "")
    told = (
        f"{equal}: largest relative error {info['max_relative_error']:.1e} (tolerance {info['tolerance']:.1e}), same"
        f" first class on {info['top1_agreement']:.1%} of the pictures"
    )
    if steps := info["rounding_steps"]:
        told += (
            f"; {steps['differ']} of {steps['values']} outputs differ, by {steps['largest']} rounding step(s) at most"
        )
    return told


def type_of(info: dict, runtime: str) -> str:
    """The type that a library or a peer computes in."""
    return info["peers"][runtime]["dtype"] if runtime in info["peers"] else info["dtype"]


def types_title(info: dict) -> str:
    return f"What each type gives, where {info['max_loss']:g} points of float32's top-1 may be lost"


def types_table(info: dict) -> list[list[str]]:
    """What every type of --dtype auto gave: milliseconds of its two libraries, error, top-1, and what became of it."""
    rows = [["type", "dense, ms", "sparse, ms", "relative error", "top-1", "loss", ""]]
    for row in info["types"]:
        if "absent" in row:
            rows.append([row["dtype"], "", "", "", "", "", row["absent"]])
            continue
        loss = info["types"][0]["top1"] - row["top1"]
        told = f"loses more than {info['max_loss']:g}" if loss > info["max_loss"] else ""
        if row["dtype"] == info["dtype"]:
            told = f"saved, {'sparse' if any(layer['sparse'] for layer in info['layers']) else 'dense'}"
        times = [f"{row['latency_ms'][name]['median']:.3f}" for name in ("tvm_dense", "tvm_sparse")]
        error = f"{row['max_relative_error']:.1e}"
        rows.append([row["dtype"], *times, error, f"{row['top1']:.2f} %", f"{loss:+.2f}", told])
    return rows


def table(head: list[str], *rows: list[str]) -> list[str]:
    """Lines of Markdown."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [first, "|" + "---|" * len(head), *others]


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
        *table(
            ["runtime", "type", "median ms", "p10 ms"],
            *(
                [TITLES[name], type_of(info, name), f"{t['median']:.3f}", f"{t['p10']:.3f}"]
                for name, t in info["latency_ms"].items()
            ),
        ),
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
        *table(
            ["runtime", "type", "top-1", "same class as the library"],
            *(
                [TITLES[name], type_of(info, name), f"{top1:.2f} %", agreement.get(name, "")]
                for name, top1 in found["top1"].items()
            ),
        ),
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
    told = "GFLOP/s count multiply-adds with kept weights; the peak is that of float32 multiply-adds in registers"
    return [*lines, "", f"{total:.4f} ms in kernels. {told}: {peak} GFLOP/s."]


def quantiser(facts: dict) -> str:
    """A line on where the int8 file comes from."""
    made = facts["made"]
    if made is None:
        return f"The file is quantised: `{facts['onnx']}`."
    more = "" if made["quantizer"] != "onnxruntime" else f", {made['method']}"
    scale = "layer" if made["per_tensor"] else "channel"
    kept = f"; in float32: {', '.join(made['keep_float'])}" if made["keep_float"] else ""
    return (
        f"`{facts['onnx']}` was made by {made['quantizer']}{more}, with one scale a {scale} for weights, on"
        f" {made['pictures']} training pictures{kept}."
    )


def markdown(info: dict) -> str:
    v = {name: number for name, number in info["versions"].items() if number}
    how = f"by measuring ({info['tuned']})" if info["tuned"] else "by a rule"
    lines = [
        f"# {Path(info['onnx']).name}, compiled",
        "",
        verdict(info),
        *(["", types_title(info), "", *table(*types_table(info))] if "types" in info else []),
        *([""] if "types" in info and info["measured_on"] else []),
        *(measured(info) if info["measured_on"] else []),
        *(validated(info) if info["validation"] else []),
        "",
        f"Input {info['input']['shape']}, target `{info['target']}`, {info['dtype']}. Kernels chosen {how}.",
        *([quantiser(info["quantised"])] if info["quantised"] else []),
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
        for column in ("runtime", "type", "median ms", "p10 ms", "sparse is"):
            table.add_column(column, justify="left" if column in ("runtime", "type") else "right")
        ours = info["latency_ms"]["tvm_sparse"]["median"]
        for name, t in info["latency_ms"].items():
            ratio = f"{t['median'] / ours:.2f}x" if name != "tvm_sparse" else ""
            table.add_row(TITLES[name], type_of(info, name), f"{t['median']:.3f}", f"{t['p10']:.3f}", ratio)
        console.print(table)
        console.print(proof(info))
    if info["validation"]:
        told = [f"{TITLES[name]}: {top1:.2f} %" for name, top1 in info["validation"]["top1"].items()]
        console.print(f"top-1 on {info['validation']['pictures']} validation pictures: {'; '.join(told)}")
    if "types" in info:
        head, *rows = types_table(info)
        table = Table(*head, title=types_title(info))
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(verdict(info))
