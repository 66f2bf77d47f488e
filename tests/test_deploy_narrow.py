"""deploy/ in bfloat16: kernels are exact on small integers, networks agree with an oracle that rounds as they do.

Sums of integers below 2 ** 24 are exact in float32 in any order, so a kernel's result is known to the last bit: it is
the sum, rounded once where it is stored. Other numbers may be summed up in another order, and then be rounded to the
neighbour, which is 2 ** -7 of the value away at most.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx")
pytest.importorskip("tvm")
from ml_dtypes import bfloat16
from onnx import helper
from plan_oracle import oracle
from test_deploy import block_weight, everything, onnx_file, prune, small_file

import deploy
from deploy import targets
from deploy.codegen import build, program
from deploy.kernels import family
from deploy.kernels.nchwc_conv import NCHWcConv
from deploy.onnx import blocks, graph, passes, reader
from deploy.plan import cost, fusion, layout
from deploy.runtime import processor
from deploy.runtime.library import Library, bind
from deploy.tuning import measure, tune

runs = pytest.mark.skipif(
    "avx512bf16" not in (processor.features() or ()), reason="this processor does not multiply bfloat16"
)
ULP = 2.0**-7  # most that neighbours in bfloat16 differ by, relative to them
RELU = ("clip", 0.0, None)


@pytest.fixture(scope="module")
def machine() -> targets.Machine:
    """This computer, for bfloat16, with so cheap threads that every kernel uses them."""
    here = targets.find_machine().with_dtype("bfloat16")
    return replace(here, core=replace(here.core, fork_cycles=0))


def compiled(network: graph.Graph, machine: targets.Machine, plan: layout.Plan, threads: int = 1) -> Library:
    made = program.make_program(network, replace(machine, threads=threads), plan)
    info = {"threads": threads, "input": {"name": "x", "shape": network.shapes["x"]}}
    executable, weights = build.build(made.module, machine)
    return Library(executable.module, weights, info)


# exactly


def integers(rng, most: int, shape) -> np.ndarray:
    """Of either sign, but none of them zero."""
    return (rng.integers(1, most + 1, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


def sparse_integers(rng, most: int, shape, block: int, density: float, fine: bool, empty: bool) -> np.ndarray:
    """In blocks of `block` rows, kept by channel or (fine) by channel and tap. empty: the first group keeps none."""
    rows, channels, *kernel = shape
    keep = rng.random((-(-rows // block), channels, *(kernel if fine else (1, 1)))) < density
    keep[0] &= not empty
    return integers(rng, most, shape) * np.repeat(keep, block, axis=0)[:rows]


def case_of(**more) -> dict:
    """A pointwise convolution whose groups keep pairs and single channels of 97, on 7x7 pixels."""
    usual = {
        "front": "none", "batch": 1, "channels": 97, "rows": 48, "kernel": (1, 1), "size": (7, 7), "stride": (1, 1),
        "pad": (0, 0), "dilation": (1, 1), "block": 16, "density": 0.5, "fine": False, "empty": False,
        "residual": False, "activation": None, "most": (300, 2), "gather": True, "candidate": 0, "seed": 0,
    }  # fmt: skip
    return usual | more


WIDE_WINDOW = {"kernel": (3, 3), "pad": (1, 1)}


@st.composite
def geometries(draw):
    """The window of a convolution, the map under it, and what is in front of it."""
    kernel, dilation = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (5, 5), (1, 3), (2, 2)])), (1, 1)
    if kernel != (1, 1):
        dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
    size = draw(st.sampled_from([(2, 2), (3, 3), (4, 4), (7, 7), (5, 9), (14, 14), (17, 20), (33, 3), (3, 40)]))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1), (3, 3)]))
    least = [(k - 1) * d + 1 + s for k, d, s in zip(kernel, dilation, stride, strict=True)]  # for more than one output
    return {
        "front": draw(st.sampled_from(["none", "none", "depthwise", "expansion"])),
        "batch": draw(st.sampled_from([1, 1, 2])),
        "kernel": kernel,
        "size": tuple(map(max, size, least)),
        "stride": stride,
        "pad": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "dilation": dilation,
    }


@st.composite
def layers(draw):
    """A convolution of any geometry, what is in front of it, and which of the candidate kernels computes it."""
    return {
        **draw(geometries()),
        "channels": draw(st.sampled_from([1, 3, 5, 16, 17, 24, 31, 32, 33, 34, 40, 64, 97])),
        "rows": draw(st.sampled_from([16, 17, 32, 33, 40, 48, 64, 97])),
        "block": draw(st.sampled_from([16, 32])),
        "density": draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])),
        "fine": draw(st.booleans()),
        "empty": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, RELU, ("clip", 0.0, 6.0)])),
        "most": draw(st.sampled_from([(300, 2), (3, 600)])),
        "gather": draw(st.booleans()),
        "candidate": draw(st.integers(0, 10_000)),
        "seed": draw(st.integers(0, 1000)),
    }


def network_of(case: dict) -> tuple[graph.Graph, np.ndarray]:
    """The case as a network of integers that are so small that no sum reaches 2 ** 24, and a batch of pictures."""
    rng, window = np.random.default_rng(case["seed"]), {k: case[k] for k in ("stride", "pad", "dilation")}
    alone, channels, rows, kernel = case["front"] == "none", case["channels"], case["rows"], case["kernel"]
    # Numbers from 257 on must be rounded: those of the pictures or of the weights, and sums when they are stored.
    most = {"depthwise": (300, 1), "expansion": (8, 1)}.get(case["front"]) or case["most"]
    channels = channels if alone else max(channels, 16)
    first = 3 if case["front"] == "expansion" else channels
    sizes = zip(case["size"], kernel, case["stride"], case["pad"], case["dilation"], strict=True)
    out = tuple((n + 2 * p - (k - 1) * d - 1) // s + 1 for n, k, s, p, d in sizes)
    shapes = dict.fromkeys("rdy", (case["batch"], rows, *out)) | dict.fromkeys(
        "ae", (case["batch"], channels, *case["size"])
    )
    shapes |= {"x": (case["batch"], first, *case["size"]), "d": (case["batch"], channels, *out)}
    nodes, last = [], "x"

    def conv(name, inputs, output, weight, **more):
        bias = integers(rng, 3, len(weight))
        nodes.append(graph.Conv(name, inputs, output, weight=weight, bias=bias, **more))

    def sparse(rows, channels, kernel=(1, 1)):
        facts = [case[name] for name in ("block", "density", "fine", "empty")]
        return sparse_integers(rng, most[1], (rows, channels, *kernel), *facts)

    if case["residual"]:
        conv("other", ["x"], "r", integers(rng, 1, (rows, first, *kernel)), **window)
    if case["front"] == "expansion":
        conv("stem", ["x"], "a", integers(rng, 1, (channels, first, 1, 1)), activation=RELU)
        conv("expand", ["a"], "e", sparse(channels, channels), activation=RELU)
        last = "e"
    if not alone:
        facts = {"kernel": kernel, "bias": integers(rng, 3, channels), "activation": RELU, **window}
        weight = integers(rng, 1, (channels, *kernel))
        nodes.append(graph.Window("slide", [last], "d", kind="conv", weight=weight, **facts))
        window, kernel, last = {}, (1, 1), "d"
    inputs = [last, "r"] if case["residual"] else [last]
    conv("conv", inputs, "y", sparse(rows, channels, kernel), activation=case["activation"], **window)
    network = graph.Graph(nodes, shapes, "x", "y")
    passes.fuse_depthwise(network)
    return network, integers(rng, most[0], shapes["x"])


def plan_of(network: graph.Graph, machine: targets.Machine, case: dict) -> layout.Plan:
    """Everything in NCHWc, by the case's number of all candidates."""
    chosen = {}
    for node in network.nodes:
        work = family.Workload(network, node)
        if isinstance(node, graph.Conv):
            block = case["block"] if node.output in "ye" else 16
            pattern = blocks.Pattern(block, blocks.keep_blocks(node.weight, block))
            every = list(NCHWcConv.candidates(work, machine, pattern))
            gathered = [schedule for schedule in every if schedule.gather]
            every = gathered if case["gather"] and gathered else every
            schedule = every[case["candidate"] % len(every)]
            chosen[node.output] = cost.Choice(0.0, schedule, pattern)
        else:
            (kind,) = cost.families_for(work, machine, True)
            chosen[node.output] = cost.Choice(0.0, family.Schedule(kind))
    return layout.plan_of(network, machine, {node.output for node in network.nodes}, chosen)


