"""Prune a network and train it: start (load, attach, resume), train, hand over (finish, prove, export, report)."""

import copy
import time
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import models
import pruning
from jobs import checkpoint
from jobs.folder import begin, check_same_data, identity, resumable
from jobs.parts import Parts, compare_with_dense, export, in_words, summarise
from jobs.pictures import check_steps, image_size
from pruning.score import Calibration
from structure.plain import in_words as plain_in_words
from utils import callbacks, report
from utils.kept import Kept
from utils.loss import Loss
from utils.options import PUBLISHED, Options
from utils.run import Run, fit

OPTIMIZERS = {
    "sgd": lambda parameters, o: torch.optim.SGD(
        parameters, o.lr, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov, fused=True
    ),
    "adam": lambda parameters, o: torch.optim.Adam(parameters, o.lr, weight_decay=o.weight_decay, fused=True),
}


def create_method(options: Options) -> pruning.Method:
    """The method of a run. Raises ValueError if the epochs do not suit its rounds: before data is opened."""
    method = pruning.create_method(options.conv_type, **vars(options.own))
    options.schedule(method.rounds)
    if options.repair and type(method) is pruning.Method:  # dense: masks are the zeros of the checkpoint
        if not options.dense_model:
            raise ValueError("--repair: --method dense keeps the zeros of --pretrained_model: name --dense_model, too")
        if options.num_epochs:
            raise ValueError(
                f"--num_epochs {options.num_epochs}: --method dense would train the repaired zeros away: choose 0, or "
                "the method that they come from"
            )
    return method


def start(parts: Parts, argv: list[str]) -> Run:
    """A run at its first step, or at the step where an interrupted one is to go on.

    The folder of an earlier run is touched last, when nothing that was asked for can be wrong any more.
    """
    options, method = parts.options, parts.method
    check_steps(options, parts.train, method.batches_per_step * options.accumulate, parts.screen)
    state = resumable(options, parts.screen)
    parts.data = identity(parts.train, parts.val)
    if state and not options.accept_changed_data:
        check_same_data(options, state, parts.train.classes, parts.data)
    teacher = load_and_attach(parts, measured=state is None)
    run = Run(
        parts.network,
        method,
        parts.train,
        loss=Loss(options.label_smoothing, teacher, options.distill, options.temperature),
        epochs=options.num_epochs,
        rate=options.schedule(method.rounds),
        make_optimizer=lambda parameters: OPTIMIZERS[options.optimizer](parameters, options),
        ranks=parts.ranks,
        accumulate=options.accumulate,
        amp=options.amp,
        ema=options.ema,
        compile=options.compile,
    )
    if state:
        run.load_state_dict(state)
        parts.accuracy, parts.errors = state["accuracy"], state.get("errors", {})
    if parts.ranks.first:
        begin(options, argv)
    return run


def load_and_attach(parts: Parts, measured: bool) -> nn.Module | None:
    """Dense weights in, then the method; if `measured`, the accuracy before and after is shown and kept.

    A resumed run does this too, so that what the method plans from the dense weights comes out the same.

    Returns:
        the dense network if it is to be imitated.
    """
    options, network, method = parts.options, parts.network, parts.method

    def measure(stage: str, label: str, of: nn.Module | None = None) -> None:
        if measured and options.pretrained_model:
            figures = parts.accuracy[stage] = parts.evaluate(of or network)
            parts.screen.print(f"{label}: {in_words(figures)}")

    dense = copy.deepcopy(network) if options.dense_model else None  # each reads its own file, of plain layers or not
    for path in (options.pretrained_model, options.dense_model):
        if path and path != PUBLISHED:
            checkpoint.check_normalisation(path, models.read_checkpoint(path), options)
    if options.pretrained_model:
        classes, reading = parts.train.classes, method.reading()
        reading |= {"fresh_classifier": not options.repair}  # which would be fitted to what chance says
        facts = models.load_checkpoint(network, options.pretrained_model, classes, **reading)
        method.accept(facts["extras"])
        if "note" in facts:
            parts.screen.print(f"{options.pretrained_model}: {facts['note']}")
    if options.dense_model:
        models.load_checkpoint(dense, options.dense_model, parts.train.classes)
        models.plainify(dense)
    if replaced := models.plainify(network):  # after the weights are in, whose names are the library's
        parts.screen.print(f"made of plain layers: {plain_in_words(replaced)}")
    if options.distill or options.repair:
        dense = (dense or copy.deepcopy(network)).eval()
    measure("dense", "dense", dense)
    method.attach(network, Calibration(partial(parts.train.first, options.calibration), cross_entropy))
    measure("pruned", "pruned, before training")
    if options.repair and measured:
        repair(parts, dense)
        measure("repaired", "repaired, before training")
    return dense if options.distill else None


