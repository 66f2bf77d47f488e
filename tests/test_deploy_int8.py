"""deploy/ in int8: quantised files compute what ONNX's rules say, to the last bit where no number has to be rounded.

Scales here are powers of two and everything else is a small integer, so that float32 holds every value exactly but for
the roundings that the file asks for. Then ONNX Runtime, integers in NumPy and all kernels agree in every bit.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("tvm")
from onnx import TensorProto, helper
from plan_oracle import oracle_of_grids as oracle
from qdq import File
from test_deploy import prune, small_file
from test_deploy_narrow import compiled, geometries, integers, network_file, sparse_integers

import deploy
from deploy import targets
from deploy.kernels import family
from deploy.onnx import blocks, graph, passes, reader
from deploy.plan import cost, fusion, layout
from deploy.runtime import processor

runs = pytest.mark.skipif(
    "avx512vnni" not in (processor.features() or ()), reason="this processor does not multiply int8"
)


@pytest.fixture(scope="module")
def machine() -> targets.Machine:
    """This computer, for int8, with so cheap threads that every kernel uses them."""
    here = targets.find_machine().with_dtype("int8")
    return replace(here, core=replace(here.core, fork_cycles=0))


def onnx_runtime(path, x: np.ndarray) -> np.ndarray | list[np.ndarray]:
    """Every node for itself, in float32: the rules to the letter, without the kernels for integers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    made = session.run(None, {session.get_inputs()[0].name: x})
    return made[0] if len(made) == 1 else made


# single layers


def case_of(**more) -> dict:
    """A pointwise convolution whose groups keep tuples and single channels of 97, on 7x7 pixels."""
    usual = {
        "front": "none", "batch": 1, "channels": 97, "rows": 48, "kernel": (1, 1), "size": (7, 7), "stride": (1, 1),
        "pad": (0, 0), "dilation": (1, 1), "block": 16, "density": 0.5, "fine": False, "empty": False,
        "other": "none", "activation": "none", "zeros": (7, 128), "signed": (False, False), "per_channel": True,
        "weights": "int8", "bias": "int32", "whole": True, "steps": (0, -3), "gather": True, "candidate": 0,
        "nchwc": True, "seed": 0,
    }  # fmt: skip
    return usual | more


WIDE_WINDOW = {"kernel": (3, 3), "pad": (1, 1)}
ZEROS = [0, 7, 128, 255]


@st.composite
def layers(draw):
    """A quantised convolution of any geometry, what is around it, and which of the candidate kernels computes it."""
    return {
        **draw(geometries()),
        "channels": draw(st.sampled_from([1, 3, 4, 5, 16, 17, 33, 64, 65, 97])),
        "rows": draw(st.sampled_from([3, 5, 16, 17, 32, 33, 48, 64, 65, 97])),
        "block": draw(st.sampled_from([1, 2, 4, 8, 16, 32])),
        "density": draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])),
        "fine": draw(st.booleans()),
        "empty": draw(st.booleans()),
        "other": draw(st.sampled_from(["none", "none", "added", "added to what is rounded", "not rounded"])),
        "activation": draw(st.sampled_from(["none", "Relu", "Clip", "rounded Relu"])),
        "zeros": (draw(st.sampled_from(ZEROS)), draw(st.sampled_from(ZEROS))),
        "signed": (draw(st.booleans()), draw(st.booleans())),
        "per_channel": draw(st.booleans()),
        "weights": draw(st.sampled_from(["int8", "int8", "uint8"])),
        "bias": draw(st.sampled_from(["int32", "float32", "none"])),
        "whole": draw(st.sampled_from([True, True, False])),
        "steps": (draw(st.sampled_from([0, 2, -4])), draw(st.sampled_from([-6, -3, 0, 4]))),
        "gather": draw(st.booleans()),
        "candidate": draw(st.integers(0, 10_000)),
        "nchwc": draw(st.sampled_from([True, True, True, False])),
        "seed": draw(st.integers(0, 1000)),
    }


def zero_point(zero: int, signed: bool):
    """Numbers from 0 to 255, or from -128 to 127."""
    return np.int8(zero - 128) if signed else np.uint8(zero)