def is_exact(machine, case) -> None:
    network, x = network_of(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "WIDE", (0, 0))
        patch.setattr(fusion, "TWICE", (1.0, 1.0))
        plan = plan_of(network, machine, case)
    np.testing.assert_array_equal(compiled(network, machine, plan).run(x), oracle(network, plan, x))


@runs
@example(case=case_of(**WIDE_WINDOW, size=(17, 16), candidate=3, most=(3, 600)))  # tiles of whole rows
@example(case=case_of(**WIDE_WINDOW, size=(13, 13), stride=(2, 2), residual=True, fine=True))  # across ends of rows
@example(case=case_of(**WIDE_WINDOW, front="depthwise", channels=33, rows=17, empty=True))
@example(case=case_of(**WIDE_WINDOW, front="expansion", channels=40, rows=97, size=(14, 9), stride=(2, 1)))
@example(case=case_of(channels=33, rows=33, density=1.0, gather=False, most=(3, 600)))
@example(case=case_of(density=0.0))
@given(case=layers())
@settings(max_examples=5, deadline=None, derandomize=True)
def test_integers_are_multiplied_exactly(machine, case):
    """Any rounding at a wrong place, and any channel, tap or pixel that is missed, read twice or not there."""
    is_exact(machine, case)


@runs
@pytest.mark.slow
@given(case=layers())
@settings(max_examples=250, deadline=None)
def test_many_more_integers_are_multiplied_exactly(machine, case):
    is_exact(machine, case)


