"""deploy/: every kernel against a slow oracle, whole networks against ONNX Runtime, the library, the errors."""

import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")
pytest.importorskip("tvm")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import deploy  # noqa: E402
import model_tune  # noqa: E402
from deploy import peers, targets  # noqa: E402
from deploy.codegen import build, program  # noqa: E402
from deploy.kernels import family, product, tiles  # noqa: E402
from deploy.kernels.nchw_pixel_conv import NCHWPixelConv  # noqa: E402
from deploy.onnx import blocks, graph, passes, reader  # noqa: E402
from deploy.plan import cost, fusion, layout  # noqa: E402
from deploy.runtime.library import Library  # noqa: E402
from deploy.tuning import measure  # noqa: E402

TARGETS = ["native"] + (["x86-avx2"] if platform.machine() == "x86_64" else [])
OTHER = "aarch64" if platform.machine() == "x86_64" else "x86-avx2"  # compiles anywhere, runs elsewhere
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def run_nodes(nodes: list, shapes: dict, x: np.ndarray, machine=None, dense=False) -> np.ndarray:
    shapes = {"x": x.shape, **shapes}
    network = graph.Graph(nodes, shapes, "x", "y")
    passes.fuse_depthwise(network)
    machine = machine or targets.find_machine()
    plan, machine = layout.make_plan(cost.CostModel(network, machine, dense)), replace(machine, threads=2)
    executable, weights = build.build(program.make_program(network, machine, plan).module, machine)
    return Library(executable.module, weights, {"threads": 2, "input": {"name": "x", "shape": x.shape}}).run(x)


def convolve(x, weight, bias, stride=(1, 1), pad=(0, 0, 0, 0), dilation=(1, 1), groups=1):
    """(B, C, H, W) * (O, C / groups, kh, kw), one output pixel at a time; pad: above, left, below, right."""
    x = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[2]), (pad[1], pad[3]))).astype(np.float64)
    kh, kw = (dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in range(2))
    rows, columns = (x.shape[2] - kh) // stride[0] + 1, (x.shape[3] - kw) // stride[1] + 1
    y = np.zeros((len(x), len(weight), rows, columns))
    each, part = len(weight) // groups, x.shape[1] // groups
    for o in range(len(weight)):
        channels = slice(o // each * part, (o // each + 1) * part)
        for i in range(rows):
            for j in range(columns):
                top, left = i * stride[0], j * stride[1]
                patch = x[:, channels, top : top + kh : dilation[0], left : left + kw : dilation[1]]
                y[:, o, i, j] = (patch * weight[o]).sum((1, 2, 3)) + bias[o]
    return y


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * max(1e-3, np.abs(theirs).max()))


def block_weight(rng, rows, columns, kernel, block, density, fine):
    """Weights in blocks of `block` rows, kept with probability `density`, by channel or (fine) by channel and tap."""
    groups = -(-rows // block)
    keep = rng.random((groups, columns, *(kernel if fine else (1, 1)))) < density
    weight = rng.uniform(0.1, 1, (rows, columns, *kernel)) * rng.choice([-1, 1], (rows, columns, *kernel))
    return (weight * np.repeat(keep, block, axis=0)[:rows]).astype(np.float32)


@st.composite
def convolutions(draw):
    """A convolution of any geometry, an image, and which of the candidate kernels to use."""
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (3, 3), (5, 5), (1, 3), (2, 2)]))
    size = draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (5, 9), (14, 14), (17, 20), (33, 3)]))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1), (3, 3)]))
    pad = tuple(draw(st.integers(0, k // 2)) for k in kernel * 2)
    size = tuple(max(n, k) for n, k in zip(size, kernel, strict=True))
    return {
        "batch": draw(st.sampled_from([1, 1, 2])),
        "channels": draw(st.integers(1, 20)),
        "rows": draw(st.sampled_from([1, 3, 4, 8, 10, 18, 32, 33, 40, 64])),
        "kernel": kernel,
        "size": size,
        "stride": stride,
        "pad": pad,
        "block": draw(st.sampled_from(blocks.SIZES)),
        "density": draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        "fine": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, ("clip", 0.0, None), ("clip", 0.0, 6.0), ("hard_swish",)])),
        "sparse": draw(st.booleans()),
        "nchwc": draw(st.booleans()),
        "candidate": draw(st.integers(0, 10_000)),
        "target": draw(st.sampled_from(TARGETS)),
        "seed": draw(st.integers(0, 1000)),
    }


ACTIVATIONS = {
    None: lambda v: v,
    ("clip", 0.0, None): lambda v: np.maximum(v, 0),
    ("clip", 0.0, 6.0): lambda v: np.clip(v, 0, 6),
    ("hard_swish",): lambda v: v * np.clip(v + 3, 0, 6) / 6,
}