def file_of(case: dict, path):
    """(a QDQ file of the case, pictures)."""
    rng, f = np.random.default_rng(case["seed"]), File()
    alone, rows, kernel = case["front"] == "none", case["rows"], case["kernel"]
    channels = case["channels"] if alone else max(case["channels"], 16)
    first = 3 if case["front"] == "expansion" else channels
    shape = (case["batch"], first, *case["size"])
    grids = [(2.0**s, zero_point(z, n)) for s, z, n in zip(case["steps"], case["zeros"], case["signed"], strict=True)]
    window = {"pads": case["pad"] * 2, "strides": case["stride"], "dilations": case["dilation"]}

    def layer(name, x, weight, bias, grid, activation, **more):
        scale = 2.0 ** rng.integers(-3, 1, len(weight) if case["per_channel"] else ())
        if case["weights"] == "int8":
            inputs = [x, f.weight(f"{name}_w", weight.astype(np.int8), scale)]
        else:  # which no instruction multiplies with a map: they are computed in float32
            inputs = [
                x,
                f.weight(f"{name}_w", (weight + 128).astype(np.uint8), scale, np.full(scale.shape, 128, np.uint8)),
            ]
        numbers = integers(rng, 200, len(weight))
        if bias == "int32":
            inputs.append(f.weight(f"{name}_b", numbers.astype(np.int32), np.full(len(weight), 2.0**-3)))
        if bias == "float32":
            inputs.append(f.constant(f"{name}_b", numbers / np.float32(8)))
        y = f.node("Conv", inputs, f"{name}_conv", **more)
        if activation == "rounded Relu":
            y = f.rounded(y, f"{name}_before", *grids[1])
        if activation.endswith("Relu"):
            y = f.node("Relu", [y], f"{name}_act")
        if activation == "Clip":
            limits = [f.constant(f"{name}_{n}", np.float32(n)) for n in (0, 6)]
            y = f.node("Clip", [y, *limits], f"{name}_act")
        return y if grid is None else f.rounded(y, name, *grid)

    def sparse(rows, channels, kernel=(1, 1)):
        facts = [case[name] for name in ("block", "density", "fine", "empty")]
        return sparse_integers(rng, 127, (rows, channels, *kernel), *facts)

    x, other = f.rounded("x", "a", *grids[0]) if case["whole"] else "x", None
    if case["other"] != "none":
        grid = None if case["other"] == "not rounded" else grids[0]
        other = layer("other", x, integers(rng, 3, (rows, first, *kernel)), "int32", grid, "none", **window)
    if case["front"] == "expansion":
        x = layer("stem", x, integers(rng, 2, (channels, first, 1, 1)), "int32", grids[0], "Relu")
        x = layer("e", x, sparse(channels, channels), case["bias"], grids[0], case["activation"])
    if not alone:
        weight, some = integers(rng, 9, (channels, 1, *kernel)), "Clip" if case["activation"] == "Clip" else "Relu"
        x = layer("d", x, weight, case["bias"], grids[1], some, group=channels, **window)
        window, kernel = {}, (1, 1)
    between = case["other"] in ("none", "added to what is rounded")
    y = layer("y" if case["other"] == "none" else "conv", x, sparse(rows, channels, kernel), case["bias"],
              grids[1] if between else None, case["activation"] if between else "none", **window)  # fmt: skip
    if other:
        y = f.rounded(f.node("Add", [y, other][:: rng.choice([-1, 1])], "sum"), "y", *grids[1])
    pictures = (rng.integers(-160, 161, shape) * np.float32(2.0 ** case["steps"][0])).astype(np.float32)
    return f.save(path, shape, y), pictures


def plan_of(network: graph.Graph, machine: targets.Machine, case: dict) -> layout.Plan:
    """As much as can be in NCHWc, or all of it in NCHW, by the case's number of all candidates."""
    chosen, inside = {}, set()

    def choose(node):
        work = family.Workload(network, node)
        able = cost.families_for(work, machine, True) if case["nchwc"] else []
        inside.update([node.output] if able else [])
        able = able or cost.families_for(work, machine, False)
        if not isinstance(node, graph.Conv):
            chosen[node.output] = cost.Choice(0.0, family.Schedule(able[0]))
            return
        pattern = blocks.Pattern(case["block"], blocks.keep_blocks(node.weight, case["block"]))
        every = [schedule for some in able for schedule in some.candidates(work, machine, pattern)]
        gathered = [schedule for schedule in every if schedule.gather]
        every = gathered if case["gather"] and gathered else every
        chosen[node.output] = cost.Choice(0.0, every[case["candidate"] % len(every)], pattern)

    for node in network.nodes:
        choose(node)
        if isinstance(node, graph.Conv) and node.depthwise and node.output not in inside:
            choose(node.depthwise)
    return layout.plan_of(network, machine, inside, chosen)