@runs
@pytest.mark.parametrize("more", [WIDE_WINDOW, {"front": "depthwise", **WIDE_WINDOW}])
def test_the_number_of_threads_changes_no_bit(machine, more):
    """Tasks that overlap, or that compute other groups of rows than they were given."""
    case = case_of(batch=2, **more)
    network, x = network_of(case)
    plan, x = plan_of(network, machine, case), np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    alone, shared = (compiled(network, machine, plan, threads).run(x) for threads in (1, 5))
    np.testing.assert_array_equal(shared, alone)
    assert np.isfinite(alone).all()  # NaN would be equal to NaN


@runs
@pytest.mark.parametrize("more", [{}, WIDE_WINDOW])
def test_gathering_changes_only_the_order_of_sums(machine, more):
    """Of a whole sum, the last bit of what is stored; and that of few outputs."""
    made = []
    for gather in (True, False):
        case = case_of(gather=gather, **more)
        network, x = network_of(case)
        plan, rng = plan_of(network, machine, case), np.random.default_rng(0)
        network.nodes[0].weight *= rng.uniform(0.5, 1, network.nodes[0].weight.shape).astype(np.float32)
        x = rng.standard_normal(x.shape).astype(np.float32)
        assert plan.schedules["y"].gather == gather
        made.append(compiled(network, machine, plan).run(x))
        agree_to_the_last_bit(made[-1], oracle(network, plan, x))
    agree_to_the_last_bit(*made)


def agree_to_the_last_bit(ours: np.ndarray, right: np.ndarray) -> None:
    """All but one in a hundred are the same numbers of bfloat16, and the others are neighbours."""
    assert (ours == right).mean() > 0.99
    np.testing.assert_allclose(ours, right, rtol=ULP, atol=1e-5 * np.abs(right).max())


