"""Every option of `imagenet.py`, declared once, help and default together: parser, YAML and `run.json` follow."""

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml


def option(default, help: str, *spellings: str, choices: tuple[str, ...] | None = None, alone=None):
    """A field of `Options`; `spellings` are flags that mean the same, `alone` is the value of the bare flag."""
    metadata = {"help": help, "spellings": spellings, "choices": choices, "alone": alone}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """What a user can ask of `imagenet.py`. Field names are flag names."""

    # What is trained, on what.
    arch: str = option("mobilenet_v2", "network; an unknown name lists them all")
    data_set: str = option(
        "digits", "digits (embedded), cifar10, cifar100, tiny_imagenet, imagefolder, lmdb, fake (noise)"
    )
    data_path: Path | None = option(None, "folder of the data set")
    image_size: int | None = option(None, "pixels a side (default: 224, digits and tiny_imagenet 64, cifar 32)")
    use_dali: bool = option(False, "decode and resize an imagefolder with NVIDIA DALI, on the GPU or the CPU")
    check_data: bool = option(False, "only decode every picture, and list those that do not decode")
    bad_pictures: str = option("stop", "a picture that does not decode", choices=("stop", "skip"))
    job_dir: Path = option(Path("experiments"), "where the run writes its records, checkpoints and reports")
    config: Path | None = option(None, "YAML file of options by these names; the command line wins")
    seed: int = option(0, "of initial weights, shuffling, augmentation and random masks")
    gpus: list[int] = option([0], "GPUs to use, a process each; without one the CPU is used")
    workers: int = option(2, "processes that decode pictures")

    # How it is pruned.
    conv_type: str = option("BlockL1Conv", "pruning method, by its name or the paper's layer name", "--method")
    N: int | None = option(None, "block length: output kernels that live or die together")
    pr_target: float = option(0.5, "share to prune, in [0, 1): in every layer, or of all stripes")
    rearrange: bool = option(False, "form blocks among reordered filters")
    full: bool = option(False, "prune the classifier too")
    rearrange_by: str = option("sort", "the order: by L1 norm, as published, or clustered so that more weight is kept")
    blocks: str = option("aligned", "where N does not divide a layer: a shorter last block, or wrapped (reference)")
    balanced: bool = option(False, "every N rows lose equally many blocks, for threads that share the work")
    budget: str | None = option(
        None,
        "uniform: the same rate in every layer; global: one ranking over all layers "
        "(default: uniform, but global for single weights of bip, hydra, imp)",
    )
    max_rate: float = option(0.9, "of a global budget, or of stripes: no layer loses more")
    rates: Path | None = option(None, "YAML file of layer-name patterns and their rates, instead of --pr_target")
    schedule: str = option("oneshot", "oneshot, or linear or cubic growth of the rate while training")
    schedule_end: float = option(0.5, "share of the training after which the rate has grown to its end")
    schedule_every: int = option(50, "updates between two selections of a growing rate")
    sr: float | None = option(None, "of stripe: strength of the L1 penalty (default: adapts, to end at --pr_target)")
    threshold: float = option(0.05, "of stripe: one whose scale is this or less goes")
    pr_unit: str = option(
        "stripes", "of stripe: what --pr_target is a share of: stripes, or macs of layers with stripes"
    )
    freeze_weights: float = option(
        0.0, "of stripe: share of training in which only scales are trained; alone, all of it", alone=1.0
    )
    layer_type: str = option(
        "unstructured",
        "of bip, hydra and imp: what is kept or goes as one",
        choices=("unstructured", "filter", "channel", "block"),
    )
    k: float = option(0.1, "of bip, hydra and imp: share kept, in (0, 1]")
    exp_mode: str = option(
        "prune",
        "of bip and hydra: dense training, learning masks, or training under those learned",
        choices=("pretrain", "prune", "finetune"),
    )
    score_init: str = option("magnitude", "of bip and hydra: scores start as the weights, or random")
    mask_lr: float = option(0.1, "of bip: peak learning rate of the scores")
    mask_lr_policy: str = option("cos", "of bip: its schedule (cos, step)", "--mask_lr_schedule")
    lr2: float = option(1e-4, "of bip: weight of the implicit gradient, 1 / gamma")
    accelerate: bool = option(False, "of bip: scores first, without the implicit gradient, then weights")
    fidelity: str = option("paper", "of bip and hydra: as the paper says, or as its code does (paper, reference)")
    rounds: int = option(1, "of imp: rounds of pruning and training; 1: one-shot magnitude")
    rewind: bool = option(True, "of imp: rounds start from the weights that the run started from")

    shrink: bool = option(False, "remove dead channels in the end: a smaller network that computes the same")

    # ResRep's own; its published schedules are the defaults.
    flops_target: float = option(0.455, "of ResRep: multiply-adds to keep, as a share of the dense network's")
    tied_groups: bool = option(False, "prune channels of residual sums, too, a group of layers together")
    lasso_strength: float = option(1e-4, "of the penalty on compactor rows")
    before_mask_iters: int | None = option(None, "updates before channels are chosen (default: five epochs)")
    mask_interval: int = option(200, "updates between two choices of channels")
    mask_end: float = option(1.0, "share of the training after which the choice stands, so that short runs can forget")
    begin_granularity: int = option(4, "by how many channels a choice grows until the target is reached")
    num_at_least: int = option(1, "channels that every layer keeps")
    compactor_momentum: float = option(0.99, "of compactors")
    decay_compactors: bool = option(False, "apply weight decay to compactors")
    bias_lr_factor: float = option(2.0, "of the learning rate of biases")
    conversion_threshold: float = option(1e-5, "compactor rows of a smaller norm are zero")
    round_to: int = option(1, "keep widths to multiples of it")

    # Where weights come from and go to.
    pretrained_model: Path | None = option(None, "checkpoint to start from", "--pretrain_model")
    evaluate: Path | None = option(None, "only evaluate this checkpoint", "--pruned_model")
    resume: str | None = option(
        None,
        "go on from this checkpoint; alone, from job_dir's last.pt, or start if there is none",
        alone="last",
    )
    export_onnx: bool = option(False, "write job_dir/model.onnx, its outputs checked")

    # How it is trained.
    debug: bool = option(False, "only six batches an epoch, to try things out")
    num_epochs: int = option(180, "epochs of training; 0: prune, write and evaluate only")
    train_batch_size: int = option(256, "pictures a step")
    eval_batch_size: int = option(256, "pictures a step of evaluation")
    optimizer: str = option("sgd", "optimiser", choices=("sgd", "adam"))
    lr: float = option(0.01, "peak learning rate")
    lr_policy: str = option(
        "cos",
        "schedule, epoch by epoch; cos_step: step by step",
        "--lr_type",
        choices=("cos", "cos_step", "step", "exp", "fixed"),
    )
    warmup_length: int | None = option(None, "epochs of linear warm-up (default: 5, a tenth of runs under 50 epochs)")
    lr_gamma: float = option(0.1, "factor of the step schedule")
    lr_decay_freq: int = option(30, "epochs between two decays of the step schedule", "--lr_adjust")
    lr_decay_step: list[int] | None = option(None, "decay of the step schedule at these epochs instead")
    momentum: float = option(0.9, "of sgd")
    nesterov: bool = option(False, "Nesterov momentum")
    weight_decay: float = option(4e-5, "on all parameters")
    accumulate: int = option(1, "batches whose mean gradient makes one update")
    amp: bool = option(False, "train in bfloat16 where that is safe (autocast); evaluation stays in float32")
    compile: bool = option(False, "compile the network with torch.compile")
    ema: float | None = option(None, "decay of an average of the weights that is evaluated and kept, say 0.999")
    distill: float = option(0.0, "share of the loss that imitates the dense pretrained network")
    temperature: float = option(4.0, "of the imitation: both networks' logits are divided by it")
    label_smoothing: float = option(0.0, "share of the target spread over all classes", "--label-smoothing")

    def __post_init__(self) -> None:
        for name in ("num_epochs", "workers"):
            _demand(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("train_batch_size", "eval_batch_size"):
            _demand(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _demand(self.image_size is None or self.image_size >= 8, "image_size", self.image_size, "8 or more")
        _demand(self.lr > 0, "lr", self.lr, "above 0")
        for name in ("accumulate", "lr_decay_freq"):
            _demand(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("label_smoothing", "distill"):
            _demand(0 <= getattr(self, name) < 1, name, getattr(self, name), "a share in [0, 1)")
        _demand(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "a decay in (0, 1)")
        _demand(self.temperature > 0, "temperature", self.temperature, "above 0")
        _demand(not self.distill or self.pretrained_model, "distill", self.distill, "0 without --pretrained_model")
        _demand(len(set(self.gpus)) == len(self.gpus), "gpus", self.gpus, "different GPUs")
        _demand(self.optimizer == "sgd" or not self.nesterov, "nesterov", True, "for --optimizer sgd only")
        warmup = self.warmup_epochs
        _demand(0 <= warmup < max(self.num_epochs, 1), "warmup_length", warmup, "0 or more, below num_epochs")
        for name in ("pretrained_model", "evaluate", "data_path", "rates"):
            path = getattr(self, name)
            _demand(path is None or path.exists(), name, path, "an existing path")

    @property
    def warmup_epochs(self) -> int:
        return min(5, self.num_epochs // 10) if self.warmup_length is None else self.warmup_length

    def to_json(self) -> dict:
        return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self).items()}


# A run may be resumed under other values of these; all others make it another run.
FREE_ON_RESUME = {
    "job_dir", "data_path", "config", "gpus", "workers", "use_dali", "resume", "export_onnx", "eval_batch_size",
}  # fmt: skip


def _demand(holds: bool, name: str, value: object, what: str) -> None:
    if not holds:
        raise ValueError(f"--{name} {value}: must be {what}")


# Flags of the published code that did nothing there, and why they are not taken here.
REFUSED = {
    "--test_only": "use --evaluate CHECKPOINT",
    "--random_rule": "weights come from --pretrained_model, chance from --seed",
    "--bn_type": "networks have the batch-norm of their papers",
    "--first-layer-type": "the first layer is always dense",
    "--nonlinearity": "networks start as their papers say",
    "--init": "networks start as their papers say",
    "--mode": "networks start as their papers say",
}


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake as ValueError instead of printing the usage."""

    def error(self, message: str):
        raise ValueError(message)


def parser(cls: type = Options, description: str | None = None) -> argparse.ArgumentParser:
    """The argument parser of an options class; what is not given is left out of its result."""
    result = OneLineParser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for field in dataclasses.fields(cls):
        kind, many = _kind(field)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        settings = {"dest": field.name, "choices": field.metadata["choices"]}
        settings["help"] = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
        if default is None or kind is bool:
            settings["help"] = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            settings = {k: v for k, v in settings.items() if k != "choices"} | {
                "action": argparse.BooleanOptionalAction
            }
        else:
            settings |= {"type": kind, "metavar": kind.__name__.upper()} | ({"nargs": "+"} if many else {})
            if field.metadata["alone"]:
                settings |= {"nargs": "?", "const": field.metadata["alone"]}
        result.add_argument(f"--{field.name}", *field.metadata["spellings"], **settings)
    return result


MARK = "<!-- options: written by `python -m utils.options` -->"


def table() -> str:
    """The options as a Markdown table: flags, default, help."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(Options):
        flags = ", ".join(f"`{flag}`" for flag in (f"--{field.name}", *field.metadata["spellings"]))
        default = getattr(Options(), field.name)
        default = "" if default is None else "off" if default is False else default
        choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        rows.append(f"| {flags} | {default} | {field.metadata['help']}{choices} |")
    return "\n".join(rows) + "\n"


def parse(argv: list[str], cls: type = Options, description: str | None = None):
    """Options from the command line over those of the `--config` file over the defaults.

    Raises:
        ValueError: one line with the flag or key, the value and the valid choices.
    """
    for argument in argv:
        flag = argument.split("=")[0]
        if flag in REFUSED:
            raise ValueError(f"{flag} had no effect in the published code and is not taken here: {REFUSED[flag]}")
    given = vars(parser(cls, description).parse_args(argv))
    return cls(**(_from_yaml(given["config"], cls) if "config" in given else {}) | given)


def _from_yaml(path: Path, cls: type) -> dict:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: not a mapping of options")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = content.keys() - fields.keys() | content.keys() & {"config"}
    if unknown:
        raise ValueError(
            f"--config {path}: unknown key {', '.join(map(str, unknown))}; keys are the names of the flags"
        )
    return {key: _convert(path, fields[key], value) for key, value in content.items() if value is not None}


def _convert(path: Path, field: dataclasses.Field, value: object):
    kind, many = _kind(field)
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        converted = [kind(v) for v in (value if isinstance(value, list) else [value])] if many else kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"--config {path}: {field.name}: {value!r} is not a {kind.__name__}") from None
    choices = field.metadata["choices"]
    if choices and converted not in choices:
        raise ValueError(f"--config {path}: {field.name}: {value!r} is not one of {', '.join(choices)}")
    return converted


def _kind(field: dataclasses.Field) -> tuple[type, bool]:
    """The type of one value, and whether there may be several: `Path | None` -> Path, `list[int]` -> int."""
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    return (typing.get_args(kind)[0], True) if typing.get_origin(kind) is list else (kind, False)


if __name__ == "__main__":
    readme = Path(__file__).resolve().parent.parent / "README.md"
    head = readme.read_text().split(MARK)[0]
    readme.write_text(f"{head}{MARK}\n{table()}")