@given(case=convolutions())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_convolution_kernel_equals_the_oracle(case):
    rng = np.random.default_rng(case["seed"])
    machine = targets.find_machine(case["target"])
    x = rng.standard_normal((case["batch"], case["channels"], *case["size"])).astype(np.float32)
    weight = block_weight(
        rng, case["rows"], case["channels"], case["kernel"], case["block"], case["density"], case["fine"]
    )
    bias = rng.standard_normal(case["rows"]).astype(np.float32)
    expected = convolve(x, weight, bias, case["stride"], case["pad"])
    nodes, shapes, inputs = [], {"y": expected.shape}, ["x"]
    if case["residual"]:  # another convolution of the same shape makes what is added
        other = rng.standard_normal(weight.shape).astype(np.float32)
        nodes.append(
            graph.Conv("other", ["x"], "r", weight=other, bias=bias, stride=case["stride"], pad=case["pad"][:2])
        )
        shapes["r"], inputs = expected.shape, ["x", "r"]
        expected = expected + convolve(x, other, bias, case["stride"], case["pad"])
    nodes.append(
        graph.Conv(
            "conv", inputs, "y", weight=weight, bias=bias, stride=case["stride"], pad=case["pad"][:2],
            activation=case["activation"],
        )
    )  # fmt: skip

    def compared(self, families, work, pattern):
        """One of all candidates, cheap in the layout that is to be tested."""
        groups = [g for g in blocks.SIZES if pattern.block % g == 0] if case["sparse"] else [1, 4, 8, 12, 16, 24, 32]
        every = [(f, *tiling) for f in families for tiling in f.tilings(work, self.machine, groups)]
        if not every:
            return []
        kernel, *tiling = every[case["candidate"] % len(every)]
        cycles = 0 if kernel.nchwc == case["nchwc"] else 1e9
        return [family.Schedule(kernel, case["sparse"], *tiling, pattern.density, cycles=cycles)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost.CostModel, "compared", compared)
        close(run_nodes(nodes, shapes, x, machine), ACTIVATIONS[case["activation"]](expected))


@given(
    channels=st.integers(1, 37),
    size=st.sampled_from([(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (8, 8), (9, 20), (16, 16), (23, 17)]),
    k=st.sampled_from([(3, 1), (5, 2), (3, 0), (1, 0), (5, 1)]),
    stride=st.sampled_from([1, 2, 3]),
    dilation=st.sampled_from([1, 1, 2]),
    batch=st.sampled_from([1, 2]),
    target=st.sampled_from(TARGETS),
)
@FEW
def test_depthwise_and_pooling_equal_the_oracle(channels, size, k, stride, dilation, batch, target):
    (k, pad), rng = k, np.random.default_rng(channels)
    reach = (k - 1) * dilation + 1
    size = tuple(max(n, reach) for n in size)
    x = rng.standard_normal((batch, channels, *size)).astype(np.float32)
    weight, bias = rng.standard_normal((channels, 1, k, k)).astype(np.float32), rng.standard_normal(channels)
    common = {"kernel": (k, k), "stride": (stride, stride), "pad": (pad, pad), "dilation": (dilation, dilation)}
    machine = targets.find_machine(target)
    expected = convolve(x, weight, bias, *[(stride,) * 2, (pad,) * 4, (dilation,) * 2], channels)
    node = graph.Window(
        "n", ["x"], "y", kind="conv", weight=weight[:, 0], bias=bias.astype(np.float32), **common,
        activation=("clip", 0.0, 6.0),
    )  # fmt: skip
    close(run_nodes([node], {"y": expected.shape}, x, machine), np.clip(expected, 0, 6))

    ones = np.ones((channels, 1, k, k)) / k**2
    mean = convolve(x, ones, np.zeros(channels), (stride,) * 2, (pad,) * 4, (dilation,) * 2, channels)
    node = graph.Window("n", ["x"], "y", kind="average", **common)
    close(run_nodes([node], {"y": mean.shape}, x, machine), mean)

    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-np.inf)
    taps = [
        padded[:, :, i * dilation :, j * dilation :][:, :, ::stride, ::stride][:, :, : mean.shape[2], : mean.shape[3]]
        for i in range(k)
        for j in range(k)
    ]
    node = graph.Window("n", ["x"], "y", kind="max", **common)
    close(run_nodes([node], {"y": mean.shape}, x, machine), np.max(taps, axis=0))


@pytest.mark.parametrize(
    ("pads", "ceil"),
    [([0] * 4, 1), ([0, 0, 1, 1], 0), ([0, 0, 1, 1], 1), ([0, 1, 0, 0], 0), ([0, 0, 1, 0], 0), ([1] * 4, 1)],
)
def test_a_maximum_of_negative_maps_is_not_its_border(tmp_path, pads, ceil):
    """A zero border in NCHWc that is larger than all values of a window would be taken for the maximum."""
    pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": pads, "ceil_mode": ceil}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["a"]), helper.make_node("MaxPool", ["a"], ["y"], **pool)]
    weights = {"w": np.full((32, 8, 1, 1), 0.1, np.float32), "b": np.full(32, -9, np.float32)}
    with pytest.MonkeyPatch.context() as patch:  # as many maps in NCHWc as possible
        patch.setattr(layout, "total", lambda costs, nchwc: -len(nchwc))
        agrees(onnx_file(tmp_path / "m.onnx", nodes, weights, (1, 8, 8, 9), rank=4), all_first=False)


