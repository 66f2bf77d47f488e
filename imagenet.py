"""Prune a convolutional network and train it: options, data, network, method, train, finish, export, report.

python imagenet.py --arch mobilenet_v2 --data_set imagefolder --data_path ImageNet --pretrained_model v2.pt \
    --conv_type BlockL1Conv --N 4 --pr_target 0.5 --rearrange --job_dir experiments/v2_1x4
"""

import copy
import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import data
import models
import pruning
from pruning.options import row
from utils import callbacks, job, machine, ranks, report
from utils.count import Cost, beside, count, totals
from utils.export import export_onnx
from utils.files import sweep
from utils.kept import Kept
from utils.loss import Loss
from utils.options import Options, parse
from utils.run import Run, evaluate, fit, learning_rate

OPTIMIZERS = {
    "sgd": lambda parameters, o: torch.optim.SGD(
        parameters, o.lr, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov, fused=True
    ),
    "adam": lambda parameters, o: torch.optim.Adam(parameters, o.lr, weight_decay=o.weight_decay, fused=True),
}


def main(argv: list[str]) -> None:
    options = parse(argv, description=__doc__)
    method = create_method(options)
    method.check(models.create_model(options.arch))
    if len(options.gpus) > 1 and torch.cuda.is_available() and not ranks.started():
        ranks.start(__file__, argv, options.gpus)
    with ranks.join() as here:
        screen = report.screen(quiet=not here.first)
        device, line = machine.pick_device(here.local if here.world > 1 else options.gpus[0])
        screen.print(line if here.world == 1 else f"{line}; {here.world} processes")
        if options.check_data:
            return check_pictures(options, device, screen)
        torch.manual_seed(options.seed)
        train, val = create_loaders(options, device, here, screen)
        network = models.create_model(options.arch, len(train.classes), options.seed)
        network.to(device, memory_format=torch.channels_last)
        if options.evaluate:
            evaluate_checkpoint(options, network, method, val, here, screen)
        else:
            prune(options, argv, network, method, train, val, here, screen)


