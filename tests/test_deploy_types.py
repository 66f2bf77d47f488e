"""model_tune.py in bfloat16 and int8: what is compiled, what it is proven with, what is counted, what is saved."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tvm")
pytest.importorskip("onnxruntime")
import onnx
from onnx import helper, numpy_helper
from test_deploy import block_weight, onnx_file
from test_quantise import PICTURES, gated_file

import deploy
import model_tune
from deploy import proof, report
from deploy.codegen.program import make_program
from deploy.onnx import passes, reader
from deploy.onnx.graph import Grid
from deploy.plan import layout
from deploy.runtime import processor, startup
from deploy.targets import DTYPES, find_machine
from deploy.tuning import measure, tune
from jobs import tune as job

HAS = processor.features() or frozenset()
in_bfloat16 = pytest.mark.skipif("avx512bf16" not in HAS, reason="this processor does not multiply bfloat16")
in_int8 = pytest.mark.skipif("avx512vnni" not in HAS, reason="this processor does not multiply int8")
n = helper.make_node


def coloured_file(path: Path) -> Path:
    """A stem, a depthwise convolution, blocks of 1x16 and three classes, on pictures of 8 pixels a side."""
    rng = np.random.default_rng(0)
    weights = {
        "stem": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "deep": rng.standard_normal((16, 1, 3, 3)).astype(np.float32),
        "wide": block_weight(rng, 32, 16, (1, 1), 16, 0.5, False),
        "classes": rng.standard_normal((3, 32)).astype(np.float32),
    }
    nodes = [
        n("Conv", ["x", "stem"], ["a"], pads=[1, 1, 1, 1], name="stem"), n("Relu", ["a"], ["b"]),
        n("Conv", ["b", "deep"], ["c"], group=16, pads=[1, 1, 1, 1], name="deep"), n("Relu", ["c"], ["d"]),
        n("Conv", ["d", "wide"], ["e"], name="wide"), n("Relu", ["e"], ["f"]), n("GlobalAveragePool", ["f"], ["g"]),
        n("Flatten", ["g"], ["h"]), n("Gemm", ["h", "classes"], ["y"], transB=1, name="classes"),
    ]  # fmt: skip
    return onnx_file(path, nodes, weights, (1, 3, 8, 8))


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Class folders: pictures that are red, green and blue, with noise."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 6)):
        for channel in range(3):
            (folder / part / str(channel)).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 128, (8, 8, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / part / str(channel) / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def no_start_up(monkeypatch):
    """As where Linux's /proc is missing: it takes a process, and other tests measure it."""
    monkeypatch.setattr(startup, "measure", lambda _: None)


def run(path: Path, *words: str) -> int:
    return model_tune.main(
        ["--onnx_path", str(path), "--runs", "3", "--threads", "1", "--peers", "onnxruntime_int8", *words]
    )


def pictures(folder: Path) -> list[str]:
    return ["--data", str(folder), "--mean", *["0.5"] * 3, "--std", *["0.5"] * 3, "--resize", "8"]


def written(path: Path) -> tuple[dict, str]:
    folder = path.parent / "deploy"
    return json.loads((folder / "deploy.json").read_text()), (folder / "deploy.md").read_text()


# One type


@in_bfloat16
def test_bfloat16_is_proven_with_a_tolerance_of_its_own_and_named(tmp_path, capsys):
    """With float32's tolerance no library would pass, and a table without types would be read as one of float32."""
    path = coloured_file(tmp_path / "m.onnx")
    assert run(path, "--dtype", "bfloat16", "--peers", "onnxruntime_dense", "openvino_default") == 0
    info, text = written(path)
    assert (info["dtype"], info["tolerance"], info["rounding_steps"]) == ("bfloat16", 4 / 256, None)
    assert 1e-4 < info["max_relative_error"] < info["tolerance"]
    assert "| TVM, block sparse | bfloat16 |" in text
    assert "same first class on 100.0% of the pictures" in text
    if info["peers"]["openvino_default"].get("dtype") == "bfloat16":
        assert next(iter(info["latency_ms"])) == "openvino_default"  # before ONNX Runtime, which has another type
    assert "within the roundings of bfloat16" in " ".join(capsys.readouterr().out.split())