def is_exact(machine, case, path) -> None:
    path, x = file_of(case, path)
    network = passes.simplify(reader.read_onnx(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "WIDE", (0, 0))
        patch.setattr(fusion, "TWICE", (1.0, 1.0))
        plan = plan_of(network, machine, case)
    right = onnx_runtime(path, x)
    np.testing.assert_array_equal(oracle(network, x), right)
    np.testing.assert_array_equal(compiled(network, machine, plan).run(x), right)


@runs
@example(case=case_of())
@example(case=case_of(**WIDE_WINDOW, size=(17, 20)))
@example(case=case_of(**WIDE_WINDOW, stride=(2, 2), other="added", batch=2, fine=True))
@example(case=case_of(**WIDE_WINDOW, front="depthwise", channels=33, rows=17, empty=True))
@example(case=case_of(**WIDE_WINDOW, front="expansion", channels=40, rows=97, size=(14, 9), stride=(2, 1)))
@example(case=case_of(channels=33, rows=33, density=1.0, gather=False, weights="uint8"))
@example(case=case_of(density=0.0, other="added to what is rounded", size=(2, 3)))
@given(case=layers())
@settings(max_examples=1, deadline=None, derandomize=True)
def test_integers_are_multiplied_exactly(tmp_path_factory, machine, case):
    """Any rounding at a wrong place, and any channel, tap or pixel that is missed, read twice or not there."""
    is_exact(machine, case, tmp_path_factory.mktemp("int8") / "m.onnx")


@runs
@pytest.mark.slow
@given(case=layers())
@settings(max_examples=200, deadline=None)
def test_many_more_integers_are_multiplied_exactly(tmp_path_factory, machine, case):
    is_exact(machine, case, tmp_path_factory.mktemp("int8") / "m.onnx")


@runs
@pytest.mark.parametrize("front", ["none", pytest.param("depthwise", marks=pytest.mark.slow)])
def test_the_number_of_threads_changes_no_bit(tmp_path, machine, front):
    """Tasks that overlap, or that compute other groups of rows than they were given."""
    case = case_of(batch=2, front=front, channels=65, **(WIDE_WINDOW if front == "depthwise" else {}))
    path, x = file_of(case, tmp_path / "m.onnx")
    network = passes.simplify(reader.read_onnx(path))
    plan = plan_of(network, machine, case)
    x = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32) * 99
    alone, shared = (compiled(network, machine, plan, threads).run(x) for threads in (1, 5))
    np.testing.assert_array_equal(shared, alone)


# whole files


EITHER = pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "int8"])


