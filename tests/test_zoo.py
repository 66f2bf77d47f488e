"""Small networks of timm and torchvision through all that `benchmarks/zoo.py` asks of them before they are exported."""

import pytest

from benchmarks import zoo

pytest.importorskip("timm")
STAGES = ("trace", *zoo.METHODS, "shrink", "gather")
NETWORKS = {  # network -> why a stage is refused
    "timm/test_byobnet": {},
    "timm/test_resnet": {},
    "timm/test_convnext": {"resrep": "no layer whose channels", "stripe": "no convolution with a batch norm"},
    "timm/test_nfnet": {"stripe": "no convolution with a batch norm behind it"},
    "timm/starnet_s050": {},
    "timm/regnety_002": {},
    "timm/tf_mobilenetv3_small_minimal_100": {},
    "torchvision/shufflenet_v2_x0_5": {},
    "torchvision/squeezenet1_1": {"stripe": "no convolution with a batch norm behind it"},
    "timm/mobilenetv4_conv_small_035": {},
    "timm/lcnet_050": {},
}
SLOW = list(NETWORKS)[-2:]  # made of the same layers as others


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETWORKS])
def test_a_network_of_others_is_pruned_with_its_function_kept(name: str):
    """Every method proves that its last step keeps the outputs; these must differ between pictures to prove much."""
    record = zoo.examine(name, 64, STAGES)
    refused = {stage: said for stage, said in record["stages"].items() if said != "ok"}
    assert refused.keys() == NETWORKS[name].keys(), refused
    assert all(NETWORKS[name][stage] in said for stage, said in refused.items())
    assert record["plain_error"] < 1e-5
    assert record["differs"] > 0.05


def test_the_names_are_many_and_each_stands_there_once():
    names = zoo.NAMES.read_text().split()
    assert len(names) == len(set(names)) > 150
    assert set(names) >= NETWORKS.keys()


def test_the_report_counts_by_family_and_tells_the_reasons():
    ok = dict.fromkeys(zoo.STAGES, "ok")
    records = {
        "timm/resnet18": {"stages": ok},
        "timm/resnet34": {"stages": ok | {"stripe": "ValueError: no stripes"}},
        "torchvision/alexnet": {"stages": {"trace": "ValueError: cannot trace"}},
    }
    text = zoo.report(records)
    assert "| timm/resnet | 2 / 2 | 2 / 2 | 2 / 2 | 1 / 2 |" in text
    assert "| torchvision/alexnet | 0 / 1 | 0 / 0 |" in text
    assert "- stripe: ValueError: no stripes (1: timm/resnet34)" in text