@in_bfloat16
def test_a_block_that_is_lost_exceeds_the_tolerance_of_bfloat16(tmp_path):
    """A tolerance that forgives a wrong library proves nothing."""
    path = coloured_file(tmp_path / "m.onnx")
    library = deploy.compile_onnx(path, threads=1, dtype="bfloat16")
    images = proof.pictures(None, path, [1, 3, 8, 8])
    proof.prove({"it": library}, measure.peer(path, 1), images, 1, proof.TOLERANCE["bfloat16"])
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "wide"]
    weight = numpy_helper.to_array(tensor).copy()
    lost = np.flatnonzero(weight[0])[0]
    weight[:16, lost] = 0
    tensor.CopyFrom(numpy_helper.from_array(weight, "wide"))
    onnx.save(model, tmp_path / "lost.onnx")
    with pytest.raises(proof.Differs, match=r"exceeds --tolerance 1\.6e-02"):
        proof.prove({"it": library}, measure.peer(tmp_path / "lost.onnx", 1), images, 1, proof.TOLERANCE["bfloat16"])


def of_signed_maps(path: Path, out: Path) -> Path:
    """As `deploy.quantise`, with maps in int8, as other quantisers write them."""
    from onnxruntime import quantization

    batches = iter([{"x": batch} for batch in PICTURES])
    signed = quantization.QuantType.QInt8
    how = {"activation_type": signed, "weight_type": signed, "per_channel": True}
    quantization.quantize_static(str(path), str(out), batches_reader(batches), **how)
    return out


def batches_reader(batches):
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(batches, None)

    return Reader()


FILES = {
    "per channel": lambda path, out: deploy.quantise(path, PICTURES, out),
    "per tensor": lambda path, out: deploy.quantise(path, PICTURES, out, per_tensor=True),
    "signed maps": of_signed_maps,
}


@pytest.mark.parametrize("how", FILES)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=in_int8)])
def test_quantised_files_of_every_kind_are_a_rounding_step_away_at_most(tmp_path, how, dtype):
    """In float32, too, their roundings are computed, and all differences are whole steps."""
    file = FILES[how](gated_file(tmp_path / "m.onnx"), tmp_path / "quantised.onnx")
    network = passes.simplify(reader.read_onnx(file))
    library = deploy.compile_onnx(file, threads=1, dtype=dtype)
    grids = [network.grid(tensor) for tensor in network.outputs.values()]
    found = proof.prove({"it": library}, measure.peer(file, 1), np.concatenate(PICTURES), 1, 4 / 255, grids)
    assert found["rounding_steps"]["values"] == 4 * 16 * 6 * 6  # four pictures
    assert found["rounding_steps"]["largest"] <= 1
    assert found["rounding_steps"]["differ"] < 0.05 * found["rounding_steps"]["values"]


@in_int8
def test_a_quantised_file_is_compiled_to_int8_without_a_word(tmp_path):
    """No pictures are needed, and differences are counted in rounding steps, since the output is quantised."""
    file = deploy.quantise(gated_file(tmp_path / "m.onnx"), PICTURES, tmp_path / "quantised.onnx")
    assert run(file) == 0
    info, text = written(file)
    assert (info["dtype"], info["tolerance"]) == ("int8", 4 / 255)
    assert info["quantised"]["made"] is None
    steps = info["rounding_steps"]
    assert steps["values"] == 4 * 16 * 6 * 6  # four pictures
    assert steps["largest"] <= 1
    assert info["max_relative_error"] == pytest.approx(steps["largest"] / 255, abs=1e-5)
    assert f"{steps['differ']} of {steps['values']} outputs differ" in text
    assert info["latency_ms"].keys() == {"onnxruntime_int8", "tvm_dense", "tvm_sparse"}


@in_int8
def test_int8_is_made_from_training_pictures(tmp_path, colours):
    path = coloured_file(tmp_path / "m.onnx")
    assert run(path, "--dtype", "int8", "--per_tensor", *pictures(colours)) == 0
    info, text = written(path)
    assert info["dtype"] == "int8"
    assert info["onnx"] == str(path)  # of which a run's report knows that it is its own
    assert info["quantised"]["made"] == {
        "quantizer": "onnxruntime", "method": "minmax", "per_tensor": True, "keep_float": [], "pictures": 12
    }  # fmt: skip
    assert info["validation"]["top1"].keys() == {info["saved"], "onnxruntime_dense", "onnxruntime_int8"}
    assert info["validation"]["agreement"]["onnxruntime_int8"] == 100
    assert "`int8.onnx` was made by onnxruntime, minmax, with one scale a layer for weights, on 12 training" in text
    made = tmp_path / "deploy" / "int8.onnx"
    picture = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    ours = deploy.load(tmp_path / "deploy").run(picture)
    np.testing.assert_allclose(ours, measure.peer(made, 1)(picture), rtol=1e-3, atol=1e-3)