def everything(rng, channels, size, k, stride, activation, separable):
    """All that can work in blocks of channels: depthwise, pointwise, a gate, residual sums, pooling, a mean."""
    mid, out = channels + 5, -(-size // stride)
    shapes = {"a": (2, channels, size, size), "g": (2, channels), "h": (2, channels, 1, 1)}
    shapes |= dict.fromkeys(("s", "t"), (2, channels, size, size))
    shapes |= {"u": (2, mid, out, out), "d": (2, mid, out, out), "r": (2, mid, out, out), "v": (2, mid, out, out)}
    shapes |= {"p": (2, mid, out, out), "q": (2, mid, out, out), "y": (2, mid)}

    def conv(name, inputs, output, rows, columns, kernel=1, **more):
        weight = block_weight(rng, rows, columns, (kernel, kernel), 16, 0.6, False) / columns
        return graph.Conv(
            name, inputs, output, weight=weight, bias=rng.standard_normal(rows).astype(np.float32), **more
        )

    def depthwise(name, x, y, channels, **more):
        weight = rng.standard_normal((channels, k, k)).astype(np.float32)
        bias = rng.standard_normal(channels).astype(np.float32)
        return graph.Window(
            name, [x], y, kind="conv", kernel=(k, k), pad=(k // 2,) * 2, weight=weight, bias=bias, **more
        )

    window = {"kernel": (3, 3), "stride": (1, 1), "pad": (1, 1)}
    one, two = {"stride": (1, 1)}, {"stride": (stride, stride)}
    shift = rng.standard_normal(channels).astype(np.float32)
    nodes = [
        conv("stem", ["x"], "a", channels, 3, 3, pad=(1, 1), activation=activation),
        graph.Mean("mean", ["a"], "g"),
        conv("fc", ["g2"], "h", channels, channels, activation=("hard_sigmoid", 1 / 6, 0.5)),
        graph.Affine("gate", ["a", "h"], "s", scale="h", shift=shift),
        depthwise("alone", "s", "t", channels, **one, activation=("hard_swish",)),
        conv("expand", ["f" if separable else "t"], "e", channels + 3, channels, activation=("clip", 0.0, None)),
        depthwise("first", "e", "u0", channels + 3, **two, activation=("clip", 0.0, 6.0)),
        conv("pointwise", ["u0"], "u", mid, channels + 3, activation=("clip", 0.0, None)),
        conv("strided", ["t"], "d", mid, channels, 3, pad=(1, 1), **two),
        graph.Affine("sum", ["u", "d"], "r", shift="d"),
        conv("last", ["r", "u"], "v", mid, mid, activation=("clip", 0.0, None)),
        graph.Window("max", ["v"], "p", kind="max", **window),
        graph.Window("average", ["p"], "q", kind="average", **window),
        graph.Mean("mean", ["q"], "y"),
    ]
    if separable:
        nodes.insert(5, depthwise("front", "t", "f", channels, **one, activation=("clip", 0.0, None)))
        shapes["f"] = shapes["t"]
    nodes.insert(2, graph.View("view", ["g"], "g2"))
    shapes |= {"g2": (2, channels, 1, 1), "u0": (2, channels + 3, out, out), "e": (2, channels + 3, size, size)}
    return nodes, shapes


@given(
    channels=st.sampled_from([16, 24, 40]),
    size=st.sampled_from([4, 7, 14, 15, 33]),
    k=st.sampled_from([3, 5]),
    stride=st.sampled_from([1, 2]),
    activation=st.sampled_from([None, ("hard_swish",)]),
    separable=st.booleans(),
    target=st.sampled_from(TARGETS),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_nchwc_computes_what_nchw_computes(channels, size, k, stride, activation, separable, target):
    rng, results, machine = np.random.default_rng(size), [], targets.find_machine(target)
    nodes, shapes = everything(rng, channels, size, k, stride, activation, separable)
    x = rng.standard_normal((2, 3, size, size)).astype(np.float32)
    plans, real = [], layout.make_plan

    def make_plan(*arguments):
        plans.append(real(*arguments))
        return plans[-1]

    for sign in (1, -1):  # as few, and as many, in NCHWc as possible
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "total", lambda costs, nchwc, sign=sign: sign * len(nchwc))
            patch.setattr(cost, "REORDER", 1e9)
            patch.setattr(fusion, "WIDE", (0, 0))
            patch.setattr(fusion, "TWICE", (1.0, 1.0))
            patch.setattr(layout, "make_plan", make_plan)
            results.append(run_nodes([replace(node) for node in nodes], shapes, x, machine))
    assert [len(plan.nchwc) for plan in plans] == [0, 12]
    out = -(-size // stride)
    band = max(n for n in range(1, out) if out % n == 0)
    few = k - stride <= stride * band  # rows would be computed twice
    inside = [expansion.node for expansion in plans[1].expansions.values()]
    assert [node.depthwise is not None for node in inside] == [separable] * few
    close(*results)


def test_what_stays_in_the_cache_is_cheaper_by_its_way_out_and_back(monkeypatch):
    machine = targets.find_machine()
    nodes, shapes = everything(np.random.default_rng(0), 16, 14, 3, 2, None, separable=False)
    network = graph.Graph(nodes, {"x": (2, 3, 14, 14), **shapes}, "x", "y")
    passes.fuse_depthwise(network)
    costs, totals = cost.CostModel(network, machine), []
    for most in (0, 10**9):
        monkeypatch.setattr(fusion, "WIDE", (most, most))
        totals.append(layout.total(costs, {name for name, (_, nchwc) in costs.nodes.items() if nchwc is not None}))
    np.testing.assert_allclose(totals[1] - totals[0], 8 / machine.core.l3_rate * np.prod(shapes["e"]))


def test_few_channels_slide_in_nchw():
    """A depthwise convolution of fewer channels than a vector has lanes, in front of a pointwise one of many."""
    rng = np.random.default_rng(0)
    x, taps = rng.standard_normal((1, 5, 9, 9)).astype(np.float32), rng.standard_normal((5, 3, 3)).astype(np.float32)
    weight = rng.standard_normal((64, 5, 1, 1)).astype(np.float32)
    nodes = [
        graph.Window(
            "dw", ["x"], "a", kind="conv", kernel=(3, 3), stride=(1, 1), pad=(1, 1), weight=taps,
            bias=np.zeros(5, np.float32),
        ),
        graph.Conv("pw", ["a"], "y", weight=weight, bias=np.zeros(64, np.float32)),
    ]  # fmt: skip
    expected = convolve(convolve(x, taps[:, None], np.zeros(5), pad=(1,) * 4, groups=5), weight, np.zeros(64))
    close(run_nodes(nodes, {"a": x.shape, "y": (1, 64, 9, 9)}, x), expected)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    most=st.integers(1, 28),
)
@settings(max_examples=200, deadline=None)
def test_strips_cover_the_map(rows, columns, most):
    seen = np.zeros((rows, columns), int)
    for strip in tiles.strips(rows, columns, most):
        assert len(strip.pixels) <= most
        for row, column in strip.starts:
            for y, x in strip.pixels:
                seen[row + y, column + x] += 1
    assert seen.min() == 1
    assert columns > most or seen.max() == 1


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    gap=st.integers(0, 4),
    lanes=st.sampled_from([4, 8, 16]),
    most=st.integers(1, 8),
)
@settings(max_examples=300, deadline=None)
def test_tiles_write_every_pixel_from_its_place_and_stay_inside(rows, columns, gap, lanes, most):
    stride, written = columns + gap, np.full(rows * columns, -1)
    for band in tiles.plan(rows, columns, stride, lanes, most):
        assert len(band.vectors) <= most
        for read, write in band.starts:
            for vector in band.vectors:
                assert vector.lanes <= lanes
                end = read + vector.source + vector.lanes
                assert end <= (rows - 1) * stride + columns + (lanes if gap else 0)
                for s in vector.stores:
                    lane = np.arange(s.lane, s.lane + s.width)
                    assert lane[-1] < vector.lanes
                    written[write + s.at + np.arange(s.width)] = read + vector.source + lane
    place = np.arange(rows)[:, None] * stride + np.arange(columns)
    np.testing.assert_array_equal(written, place.reshape(-1))


def test_blocks_are_found_in_the_weights():
    rng = np.random.default_rng(0)
    for block in blocks.SIZES:
        weight = block_weight(rng, 64, 50, (1, 1), block, 0.5, False)
        pattern = blocks.find_pattern(weight)
        assert pattern.block == block
        assert pattern.density == pytest.approx(np.count_nonzero(weight) / weight.size)
    assert blocks.find_pattern(np.ones((10, 3, 1, 1))).density == 1.0  # dense, with a short last group
    assert blocks.find_pattern(np.zeros((10, 3, 1, 1))).density == 0.0
    short = block_weight(rng, 18, 100, (1, 1), 4, 0.5, False)
    assert blocks.find_pattern(short).block == 4


def test_scattered_zeros_are_covered_by_larger_blocks_where_that_pays():
    alive = np.zeros((64, 9), bool)
    alive[:, :3] = True  # three positions that all filters keep,
    alive[np.arange(64), np.random.default_rng(0).integers(3, 9, 64)] = True  # and one that each has for itself
    weight = np.broadcast_to(alive.reshape(64, 1, 3, 3), (64, 64, 3, 3)).astype(np.float32)
    whole = blocks.find_pattern(weight)
    assert whole.block < 4
    found = blocks.with_covers(whole, weight)
    assert [pattern.block for pattern in found[1:]] == [32, 16, 8, 4]
    for pattern in found:
        dropped = np.repeat(~pattern.keep, pattern.block, axis=0)[:64]
        assert not weight.reshape(64, -1)[dropped].any()
    node = graph.Conv("conv", ["x"], "y", weight=weight, bias=np.zeros(64, np.float32), pad=(1, 1))
    network = graph.Graph([node], {"x": (1, 64, 16, 16), "y": (1, 64, 16, 16)}, "x", "y")
    plan = layout.make_plan(cost.CostModel(network, targets.find_machine()))
    assert plan.schedules["y"].sparse
    assert plan.patterns["y"].block >= 4
    x = np.random.default_rng(1).standard_normal((1, 64, 16, 16)).astype(np.float32)
    close(run_nodes([node], {"y": (1, 64, 16, 16)}, x), run_nodes([node], {"y": (1, 64, 16, 16)}, x, dense=True))


def test_packing_keeps_every_weight_once():
    rng = np.random.default_rng(0)
    weight = block_weight(rng, 10, 13, (3, 3), 4, 0.4, True)
    node = graph.Conv("conv", ["x"], "y", weight=weight, bias=np.zeros(10))
    pattern = blocks.Pattern(4, blocks.keep_blocks(weight, 4))
    schedule = family.Schedule(NCHWPixelConv, sparse=True, group=4, tile=1, unroll=2)
    columns = product.columns_of(node, pattern, schedule, np.arange(13 * 9))
    _, (kept, offset, pointer, _) = product.pack(node, schedule, columns)
    back = np.zeros((12, 13 * 9), np.float32)
    for g in range(3):
        for step in range(pointer[g] * 2, pointer[g + 1] * 2):
            back[4 * g : 4 * g + 4, offset[step]] += kept.reshape(-1, 4)[step]
    np.testing.assert_array_equal(back[:10], weight.reshape(10, -1))


# whole files


def onnx_file(path: Path, nodes, weights: dict, x=(1, 8, 8, 8), rank=2) -> Path:
    """A small ONNX file with input x and output y."""
    made = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def agrees(path: Path, batch=None, all_first=True, **options) -> Library:
    library = deploy.compile_onnx(path, threads=2, batch=batch, **options)
    shape = library.info["input"]["shape"]
    images = np.random.default_rng(1).standard_normal((2 * shape[0], *shape[1:])).astype(np.float32)
    error, top1 = measure.compare(library.run, measure.peer(path, 2), images, shape[0])
    assert error < 1e-5
    assert top1 == 1.0 or not all_first
    return library


def small_file(path: Path, block=4, x=(1, 8, 8, 8)) -> Path:
    """1x1 convolution in blocks of `block` rows -> hard-swish -> mean -> classifier."""
    rng = np.random.default_rng(0)
    weights = {
        "w": block_weight(rng, 16, x[1] if isinstance(x[1], int) else 8, (1, 1), block, 0.5, False),
        "v": rng.standard_normal((5, 16)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("HardSwish", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "v"], ["y"], transB=1, name="classifier"),
    ]
    return onnx_file(path, nodes, weights, x)


def prune(network, block=4, rate=0.5):
    """Random normalisation statistics, and blocks of `block` rows zeroed in every pointwise convolution."""
    import torch

    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, torch.nn.Conv2d) and module.groups == 1 and module.out_channels % block == 0:
            rows, columns = module.weight.shape[:2]
            keep = (torch.rand(rows // block, columns, 1, 1) > rate).float()
            module.weight.data *= keep.repeat_interleave(block, 0)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "size"), [("mobilenet_v2", 32), ("mobilenet_v3_small", 64), ("resnet18", 32), ("vgg11_bn", 32)]
)
def test_networks_equal_onnx_runtime(tmp_path, name, size):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    path = tmp_path / "model.onnx"
    network = prune(torchvision.models.get_model(name, num_classes=10))
    if name == "vgg11_bn":  # the plan of a VGG without its two layers of 4096
        network = torch.nn.Sequential(
            network.features, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(512, 10)
        )
    image = torch.randn(1, 3, size, size)
    torch.onnx.export(network.eval(), (image,), str(path), dynamo=True, external_data=False, verbose=False)
    library = agrees(path)
    assert any(layer["N"] == 4 for layer in library.info["layers"])
    agrees(path, dense=True)