def prune(options: Options, argv: list[str], network: nn.Module, method, train, val, here, screen: Console) -> None:
    state = resumable(options, screen)
    if here.first and not (state and (options.job_dir / "run.json").exists()):
        job.begin(options, argv)
    teacher, accuracy = load_and_attach(options, network, method, None if state else val, here, screen)
    one_round = dataclasses.replace(options, num_epochs=options.num_epochs // method.rounds)
    run = Run(
        network,
        method,
        train,
        loss=Loss(options.label_smoothing, teacher, options.distill, options.temperature),
        epochs=options.num_epochs,
        rate=lambda epoch, *step: learning_rate(one_round, epoch % one_round.num_epochs, *step),
        make_optimizer=lambda parameters: OPTIMIZERS[options.optimizer](parameters, options),
        ranks=here,
        **{name: getattr(options, name) for name in ("accumulate", "amp", "ema", "compile")},
    )
    if state:
        run.load_state_dict(state)
        accuracy = state["accuracy"]

    about = {"classes": train.classes, "image_size": image_size(options)}
    about |= {"options": options.to_json(), "accuracy": accuracy}
    checkpoints = options.job_dir / "checkpoint"
    if here.first:
        sweep(checkpoints)
    with callbacks.Save(checkpoints, models.describe(network, **about)) as save, callbacks.Show(screen) as show:
        told = [callbacks.Record(options.job_dir, run.epoch, accuracy), show] if here.first else []
        fit(run, [callbacks.Evaluate(val), *told, save])
        save.write(run, "last.pt")

    network = run.kept_network()
    images = next(iter(val))[0][:8]
    kept = pruning.finish(method, network, images)
    if options.shrink:
        network, _ = pruning.proven_copy(network, pruning.shrink, images)
    tuned = evaluate(network, val, here)
    if not here.first:
        return
    told = {name: layer.to_json() for name, layer in kept.items()}
    models.save_checkpoint(checkpoints / "final.pt", network, **about, kept=told, epoch=run.epoch)
    fixed = export(options, network, kept, images, screen) if options.export_onnx else {}
    costs, sums = compare_with_dense(options, network, images)
    head = {"arch": network.arch, "image_size": about["image_size"], "options": about["options"]}
    head |= {"data_set": options.data_set, "method": str(method), "accuracy": accuracy | {"tuned": tuned}}
    report.save_summary(options.job_dir, head | {"totals": sums}, costs, kept, fixed)
    report.write(options.job_dir, screen)
    if pictures := method.draw(kept, f"{options.arch} on {options.data_set}", options.job_dir):
        screen.print(f"written: {options.job_dir}/{', '.join(pictures)}")


def create_method(options: Options) -> pruning.Method:
    own = row(options.conv_type).own
    given = {name: getattr(options, name) for name in own if getattr(options, name, None) is not None}
    method = pruning.create_method(options.conv_type, **given)
    if options.num_epochs % method.rounds or (method.rounds > 1 and not options.num_epochs):
        raise ValueError(f"--num_epochs {options.num_epochs}: must divide into {method.rounds} rounds of training")
    return method


def data_request(options: Options, device: torch.device, screen: Console) -> dict:
    return {
        "data_set": options.data_set,
        "data_path": options.data_path,
        "image_size": image_size(options),
        "train_batch_size": options.train_batch_size,
        "eval_batch_size": options.eval_batch_size,
        "seed": options.seed,
        "device": device,
        "workers": options.workers,
        "skip_bad": options.bad_pictures == "skip",
        "use_dali": options.use_dali,
        "say": screen.print,
    }


def create_loaders(options: Options, device: torch.device, here: ranks.Ranks, screen: Console) -> list[data.Loader]:
    if options.train_batch_size % here.world:
        raise ValueError(f"--train_batch_size {options.train_batch_size}: must divide among {here.world} processes")
    loaders = data.create_loaders(**data_request(options, device, screen))
    for loader in loaders:
        loader.rank, loader.world, loader.limit = here.rank, here.world, 6 if options.debug else None
    return loaders


def check_pictures(options: Options, device: torch.device, screen: Console) -> None:
    """List the pictures that do not decode; status 1 if there are any."""
    problems = data.check(**data_request(options, device, screen))
    for problem in problems:
        screen.print(problem)
    screen.print(f"{len(problems)} pictures do not decode")
    if problems:
        raise SystemExit(1)


def image_size(options: Options) -> int:
    return options.image_size or data.known(options.data_set).size


def load_and_attach(
    options: Options, network: nn.Module, method, val: data.Loader | None, here: ranks.Ranks, screen: Console
) -> tuple[nn.Module | None, dict]:
    """Dense weights in, then the method; accuracy before and after is told if `val` is given.

    A resumed run does this too, so that what the method plans from the dense weights comes out the same.

    Returns:
        the dense network if it is to be imitated, and accuracy by stage.
    """
    accuracy = {}

    def tell(stage: str, label: str) -> None:
        if val is not None and options.pretrained_model:
            figures = accuracy[stage] = evaluate(network, val, here)
            loss = f"loss {figures['loss']:.4f}"
            screen.print(f"{label}: top-1 {figures['top1']:.2f}, top-5 {figures['top5']:.2f}, {loss}")

    if options.pretrained_model:
        facts = models.load_checkpoint(network, options.pretrained_model)
        method.accept(facts["extras"])
        if "note" in facts:
            screen.print(f"{options.pretrained_model}: {facts['note']}")
    teacher = copy.deepcopy(network).eval() if options.distill else None
    tell("dense", "dense")
    method.attach(network)
    tell("pruned", "pruned, before training")
    return teacher, accuracy


def resumable(options: Options, screen: Console) -> dict | None:
    """The state to go on from, if one is asked for and there."""
    last = options.job_dir / "checkpoint" / "last.pt"
    again = ranks.restarted() and last.exists()  # whatever the processes that died had begun with
    if not (options.resume or again):
        return None
    if options.resume != "last" and not again:
        last = Path(options.resume)
    elif not last.exists():
        screen.print(f"--resume: no {last}; starting")
        return None
    state = models.read_checkpoint(last)
    job.check_same_run(options, state, last)
    screen.print(f"resuming after {state['epoch']} epochs and {state['loader']['batch']} steps")
    return state


def compare_with_dense(options: Options, network: nn.Module, images: torch.Tensor) -> tuple[dict[str, Cost], dict]:
    """Costs by layer and in all, where channels that the dense network has, and this one has not, are zeros."""
    dense = models.create_model(options.arch, network.num_classes)
    costs = beside(count(dense, images[:1].cpu()), count(network, images[:1]))
    return costs, totals(network, costs, dense)


def evaluate_checkpoint(options: Options, network: nn.Module, method, val: data.Loader, here, screen: Console) -> None:
    """Accuracy, sparsity by layer and whether the blocks are whole; with --export_onnx, `model.onnx` too.

    A checkpoint that holds more than a dense network (scores without masks) needs the method that makes one of it.
    """
    facts = models.load_checkpoint(network, options.evaluate)
    images = next(iter(val))[0][:8]
    if facts["extras"]:
        method.accept(facts["extras"])
        method.attach(network)
        pruning.finish(method, network, images)
    figures = evaluate(network, val, here)
    costs, sums = compare_with_dense(options, network, images)
    lengths = pruning.find_blocks(network, options.N or 16)
    rows = [["layer", "shape", "sparsity", "blocks"]]
    for name, cost in costs.items():
        shape = " -> ".join("x".join(map(str, shape)) for shape in (cost.shape, cost.left) if shape)
        rows.append([name, shape, f"{100 * (1 - cost.density):.2f} %", lengths.get(name, ("", ""))[1]])
    report.show(rows, str(options.evaluate), screen)
    screen.print(
        f"{options.evaluate}: top-1 {figures['top1']:.2f}, top-5 {figures['top5']:.2f}, loss {figures['loss']:.4f}; "
        f"sparsity {100 * sums['sparsity']:.2f} %, multiply-adds {sums['macs_kept']:,} of {sums['macs']:,}"
        + (f"; {facts['note']}" if "note" in facts else "")
    )
    if options.export_onnx and here.first:
        export(options, network, {name: Kept("blocks", 1.0, N=N) for name, (N, _) in lengths.items()}, images, screen)


def export(options: Options, network: nn.Module, kept: dict, images: torch.Tensor, screen: Console) -> dict[str, str]:
    """Write `model.onnx` with blocks as consecutive rows. Returns why not, for the layers where that is impossible."""
    lengths = {name: layer.N for name, layer in kept.items() if layer.in_blocks}
    network, fixed = pruning.proven_copy(network, partial(pruning.gather_blocks, lengths=lengths), images)
    error = export_onnx(network, images, options.job_dir / "model.onnx")
    screen.print(f"written: {options.job_dir}/model.onnx (ONNX Runtime agrees to {error:.1e})")
    return fixed


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"imagenet.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before or after training; while training, a checkpoint is written first
        sys.exit(130)