def test_a_quantised_file_runs_where_the_processor_cannot(capsys):
    """In float32, with its roundings, instead of not at all; and it is said."""
    options = model_tune.parse(["--onnx_path", "m.onnx", "--target", "x86-avx2"])
    assert job.types_of(options, True) == {"float32": ""}
    told = capsys.readouterr().out
    assert "its roundings are computed in float32 (dtype int8: x86-avx2 has none of avx512vnni" in told
    assert job.types_of(options, False) == {"float32": ""}
    assert not capsys.readouterr().out


def test_what_does_not_go_with_a_type_is_one_line(tmp_path, capsys, colours):
    path = gated_file(tmp_path / "m.onnx")
    file = str(deploy.quantise(path, PICTURES, tmp_path / "quantised.onnx"))
    cases = [
        (file, ["--dtype", "bfloat16"], "is quantised, which goes with int8 and float32"),
        (file, ["--dtype", "auto", *pictures(colours)], "squares of three channels"),
        (str(path), ["--dtype", "int8"], "is not quantised, and --data is missing"),
        (str(path), ["--dtype", "auto"], "--dtype auto: --data is missing"),
        (str(path), ["--dtype", "bfloat16", "--target", "x86-avx2"], "x86-avx2 has none of avx512bf16"),
        (file, ["--dtype", "int8", "--target", "x86-avx2"], "x86-avx2 has none of avx512vnni"),
        (str(path), ["--max_loss", "-1"], "--max_loss -1"),
    ]
    for onnx_path, words, told in cases:
        assert run(Path(onnx_path), *words) == 2, words
        err = capsys.readouterr().err
        assert told in err
        assert err.count("\n") == 1, err


@pytest.mark.parametrize("name", ["x_scale", "i_scale"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, [1.0] * 8])
def test_damaged_scales_are_refused(tmp_path, name, value):
    """They would end in a division by zero, or in a library that computes nothing."""
    model = onnx.load(deploy.quantise(gated_file(tmp_path / "m.onnx"), PICTURES, tmp_path / "int8.onnx"))
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(np.float32(value), name))
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(ValueError, match=r"\(operator QuantizeLinear\) has .*scale") as caught:
        reader.read_onnx(tmp_path / "damaged.onnx")
    assert "\n" not in str(caught.value)


def test_rounding_steps_are_counted_where_an_output_has_a_grid():
    images, right = np.zeros((2, 1), np.float32), np.float32([[0.5, -1.0, 0.0, 2.0]])
    ours = right + np.float32([[0.0, 0.5, -1.0, 0.0001]])  # of steps of 0.5: none, one, two, and none again

    def prove(grids, tolerance: float) -> dict:
        library = type("Library", (), {"run": staticmethod(lambda _: ours)})
        return proof.prove({"it": library}, lambda _: right, images, 1, tolerance, grids)

    found = prove([Grid(0.5, 0)], 4 / 255)
    assert found["rounding_steps"] == {"largest": 2, "differ": 4, "values": 8}  # of two pictures
    assert found["max_relative_error"] == pytest.approx(2 / 255)  # of the grid's range
    with pytest.raises(proof.Differs):
        prove([Grid(0.5, 0)], 1.5 / 255)
    assert prove([None], 0.6) == {"max_relative_error": 0.5, "top1_agreement": 1.0, "rounding_steps": None}


@in_int8
def test_quantised_layers_are_tuned_as_they_are_in_the_network(tmp_path, monkeypatch):
    """A layer alone whose input had no grid would be timed with a float32 kernel, for the int8 one."""
    asked = []

    def milliseconds(graph, machine, plan, place):
        calls = [kernel for kernel, *_ in make_program(graph, machine, plan).calls()]
        asked.extend((machine.dtype, kernel.product.dot) for kernel in calls if kernel.name == "nchwc_conv")
        return 1.0

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    file = deploy.quantise(coloured_file(tmp_path / "m.onnx"), [np.ones((1, 3, 8, 8), np.float32)], tmp_path / "q.onnx")
    network = passes.simplify(reader.read_onnx(file))
    kept = {}
    for dtype in ("float32", "int8"):
        aim, path = find_machine().with_dtype(dtype), tmp_path / f"{dtype}.json"
        layout.make_plan(tune.MeasuredCostModel(tune.Times(path, aim), network, aim))
        kept[dtype] = json.loads(path.read_text())["times_ms"].keys()
    assert set(asked) == {("float32", 1), ("int8", 4)}  # channels that a multiply-add sums up
    assert not kept["float32"] & kept["int8"]


