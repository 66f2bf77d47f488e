"""Prove what was compiled, time it beside its peers, count its right answers, and choose the library that is saved.

`options` are those of `model_tune.py` everywhere.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import data
from deploy import accuracy, peers, proof, report

if TYPE_CHECKING:
    from deploy.codegen.build import Compiled

ORT, ORT_INT8 = "onnxruntime_dense", "onnxruntime_int8"  # peers whose top-1 is measured


class Labelled(NamedTuple):
    """The two parts of --data, and the column of the logits for each of its classes."""

    train: "data.Loader"
    val: "data.Loader"
    columns: np.ndarray


class Files(NamedTuple):
    """The ONNX files of the network; or, as text, why there is none."""

    float32: Path | str
    int8: Path | str


class Build(NamedTuple):
    """The network compiled in one type.

    quantised: it was read from the int8 file. grids: what the values of each output are rounded to. compiled:
    "tvm_dense" and "tvm_sparse". libraries: the same, where they run: here, or on the device.
    """

    dtype: str
    quantised: bool
    grids: list
    compiled: "dict[str, Compiled]"
    libraries: dict


def prove_and_measure(
    options,
    builds: list[Build],
    types: dict[str, str],
    where: Files,
    names: list[str],
    images: np.ndarray,
    known: Labelled | None,
) -> tuple[Build, dict]:
    """The build to save, and what deploy.json says of its equality, its times, its top-1, and of other types.

    Args:
        builds: one; or several, float32 first, of which the fastest within --max_loss is chosen.
        types: all that were asked for, and why some of them are not among the builds.
        names: of the peers to time.
        images: to prove equality on.

    Raises:
        proof.Differs: a library computes something else. If it is one of several, it is left out instead.
    """
    info = builds[0].compiled["tvm_sparse"].info
    shape, threads = info["input"]["shape"], info["threads"]
    there = {name: file for name, file in zip((ORT, ORT_INT8), where, strict=True) if isinstance(file, Path)}
    references = {name: proof.reference(file, threads) for name, file in there.items()}
    rows, absent = [], {dtype: why for dtype, why in types.items() if why}
    for build in builds:
        try:
            rows.append({"dtype": build.dtype, **prove(options, build, there, references, images, shape[0])})
        except proof.Differs as problem:
            if build is builds[0]:
                raise
            absent[build.dtype] = str(problem)
    runners, facts = peers.start(names, *where, threads, shape)
    for name, fact in facts.items():
        if "absent" in fact:
            print(f"{peers.PEERS[name].title} is not timed: {fact['absent']}")
    proven = {build.dtype: build for build in builds if build.dtype not in absent}
    libraries = {(name, dtype): library for dtype, one in proven.items() for name, library in one.libraries.items()}
    times = proof.race(libraries, runners, images[: shape[0]], options.runs)
    for row in rows:
        dtype = row["dtype"]
        row["latency_ms"] = {name: times[name, dtype] for name in proven[dtype].libraries}
        row["saved"] = report.better(row["latency_ms"], proven[dtype].compiled["tvm_sparse"].info["layers"])
    if known:
        runs = {row["dtype"]: libraries[row["saved"], row["dtype"]].run for row in rows}
        others = {name: run for name, (run, by) in references.items() if by == proof.ONNX_RUNTIME}
        right, classes = accuracy.predict(runs | others, known.val, shape[0], known.columns)
        rows = [row | {"top1": accuracy.top1(right, classes[row["dtype"]])} for row in rows]
    chosen = report.choose(rows, options.max_loss)
    found = {key: value for key, value in chosen.items() if key not in ("dtype", "top1")}
    same_type_first = sorted(runners, key=lambda name: facts[name]["dtype"] != chosen["dtype"])
    found["latency_ms"] = {name: times[name] for name in same_type_first} | chosen["latency_ms"]
    found["peers"] = facts
    if known:
        compared = {chosen["saved"]: classes[chosen["dtype"]], **{name: classes[name] for name in others}}
        found["validation"] = accuracy.compared(right, compared) | {"data": options.data}
    if options.dtype == "auto":
        missing = [{"dtype": dtype, "absent": why} for dtype, why in absent.items()]
        found |= {"types": rows + missing, "max_loss": options.max_loss}
    return proven[chosen["dtype"]], found


def prove(options, build: Build, files: dict, references: dict, images: np.ndarray, batch: int) -> dict:
    """What deploy.json says of a build's equality. files, references: of ORT, and of ORT_INT8."""
    name, dtype = (ORT_INT8, "int8") if build.quantised else (ORT, build.dtype)
    right, proven_by = references[name]
    tolerance = options.tolerance
    if tolerance is None and proven_by == proof.ONNX_RUNTIME:
        tolerance = proof.allowed(dtype, files[name], images, batch, proof.whole_ranges(build.grids))
    elif tolerance is None:
        tolerance = proof.TOLERANCE[dtype]
    found = proof.prove(build.libraries, right, images, batch, tolerance, build.grids)
    return {"tolerance": tolerance, "proven_by": proven_by, **found}
