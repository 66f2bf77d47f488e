"""Compile a network, prove it, time it beside its peers, count its right answers, and write all of it down.

`options` are those of `model_tune.py` everywhere.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import data
from deploy import accuracy, compiler, dump, peers, proof, report
from deploy.onnx import blocks, passes, reader
from deploy.quantise import NotQuantised, quantise
from deploy.runtime import remote, startup
from deploy.tuning import measure
from utils import files

if TYPE_CHECKING:
    from deploy.codegen.build import Compiled
    from deploy.onnx.graph import Graph

INT8 = "int8.onnx"  # beside the library
ORT, ORT_INT8 = "onnxruntime_dense", "onnxruntime_int8"  # peers whose top-1 is measured


class Labelled(NamedTuple):
    """The two parts of --data, and the column of the logits for each of its classes."""

    train: "data.Loader"
    val: "data.Loader"
    columns: np.ndarray


def compile_and_save(options) -> None:
    """Write the faster of the two libraries, proven equal, and how it was made."""
    write = dump.into(options.dump_dir) if options.dump_dir else dump.forget
    names = [] if options.rpc else peers.chosen(options.peers)
    network = reader.read_onnx(options.onnx_path, options.batch, options.image_size)
    network = passes.simplify(network, write)
    blocks.check(network, options.bsr)
    known = labelled(options, network) if options.data else None
    device = remote.Device(options.rpc, options.key) if options.rpc else None
    common = {"target": options.target, "threads": options.threads, "tune": options.tune, "device": device}
    common["dtype"] = options.dtype
    sparse = compiler.compile_graph(network, options.onnx_path, sparsity=options.sparsity, dump=write, **common)
    dense = compiler.compile_graph(network, options.onnx_path, dense=True, **common)
    compiled = {"tvm_dense": dense, "tvm_sparse": sparse}
    libraries = {name: remote.RemoteLibrary(one, device) for name, one in compiled.items()} if device else compiled
    found, others = dict(proof.NOTHING), {}
    if device or sparse.runs_here:
        found, others = prove_and_time(options, libraries, names, known)
        found["measured_on"] = device.name if device else "this computer"
    found["saved"] = report.better(found["latency_ms"], sparse.info["layers"])
    if known and found["measured_on"]:
        runners = {found["saved"]: libraries[found["saved"]].run} | others
        found["validation"] = accuracy.evaluate(runners, known.val, sparse.info["batch"], known.columns)
        found["validation"]["data"] = options.data
    saved = compiled[found["saved"]]
    saved.info = report.describe(saved.info, options.tolerance, found, options.runs)
    report.show(saved.info)
    save(options, saved)


def save(options, library: "Compiled") -> None:
    """Write the library, and its description with what only the saved one can tell."""
    with files.writing(options.folder, safe=f"{options.onnx_path} is as it was"):
        library.save(options.folder)
        if not options.data:  # one that is there is of an earlier library
            (options.folder / INT8).unlink(missing_ok=True)
        if library.runs_here:
            library.info["start_up"] = startup.measure(options.folder)
            if options.profile:
                from deploy.tuning import profile  # needs TVM, whose absence is said in better words elsewhere

                images = np.random.default_rng(0).standard_normal(library.info["input"]["shape"]).astype(np.float32)
                found = library.info["profile"] = profile.profile(library, library.machine, images, options.runs)
                print("\n".join(report.profile_table(found)))
            library.describe(options.folder)
        files.save_text(options.folder / "deploy.md", report.markdown(library.info))


def labelled(options, network: "Graph") -> Labelled:
    """The pictures of --data, prepared as the network expects them."""
    shape, classes = network.shapes[network.input], (network.pictures or {}).get("classes")
    how = accuracy.preparation(network.pictures, shape, options.mean, options.std, options.resize)
    train, val = data.evaluation_loaders(options.data, how, shape[0])
    return Labelled(train, val, accuracy.columns(train.classes, classes, network.shapes[network.output][1]))


def prove_and_time(
    options, libraries: dict, names: list[str], known: Labelled | None
) -> tuple[dict, dict[str, Callable]]:
    """What deploy.json says of equality and times; and the functions of ONNX Runtime in float32 and int8, if it ran."""
    info = libraries["tvm_sparse"].info
    shape, threads = info["input"]["shape"], info["threads"]
    images = proof.pictures(options.images, options.onnx_path, shape)
    right, proven_by = proof.reference(options.onnx_path, threads)
    error, top1 = proof.prove(libraries, right, images, shape[0], options.tolerance)
    with tempfile.TemporaryDirectory() as folder:
        asked = any(peers.PEERS[name].dtype == "int8" for name in names)
        int8 = in_int8(options, known, list(measure.batches(images, shape[0])), Path(folder)) if asked else ""
        runners, facts = peers.start(names, options.onnx_path, int8, threads, shape)
    for name, fact in facts.items():
        if "absent" in fact:
            print(f"{peers.PEERS[name].title} is not timed: {fact['absent']}")
    found = {"proven_by": proven_by, "max_relative_error": error, "top1_agreement": top1, "peers": facts}
    found["latency_ms"] = proof.race(libraries, runners, images[: shape[0]], options.runs)
    others = {ORT: right} if proven_by == "ONNX Runtime" else {}
    return found, others | {name: run for name, run in runners.items() if name == ORT_INT8}


def in_int8(options, known: Labelled | None, images: list[np.ndarray], scratch: Path) -> Path | str:
    """The network as a QDQ file, or why there is none.

    Its ranges come from training pictures of --data, and it lies beside the library. Without --data it lies in
    `scratch`, with the ranges of `images`: batches that do where the file is only timed.
    """
    if known:
        images = [batch.contiguous().numpy() for batch, _ in known.train.spread(options.calibration)]
    how = {"method": options.quantise_method, "keep_float": options.keep_float or ()}
    how |= {"quantizer": options.quantizer, "per_tensor": options.per_tensor}
    try:
        return quantise(options.onnx_path, images, (options.folder if known else scratch) / INT8, **how)
    except NotQuantised as problem:
        return str(problem)