def repair(parts: Parts, dense: nn.Module) -> None:
    """Let the method repair what its masks broke, and say what that has left out. A resumed run has it behind it."""
    options = parts.options
    seen = partial(parts.train.first, options.calibration, augmented=False)
    began, result = time.monotonic(), parts.method.calibrate(parts.network, dense, Calibration(seen, cross_entropy))
    parts.ranks.share(list(parts.network.state_dict().values()))  # GPUs may round differently
    count = min(options.calibration, parts.train.count)
    fewer = f" ({options.calibration} were asked for)" if count < options.calibration else ""
    seconds = time.monotonic() - began
    parts.screen.print(f"repaired: {len(result.errors)} layers on {count} pictures{fewer} in {seconds:.0f} s")
    for name, reason in result.left_out.items():
        parts.screen.print(f"--calibration {options.calibration}: {name}: {reason}")
    if not result.errors and not result.left_out:
        parts.screen.print("--repair: nothing is pruned yet, so there is nothing to repair")
    parts.errors = result.errors


def train(parts: Parts, run: Run) -> None:
    """All epochs, with records, checkpoints and progress on the way; the last step is in `last.pt`."""
    described = models.describe(parts.network, **about(parts))
    with callbacks.Save(parts.checkpoints, described) as save, callbacks.Show(parts.screen) as show:
        seen = [callbacks.Record(parts.options.job_dir, run.epoch, parts.accuracy), show] if parts.ranks.first else []
        fit(run, [callbacks.Evaluate(parts.val), *seen, save])
        save.write(run, "last.pt")


def hand_over(parts: Parts, run: Run) -> None:
    """Fold the method away, prove it, and write what is left: the network, its ONNX file, the report."""
    options, images, network = parts.options, parts.images(), run.kept_network()
    kept = pruning.finish(parts.method, network, images)
    missed = parts.method.shortfalls(network, kept, images[:1])
    for name, error in parts.errors.items():
        kept.setdefault(name, Kept("as in the checkpoint")).error = error
    save_final(parts, network, kept, run.epoch)
    if options.shrink:
        network, _ = pruning.proven_copy(network, pruning.shrink, images)
        save_final(parts, network, kept, run.epoch)
    tuned = parts.evaluate(network)
    if not parts.ranks.first:
        return
    fixed = export(parts, network, kept, images) if options.export_onnx else {}
    costs = compare_with_dense(parts, network, images)
    facts = {"accuracy": parts.accuracy | {"tuned": tuned}, "not_reached": missed}
    summarise(parts, network, parts.checkpoints / "final.pt", facts, costs, kept, fixed)
    if pictures := parts.method.draw(kept, f"{options.arch} on {options.data_set}", options.job_dir):
        parts.screen.print(f"written: {options.job_dir}/{', '.join(pictures)}")
    report.show_shortfalls(missed, parts.screen)


def about(parts: Parts) -> dict:
    """What every checkpoint says about itself, beside what it says about its network."""
    facts = {"classes": parts.train.classes, "image_size": image_size(parts.options), "data": parts.data}
    facts |= checkpoint.normalisation(parts.options)
    return facts | {"options": parts.options.to_json(), "accuracy": parts.accuracy, "errors": parts.errors}


def save_final(parts: Parts, network: nn.Module, kept: dict[str, Kept], epoch: int) -> None:
    """Write `final.pt`: the finished network, and what was kept of every layer."""
    if parts.ranks.first:
        facts = about(parts) | {"kept": {name: layer.to_json() for name, layer in kept.items()}, "epoch": epoch}
        models.save_checkpoint(parts.checkpoints / "final.pt", network, **facts)
