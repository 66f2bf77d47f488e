"""Options: whose they are, what is refused, what the command line, YAML and Python say alike, and what is shown."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import data
import imagenet
import model_tune
import models
import pruning
from data.sources import SOURCES
from docs import generate
from jobs.folder import check_same_run
from pruning.options import METHODS, owners, row
from utils.declare import default_of, flags_of, kind_of, options_of
from utils.options import EvaluateOptions, Options

ROOT = Path(__file__).resolve().parent.parent

# Freezing the command line: a flag is added on purpose. Every flag of a switch has its --no_ beside it.
RUN = """
--arch_options --classes --mean --std --interpolation --crop
--arch --data_set --data_path --image_size --bad_pictures --job_dir --config --seed --gpus --workers
--conv_type --method --shrink --calibration --repair --dense_model
--pretrained_model --pretrain_model --evaluate --pruned_model --resume --accept_changed_data --export_onnx --num_epochs
--train_batch_size --eval_batch_size --optimizer --lr --lr_policy --lr_type --warmup_length --momentum --nesterov
--weight_decay --amp --label_smoothing --lr_gamma --lr_decay_freq --lr_adjust --lr_decay_step --debug --accumulate
--compile --ema --distill --temperature --use_dali --check_data
"""
ONE_SHOT = "--pr_target --full --budget --max_rate --rates --schedule --schedule_end --schedule_every --repair"
BLOCKS = "--N --rearrange --rearrange_by --blocks --balanced"
SELECTIVE = "--layer_type --k --N --budget --fidelity"
HYDRA = f"{SELECTIVE} --exp_mode --score_init"
OWN = {
    "dense": "",
    "block_l1": f"{ONE_SHOT} {BLOCKS} --score",
    "block_random": f"{ONE_SHOT} {BLOCKS} --seed",
    "weight": f"{ONE_SHOT} --score",
    "filter": f"{ONE_SHOT} --score",
    "kernel_l1": f"{ONE_SHOT} --score",
    "kernel_random": f"{ONE_SHOT} --blocks --seed",
    "bip": f"{HYDRA} --mask_lr --mask_lr_policy --mask_lr_schedule --lr2 --accelerate --lr",
    "hydra": HYDRA,
    "imp": f"{SELECTIVE} --rounds --rewind",
    "resrep": """--flops_target --tied_groups --lasso_strength --before_mask_iters --mask_interval --begin_granularity
        --num_at_least --compactor_momentum --decay_compactors --bias_lr_factor --conversion_threshold --round_to
        --mask_end --fidelity""",
    "stripe": "--sr --threshold --pr_unit --pr_target --freeze_weights --max_rate --schedule_end",
}
TUNE = """--onnx_path --bsr --bsc --sparsity --threads --batch --image_size --target --images --tune --rpc --key --runs
--tolerance --out --dump_dir --profile --dtype --data --mean --std --resize --calibration --quantizer --quantise_method
--keep_float --per_tensor --peers --max_loss"""


def switched_on(cls: type) -> set[str]:
    return {flag for field in options_of(cls) for flag in flags_of(field) if not flag.startswith("--no_")}


def shown(*argv: str) -> tuple[str, bool]:
    """What `imagenet.py` prints, and whether it has imported torch by then."""
    program = "import sys, imagenet\ntry: imagenet.main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    *lines, torch = done.stdout.splitlines()
    return "\n".join(lines), torch == "True"


def test_the_command_lines_are_frozen():
    assert switched_on(Options) == set(RUN.split())
    assert {name: switched_on(row.options) for name, row in METHODS.items()} == {
        name: set(flags.split()) for name, flags in OWN.items()
    }
    assert switched_on(EvaluateOptions) == {"--N"}
    assert switched_on(model_tune.Options) == set(TUNE.split())


def test_the_page_of_options_is_what_the_declarations_say():
    assert generate.PATH.read_text() == generate.text(), "python docs/generate.py writes it"
    assert "docs/options.md" in (ROOT / "README.md").read_text()


# Whose an option is

# Options whose values must exist, be known, or go with another's.
NOT_VALID_ALONE = {"evaluate", "config", "conv_type", "data_set", "arch", "pretrained_model", "data_path", "distill"}
NOT_VALID_ALONE |= {"N", "budget", "arch_options", "classes", "mean", "std", "repair", "dense_model"}
SHARED = {"lr", "seed", "repair"}  # the run's, which some methods are given


def valid_words(field) -> tuple[list[str], object]:
    """A valid value of an option that is not its default, for the command line and for Python."""
    flag, default, (kind, _) = f"--{field.name}", default_of(field), kind_of(field)
    if kind is bool:
        return ([flag], True) if not default else ([f"--no-{field.name}"], False)
    if field.metadata["choices"]:
        value = next(word for word in reversed(field.metadata["choices"]) if word != default)
    else:
        value = {int: default + 1 if isinstance(default, int) else 8, float: 0.25}.get(kind, "word")
    return [flag, str(value)], value


@pytest.mark.parametrize("name", METHODS)
def test_flags_of_other_methods_are_refused(name: str, tmp_path: Path):
    """On the command line, in YAML and from Python alike; the message names who has the option."""
    own, recipe = {field.name for field in options_of(row(name).options)}, tmp_path / "recipe.yml"
    everyones = {field.name: field for method in METHODS.values() for field in options_of(method.options)}
    foreign = {key: field for key, field in everyones.items() if key not in own and key not in SHARED}
    assert len(foreign) > 15
    for key, field in foreign.items():
        words, value = valid_words(field)
        says = f"{words[0].replace('no-', 'no_')} belongs to {', '.join(owners(key))}(, --evaluate)?, not to {name}$"
        with pytest.raises(ValueError, match=f"^{says}"):
            imagenet.parse(["--method", name, *words])
        recipe.write_text(json.dumps({key: value}))
        says = f"--{key} belongs to {', '.join(owners(key))}(, --evaluate)?, not to {name}$"
        with pytest.raises(ValueError, match=f"^--config {recipe}: {says}"):
            imagenet.parse(["--method", name, "--config", str(recipe)])
        with pytest.raises(ValueError, match=f"^--{key} belongs to {', '.join(owners(key))}, not to {name}$"):
            pruning.create_method(name, **{key: value})


def test_evaluation_owns_the_block_length_too(tmp_path: Path):
    with pytest.raises(
        ValueError, match="--N belongs to block_l1, block_random, bip, hydra, imp, --evaluate, not to f"
    ):
        imagenet.parse(["--method", "filter", "--N", "4"])
    assert imagenet.parse(["--method", "filter", "--N", "4", "--evaluate", str(tmp_path)]).evaluation.N == 4
    both = imagenet.parse(["--N", "8", "--evaluate", str(tmp_path)])
    assert (both.evaluation.N, both.own.N) == (8, 8)
    assert imagenet.parse(["--evaluate", str(tmp_path)]).evaluation.N == 16
    with pytest.raises(ValueError, match="--N 8: for --layer_type block, not unstructured"):
        imagenet.parse(["--method", "bip", "--N", "8"])


def test_a_method_is_given_the_runs_values_of_shared_names():
    assert imagenet.parse(["--method", "bip", "--lr", "0.5"]).own.lr == 0.5
    assert imagenet.parse(["--method", "kernel_random", "--seed", "3"]).own.seed == 3
    options = imagenet.parse(["--method", "kernel_random", "--seed", "3"])
    assert pruning.create_method(options.conv_type, **vars(options.own)).options.seed == 3


# The command line and YAML


def test_command_line_wins_over_yaml_over_defaults(tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("# a comment\nN: 8\npr_target: 0.75\nrearrange: true\nlr: 1\ngpus: 0\nweight-decay: 1e-3\n")
    options = imagenet.parse(["--config", str(recipe), "--N", "4", "--no-rearrange"])
    own = options.own
    assert (own.N, own.pr_target, own.rearrange) == (4, 0.75, False)
    assert (options.lr, options.gpus, options.weight_decay) == (1.0, [0], 1e-3)
    assert options.arch == Options().arch


def test_the_method_may_stand_in_the_file(tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("method: bip\nk: 0.2\n")
    assert imagenet.parse(["--config", str(recipe)]).own.k == 0.2
    with pytest.raises(ValueError, match="--k belongs to bip, hydra, imp, not to filter"):
        imagenet.parse(["--config", str(recipe), "--method", "filter"])


@pytest.mark.parametrize("name", METHODS)
def test_dashes_and_underscores_mean_the_same(name: str):
    """For every flag of the run and of the method, with its value behind it or behind an equals sign."""
    for field in [*options_of(Options), *options_of(row(name).options)]:
        if field.name in NOT_VALID_ALONE:
            continue
        words, _ = valid_words(field)
        options = imagenet.parse(["--method", name, *words])
        dashed = [f"--{words[0][2:].replace('_', '-')}", *words[1:]]
        assert imagenet.parse(["--method", name, *dashed]) == options
        assert imagenet.parse(["--method", name, "=".join(dashed)]) == options
        assert options != imagenet.parse(["--method", name]), words


def test_both_programs_take_both_spellings(tmp_path: Path):
    assert model_tune.parse(["--onnx-path", "a.onnx", "--dump-dir=there"]).dump_dir == "there"
    path = str(tmp_path)
    assert imagenet.parse(["--pretrain-model", path]).pretrained_model == tmp_path
    assert imagenet.parse(["--lr-type", "step"]).lr_policy == "step"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--arc", "resnet20"], "unrecognized arguments: --arc; did you mean --arch?"),  # no guessing without asking
        (["--ach", "resnet20"], "did you mean --arch?"),
        (["--epochs", "3"], "did you mean --num_epochs?"),
        (["--batch-size", "3"], "did you mean --train_batch_size?"),
        (["--learning_rate", "3"], "did you mean --lr?"),
        (["--method", "resrep", "--flop_target", "3"], "did you mean --flops_target?"),
        (["--N", "four"], "--N: invalid int value: 'four'"),
        (["--optimizer", "lbfgs"], "invalid choice: 'lbfgs'"),
        (["--num_epochs", "-1"], "--num_epochs -1: must be 0 or more"),
        (["--train_batch_size", "0"], "--train_batch_size 0"),
        (["--evaluate", "nowhere.pt"], "--evaluate nowhere.pt: must be an existing path"),
        (["--num_epochs", "3", "--warmup_length", "3"], "--warmup_length 3: must be 0 or more, below --num_epochs 3"),
        (["--gpus", "1", "1"], "different GPUs"),
        (["--gpus", "-1"], "--gpus"),
        (["--distill", "0.5"], "--distill 0.5: must be 0 without --pretrained_model"),
        (["--ema", "1.5"], "--ema 1.5: must be in"),
        (["--lr", "nan"], "--lr nan: must be a finite number"),
        (["--weight_decay", "inf"], "--weight_decay inf: must be a finite number"),
        (["--bn_type", "LearnedBatchNorm"], "--bn_type had no effect in the published code"),
        (["--test-only"], "--test_only had no effect .* use --evaluate"),
        (["--config", "nowhere.yml"], "--config nowhere.yml: .*No such file"),
        (["--method", "magic"], "unknown method 'magic': one of dense, "),
        (["--arch", "alexnet"], "unknown network 'alexnet'"),
        (["--data_set", "mnist"], "unknown data set 'mnist'"),
    ],
)
def test_wrong_options_are_one_line(argv: list[str], message: str):
    with pytest.raises(ValueError, match=message) as error:
        imagenet.parse(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("blocksize: 4", "recipe.yml: unknown key blocksize; did you mean --blocks?"),
        ("config: other.yml", "recipe.yml: unknown key config"),
        ("no_rearrange: true", "recipe.yml: unknown key no_rearrange: .* NAME: false"),
        ("N: [4", "recipe.yml: while parsing"),
        ("- N", "not a mapping"),
        ("N: four", "recipe.yml: --N 'four': not a whole number"),
        ("N: 4.5", "recipe.yml: --N 4.5: not a whole number"),
        ("N: true", "recipe.yml: --N True: not a whole number"),
        ("rearrange: 1", "recipe.yml: --rearrange 1: not true or false"),
        ("lr: .inf", "recipe.yml: --lr inf: must be a finite number"),
        ("optimizer: lbfgs", "recipe.yml: --optimizer lbfgs: one of sgd, adam"),
        ("method: 3", "--conv_type 3: not a word"),
        ("job_dir: ''", "recipe.yml: --job_dir '': not a path"),
        ("method: [dense]", "--conv_type is a list: not a word"),
        ("lr: !!timestamp x", "recipe.yml: holds a value that is no YAML"),
        (f"lr: 1{'0' * 400}", "must be a finite number"),
        (f"train_batch_size: 1{'0' * 40}", "must be at most 9223372036854775807"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_wrong_recipes_are_one_line(content: str, message: str, tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        imagenet.parse(["--config", str(recipe)])
    assert "\n" not in str(error.value)


def test_rounds_are_checked_with_their_own_epochs():
    """The warm-up of a round is measured against the round, and before data is opened."""
    wrong = [
        "--method",
        "imp",
        "--rounds",
        "4",
        "--num_epochs",
        "12",
        "--warmup_length",
        "5",
        "--data_set",
        "imagefolder",
    ]
    with pytest.raises(
        ValueError, match="--warmup_length 5: must be 0 or more, below the 3 epochs of each of 4 rounds"
    ):
        imagenet.main(wrong)
    options = imagenet.parse([*wrong[:-4], "--warmup_length", "2"])
    rate = options.schedule(4)
    assert [rate(epoch, 0, 10) for epoch in range(3)] == [rate(epoch, 0, 10) for epoch in range(9, 12)]
    assert rate(2, 0, 10) == options.lr, "the end of a warm-up of two epochs"


# A run gone on with


def test_a_run_is_the_same_under_the_same_options_and_those_of_older_files():
    options = imagenet.parse(["--method", "bip", "--layer_type", "block"])
    state = {"options": options.to_json()}
    check_same_run(options, state, Path("last.pt"))
    older = {key: value for key, value in state["options"].items() if key not in ("calibration", "fidelity")}
    check_same_run(options, {"options": older | {"N": 16, "budget": None, "pr_target": 0.5}}, Path("last.pt"))
    for name, value in {"k": 0.2, "N": 8, "lr": 1.0}.items():
        with pytest.raises(ValueError, match=rf"--resume: last\.pt was made with --{name} {value} \(now "):
            check_same_run(options, {"options": state["options"] | {name: value}}, Path("last.pt"))
    asked = imagenet.parse(["--method", "bip", "--layer_type", "block", "--fidelity", "reference"])
    with pytest.raises(ValueError, match="--fidelity None"):
        check_same_run(asked, {"options": older}, Path("last.pt"))


def test_every_option_has_help_and_survives_json():
    classes = [Options, EvaluateOptions, model_tune.Options, *(row.options for row in METHODS.values())]
    assert all(field.metadata["help"] for cls in classes for field in options_of(cls))
    written = json.loads(json.dumps(imagenet.parse(["--method", "bip", "--job_dir", "here"]).to_json()))
    assert (written["job_dir"], written["k"], written["conv_type"]) == ("here", 0.1, "bip")


# What is shown, and at what cost


def test_help_is_grouped_and_short_and_adds_the_methods_options():
    text, torch = shown("--help")
    assert not torch, "importing torch takes longer than an answer may"
    assert [heading in text for heading in ("Network and data:", "Files:", "Learning rate:")] == [True] * 3
    assert "--optimizer {sgd,adam}" in text
    assert "--flops_target" not in text
    assert len(text.splitlines()) < 115
    with_method, torch = shown("--method", "resrep", "--help")
    assert not torch
    assert "Options of --method resrep:" in with_method
    assert "--flops_target" in with_method


def test_the_list_has_all_that_there_is():
    text, torch = shown("--list")
    assert not torch
    words = text.split()
    assert {*models.NAMES, *data.DATA_SETS, *METHODS} <= set(words)
    assert "BlockL1Conv" in text
    assert set(data.DATA_SETS) == set(SOURCES)


def test_the_version_is_that_of_the_project():
    text, torch = shown("--version")
    assert not torch
    assert text.startswith("block-pruning 0.1.0; Python 3.")


def test_without_a_word_it_says_how_to_start():
    done = subprocess.run([sys.executable, "imagenet.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--list" in done.stderr
    for line in done.stderr.splitlines():
        if "--arch" in line:
            imagenet.parse(line.split()[2:])


def test_a_typo_is_told_before_torch_is_imported():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "imagenet.py", "--num_epoch", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    *imports, last = done.stderr.splitlines()
    assert (done.returncode, last) == (
        2,
        "imagenet.py: unrecognized arguments: --num_epoch; did you mean --num_epochs?",
    )
    assert not [line for line in imports if line.endswith(" torch")]


def test_required_options_and_words_of_their_own():
    with pytest.raises(ValueError, match="the following arguments are required: --onnx_path"):
        model_tune.parse([])
    assert model_tune.parse(["--onnx_path", "x", "--image_size", "192x256"]).image_size == (192, 256)
    with pytest.raises(ValueError, match="--image_size: invalid image_size value: '3y'"):
        model_tune.parse(["--onnx_path", "x", "--image_size", "3y"])