@runs
def test_what_is_no_number_stays_none(machine):
    """Wherever float32 computes NaN or infinity from a picture, so does bfloat16."""
    libraries = []
    for aim, gather in ((targets.find_machine(), False), (machine, False), (machine, True)):
        case = case_of(gather=gather, size=(5, 5))
        network, x = network_of(case)
        libraries.append(compiled(network, aim, plan_of(network, aim, case)))
    for bad in (np.nan, np.inf, -np.inf):
        x[0, ::7, 2, 3] = bad
        usual, *narrow = (np.isfinite(library.run(x)) for library in libraries)
        assert not usual[0, :, 2, 3].all()
        for finite in narrow:
            assert not finite[~usual].any()
            assert finite.sum() == finite.size - (~finite[0, :, 2, 3]).sum()  # every other pixel is


# whole networks


def whole_network(machine, channels, size, k, stride, activation, separable):
    """(network, plan, pictures): everything that can work in blocks of channels, as much of it as possible in NCHWc."""
    nodes, shapes = everything(np.random.default_rng(size), channels, size, k, stride, activation, separable)
    network = graph.Graph(nodes, {"x": (2, 3, size, size), **shapes}, "x", "y")
    passes.fuse_depthwise(network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "total", lambda costs, nchwc: -len(nchwc))
        patch.setattr(cost, "REORDER", 1e9)
        patch.setattr(fusion, "WIDE", (0, 0))
        patch.setattr(fusion, "TWICE", (1.0, 1.0))
        plan = layout.make_plan(cost.CostModel(network, machine))
    return network, plan, np.random.default_rng(size).standard_normal(network.shapes["x"]).astype(np.float32)


def near(ours: np.ndarray, right: np.ndarray, exact: np.ndarray) -> None:
    """`ours` rounds as the oracle does, and not in some other way that is as far from the `exact` result.

    A value that was rounded to the neighbour is one of very many that an output depends on.
    """
    np.testing.assert_allclose(ours, right, rtol=0, atol=ULP * np.abs(right).max())
    assert np.square(ours - right).mean() < np.square(exact - right).mean() / 4


@runs
@pytest.mark.parametrize(
    "facts",
    [
        (40, 14, 3, 2, ("hard_swish",), True),
        *(
            pytest.param(facts, marks=pytest.mark.slow)
            for facts in [(16, 8, 3, 1, None, False), (17, 15, 5, 2, RELU, True), (24, 33, 3, 1, RELU, False),
                          (97, 9, 3, 2, None, True), (32, 14, 5, 1, ("hard_swish",), False)]
        ),
    ],
)  # fmt: skip
def test_every_kernel_rounds_as_the_oracle(machine, facts):
    network, plan, x = whole_network(machine, *facts)
    assert len(plan.nchwc) == 12
    assert plan.expansions
    near(compiled(network, machine, plan).run(x), oracle(network, plan, x), oracle(network, plan, x, lambda v: v))