def test_cifar_network_with_a_batch_left_open(tmp_path):
    torch = pytest.importorskip("torch")
    import models

    path = tmp_path / "model.onnx"
    network = prune(models.create_model("resnet20", num_classes=10))
    torch.onnx.export(
        network, (torch.randn(2, 3, 32, 32),), str(path), dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=({0: "batch"},),
    )  # fmt: skip
    assert agrees(path, batch=3).info["batch"] == 3
    assert agrees(path).info["batch"] == 1


def test_operators_of_older_exporters(tmp_path):
    rng = np.random.default_rng(0)
    f32 = np.float32
    weights = {
        "w": rng.standard_normal((8, 8, 3, 3)).astype(f32), "g": rng.standard_normal((12, 3, 1, 1)).astype(f32),
        "three": np.array(3, f32), "six": np.array(6, f32), "zero": np.array(0, f32),
        "scale": rng.random(8).astype(f32), "shift": rng.random(8).astype(f32),
        "mean": rng.random(8).astype(f32), "var": rng.random(8).astype(f32) + 1,
        "pads": np.array([0, 2, 0, 0, 0, 2, 0, 0]), "starts": np.array([0, 0]), "ends": np.array([99, 99]),
        "axes": np.array([2, 3]), "steps": np.array([2, 2]), "shape": np.array([0, -1]), "b": rng.random(4).astype(f32),
        "nine": np.array([99, 9]), "ones": np.array([0, 1]), "m": rng.random((36 * 16, 4)).astype(f32),
    }  # fmt: skip
    n = helper.make_node
    nodes = [
        n("BatchNormalization", ["x", "scale", "shift", "mean", "var"], ["bn"]),  # before any convolution: stands alone
        n("Conv", ["bn", "w"], ["a"], pads=[1, 1, 1, 1]),
        n("Add", ["a", "three"], ["a3"]),
        n("Clip", ["a3", "zero", "six"], ["a6"]),
        n("Div", ["a6", "six"], ["gate"]),
        n("Mul", ["a", "gate"], ["swish"]),
        n("GlobalAveragePool", ["swish"], ["pool"]),
        n("HardSigmoid", ["pool"], ["squeeze"], alpha=1 / 6),
        n("Mul", ["swish", "squeeze"], ["excited"]),
        n("Slice", ["excited", "starts", "ends", "axes", "steps"], ["sliced"]),
        n("Pad", ["sliced", "pads"], ["padded"]),
        n("Dropout", ["padded"], ["kept"]),
        n("MaxPool", ["kept"], ["max"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        n("Concat", ["max", "max"], ["both"], axis=1),
        n("Sub", ["both", "three"], ["less"]),
        n("AveragePool", ["less"], ["average"], kernel_shape=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
        n("Slice", ["average", "starts", "nine", "ones"], ["nine_channels"]),
        n("Conv", ["nine_channels", "g"], ["grouped"], group=3),
        n("Concat", ["grouped", "average"], ["wide"], axis=1),
        n("Relu", ["wide"], ["positive"]),
        n("Reshape", ["positive", "shape"], ["flat"]),
        n("MatMul", ["flat", "m"], ["product"]),
        n("Add", ["product", "b"], ["y"]),
    ]  # fmt: skip
    agrees(onnx_file(tmp_path / "m.onnx", nodes, weights, (2, 8, 9, 9)))  # 9 -> sliced 5 -> pooled 3 -> averaged 4


def test_hard_activations_and_residuals_are_fused(tmp_path):
    weights = {"w": np.ones((8, 8, 1, 1), np.float32), "three": np.array(3.0, np.float32)}
    weights |= {"six": np.array(6, np.float32), "zero": np.array(0, np.float32)}
    n = helper.make_node
    nodes = [
        n("Conv", ["x", "w"], ["a"]), n("Add", ["a", "three"], ["b"]), n("Clip", ["b", "zero", "six"], ["c"]),
        n("Div", ["c", "six"], ["d"]), n("Mul", ["a", "d"], ["e"]), n("Conv", ["e", "w"], ["f"]),
        n("Add", ["f", "e"], ["g"]), n("Relu", ["g"], ["y"]),
    ]  # fmt: skip
    network = passes.simplify(reader.read_onnx(onnx_file(tmp_path / "m.onnx", nodes, weights, rank=4)))
    first, second = network.nodes
    assert first.activation == ("hard_swish",)
    assert second.inputs == [first.output, first.output]
    assert second.activation == ("clip", 0.0, None)
    agrees(tmp_path / "m.onnx")


# the library and the command


def test_a_saved_library_runs_without_this_repository(tmp_path):
    library = deploy.compile_onnx(small_file(tmp_path / "m.onnx"), threads=1)
    library.save(tmp_path / "out")
    images = np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(deploy.load(tmp_path / "out").run(images), library.run(images))
    np.save(tmp_path / "images.npy", images)
    example = deploy.runtime.library.__doc__.split("\n\n")[2:4]
    program = "\n".join(line[4:] for part in example for line in part.splitlines())
    program = program.replace('"deploy/', '"out/').replace("images = np.zeros", 'images = np.load("images.npy") #')
    program = program.replace(".argmax(1)", ".tolist()")
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(json.loads(ran.stdout), library.run(images), rtol=1e-5)


def test_the_command_writes_what_it_proved(tmp_path, capfd, monkeypatch):
    for name in ("openvino", "MNN"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    path = small_file(tmp_path / "m.onnx")
    np.save(tmp_path / "inputs.npy", np.ones((3, 8, 8, 8), np.float32))
    assert model_tune.main(["--onnx_path", str(path), "--bsr", "4", "--bsc", "1", "--runs", "3", "--threads", "1"]) == 0
    written = json.loads((tmp_path / "deploy" / "deploy.json").read_text())
    assert written["max_relative_error"] < 1e-5
    assert written["top1_agreement"] == 1.0
    assert set(written["latency_ms"]) == {"onnxruntime_dense", "onnxruntime_int8", "tvm_dense", "tvm_sparse"}
    assert {name for name, fact in written["peers"].items() if "absent" in fact} == {
        "openvino_dense",
        "openvino_default",
        "openvino_int8",
        "mnn",
    }
    assert written["speedup"]["vs_onnxruntime_int8"] > 0
    assert {"median", "p10"} == set(written["latency_ms"]["tvm_sparse"])
    assert [layer["name"] for layer in written["layers"]] == ["conv", "classifier"]
    assert written["layers"][0]["N"] == 4
    assert "| conv | 16 x 8 x 1 x 1 | 64 | 4 |" in (tmp_path / "deploy" / "deploy.md").read_text()
    assert deploy.load(tmp_path / "deploy").run(np.zeros((1, 8, 8, 8), np.float32)).shape == (1, 5)
    told = capfd.readouterr()
    assert told.err == ""
    for package in ("openvino", "MNN"):
        assert f"pip install {package}" in told.out
        assert f"pip install {package}" in (tmp_path / "deploy" / "deploy.md").read_text()


def test_a_file_that_onnx_runtime_cannot_read_is_proven_without_it(tmp_path, capsys):
    """A newer IR version than the installed ONNX Runtime knows, for example."""
    path = small_file(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.ir_version = onnx.IR_VERSION
    onnx.save(model, path)
    try:
        measure.peer(path, 1)
        pytest.skip("this ONNX Runtime reads it")
    except measure.Unreadable:
        pass
    assert model_tune.main(["--onnx_path", str(path), "--runs", "1", "--threads", "1"]) == 0
    told = capsys.readouterr()
    assert "ONNX Runtime is left out: " in told.out
    written = json.loads((tmp_path / "deploy" / "deploy.json").read_text())
    assert {"tvm_dense", "tvm_sparse"} <= written["latency_ms"].keys()
    assert "absent" in written["peers"]["onnxruntime_dense"]
    assert "cannot be quantised" in written["peers"]["onnxruntime_int8"]["absent"]
    assert written["max_relative_error"] < 1e-5
    assert "equal to onnx's reference evaluator" in (tmp_path / "deploy" / "deploy.md").read_text()


@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_that_is_installed_computes_the_network(tmp_path, name):
    """A peer that is set up wrongly is fast and worthless: what each computes is compared before its time counts."""
    peer, path = peers.PEERS[name], small_file(tmp_path / "m.onnx")
    pytest.importorskip(peer.package)
    images = np.random.default_rng(0).standard_normal((1, 8, 8, 8)).astype(np.float32)
    int8 = deploy.quantise(path, [images], tmp_path / "int8.onnx")
    runners, facts = peers.start([name], path, int8, 1, images.shape)
    assert facts[name]["dtype"] in (peer.dtype, "float32", "bfloat16")
    error, _ = measure.compare(runners[name], measure.peer(path, 1), images, 1)
    assert error < {"float32": 1e-5}.get(facts[name]["dtype"], 0.05)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    runners, facts = peers.start([name], broken, broken, 1, images.shape)
    assert not runners
    assert str(broken) in facts[name]["absent"]


def test_the_chosen_peers_are_timed_in_turns_beside_the_libraries(tmp_path):
    path = small_file(tmp_path / "m.onnx")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "int8.onnx").write_bytes(b"of an earlier library")
    argv = ["--onnx_path", str(path), "--runs", "3", "--threads", "1", "--peers", "onnxruntime_int8", "openvino_dense"]
    assert model_tune.main(argv) == 0
    written = json.loads((tmp_path / "deploy" / "deploy.json").read_text())
    asked = {"onnxruntime_int8", "openvino_dense"}
    assert written["peers"].keys() == asked
    there = {name for name in asked if "absent" not in written["peers"][name]}
    assert written["latency_ms"].keys() == there | {"tvm_dense", "tvm_sparse"}
    assert "| ONNX Runtime int8, dense |" in (tmp_path / "deploy" / "deploy.md").read_text()
    assert not (tmp_path / "deploy" / "int8.onnx").exists()  # a new one's ranges would be of noise


def test_the_command_refuses_a_library_that_differs(tmp_path, capsys):
    path = small_file(tmp_path / "m.onnx")
    assert model_tune.main(["--onnx_path", str(path), "--tolerance", "0", "--runs", "1"]) == 1
    assert "exceeds --tolerance" in capsys.readouterr().err
    assert not (tmp_path / "deploy").exists()


def test_nothing_is_proven_with_values_that_are_not_finite():
    """max(0.0, nan) is 0.0: a reference of NaN would be as equal as can be."""
    images, right = np.zeros((2, 3), np.float32), np.ones((1, 4), np.float32)
    for bad in (np.nan, np.inf):
        wrong = np.where(np.arange(4) == 2, np.float32(bad), right)
        assert measure.compare(lambda _, wrong=wrong: wrong, lambda _: right, images, 1) == (float("inf"), 0.0)
        for ours in (right, wrong):
            with pytest.raises(ValueError, match="NaN or infinity"):
                measure.compare(lambda _, ours=ours: ours, lambda _, wrong=wrong: wrong, images, 1)


def test_mistakes_are_answered_in_one_line(tmp_path, capsys):
    good = str(small_file(tmp_path / "m.onnx"))
    three = str(small_file(tmp_path / "three.onnx", x=(1, 3, 8, 8)))
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"\x08\x09 not a network" * 20)
    n = helper.make_node
    unknown = onnx_file(tmp_path / "unknown.onnx", [n("Softsign", ["x"], ["y"], name="odd")], {})
    open_size = small_file(tmp_path / "open.onnx", x=(1, 8, "H", 8))
    np.save(tmp_path / "wrong.npy", np.zeros((1, 8, 9, 9), np.float32))
    cases = [
        (["--onnx_path", str(garbage)], "not a valid ONNX file"),
        (["--onnx_path", str(tmp_path / "missing.onnx")], "no such file"),
        (["--onnx_path", str(unknown)], "'odd' (operator Softsign)"),
        (["--onnx_path", str(open_size)], "--image_size fixes"),
        (["--onnx_path", good, "--bsr", "8"], "--bsr 8"),
        (["--onnx_path", good, "--peers", "tflite"], "--peers tflite: from onnxruntime_dense, "),
        (["--onnx_path", good, "--dtype", "int4"], "--dtype"),
        (["--onnx_path", good, "--dtype", "int8"], "is not quantised, and --data is missing"),
        (["--onnx_path", good, "--dtype", "auto"], "--dtype auto: --data is missing"),
        (["--onnx_path", good, "--data", str(tmp_path)], "--data: pictures are cut to squares of three channels"),
        (["--onnx_path", three, "--data", str(tmp_path)], "--mean is missing"),
        (["--onnx_path", three, "--data", str(tmp_path), "--mean", "1", "--std", "1"], "--mean 1.0: must be three"),
        (["--onnx_path", three, "--data", str(tmp_path), "--mean", *"000", "--std", *"111"], "has no folder train"),
        (["--onnx_path", good, "--runs", "1", "--keep_float", "nothing"], "--keep_float nothing: not among"),
        (["--onnx_path", good, "--bsc", "4"], "--bsc 4"),
        (["--onnx_path", good, "--sparsity", "1.5"], "--sparsity 1.5"),
        (["--onnx_path", good, "--batch", "2"], "--batch 2"),
        (["--onnx_path", good, "--target", "z80"], "target 'z80'"),
        (["--onnx_path", good, "--images", str(tmp_path / "wrong.npy")], "--images"),
    ]
    for argv, words in cases:
        assert model_tune.main(argv) == 2, argv
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1, err


def test_the_library_checks_its_pictures(tmp_path):
    library = deploy.compile_onnx(small_file(tmp_path / "m.onnx"), threads=1)
    with pytest.raises(ValueError, match="takes float32"):
        library.run(np.zeros((1, 8, 9, 8), np.float32))
    with pytest.raises(ValueError, match=r"holds no deploy\.json"):
        deploy.load(tmp_path)


@pytest.mark.parametrize("missing", ["tvm", "onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_pip_line(tmp_path, missing):
    path = small_file(tmp_path / "m.onnx")
    program = f"import sys; sys.modules[{missing!r}] = None; import model_tune; sys.exit(model_tune.main())"
    command = [sys.executable, "-c", program, "--onnx_path", str(path)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "pip install" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_other_processors_are_compiled_for(tmp_path):
    library = deploy.compile_onnx(small_file(tmp_path / "m.onnx"), target=OTHER)
    assert library.info["layers"][0]["N"] == 4
    with pytest.raises(ValueError, match="cannot run"):
        library.run(np.zeros((1, 8, 8, 8), np.float32))


def test_deploy_needs_no_torch():
    parts = "deploy, deploy.codegen.program, model_tune, jobs.tune"
    program = f"import sys; sys.modules['torch'] = None; import {parts}"  # importing what is None fails
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=False).returncode == 0
