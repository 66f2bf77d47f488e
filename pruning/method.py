"""The one interface: what a pruning method may do to a run. Dense training is this class itself."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pruning.options import NoOptions
from pruning.repair import Repaired, repair
from pruning.score import Calibration
from utils.kept import Kept
from utils.run import Run

NOTABLE = 0.01  # how far from the asked share a run may end without saying so: numbers of groups are whole


class Method:
    """Every hook has a harmless default, so a method says only what is its own.

    State lives in the network's modules, never here: what training changes in parameters and buffers, what `attach`
    plans in attributes of the layers, so that a deep copy of the network has it too. Every hook acts on the network
    that it is given. A resumed run builds the network, loads the dense weights again, attaches, and loads the rest.
    """

    batches_per_step = 1
    rounds = 1  # trainings that follow one another in a run, each under the whole schedule of the learning rate

    def __init__(self, name: str = "dense", options: NoOptions = NoOptions()):  # noqa: B008 (frozen)
        self.name, self.options = name, options

    @classmethod
    def create(cls, name: str, options) -> "Method":
        """The method called `name` under `options`: of this class, or, where an option says so, of another."""
        return cls(name, options)

    def __str__(self) -> str:
        """What it does and was asked, for titles."""
        return "dense"

    def check(self, network: nn.Module) -> None:
        """Raise ValueError if this method cannot prune this network: asked before data is opened."""

    def accept(self, tensors: dict[str, Tensor]) -> None:
        """Told before `attach` what the checkpoint holds beyond a dense network, by name (`conv1.popup_scores`, ...).

        Raises:
            ValueError: this method has no use for it.
        """
        if tensors:
            raise ValueError(f"the checkpoint holds {next(iter(tensors))}, of which method {self} makes no use")

    def reading(self) -> dict[str, float]:
        """What `models.load_checkpoint` should know of this method's options to read a file as this run means it."""
        return {}

    def attach(self, network: nn.Module, calibration: Calibration | None = None) -> None:
        """Called once, after the dense weights are in: add masks, skeletons, compactors, scores.

        Args:
            calibration: for methods that look at data.
        """

    def calibrate(self, network: nn.Module, dense: nn.Module, calibration: Calibration) -> Repaired:
        """Called after `attach`, on request: repair what the masks broke, beside the `dense` network.

        By default, masks stay. Those of plain layers are where their weights are not zero: a pruned checkpoint's.

        Raises:
            ValueError: there is no calibration picture, or `dense` is no dense version of `network`.
        """
        return repair(network, dense, calibration)

    def optimizers(self, network: nn.Module, make: Callable) -> list[torch.optim.Optimizer]:
        """The optimisers of the run; `make(parameters)` builds one by the run's options."""
        return [make([parameter for parameter in network.parameters() if parameter.requires_grad])]

    def step(self, run: Run, *batches: tuple[Tensor, Tensor]) -> None:
        """One training step on `batches` of (images (B, 3, H, W), labels (B,)): by default one update, by the mean."""
        for images, labels in batches:
            run.backward(run.forward(images, labels) / len(batches))
        self.on_gradients(run)
        run.update()
        self.after_update(run)

    def on_gradients(self, run: Run) -> None:
        """Gradients are complete and unscaled."""

    def after_update(self, run: Run) -> None:
        """Weights are new: thresholds, masks. `run.iteration` and `run.progress` (0 to 1) are known."""

    def settle(self, network: nn.Module) -> None:
        """Weights come from elsewhere (an average): make them obey the method. Called before evaluating and saving."""

    def figures(self, network: nn.Module) -> dict[str, float]:
        """What the method has to tell of this moment, by name: it stands in the records of every epoch."""
        return {}

    def draw(self, kept: dict[str, Kept], title: str, folder: Path) -> list[str]:
        """Draw the method's own pictures of what was kept into `folder`; returns the names of the files."""
        return []

    def finish(self, network: nn.Module) -> dict[str, Kept]:
        """Fold the method away in place: only plain layers remain, same outputs. Returns what was kept, per layer."""
        return {}

    def shortfalls(self, network: nn.Module, kept: dict[str, Kept], image: Tensor) -> list[str]:
        """What was asked and not reached, one plain sentence each.

        By default: the rate, over all layers that were to be pruned.

        Args:
            network: as `finish` has left it.
            kept: what `finish` has returned.
            image: (1, 3, H, W), of the size that counts.
        """
        sizes = {name: network.get_submodule(name).weight.numel() for name, of in kept.items() if of.rate}
        asked, gone = (sum(getattr(kept[name], key) * sizes[name] for name in sizes) for key in ("rate", "sparsity"))
        return missed("weights", asked, gone, sum(sizes.values()))