@runs
def test_nothing_is_read_that_was_not_written(machine):
    """Every kernel finds its output full of NaN: halos, short blocks, and what the picture before has left."""
    tvm = pytest.importorskip("tvm")
    network, plan, x = whole_network(machine, 40, 7, 3, 2, RELU, True)
    library = compiled(network, machine, plan)
    right = library.run(x)
    runner, filled = bind(library.executable, library.weights, tvm.cpu()), []

    def instrument(function, name, before, result, *arguments) -> int:
        if before and not name.startswith("vm."):
            made = arguments[-1]
            nothing = np.full(made.shape, np.nan, np.float32).astype(bfloat16 if made.dtype == "uint16" else np.float32)
            made.copyfrom(nothing.view(str(made.dtype)))
            filled.append(name)
        return 0  # go on

    runner.set_instrument(instrument)
    for picture in (np.full_like(x, np.nan), x):
        made = runner["network"](tvm.runtime.tensor(picture)).numpy()
    np.testing.assert_array_equal(made, right)
    assert np.isfinite(right).all()  # NaN would be equal to NaN
    assert len(filled) >= 2 * len(network.nodes) - 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function (name of a network, size of its pictures) -> the ONNX file of it, pruned by half in blocks of 16."""
    torch = pytest.importorskip("torch")

    def export(name: str, size: int):
        import models

        path = tmp_path_factory.mktemp("networks") / f"{name}.onnx"
        network = prune(models.create_model(name, num_classes=10), block=16)
        picture = (torch.randn(1, 3, size, size),)
        torch.onnx.export(network, picture, str(path), dynamo=True, external_data=False, verbose=False)
        return path

    return export


def network_file(path):
    """A separable network, pruned by half in blocks of 16 rows; most of it is faster in NCHWc."""
    rng, n = np.random.default_rng(0), helper.make_node
    weights = {
        "stem": rng.standard_normal((64, 3, 3, 3)) / 5,
        "slide": rng.standard_normal((64, 1, 3, 3)) / 3,
        "point": block_weight(rng, 128, 64, (1, 1), 16, 0.5, False) / 6,
        "deep": block_weight(rng, 64, 128, (3, 3), 16, 0.5, False) / 20,
        "classes": rng.standard_normal((10, 64)) / 8,
    }
    nodes = [
        n("Conv", ["x", "stem"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2], name="stem"), n("Relu", ["a"], ["b"]),
        n("Conv", ["b", "slide"], ["c"], pads=[1, 1, 1, 1], group=64, name="slide"), n("Relu", ["c"], ["d"]),
        n("Conv", ["d", "point"], ["e"], name="point"), n("Relu", ["e"], ["f"]),
        n("Conv", ["f", "deep"], ["g"], pads=[1, 1, 1, 1], name="deep"), n("Relu", ["g"], ["h"]),
        n("GlobalAveragePool", ["h"], ["i"]), n("Flatten", ["i"], ["j"]),
        n("Gemm", ["j", "classes"], ["y"], transB=1, name="classes"),
    ]  # fmt: skip
    return onnx_file(path, nodes, {k: w.astype(np.float32) for k, w in weights.items()}, (1, 3, 32, 32))


def agrees_with_float32(path, size: int) -> Library:
    """Rounded to 8 bits in every layer, the logits differ by 2 percent of the largest one at most."""
    library = deploy.compile_onnx(path, threads=2, dtype="bfloat16")
    assert any(layer["kernel"].startswith("sparse, NCHWc") for layer in library.info["layers"])
    images = np.random.default_rng(0).standard_normal((4, 3, size, size)).astype(np.float32)
    difference, _ = measure.compare(library.run, measure.peer(path, 2), images, 1)
    assert 1e-4 < difference < 0.02  # a library in float32 is nearer
    return library


@runs
def test_a_saved_library_says_its_type_and_what_it_needs(tmp_path, monkeypatch):
    made = agrees_with_float32(network_file(tmp_path / "m.onnx"), 32)
    made.save(tmp_path / "out")
    info = json.loads((tmp_path / "out" / "deploy.json").read_text())
    assert info["dtype"] == "bfloat16"
    assert {kind for kind, _, _ in info["weights"]} == {"float32", "uint16", "int32"}
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(deploy.load(tmp_path / "out").run(images), made.run(images))
    have = processor.features()
    monkeypatch.setattr(processor, "features", lambda: have - {"avx512bf16"})
    with pytest.raises(ValueError, match="lacks avx512bf16") as caught:
        deploy.load(tmp_path / "out")
    assert "\n" not in str(caught.value)


@runs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("resnet20", 32), ("resnet18", 32), ("mobilenet_v1", 32), ("mobilenet_v2", 32)]
)
def test_networks_agree_with_onnx_runtime_in_float32(tmp_path, name, size):
    torch = pytest.importorskip("torch")
    import models

    network, path = prune(models.create_model(name, num_classes=10), block=16), tmp_path / "model.onnx"
    picture = (torch.randn(1, 3, size, size),)
    torch.onnx.export(network, picture, str(path), dynamo=True, external_data=False, verbose=False)
    agrees_with_float32(path, size)


@runs
@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("density", [1, 0.5, 0.25, 0.1])
def test_every_block_and_density(machine, block, density):
    """As the cost model plans it, and all of it in NCHWc."""
    rng = np.random.default_rng(block)
    shapes = {"x": (2, 33, 14, 14), "a": (2, 96, 14, 14), "b": (2, 96, 7, 7), "c": (2, 64, 7, 7), "y": (2, 64, 7, 7)}

    def conv(name, inputs, output, rows, columns, k=1, stride=1):
        weight = block_weight(rng, rows, columns, (k, k), block, density, False) / np.sqrt(columns * k * k)
        bias = rng.standard_normal(rows).astype(np.float32)
        more = {"stride": (stride, stride), "pad": (k // 2, k // 2), "activation": RELU}
        return graph.Conv(name, inputs, output, weight=weight, bias=bias, **more)

    taps = {"weight": rng.standard_normal((96, 3, 3)).astype(np.float32), "bias": np.zeros(96, np.float32)}
    window = {"kernel": (3, 3), "stride": (2, 2), "pad": (1, 1), **taps}
    nodes = [
        conv("first", ["x"], "a", 96, 33, 3),
        graph.Window("slide", ["a"], "b", kind="conv", **window),
        conv("second", ["b"], "c", 64, 96),
        conv("third", ["c", "c"], "y", 64, 64, 3),
    ]
    network = graph.Graph(nodes, shapes, "x", "y")
    passes.fuse_depthwise(network)
    x = rng.standard_normal(shapes["x"]).astype(np.float32)
    for least in (layout.total, lambda costs, nchwc: -len(nchwc)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "total", least)
            plan = layout.make_plan(cost.CostModel(network, machine))
        ours, right, exact = (
            compiled(network, machine, plan).run(x), oracle(network, plan, x), oracle(network, plan, x, lambda v: v),
        )  # fmt: skip
        if plan.nchwc:
            near(ours, right, exact)
        else:
            np.testing.assert_allclose(ours, right, rtol=0, atol=1e-5 * np.abs(right).max())


# processors


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512", "aarch64"])
def test_a_processor_without_the_instruction_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(ValueError, match=f"dtype bfloat16: {name} has none of avx512bf16") as caught:
        deploy.compile_onnx(small_file(tmp_path / "m.onnx"), target=name, dtype="bfloat16")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="dtype 'float16': float32 or bfloat16"):
        deploy.compile_onnx(tmp_path / "m.onnx", target=name, dtype="float16")


@pytest.mark.parametrize("cpu", ["znver4", "sapphirerapids", "cooperlake"])
def test_code_for_every_processor_that_has_it(cpu):
    """The instruction itself is there, on whole registers, though LLVM would split Intel's in two."""
    aim = targets.find_machine(json.dumps({"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": cpu}))
    aim, case = aim.with_dtype("bfloat16"), case_of()
    network, _ = network_of(case)
    made = program.make_program(network, aim, plan_of(network, aim, case))
    (code,) = build.build(made.module, aim)[0].module.mod.imports
    multiplied = [line for line in code.inspect_source("s").splitlines() if "vdpbf16ps" in line]
    assert multiplied
    assert all("zmm" in line for line in multiplied)


@runs
def test_one_file_of_tuning_holds_the_times_of_every_type(tmp_path, monkeypatch):
    """A kernel in float32 bears the name of the one in bfloat16, and would be taken for as fast."""
    asked = []

    def milliseconds(graph, machine, plan, place):
        asked.append(machine.dtype)
        return 1.0

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    path, file, here = network_file(tmp_path / "m.onnx"), tmp_path / "tuned.json", targets.find_machine()
    network = passes.simplify(reader.read_onnx(path))
    for dtype in ("float32", "bfloat16", "float32", "bfloat16"):
        aim = here.with_dtype(dtype)
        asked.append("plan")
        layout.make_plan(tune.MeasuredCostModel(tune.Times(file, aim), network, aim))
    counts = {dtype: asked.count(dtype) for dtype in ("float32", "bfloat16")}
    assert min(counts.values()) > 5
    expected = [["plan", *[dtype] * count] for dtype, count in counts.items()]
    assert asked == [*expected[0], *expected[1], "plan", "plan"]
    assert len(json.loads(file.read_text())["times_ms"]) == sum(counts.values())