# Every type


def row(dtype: str, ms: float, top1: float) -> dict:
    return {"dtype": dtype, "saved": "tvm_sparse", "latency_ms": {"tvm_sparse": {"median": ms}}, "top1": top1}


@pytest.mark.parametrize(
    ("max_loss", "chosen"), [(0, "float32"), (0.2, "bfloat16"), (0.5, "bfloat16"), (1.0, "int8"), (100, "int8")]
)
def test_the_fastest_type_within_the_loss_is_chosen(max_loss, chosen):
    rows = [row("float32", 3.0, 70.0), row("bfloat16", 2.0, 69.8), row("int8", 1.0, 69.25)]
    rows[1]["top1"] = 70.0 - 0.125
    assert report.choose(rows, max_loss)["dtype"] == chosen
    assert report.choose([row("float32", 1.0, 70.0), row("int8", 2.0, 71.0)], max_loss)["dtype"] == "float32"


def test_auto_names_the_types_that_cannot_be(monkeypatch):
    """A type that is missing without a word would be taken for one that was too slow."""
    monkeypatch.setitem(DTYPES, "bfloat16", frozenset({"no such feature"}))
    options = model_tune.parse(["--onnx_path", "m.onnx", "--dtype", "auto", "--data", "pictures"])
    types = job.types_of(options, False)
    assert list(types) == ["float32", "bfloat16", "int8"]
    assert types["float32"] == ""
    assert "has none of no such feature" in types["bfloat16"]
    rows = [row("float32", 1.0, 70.0) | {"max_relative_error": 1e-6}, {"dtype": "int8", "absent": "it is refused"}]
    rows[0]["latency_ms"]["tvm_dense"] = {"median": 2.0}
    info = {"types": rows, "max_loss": 0.5, "dtype": "float32", "layers": [{"sparse": True}]}
    first = ["float32", "2.000", "1.000", "1.0e-06", "70.00 %", "+0.00", "saved, sparse"]
    assert report.types_table(info)[1:] == [first, ["int8", "", "", "", "", "", "it is refused"]]


def test_auto_measures_every_type_and_saves_the_fastest_that_is_right(tmp_path, colours, capsys):
    path = coloured_file(tmp_path / "m.onnx")
    assert run(path, "--dtype", "auto", "--max_loss", "0", "--calibration", "12", *pictures(colours)) == 0
    info, text = written(path)
    rows = {row["dtype"]: row for row in info["types"]}
    assert list(rows) == ["float32", "bfloat16", "int8"]
    measured = {name: row for name, row in rows.items() if "absent" not in row}
    for name, feature in (("bfloat16", "avx512bf16"), ("int8", "avx512vnni")):
        assert (name in measured) == (feature in HAS)
    for name, row in measured.items():
        assert row["latency_ms"].keys() == {"tvm_dense", "tvm_sparse"}
        assert row["max_relative_error"] <= row["tolerance"] == proof.TOLERANCE[name]
        assert f"| {name} | {row['latency_ms']['tvm_dense']['median']:.3f} |" in text
    able = {name for name, row in measured.items() if row["top1"] >= rows["float32"]["top1"]}
    assert info["dtype"] == min(able, key=lambda name: rows[name]["latency_ms"][rows[name]["saved"]]["median"])
    assert info["validation"]["top1"][info["saved"]] == rows[info["dtype"]]["top1"]
    assert info["latency_ms"]["tvm_sparse"] == rows[info["dtype"]]["latency_ms"]["tvm_sparse"]
    assert "may be lost" in " ".join(capsys.readouterr().out.split())
    file = tmp_path / "deploy" / "int8.onnx" if info["dtype"] == "int8" else path
    picture = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    error, _ = measure.compare(deploy.load(tmp_path / "deploy").run, measure.peer(file, 1), picture, 1)
    assert error < proof.TOLERANCE[info["dtype"]]