def is_right(path, x: np.ndarray, dtype: str) -> None:
    """With as much as can be in NCHWc."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "total", lambda costs, nchwc: -len(nchwc))
        library = deploy.compile_onnx(path, threads=1, dtype=dtype)
    np.testing.assert_array_equal(library.run(x), onnx_runtime(path, x))


SHAPE = (2, 32, 8, 8)
U8, I8 = np.uint8, np.int8


def pictures(shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(-160, 161, shape).astype(np.float32)


def numbers(*shape, most: int = 20) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-most, most + 1, shape).astype(np.int8)


def pointwise(f: File, x: str, name: str, rows: int = 32, channels: int = 32) -> str:
    return f.node("Conv", [x, f.weight(f"{name}_w", numbers(rows, channels, 1, 1), 0.25)], name)


def pools(f: File) -> str:
    """The largest of windows whose border is no zero, of negative maps too; averages; strides."""
    a = f.rounded(pointwise(f, f.rounded("x", "q", 1.0, U8(100)), "a"), "aq", 16.0, U8(128))
    b = f.rounded(f.node("MaxPool", [a], "b", kernel_shape=[3, 3], pads=[1] * 4), "bq", 16.0, U8(128))
    c = f.rounded(f.node("Relu", [b], "c"), "cq", 8.0, U8(0))
    d = f.rounded(f.node("MaxPool", [c], "d", kernel_shape=[3, 3], pads=[1] * 4), "dq", 8.0, U8(0))
    e = f.node("AveragePool", [d], "e", kernel_shape=[2, 2], strides=[2, 2])
    return pointwise(f, f.rounded(e, "eq", 8.0, I8(-100)), "y")


def joined(f: File) -> str:
    """Maps side by side, on one grid and on grids of their own; a mean of them, rounded."""
    q = f.rounded("x", "q", 1.0, U8(100))
    a = f.rounded(pointwise(f, q, "a"), "aq", 16.0, U8(128))
    b = f.rounded(pointwise(f, q, "b", 20), "bq", 8.0, I8(5))
    c = f.rounded(f.node("Concat", [a, b, q], "c", axis=1), "cq", 16.0, U8(128))
    d = f.rounded(pointwise(f, c, "d", 32, 84), "dq", 64.0, U8(99))
    e = f.rounded(f.node("GlobalAveragePool", [d], "e"), "eq", 1.0, U8(128))
    return f.rounded(pointwise(f, e, "y", 10), "yq", 1.0, U8(128))


def gated(f: File) -> str:
    """A gate in float32, of one pixel, on a rounded map."""
    a = f.rounded(pointwise(f, f.rounded("x", "q", 1.0, U8(100)), "a"), "aq", 16.0, U8(128))
    limits = [f.constant("low", np.float32(0)), f.constant("high", np.float32(2))]
    gate = f.node("Clip", [f.node("GlobalAveragePool", [a], "mean"), *limits], "gate")
    b = f.rounded(f.node("Mul", [a, gate], "b"), "bq", 32.0, U8(7))
    return f.rounded(pointwise(f, b, "y"), "yq", 64.0, U8(128))


def used_in_many_ways(f: File) -> str:
    """The picture rounded and not, a map rounded twice and not at all, an activation behind a rounding."""
    q = f.rounded("x", "q", 1.0, U8(100))
    a = pointwise(f, q, "a")
    b, c = f.rounded(a, "b", 16.0, U8(128)), f.rounded(a, "c", 2.0, I8(0))
    d = f.node("Relu", [f.node("Add", [b, "x"], "d")], "relu")
    e = f.rounded(f.node("Relu", [b], "e"), "eq", 32.0, U8(0))
    g = f.rounded(f.rounded(f.node("Add", [c, a], "g"), "gq", 4.0, U8(128)), "gqq", 8.0, U8(3))
    h = f.rounded(f.node("Add", [pointwise(f, g, "p"), pointwise(f, e, "r")], "h"), "hq", 64.0, U8(128))
    return f.node("Add", [f.node("Identity", [h], "same"), d], "y")


def residuals(f: File) -> str:
    """Sums with a rounding before them, on either side, on both, on none, of a tensor with itself."""
    x = f.rounded("x", "x0", 1.0, U8(100))
    for i, (mine, other) in enumerate([(True, False), (False, True), (True, True), (False, False)]):
        a = pointwise(f, x, f"a{i}")
        a = f.rounded(a, f"a{i}q", 16.0, U8(128)) if mine else a
        b = pointwise(f, x, f"b{i}")
        b = f.rounded(b, f"b{i}q", 8.0, I8(11)) if other else b
        x = f.rounded(f.node("Add", [a, b], f"c{i}"), f"c{i}q", 4.0, U8(60))
    return f.rounded(f.node("Add", [x, x], "y"), "yq", 16.0, U8(128))


def with_a_scale_a_channel(f: File) -> str:
    """As NNCF rounds what depthwise convolutions read. Odd zero points would make another number of two even."""
    many, zeros = 2.0 ** (np.arange(32) % 4), 2 * np.arange(32)
    a = f.rounded(pointwise(f, f.rounded("x", "q", many, (2 * zeros).astype(U8)), "a"), "aq", many, np.full(32, 9, U8))
    weight = f.weight("slide_w", numbers(32, 1, 3, 3), np.full(32, 0.5))
    b = f.node("Conv", [f.rounded(f.node("Relu", [a], "b"), "bq", 16 * many, zeros.astype(I8)), weight], "slide",
               group=32, pads=[1] * 4)  # fmt: skip
    return f.rounded(pointwise(f, f.rounded(b, "cq", 64.0, U8(128)), "y"), "yq", 64.0, U8(128))


@runs
@EITHER
@pytest.mark.parametrize("make", [pools, joined, gated, used_in_many_ways, residuals, with_a_scale_a_channel])
def test_roundings_stay_where_the_file_has_them(tmp_path, make, dtype):
    """A fusion that moves an activation or a sum across a rounding, or that rounds what another node reads, too."""
    f = File()
    y = make(f)
    is_right(f.save(tmp_path / "m.onnx", SHAPE, y), pictures(), dtype)


@runs
def test_smooth_activations_between_roundings_are_one_step_off_at_most(tmp_path):
    """They are rounded in float32, too, so a value beside the middle of two steps may go to either."""
    f, step = File(), 2.0**-5
    a = f.rounded(pointwise(f, f.rounded("x", "q", 1.0, U8(100)), "a"), "aq", 16.0, U8(128))
    a = f.rounded(f.node("Mul", [a, f.constant("small", np.float32(2.0**-9))], "b"), "bq", step, U8(128))
    kinds = ("HardSwish", "HardSigmoid", "Sigmoid")
    ends = [f.rounded(f.node(kind, [a], kind), f"{kind}q", step, U8(12)) for kind in kinds]
    ends.append(f.rounded(f.node("Mul", [a, "Sigmoid"], "swish"), "swishq", step, U8(12)))
    path, x = f.save(tmp_path / "m.onnx", SHAPE, *ends), pictures()
    right = dict(zip(ends, onnx_runtime(path, x), strict=True))
    for dtype in ("float32", "int8"):
        for name, made in deploy.compile_onnx(path, threads=1, dtype=dtype).run(x).items():
            np.testing.assert_allclose(made, right[name], atol=step, rtol=0)
            assert (made == right[name]).mean() > 0.99


def one_layer(f: File, weight: str, x: str | None = None) -> str:
    return f.rounded(f.node("Conv", [x or f.rounded("x", "q", 1.0, U8(128)), weight], "c"), "y", 16.0, U8(100))


def quantised_here(f: File) -> str:
    return f.rounded(f.constant("w", numbers(32, 32, 1, 1) * np.float32(0.25)), "wq", 0.25, I8(0))


SQUARE, POWERS = numbers(32, 32, 1, 1), 2.0 ** (np.arange(32) % 5)
WEIGHTS = {
    "along axis 1": lambda f: f.weight("w", SQUARE, POWERS, axis=1),
    "along axis -4": lambda f: f.weight("w", SQUARE, POWERS, axis=-4),
    "uint8": lambda f: f.weight("w", SQUARE.view(U8), np.full(32, 0.25), np.arange(32, dtype=U8)),
    "int8 with zero points": lambda f: f.weight("w", SQUARE, 0.25, I8(3)),
    "from -128 to 127": lambda f: f.weight("w", np.clip(SQUARE * 7.0, -128, 127).astype(I8), 0.25),
    "with a scale of zero": lambda f: f.weight("w", SQUARE, np.arange(32) % 2),
    "in blocks of rows": lambda f: f.weight("w", SQUARE, POWERS.reshape(1, 32, 1, 1), block_size=32),
    "quantised in the file": quantised_here,
}


@runs
@EITHER
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_multiplied_as_they_are_meant(tmp_path, kind, dtype):
    """Scales of another axis, or zero points, that are taken for those of the rows; -128; a division by zero."""
    f = File()
    is_right(f.save(tmp_path / "m.onnx", SHAPE, one_layer(f, WEIGHTS[kind](f)), opset=21), pictures(), dtype)


@runs
@EITHER
@pytest.mark.parametrize("weight", ["int8", "float32"])
def test_pictures_that_are_not_rounded_are_multiplied_in_float32(tmp_path, weight, dtype):
    """What a kernel of float32 stores in steps of a grid has to be divided by the length of a step."""
    f = File()
    whole = f.weight("w", numbers(32, 32, 1, 1), np.full(32, 0.5))
    if weight == "float32":
        whole = f.constant("v", numbers(32, 32, 1, 1) * np.float32(0.5))
    x = f.node("Mul", ["x", f.constant("half", np.float32(0.5))], "halves")
    is_right(f.save(tmp_path / "m.onnx", SHAPE, one_layer(f, whole, x)), pictures(), dtype)


@runs
@pytest.mark.parametrize("zero", [U8(0), U8(7), U8(255), I8(-128), I8(0)])
def test_values_far_outside_of_a_grid_become_its_ends(tmp_path, zero):
    """Numbers that int32 does not hold wrap around, and those of other types saturate elsewhere.

    The oracle counts in integers: here is no rounding but at the ends.
    """
    f, low = File(), -128 if zero.dtype == I8 else 0
    x = f.rounded("x", "q", 1.0, zero)
    y = f.node("Conv", [x, f.weight("w", numbers(32, 32, 3, 3), 1.0)], "c", pads=[1] * 4)
    path = f.save(tmp_path / "m.onnx", SHAPE, f.rounded(y, "y", 256.0, zero), y)
    x = pictures()
    for i, huge in enumerate([1e30, -1e30, 3e9, -3e9, 2.0**31, np.inf, -np.inf, 255, -255, 1e9]):
        x[0, i, i % 8, 3] = huge
    q = np.clip(np.rint(x.astype(np.float64)) + int(zero), low, low + 255)
    whole = np.pad((q - int(zero)).astype(np.int64), [(0, 0), (0, 0), (1, 1), (1, 1)])
    seen = np.lib.stride_tricks.sliding_window_view(whole, (3, 3), (2, 3))
    sums = np.einsum("bchwij,ocij->bohw", seen, numbers(32, 32, 3, 3).astype(np.int64))
    ends = np.clip(np.rint(sums / 256) + int(zero), low, low + 255) - int(zero)
    library = deploy.compile_onnx(path, threads=1, dtype="int8")
    made, exact = library.run(x).values()
    np.testing.assert_array_equal(exact, sums)
    np.testing.assert_array_equal(made, 256 * ends)


# networks


def agrees(path, batches: list[np.ndarray], whole, least: int) -> None:
    """Every type computes the file's logits but for the steps that a sum beside a half may go to either side.

    whole: the file before it was quantised, of which int8 keeps every block of zeros. least: sparse layers in int8.
    """
    right, found = [onnx_runtime(path, x) for x in batches], {}
    for dtype, most in {"float32": 0.02, "int8": 0.02, "bfloat16": 0.04}.items():
        library = deploy.compile_onnx(path, threads=1, dtype=dtype)
        apart = [np.abs(library.run(x) - y).max() for x, y in zip(batches, right, strict=True)]
        assert max(apart) < most * np.abs(right).max(), dtype
        found[dtype] = library.info["layers"]
    assert sum(layer["sparse"] for layer in found["int8"]) >= least
    kept = {layer["name"]: layer["density"] for layer in deploy.compile_onnx(whole, threads=1).info["layers"]}
    assert all(layer["density"] <= kept[layer["name"]] for layer in found["int8"])


def batches_of(size: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((8, 1, 3, size, size)).astype(np.float32))


@runs
@pytest.mark.parametrize("quantizer", ["onnxruntime", "nncf"])
def test_what_quantisers_make_agrees_with_onnx_runtime(tmp_path, quantizer):
    """Both write 8 bits in their own way: NNCF rounds the weights in the file."""
    pytest.importorskip(quantizer)
    path, batches = network_file(tmp_path / "m.onnx"), batches_of(32)
    out = deploy.quantise(path, batches, tmp_path / "int8.onnx", quantizer=quantizer)
    agrees(out, batches, path, 2)


@runs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "least"),
    [("resnet20", 32, 6), ("resnet18", 64, 12), ("mobilenet_v1", 64, 8), ("mobilenet_v2", 64, 12),
     ("mobilenet_v3_small", 64, 12)],
)  # fmt: skip
def test_networks_agree_with_onnx_runtime(tmp_path, name, size, least):
    torch = pytest.importorskip("torch")
    import models

    network, path = prune(models.create_model(name, num_classes=10), block=16), tmp_path / "model.onnx"
    picture, batches = (torch.randn(1, 3, size, size),), batches_of(size)
    torch.onnx.export(network, picture, str(path), dynamo=True, external_data=False, verbose=False)
    agrees(deploy.quantise(path, batches, tmp_path / "int8.onnx"), batches, path, least)


# what is refused


def changed(index: int, *, number: int = 2, **value):
    """Another input of the file's node number `index`."""

    def change(f: File) -> None:
        ((name, new),) = value.items()
        f.nodes[index].input[number] = f.constant(name, new)

    return change


