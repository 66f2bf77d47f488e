"""Networks that are not ours: pruned with their function kept, or refused by name before the first change."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import models
import pruning
from structure import Graph

METHODS = {
    "block_l1": {"N": 4, "pr_target": 0.5, "rearrange": True},
    "bip": {"layer_type": "block", "N": 4, "k": 0.5},
    "imp": {"k": 0.5},
    "hydra": {"k": 0.5},
    "stripe": {},
}


class Base(nn.Module):
    """Three convolutions with batch norms, global pooling, a classifier; `mid` stands between the last two."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.c2, self.b2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.c3, self.b3 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def mid(self, x):
        return x

    def pool(self, x):
        return x.mean((2, 3))

    def forward(self, x):
        x = self.mid(F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x)))))))
        return self.fc(self.pool(F.relu(self.b3(self.c3(x)))))


class SpatialMean(Base):
    """Spatial attention from the mean over channels."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Conv2d(1, 1, 7, padding=3)

    def mid(self, x):
        return x * torch.sigmoid(self.attention(x.mean(1, keepdim=True)))


class MeanOfAll(Base):
    def mid(self, x):
        return x * torch.mean(x)


class MaxPooled(Base):
    def pool(self, x):
        return x.amax((2, 3))


class OneAxisAtATime(Base):
    def pool(self, x):
        return x.mean(-1).mean(dim=-1)


class OwnNorm(nn.BatchNorm2d):
    pass


class NormOfOwnClass(Base):
    def __init__(self):
        super().__init__()
        self.b2 = OwnNorm(32)


class NormUsedTwice(Base):
    """The statistics of `b3` are also read by a function: another order of them would be wrong there."""

    def mid(self, x):
        return F.batch_norm(x, self.b3.running_mean, self.b3.running_var, self.b3.weight, self.b3.bias)


class TiedWeights(Base):
    def __init__(self):
        super().__init__()
        self.c4 = nn.Conv2d(32, 32, 3, padding=1)
        self.c4.weight = self.c3.weight

    def mid(self, x):
        return self.c4(x)


class MadeOfNumbers(Base):
    """A layer reads what no tensor of the network went into."""

    def __init__(self):
        super().__init__()
        self.position = nn.Linear(1, 1)

    def mid(self, x):
        return x * self.position(torch.full((x.shape[0], 1), 2.0).to(x)).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    "kind",
    [SpatialMean, MeanOfAll, MaxPooled, OneAxisAtATime, NormOfOwnClass, NormUsedTwice, TiedWeights, MadeOfNumbers],
)
def test_the_function_stays(kind):
    torch.manual_seed(0)
    network, images = kind(), torch.randn(2, 3, 8, 8)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    method = pruning.create_method("block_l1", **METHODS["block_l1"])
    method.attach(network)
    kept = pruning.finish(method, network, images)
    assert kept["c3"].sparsity == 0.5
    assert "attention" not in kept or kept["attention"].sparsity == 0
    network, _ = pruning.proven_copy(network, pruning.shrink, images)
    pruning.proven_copy(network, lambda n: pruning.gather_blocks(n, {"c2": 4, "c3": 4}), images)


def test_a_mean_over_channels_passes_no_channels_on():
    graph = Graph(SpatialMean())
    assert graph.input["attention"] is not graph.output["c2"]
    assert graph.head == {"fc"}  # and is no pooling either


class Standardised(nn.Conv2d):
    """Computes with another weight than the one that it holds."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Tuple(Base):
    def forward(self, x):
        y = super().forward(x)
        return y, y.softmax(1)


class Dict(Base):
    def forward(self, x):
        return {"out": super().forward(x)}


def changed(change) -> Base:
    network = Base()
    change(network)
    return network


def standardise(network: Base) -> None:
    network.c2 = Standardised(16, 32, 3, padding=1)


def without_statistics(network: Base) -> None:
    network.b2 = nn.BatchNorm2d(32, track_running_stats=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Tuple, "Tuple returns a tuple: it must return the logits alone"),
        (Dict, "Dict returns a dict: it must return the logits alone"),
        (lambda: changed(without_statistics), "b2: a batch norm without running statistics"),
        (lambda: changed(standardise), "c2 is a Standardised: only plain"),
        (lambda: changed(lambda n: parametrizations.weight_norm(n.c2)), "c2 is a ParametrizedConv2d: only plain"),
        (lambda: changed(lambda n: spectral_norm(n.c2)), "c2: its weight is computed from other tensors"),
        (lambda: changed(lambda n: prune.random_unstructured(n.c2, "weight", 0.5)), "c2: its weight is computed"),
    ],
)
def test_what_cannot_be_pruned_is_named_before_the_first_change(method: str, make, message: str):
    network = make()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    kinds = [type(module) for module in network.modules()]
    with pytest.raises(ValueError, match=message) as error:
        pruning.create_method(method, **METHODS[method]).attach(network)
    assert "\n" not in str(error.value)
    assert kinds == [type(module) for module in network.modules()]
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_without_a_final_pooling_the_layer_that_writes_the_output_is_the_classifier():
    """As in segmentation: all layers counted as the classifier, so that nothing was pruned."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    assert Graph(nn.Sequential(*layers, nn.Conv2d(8, 4, 1))).head == {"4"}
    pooled = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert Graph(pooled).head == {"5", "7"}


def test_a_network_whose_layers_all_count_as_the_classifier_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    method = pruning.create_method("block_l1", N=4, pr_target=0.5)
    with pytest.raises(ValueError, match=r"no pooling stands behind .* all 1 count as the classifier, .* --full"):
        method.check(network)
    pruning.create_method("block_l1", N=4, pr_target=0.5, full=True).check(network)
    pruning.create_method("block_l1", N=4, pr_target=0.5, rates={"2": 0.5}).check(network)


def test_grouped_convolutions_load_back(tmp_path):
    """They are not depthwise: a file of such a network was refused by the network that had written it."""
    theirs, ours = (torchvision.models.regnet_y_400mf(num_classes=10) for _ in range(2))
    for network in (theirs, ours):
        network.arch, network.num_classes = "regnet_y_400mf", 10
    models.save_checkpoint(tmp_path / "final.pt", theirs)
    models.load_checkpoint(ours, tmp_path / "final.pt")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))