def missed(what: str, asked: float, gone: float, total: float) -> list[str]:
    """A sentence if as much as is `gone` of `total` is away from what was `asked` by more than `NOTABLE`, or none."""
    if abs(asked - gone) <= NOTABLE * total:
        return []
    return [f"{100 * asked / total:.1f} % of the {what} were to go, but {100 * gone / total:.1f} % have gone."]


@torch.no_grad()
def finish(method: Method, network: nn.Module, images: Tensor, tolerance: float = 1e-5) -> dict[str, Kept]:
    """`method.finish`, proven: outputs on `images` before and after agree within `tolerance` of the largest.

    Both are computed in float64, where the rounding of deep networks neither hides a difference nor makes one.

    Returns:
        what was kept, per layer.

    Raises:
        ValueError: the outputs differ.
    """
    method.settle(network)
    network.eval().double()
    before = outputs(network, images)
    kept = method.finish(network)
    after = outputs(network, images)
    network.float()
    _demand_equal(f"{type(method).__name__}.finish", after, before, tolerance)
    return kept


@torch.no_grad()
def proven_copy(network: nn.Module, change: Callable, images: Tensor, tolerance: float = 1e-4) -> tuple:
    """A copy of `network` after `change(copy)`, proven to compute the same on `images`; and what `change` returned.

    The change is made in float32, and both networks are compared in float64: a GPU's float32 is TF32 in convolutions,
    whose ten bits of mantissa would not do for a proof.

    Raises:
        ValueError: the outputs differ by more than `tolerance` of the largest.
    """
    before = outputs(network.eval().double(), images)
    changed = copy.deepcopy(network.float())
    returned = change(changed)
    after = outputs(changed.double(), images)
    changed.float()
    name = getattr(change, "func", change).__name__  # that of a partial's function
    _demand_equal(name, after, before, tolerance)
    return changed, returned


def outputs(network: nn.Module, images: Tensor) -> Tensor:
    """Those of a network in float64. What its code makes or keeps in float32 is converted where it is used."""
    with _InFloat64():
        return network(images.double())


class _InFloat64(TorchFunctionMode):
    """Functions are given float64 in place of float32: a convolution takes no two types of tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(_doubled, (args, kwargs or {}))
        return function(*args, **kwargs)


def _doubled(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest absolute reference value, or to 1 where all of those are zero."""
    scale = reference.abs().max()
    return float((value - reference).abs().max() / torch.where(scale > 0, scale, 1.0))


def _demand_equal(what: str, after: Tensor, before: Tensor, tolerance: float) -> None:
    """Raise ValueError if the outputs `after` differ from those `before`; warn if these prove little."""
    error = relative_error(after, before)
    if not error <= tolerance:  # a difference that is not a number is none that is small
        raise ValueError(f"{what} changed the network's outputs by {error:.1e} of the largest, {tolerance:.0e} allowed")
    if (before == before.flatten()[0]).all():
        same = float(before.flatten()[0])
        warnings.warn(f"all outputs of the network are {same:g}: it tells no pictures apart", stacklevel=3)
