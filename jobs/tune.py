"""Compile a network in the types that are asked for, have it measured, and save the library that is chosen.

`options` are those of `model_tune.py` everywhere.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import data
from deploy import accuracy, compiler, dump, peers, proof, report, targets
from deploy.onnx import blocks, passes, reader
from deploy.quantise import NotQuantised, quantise
from deploy.runtime import processor, remote, startup
from deploy.tuning import measure
from jobs.measure import Build, Files, Labelled, prove_and_measure
from utils import files

if TYPE_CHECKING:
    from deploy.codegen.build import Compiled
    from deploy.onnx.graph import Graph

INT8 = "int8.onnx"  # beside the library


def compile_and_save(options) -> None:
    """Write the fastest of the libraries, proven equal, and how it was made."""
    names, write = peers.chosen(options.peers), dump.into(options.dump_dir) if options.dump_dir else dump.forget
    network = read(options, options.onnx_path, write)
    blocks.check(network, options.bsr)
    known = labelled(options, network) if options.data else None
    types = types_of(options, network.quantised)
    device = remote.Device(options.rpc, options.key) if options.rpc else None
    here = not device and not processor.lacking(targets.find_machine(options.target).requires)
    if options.dtype == "auto" and not (device or here):
        raise ValueError(f"--dtype auto measures, and this computer cannot run {options.target}: --rpc names a device")
    images = proof.pictures(options.images, options.onnx_path, network.shapes[network.input])
    with tempfile.TemporaryDirectory() as scratch:
        names = names if here else []
        where = onnx_files(options, network, known, images, needs_int8(types, names), Path(scratch) / INT8)
        if types.get("int8") == "" and isinstance(where.int8, str):
            if options.dtype == "int8":
                raise NotQuantised(where.int8)
            types["int8"] = where.int8
        builds = [build(options, dtype, network, where, device, write) for dtype, why in types.items() if not why]
        saved, found = builds[0], {**proof.NOTHING, "saved": "tvm_sparse"}
        if device or here:
            saved, found = prove_and_measure(options, builds, types, where, names, images, known)
            found["measured_on"] = device.name if device else "this computer"
        library = saved.compiled[found["saved"]]
        found["quantised"] = origin(options, where, known) if saved.quantised else None
        library.info = report.describe(library.info, found, options.runs)
        report.show(library.info)
        save(options, library, where.int8 if known else None)


# What there is


def read(options, path: Path | str, write=dump.forget) -> "Graph":
    return passes.simplify(reader.read_onnx(path, options.batch, options.image_size), write)


def labelled(options, network: "Graph") -> Labelled:
    """The pictures of --data, prepared as the network expects them."""
    shape, classes = network.shapes[network.input], (network.pictures or {}).get("classes")
    how = accuracy.preparation(network.pictures, shape, options.mean, options.std, options.resize)
    train, val = data.evaluation_loaders(options.data, how, shape[0])
    return Labelled(train, val, accuracy.columns(train.classes, classes, network.shapes[network.output][1]))


def types_of(options, rounded: bool) -> dict[str, str]:
    """The types to compile the network in, float32 before others; and, as text, why one of --dtype auto cannot be.

    rounded: whether the file is quantised.
    """
    machine, refused = targets.find_machine(options.target), {}
    for dtype in targets.DTYPES:
        try:
            machine.with_dtype(dtype)
        except ValueError as problem:
            refused[dtype] = str(problem)
    if rounded and options.dtype in ("bfloat16", "auto"):
        raise ValueError(
            f"--dtype {options.dtype}: {options.onnx_path} is quantised, which goes with int8 and float32; bfloat16 and"
            " auto take the float32 file that it was made from"
        )
    if options.dtype == "int8" and not rounded and not options.data:
        raise ValueError(
            f"--dtype int8: {options.onnx_path} is not quantised, and --data is missing, from whose training pictures"
            " the ranges of its maps come"
        )
    if options.dtype == "auto":
        return {dtype: refused.get(dtype, "") for dtype in targets.DTYPES}
    if options.dtype:
        machine.with_dtype(options.dtype)  # ValueError where it is refused
        return {options.dtype: ""}
    if not rounded:
        return {"float32": ""}
    if "int8" in refused:
        print(f"{options.onnx_path} is quantised, and its roundings are computed in float32 ({refused['int8']})")
    return {"float32" if "int8" in refused else "int8": ""}


def needs_int8(types: dict[str, str], names: list[str]) -> bool:
    return types.get("int8") == "" or any(peers.PEERS[name].dtype == "int8" for name in names)


def onnx_files(options, network: "Graph", known: Labelled | None, images: np.ndarray, int8: bool, out: Path) -> Files:
    """The network in float32 and, if `int8` is wanted, quantised: the given file is one of them, the other is made.

    The ranges of an int8 file come from training pictures of --data. Without --data they come from `images`, which do
    where the file is only timed.
    """
    path = Path(options.onnx_path)
    if network.quantised:
        return Files(f"{path} is quantised, and the network in float32 is not given", path)
    if not int8:
        return Files(path, "no int8 file is wanted")
    batches = list(measure.batches(images, network.shapes[network.input][0]))
    if known:
        batches = [batch.contiguous().numpy() for batch, _ in known.train.spread(options.calibration)]
    try:
        return Files(path, quantise(path, batches, out, **quantiser(options)))
    except NotQuantised as problem:
        return Files(path, str(problem))


def quantiser(options) -> dict:
    """How the int8 file is made, as arguments of `quantise`."""
    how = {"quantizer": options.quantizer, "method": options.quantise_method, "per_tensor": options.per_tensor}
    return how | {"keep_float": options.keep_float or []}


# What is made of it


def build(options, dtype: str, network: "Graph", where: Files, device, write) -> Build:
    """Compile the network in a type, sparse and dense."""
    if dtype == "int8" and not network.quantised:
        network = read(options, where.int8, write)
    common = {"target": options.target, "threads": options.threads, "tune": options.tune, "device": device}
    common["dtype"] = dtype
    sparse = compiler.compile_graph(network, options.onnx_path, sparsity=options.sparsity, dump=write, **common)
    dense = compiler.compile_graph(network, options.onnx_path, dense=True, **common)
    compiled = {"tvm_dense": dense, "tvm_sparse": sparse}
    libraries = {name: remote.RemoteLibrary(one, device) for name, one in compiled.items()} if device else compiled
    grids = [network.grid(tensor) for tensor in network.outputs.values()]
    return Build(dtype, network.quantised, grids, compiled, libraries)


def origin(options, where: Files, known: Labelled | None) -> dict:
    """What deploy.json says of the quantised file: "made" is None for one that was given."""
    facts = {"onnx": str(where.int8), "sha256": hashlib.sha256(where.int8.read_bytes()).hexdigest(), "made": None}
    if isinstance(where.float32, Path):
        pictures = min(options.calibration, known.train.count)
        facts |= {"onnx": INT8, "made": quantiser(options) | {"pictures": pictures}}
    return facts


def save(options, library: "Compiled", int8: Path | str | None) -> None:
    """Write the library, its description with what only the saved one can tell, and the int8 file if there is one."""
    with files.writing(options.folder, safe=f"{options.onnx_path} is as it was"):
        library.save(options.folder)
        if isinstance(int8, Path) and int8 != Path(options.onnx_path):
            with files.atomic(options.folder / INT8) as file:
                file.write(int8.read_bytes())
        elif Path(options.onnx_path).resolve() != (options.folder / INT8).resolve():
            (options.folder / INT8).unlink(missing_ok=True)  # one that is there is of an earlier library
        if library.runs_here:
            library.info["start_up"] = startup.measure(options.folder)
            if options.profile:
                from deploy.tuning import profile  # needs TVM, whose absence is said in better words elsewhere

                images = np.random.default_rng(0).standard_normal(library.info["input"]["shape"]).astype(np.float32)
                found = library.info["profile"] = profile.profile(library, library.machine, images, options.runs)
                print("\n".join(report.profile_table(found)))
            library.describe(options.folder)
        files.save_text(options.folder / "deploy.md", report.markdown(library.info))
