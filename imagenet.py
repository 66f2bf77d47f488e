"""Prune a convolutional network and train it: options, data, network, method, train, finish, export, report.

python imagenet.py --arch mobilenet_v2 --data_set imagefolder --data_path ImageNet --pretrained_model v2.pt \
    --conv_type BlockL1Conv --N 4 --pr_target 0.5 --rearrange --job_dir experiments/v2_1x4
"""

import sys
from functools import partial

import torch
from rich.console import Console

import data
import models
import pruning
from utils import callbacks, job, machine, report
from utils.count import count, totals
from utils.export import export_onnx
from utils.files import save_checkpoint
from utils.options import Options, parse
from utils.run import Run, evaluate, fit, learning_rate

OPTIMIZERS = {
    "sgd": lambda parameters, o: torch.optim.SGD(
        parameters, o.lr, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov
    ),
    "adam": lambda parameters, o: torch.optim.Adam(parameters, o.lr, weight_decay=o.weight_decay),
}


def main(argv: list[str]) -> None:
    options = parse(argv, description=__doc__)
    screen = report.screen()
    method = create_method(options)
    method.check(models.create_model(options.arch))
    device, line = machine.pick_device(options.gpus[0])
    screen.print(line)
    torch.manual_seed(options.seed)
    train, val = create_loaders(options, device, screen)
    network = models.create_model(options.arch, len(train.classes), options.seed)
    network.to(device, memory_format=torch.channels_last)
    if options.evaluate:
        return evaluate_checkpoint(options, network, val, screen)

    state = resumable(options, screen)
    if not state:
        job.begin(options, argv)
    accuracy = load_and_attach(options, network, method, None if state else val, screen)
    run = Run(
        network,
        method,
        train,
        epochs=options.num_epochs,
        rate=partial(rate, options),
        make_optimizer=lambda parameters: OPTIMIZERS[options.optimizer](parameters, options),
        label_smoothing=options.label_smoothing,
        amp=options.amp,
    )
    if state:
        run.load_state_dict(state)
        accuracy = state["accuracy"]

    facts = {
        "arch": options.arch,
        "num_classes": len(train.classes),
        "classes": train.classes,
        "image_size": image_size(options),
        "options": options.to_json(),
        "accuracy": accuracy,
    }
    checkpoints = options.job_dir / "checkpoint"
    record = callbacks.Record(options.job_dir, run.epoch, accuracy)
    with callbacks.Save(checkpoints, facts) as save, callbacks.Show(screen) as show:
        fit(run, [callbacks.Evaluate(val), record, show, save])
        save.write(run, "last.pt")

    images = next(iter(val))[0][:8]
    kept = pruning.finish(method, network, images)
    tuned = evaluate(network, val)
    final = {"state_dict": network.state_dict(), "kept": kept, "epoch": run.epoch}
    save_checkpoint(checkpoints / "final.pt", facts | final)
    fixed = export(options, network, kept, images, screen) if options.export_onnx else {}
    told = {name: facts[name] for name in ("arch", "image_size", "options")}
    told |= {"data_set": options.data_set, "method": method_label(options), "accuracy": accuracy | {"tuned": tuned}}
    costs = count(network, images[:1])
    report.save_summary(options.job_dir, told | {"totals": totals(network, costs)}, costs, kept, fixed)
    report.write(options.job_dir, screen)


def create_method(options: Options) -> pruning.Method:
    names = set().union(*map(pruning.option_names, pruning.METHODS))
    return pruning.create_method(options.conv_type, **{name: getattr(options, name) for name in names})


def method_label(options: Options) -> str:
    """The method and its options, for titles."""
    key = pruning.ALIASES.get(options.conv_type, options.conv_type)
    taken = {name: getattr(options, name) for name in sorted(pruning.option_names(key) - {"seed"})}
    return ", ".join([key, *(f"{name} {value}" for name, value in taken.items() if value is not False)])


def create_loaders(options: Options, device: torch.device, screen: Console) -> tuple[data.Loader, data.Loader]:
    return data.create_loaders(
        options.data_set,
        data_path=options.data_path,
        image_size=image_size(options),
        train_batch_size=options.train_batch_size,
        eval_batch_size=options.eval_batch_size,
        seed=options.seed,
        device=device,
        workers=options.workers,
        skip_bad=options.bad_pictures == "skip",
        say=screen.print,
    )


def image_size(options: Options) -> int:
    return options.image_size or data.DEFAULT_SIZE.get(options.data_set, 0)


def rate(options: Options, epoch: int, step: int, steps: int) -> float:
    return learning_rate(options.lr_policy, options.lr, epoch, options.num_epochs, options.warmup_epochs, step, steps)


def load_and_attach(options: Options, network, method: pruning.Method, val: data.Loader | None, screen) -> dict:
    """Dense weights in, then the method. Returns the accuracy before and after, if asked for and worth telling.

    A resumed run does this too, so that what the method plans from the dense weights comes out the same.
    """
    facts = models.load_checkpoint(network, options.pretrained_model) if options.pretrained_model else {}
    if not options.pretrained_model or val is None:
        method.attach(network)
        return {}
    if "note" in facts:
        screen.print(f"{options.pretrained_model}: {facts['note']}")
    dense = evaluate(network, val)
    screen.print(f"dense: top-1 {dense['top1']:.2f}, top-5 {dense['top5']:.2f}, loss {dense['loss']:.4f}")
    method.attach(network)
    pruned = evaluate(network, val)
    screen.print(f"pruned, before training: top-1 {pruned['top1']:.2f}, top-5 {pruned['top5']:.2f}")
    return {"dense": dense, "pruned": pruned}


def resumable(options: Options, screen: Console) -> dict | None:
    """The state to go on from, if one is asked for and there."""
    last = options.job_dir / "checkpoint" / "last.pt"
    if not options.resume:
        return None
    if not last.exists():
        screen.print(f"--resume: no {last}; starting")
        return None
    state = models.read_checkpoint(last)
    job.check_same_run(options, state, last)
    screen.print(f"resuming after {state['epoch']} epochs and {state['loader']['batch']} steps")
    return state


def evaluate_checkpoint(options: Options, network, val: data.Loader, screen: Console) -> None:
    facts = models.load_checkpoint(network, options.evaluate)
    figures = evaluate(network, val)
    sums = totals(network, count(network, next(iter(val))[0][:1]))
    screen.print(
        f"{options.evaluate}: top-1 {figures['top1']:.2f}, top-5 {figures['top5']:.2f}, loss {figures['loss']:.4f}; "
        f"sparsity {100 * sums['sparsity']:.2f} %, multiply-adds {sums['macs_kept']:,} of {sums['macs']:,}"
        + (f"; {facts['note']}" if "note" in facts else "")
    )


def export(options: Options, network, kept: dict, images: torch.Tensor, screen: Console) -> dict[str, str]:
    """Write `model.onnx` with blocks as consecutive rows. Returns why not, for the layers where that is impossible."""
    lengths = {name: layer["N"] for name, layer in kept.items() if layer.get("N") and layer.get("rate")}
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