def attribute(index: int, **value):
    return lambda f: f.nodes[index].attribute.extend(helper.make_attribute(k, v) for k, v in value.items())


def replaced(kind: str, *inputs: str):
    """The convolution by another operator."""

    def change(f: File) -> None:
        at = next(i for i, node in enumerate(f.nodes) if node.op_type == "Conv")
        f.nodes[at] = helper.make_node(kind, [*f.nodes[0].output, *inputs][: len(inputs) + 1], ["c"], name="c")

    return change


def float8():
    from ml_dtypes import float8_e4m3fn

    return np.zeros((), float8_e4m3fn)


REFUSED = {
    "another scale": (changed(1, number=1, other=np.float32(2)), "q_meant.*reads other numbers than a QuantizeLinear"),
    "another zero point": (changed(1, other=U8(127)), "q_meant.*reads other numbers than a QuantizeLinear"),
    "another type": (changed(1, other=I8(0)), "q_meant.*reads other numbers than a QuantizeLinear"),
    "a scale a row": (lambda f: (changed(0, number=1, s=np.ones(8, np.float32))(f), attribute(0, axis=2)(f)),
                      "'q'.*8 scales of float32"),
    "16 bits": (changed(0, wide=np.uint16(7)), "'q'.*numbers of uint16: float32, one or one a channel"),
    "float8": (changed(0, wide=float8()), "'q'.*numbers of float8_e4m3fn: float32"),
    "16 bits without a zero point": (
        lambda f: (f.nodes[0].input.pop(), attribute(0, output_dtype=TensorProto.INT16)(f)), "'q'.*numbers of int16",
    ),
    "float16": (changed(0, number=1, half=np.float16(1)), "'q'.*does not fit its inputs"),
    "a scale of zero": (changed(0, number=1, s=np.float32(0)), "'q'.*a scale of 0.0: it must be positive"),
    "a negative scale": (changed(0, number=1, s=np.float32(-1)), "'q'.*a scale of -1.0: it must be positive"),
    "a scale of NaN": (changed(0, number=1, s=np.float32(np.nan)), "'q'.*a scale of nan: it must be positive"),
    "an infinite scale": (changed(0, number=1, s=np.float32(np.inf)), "'q'.*a scale of inf: it must be positive"),
    "a scale without inverse": (changed(0, number=1, s=np.float32(1e-45)), "'q'.*a scale of 1.4.*and not extreme"),
    "a weight's scale of NaN": (changed(2, number=1, s=np.float32(np.nan)), "'w'.*a scale that is not a number"),
    "a scale that is computed": (lambda f: f.nodes[0].input.__setitem__(1, "x"), "'q'.*needs a constant 'x'"),
    "numbers that others read": (lambda f: f.nodes[3].input.__setitem__(0, "q"), "'c'.*only DequantizeLinear may read"),
    "QLinearConv": (replaced("QLinearConv", "q_scale", "q_zero", "w_whole", "w_scale", "q_zero", "y_scale", "y_zero"),
                    "'c' .*QLinearConv.*not supported.*; supported are Add"),
    "ConvInteger": (replaced("ConvInteger", "w_whole"), "'c' .*ConvInteger.*not supported.*; supported are Add"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_in_one_line(tmp_path, machine, what, dtype):
    """Quantised otherwise, a file must not be compiled into a library that computes something else."""
    change, words = REFUSED[what]
    f = File()
    x = f.rounded("x", "q", 1.0, U8(128))
    y = one_layer(f, f.weight("w", numbers(32, 32, 1, 1), 0.25), x)
    change(f)
    with pytest.raises(ValueError, match=words) as caught:
        deploy.compile_onnx(f.save(tmp_path / "m.onnx", SHAPE, y, opset=21), threads=1, dtype=dtype)
    assert "\n" not in str(caught.value)


def test_a_processor_without_the_instruction_is_refused_in_one_line(tmp_path):
    f = File()
    path = f.save(tmp_path / "m.onnx", SHAPE, one_layer(f, f.weight("w", numbers(32, 32, 1, 1), 0.25)))
    for name in ("x86-avx2", "aarch64"):
        with pytest.raises(ValueError, match=f"dtype int8: {name} has none of avx512vnni") as caught:
            deploy.compile_onnx(path, target=name, dtype="int8")
        assert "\n" not in str(caught.value)
        assert deploy.compile_onnx(path, target=name).info["dtype"] == "float32"


@runs
def test_a_file_that_is_not_quantised_is_not_called_int8(tmp_path):
    """Every layer would stay float32, and deploy.json would say int8."""
    with pytest.raises(ValueError, match="has no QuantizeLinear") as caught:
        deploy.compile_onnx(small_file(tmp_path / "float.onnx"), dtype="int8")
    assert "\n" not in str(caught.value)
