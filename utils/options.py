"""What a user can ask of a run of `imagenet.py`; what belongs to a pruning method stands in `pruning/options.py`.

Every class is a group of --help. Needs no torch.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

from utils.declare import Declared, option
from utils.schedule import POLICIES, Schedule

PUBLISHED = Path("published")  # in place of a checkpoint
RGB = ("red", "green", "blue")
OWN_ARGUMENTS = ("name", "num_classes", "seed")  # of `models.create_model`: they come from elsewhere


@dataclass(frozen=True)
class DataOptions(Declared):
    """Network and data"""

    arch: str = option("mobilenet_v2", "network; --list names them, and the forms of names of others")
    arch_options: list[str] | None = option(None, "arguments of a network that is not ours: width=1.0 depth=2")
    data_set: str = option("digits", "data set; --list names them all")
    data_path: Path | None = option(None, "folder of the data set")
    image_size: int | None = option(
        None, "pixels a side (default: 224, digits and tiny_imagenet 64, cifar 32)", within="[8, inf)"
    )
    classes: Path | None = option(None, "file of all class names, a line each, if the folders hold a part")
    mean: list[float] | None = option(None, "of red, green, blue (default: of the network's library, or ImageNet)")
    std: list[float] | None = option(None, "of red, green, blue (default: likewise)", within="(0, inf)")
    interpolation: str | None = option(None, "of resizing (default: likewise)", choices=("bilinear", "bicubic"))
    crop: float | None = option(None, "share of a side that evaluation sees (default: likewise)", within="(0, 1]")
    use_dali: bool = option(False, "decode and resize an imagefolder with NVIDIA DALI, on the GPU or the CPU")
    workers: int = option(2, "processes that decode pictures", within="[0, inf)")
    check_data: bool = option(False, "only decode every picture, and list those that do not decode")
    bad_pictures: str = option("stop", "at a picture that does not decode", choices=("stop", "skip"))


@dataclass(frozen=True)
class PruningOptions(Declared):
    """Pruning"""

    conv_type: str = option(
        "BlockL1Conv", "pruning method, by its name or the paper's layer name; --list names them all", "--method"
    )
    shrink: bool = option(False, "remove dead channels in the end: a smaller network that computes the same")
    calibration: int = option(512, "pictures shown to a method that looks at data before training", within="[1, inf)")
    repair: bool = option(False, "fit what is kept to the dense network, without labels")
    dense_model: Path | None = option(None, "that network, where --pretrained_model is pruned already")


@dataclass(frozen=True)
class FileOptions(Declared):
    """Files"""

    config: Path | None = option(None, "YAML file of options by the names of their flags; the command line wins")
    job_dir: Path = option(Path("experiments"), "where the run writes its records, checkpoints and reports")
    pretrained_model: Path | None = option(
        None, "checkpoint to start from; published: the library's", "--pretrain_model"
    )
    resume: str | None = option(
        None, "go on from this checkpoint; alone, from job_dir's last.pt, or start if there is none", alone="last"
    )
    accept_changed_data: bool = option(False, "resume although the pictures are not those that the run began with")
    evaluate: Path | None = option(
        None, "only evaluate this checkpoint; --N is the length of the blocks to look for then", "--pruned_model"
    )
    export_onnx: bool = option(False, "write job_dir/model.onnx, its outputs checked")


@dataclass(frozen=True)
class TrainingOptions(Declared):
    """Training"""

    num_epochs: int = option(180, "epochs of training; 0: prune, write and evaluate only", within="[0, inf)")
    train_batch_size: int = option(256, "pictures a step", within="[1, inf)")
    eval_batch_size: int = option(256, "pictures a step of evaluation", within="[1, inf)")
    accumulate: int = option(1, "batches whose mean gradient makes one update", within="[1, inf)")
    optimizer: str = option("sgd", "optimiser", choices=("sgd", "adam"))
    momentum: float = option(0.9, "momentum of sgd", within="[0, 1)")
    nesterov: bool = option(False, "Nesterov momentum")
    weight_decay: float = option(4e-5, "weight decay of all parameters", within="[0, inf)")
    label_smoothing: float = option(0.0, "share of the target spread over all classes", within="[0, 1)")
    distill: float = option(0.0, "share of the loss that imitates the dense pretrained network", within="[0, 1)")
    temperature: float = option(4.0, "by which both networks' logits are divided then", within="(0, inf)")
    ema: float | None = option(
        None, "decay of an average of the weights that is evaluated and kept, say 0.999", within="(0, 1)"
    )
    debug: bool = option(False, "only six batches an epoch, to try things out")


@dataclass(frozen=True)
class RateOptions(Declared):
    """Learning rate"""

    lr: float = option(0.01, "peak learning rate", within="(0, inf)")
    lr_policy: str = option(
        "cos", "its schedule, epoch by epoch; cos_step: step by step", "--lr_type", choices=tuple(POLICIES)
    )
    warmup_length: int | None = option(
        None, "epochs of linear warm-up (default: 5, a tenth of runs under 50 epochs)", within="[0, inf)"
    )
    lr_gamma: float = option(0.1, "factor of the step schedule", within="(0, 1]")
    lr_decay_freq: int = option(30, "epochs between two decays of the step schedule", "--lr_adjust", within="[1, inf)")
    lr_decay_step: list[int] | None = option(
        None, "decay of the step schedule at these epochs instead", within="[0, inf)"
    )


@dataclass(frozen=True)
class MachineOptions(Declared):
    """Machine and chance"""

    seed: int = option(0, "of initial weights, shuffling, augmentation and random masks")
    gpus: list[int] = option([0], "GPUs to use, a process each; without one the CPU is used", within="[0, inf)")
    amp: bool = option(False, "train in bfloat16 where that is safe (autocast); evaluation stays in float32")
    compile: bool = option(False, "compile the network with torch.compile")


@dataclass(frozen=True)
class EvaluateOptions(Declared):
    """Evaluation (--evaluate)"""

    N: int = option(16, "length of the blocks to look for; its halves are tried, too", within="[1, inf)")


@dataclass(frozen=True)
class Options(
    DataOptions, PruningOptions, FileOptions, TrainingOptions, RateOptions, MachineOptions
):  # in the order of --help
    """The options of a run. Field names are flag names.

    Attributes:
        own: the options of the pruning method.
        evaluation: the options of --evaluate.
        given: the names of the options that the user has given; the others have their defaults.
    """

    own: Declared = Declared()
    evaluation: EvaluateOptions = EvaluateOptions()
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _demand(not self.distill or self.pretrained_model, "distill", self.distill, "0 without --pretrained_model")
        _demand(len(set(self.gpus)) == len(self.gpus), "gpus", self.gpus, "different GPUs")
        _demand(self.optimizer == "sgd" or not self.nesterov, "nesterov", True, "for --optimizer sgd only")
        for name in ("pretrained_model", "dense_model", "evaluate", "data_path", "classes"):
            path = getattr(self, name)
            published = name == "pretrained_model" and path == PUBLISHED
            _demand(path is None or path.exists() or published, name, path, "an existing path")
        for name in ("mean", "std"):
            _demand(len(getattr(self, name) or RGB) == len(RGB), name, getattr(self, name), "three numbers")
        _demand(not self.repair or self.pretrained_model, "repair", True, "with --pretrained_model")
        _demand(not self.dense_model or self.repair, "dense_model", self.dense_model, "with --repair")
        self.schedule()
        self.arguments()

    def arguments(self) -> dict[str, object]:
        """What --arch_options says: by name, a number, truth value, None or tuple as Python writes it, or else a word.

        Raises:
            ValueError: one of them is no `name=value`.
        """
        arguments = {}
        for word in self.arch_options or ():
            name, equals, value = word.partition("=")
            _demand(equals and name.isidentifier(), "arch_options", word, "of the form name=value")
            _demand(name not in OWN_ARGUMENTS, "arch_options", word, f"none of {', '.join(OWN_ARGUMENTS)}")
            try:
                arguments[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                arguments[name] = value
        return arguments

    def schedule(self, rounds: int = 1) -> Schedule:
        """The learning rate, whose schedule starts again in each of `rounds` trainings of equal length.

        Raises:
            ValueError: --num_epochs does not divide into rounds, or the warm-up takes all of one.
        """
        if self.num_epochs % rounds or (rounds > 1 and not self.num_epochs):
            raise ValueError(f"--num_epochs {self.num_epochs}: must divide into {rounds} rounds of training")
        epochs = self.num_epochs // rounds
        warmup = min(5, epochs // 10) if self.warmup_length is None else self.warmup_length
        each = f"the {epochs} epochs of each of {rounds} rounds" if rounds > 1 else f"--num_epochs {epochs}"
        _demand(warmup < max(epochs, 1), "warmup_length", warmup, f"0 or more, below {each}")
        milestones = tuple(self.lr_decay_step or ())
        return Schedule(self.lr, self.lr_policy, epochs, warmup, self.lr_gamma, self.lr_decay_freq, milestones)

    def to_json(self) -> dict[str, object]:
        """The run's options and its method's by name, paths as text."""
        return self.own.to_json() | super().to_json()

    def defaults(self) -> dict[str, object]:
        """What `to_json` gives for the same method where nothing is asked for."""
        return type(self.own)().to_json() | type(self)().to_json()


def _demand(holds: object, name: str, value: object, what: str) -> None:
    if not holds:
        raise ValueError(f"--{name} {value}: must be {what}")


# A run may be resumed under other values of these; all others make it another run.
FREE_ON_RESUME = {
    "job_dir", "data_path", "config", "gpus", "workers", "use_dali", "resume", "export_onnx", "eval_batch_size",
    "accept_changed_data",
}  # fmt: skip
