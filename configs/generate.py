"""Write a recipe for every row of the published tables, and their CIFAR-10 twins, from the tables below.

python configs/generate.py            writes configs/<folder>/*.yml
python configs/generate.py --check    writes nothing; status 1 if a file differs, is missing or superfluous
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.files import save_text  # noqa: E402

# The 1xN paper's top-1 and top-5 on ImageNet, half of every layer pruned. Blocks are rearranged unless `_plain`.
# ResNet-50: the plot data of its figure 4 at 0.5; kernels: its kernel-wise study; all else: its README's tables.
PUBLISHED = {
    "mobilenet_v1": {
        "weight": (70.764, 89.592),
        "filter": (65.348, 86.264),
        "1x2": (70.281, 89.370),
        "1x4": (70.052, 89.056),
        "1x8": (69.908, 89.027),
        "1x16": (69.559, 88.933),
        "1x32": (69.541, 88.801),
    },
    "mobilenet_v2": {
        "weight": (71.146, 89.872),
        "filter": (66.730, 87.190),
        "1x2": (70.233, 89.417),
        "1x4": (69.579, 88.944),  # a misprint elsewhere: see NOTES
        "1x8": (69.372, 88.862),
        "1x16": (69.352, 88.708),
        "1x32": (68.762, 88.425),
        "1x2_plain": (69.900, 89.296),
        "1x4_plain": (69.521, 88.920),
        "1x8_plain": (69.206, 88.608),
        "1x16_plain": (68.971, 88.399),
        "1x32_plain": (68.431, 88.315),
    },
    "mobilenet_v3_small": {
        "weight": (66.376, 86.868),
        "filter": (59.054, 81.713),
        "1x2": (65.380, 86.060),
        "1x4": (64.465, 85.495),
        "1x8": (64.101, 85.274),
        "1x16": (63.126, 84.203),
        "1x32": (62.881, 83.982),
    },
    "mobilenet_v3_large": {
        "weight": (72.897, 91.093),
        "filter": (69.137, 89.097),
        "1x2": (72.120, 90.677),
        "1x4": (71.935, 90.458),
        "1x8": (71.478, 90.163),
        "1x16": (71.112, 90.129),
        "1x32": (70.769, 89.696),
    },
    "resnet50": {
        "weight": (77.088, 93.614),
        "filter": (75.382, 92.518),
        "1x2": (76.654, 93.466),
        "1x4": (76.506, 93.238),
        "1x8": (76.146, 93.134),
        "1x16": (76.254, 93.084),
        "1x32": (75.960, 92.950),
        "kernel_random": (74.834, 92.178),
        "kernel_l1": (75.370, 92.582),
    },
}
NOTES = {
    "mobilenet_v2_1x4": "misprint: the README's first table has top-1 60.706 (top-5 89.165); the plot data have\n"
    "69.426 (88.899); the rearrangement table has 69.579 (88.944), taken here",
}

# The twins, and the minutes of five epochs on two cores. No 1x32: the first stage has 16 filters.
TWINS = {"resnet20": "about 3 minutes on two cores", "resnet56": "about 10 minutes on two cores, estimated"}
TWIN_PATTERNS = [p for p in dict.fromkeys(p for rows in PUBLISHED.values() for p in rows) if not p.startswith("1x32")]

CONV_TYPES = {
    "weight": "UnstructureConv",
    "filter": "StructureConv",
    "kernel_random": "kernel_random",
    "kernel_l1": "kernel_l1",
}
IMAGENET = {
    "num_epochs": 180,
    "train_batch_size": 256,
    "lr": 0.01,
    "lr_policy": "cos",
    "warmup_length": 5,
    "momentum": 0.9,
    "weight_decay": 4e-5,
}
CIFAR10 = {"num_epochs": 5, "train_batch_size": 128, "lr": 0.02, "weight_decay": 1e-4, "amp": True}


# BiP's published recipes for ResNet-20, 90 % pruned; ImageNet's are for ResNet-18, and lack hydra and finetune.
# Accuracy is read off its figure 3: the dense network's, and that of the best mask of any sparsity.
BIP_DATA = {
    "cifar10": "dense 92.1, best mask 92.4",
    "cifar100": "dense 68.7, best mask 69.3",
    "tiny_imagenet": "no curve for this network",
    "imagenet": "no curve for this network",
}
BIP_MASKS = {"layer_type": "unstructured", "k": 0.1}
BIP_SCORES = BIP_MASKS | {"lr2": 1e-4, "mask_lr": 0.1}
# Phase -> (what starts it, its own options). An epoch of BiP draws every picture once here, twice there: 200 are 100.
BIP_PHASES = {
    "pretrain": (None, {"conv_type": "bip", "exp_mode": "pretrain", "num_epochs": 200, "weight_decay": 5e-4}),
    "bip": (
        "pretrain",
        {"conv_type": "bip", **BIP_SCORES, "mask_lr_policy": "step", "num_epochs": 200, "weight_decay": 1e-4},
    ),
    "hydra": ("pretrain", {"conv_type": "hydra", **BIP_MASKS, "num_epochs": 100, "weight_decay": 5e-4}),
    "finetune": (
        "bip",
        {"conv_type": "bip", "exp_mode": "finetune", **BIP_MASKS, "num_epochs": 100, "weight_decay": 5e-4},
    ),
}
BIP_COMMON = {"train_batch_size": 128, "lr": 0.1, "lr_policy": "cos", "warmup_length": 0, "momentum": 0.9}
BIP_IMAGENET = {
    "pretrain": {"num_epochs": 90},
    "bip": {"score_init": "random", "mask_lr_policy": "cos"},
}

# ResRep's published runs: (what is said, what they start from, options). One cosine over all steps, no warm-up.
RESREP_CIFAR = {"data_set": "cifar10", "train_batch_size": 64, "momentum": 0.9, "weight_decay": 1e-4}
RESREP_PRUNE = {"conv_type": "resrep", "lr": 0.01, "lr_policy": "cos_step", "warmup_length": 0}
RESREP = {
    "resnet50": (
        "top-1 76.15 to 76.15 at 45.5 % of the multiply-adds, from torchvision's first weights",
        "resnet50.pth",
        {"arch": "resnet50", "data_set": "imagefolder", "flops_target": 0.455, "num_epochs": 180}
        | {"train_batch_size": 256, "momentum": 0.9, "weight_decay": 1e-4}
        | RESREP_PRUNE,
    ),
    "resnet56_base": (
        "top-1 93.71, what is then pruned",
        None,
        {"arch": "resnet56_b", "conv_type": "DenseConv", "num_epochs": 240, "lr": 0.1, "lr_policy": "step"}
        | {"lr_decay_step": [120, 180], "warmup_length": 0}
        | RESREP_CIFAR,
    ),
    "resnet56": (
        "top-1 93.71 to 93.71 at 47.1 % of the multiply-adds",
        "experiments/resnet56_base/checkpoint/final.pt",
        {"arch": "resnet56_b", "flops_target": 0.471, "num_epochs": 480} | RESREP_CIFAR | RESREP_PRUNE,
    ),
}

# Stripe-wise pruning's published runs, from scratch, likewise. Its README's threshold is 0.01; the thread on its
# ResNet-56 says 0.05. Nothing was published for CIFAR-100; the code for ImageNet was not: trained as usual for ResNet.
SWP_COMMON = {"lr": 0.1, "lr_policy": "step", "warmup_length": 0, "momentum": 0.9, "weight_decay": 1e-4}
SWP_CIFAR = {"num_epochs": 160, "train_batch_size": 64, "lr_decay_step": [80, 120]} | SWP_COMMON
SWP_IMAGENET = {"num_epochs": 90, "train_batch_size": 256, "lr_decay_step": [30, 60]} | SWP_COMMON
SWP = {
    "vgg16_bn_cifar10": ("parameters -92.66 %, FLOPs -71.16 %, accuracy +0.4 against dense", 1e-5, 0.01),
    "vgg16_bn_cifar100": ("nothing for CIFAR-100", 1e-5, 0.01),
    "resnet56_projection_cifar10": ("parameters -75.6 %, FLOPs -77.7 %, accuracy -0.12 against dense", 1e-5, 0.05),
    "resnet56_projection_cifar100": ("nothing for CIFAR-100", 1e-5, 0.05),
    "resnet18_imagenet": ("FLOPs -50.48 %, top-1 +0.23, top-5 +0.22 against dense", 5e-6, 0.05),
    "resnet18_imagenet_stronger": ("FLOPs -54.58 %, top-1 -0.17, top-5 -0.04 against dense", 2e-5, 0.05),
}

DATA_PATHS = {
    "imagefolder": "ImageNet",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "tiny_imagenet": "TinyImageNet",
}


@dataclass(frozen=True)
class Recipe:
    """One file: options of `imagenet.py`, and what is said about them."""

    folder: str
    name: str
    comments: list[str]
    options: dict
    weights: str | None  # to start from

    @property
    def path(self) -> Path:
        return Path("configs") / self.folder / f"{self.name}.yml"

    def text(self) -> str:
        """The file: comments with its command, expected result and time, then options."""
        command = f"python imagenet.py --config {self.path} --data_path {DATA_PATHS[self.options['data_set']]}"
        command += f" --pretrained_model {self.weights}" if self.weights else ""
        head = [command, *self.comments, "written by configs/generate.py: change its table, not this file"]
        names = {name: self.options[name] for name in ("arch", "data_set")} | {"job_dir": f"experiments/{self.name}"}
        body = yaml.safe_dump(names | self.options, sort_keys=False)
        return "".join(f"# {line}\n" for line in head) + "\n" + body


def pruning_1xn(pattern: str) -> dict:
    if pattern in CONV_TYPES:
        return {"conv_type": CONV_TYPES[pattern], "pr_target": 0.5}
    length, _, plain = pattern.removeprefix("1x").partition("_")
    return {"conv_type": "BlockL1Conv", "N": int(length), "pr_target": 0.5, "rearrange": not plain}


def published_1xn(arch: str, pattern: str) -> Recipe:
    name, (top1, top5) = f"{arch}_{pattern}", PUBLISHED[arch][pattern]
    comments = [
        f"published: top-1 {top1:.3f}, top-5 {top5:.3f}",
        *NOTES.get(name, "").splitlines(),
        "time: 180 epochs of ImageNet; not measured here",
        f"pocket size: {twin('resnet20', pattern.replace('1x32', '1x16')).path}",
    ]
    pruning = pruning_1xn(pattern)
    # Blocks of the published tables wrap around where N does not divide a layer's width.
    pruning |= {"blocks": "reference"} if "N" in pruning else {}
    return Recipe("1xn", name, comments, {"arch": arch, "data_set": "imagefolder"} | pruning | IMAGENET, f"{arch}.pt")


def twin(arch: str, pattern: str) -> Recipe:
    comments = [
        "published: nothing for CIFAR-10; benchmarks/cifar10_1xn.py measures such runs side by side",
        f"time: {TWINS[arch]}",
    ]
    options = {"arch": arch, "data_set": "cifar10"} | pruning_1xn(pattern) | CIFAR10
    return Recipe("cifar10", f"{arch}_{pattern}", comments, options, f"{arch}.th")


def published_bip(data: str, phase: str) -> Recipe:
    before, options = BIP_PHASES[phase]
    own = {"arch": "resnet20s", "data_set": data} | options | BIP_COMMON
    if data == "imagenet":
        own |= {"arch": "resnet18", "data_set": "imagefolder", "train_batch_size": 200, "lr": 0.01}
        own |= BIP_IMAGENET[phase]
    comments = [
        f"published: {BIP_DATA[data]}",
        "time: not measured here; benchmarks/cifar10_bip.py is a short form",
    ]
    weights = f"experiments/{data}_{before}/checkpoint/final.pt" if before else None
    return Recipe("bip", f"{data}_{phase}", comments, own, weights)


def published_resrep(name: str) -> Recipe:
    said, weights, options = RESREP[name]
    comments = [f"published: {said}", "time: not measured here; benchmarks/cifar10_resrep.py is a short form"]
    return Recipe("resrep", name, comments, options, weights)


def published_swp(name: str) -> Recipe:
    said, sr, threshold = SWP[name]
    data = next(data for data in ("cifar100", "cifar10", "imagenet") if data in name)
    options = {"arch": name.partition(f"_{data}")[0], "data_set": data.replace("imagenet", "imagefolder")}
    options |= {"conv_type": "stripe", "sr": sr, "threshold": threshold}
    comments = [f"published: {said}", "time: not measured here; benchmarks/cifar10_swp.py is a short form"]
    return Recipe("swp", name, comments, options | (SWP_IMAGENET if data == "imagenet" else SWP_CIFAR), None)


RECIPES = [published_1xn(arch, pattern) for arch, rows in PUBLISHED.items() for pattern in rows]
RECIPES += [twin(arch, pattern) for arch in TWINS for pattern in TWIN_PATTERNS]
RECIPES += [
    published_bip(data, phase) for data in BIP_DATA for phase in (BIP_IMAGENET if data == "imagenet" else BIP_PHASES)
]
RECIPES += [published_resrep(name) for name in RESREP]
RECIPES += [published_swp(name) for name in SWP]


def drift() -> dict[str, list[str]]:
    """Files that are not as the table has them, by what is wrong."""
    texts = {str(recipe.path): recipe.text() for recipe in RECIPES}
    folders = {ROOT / recipe.path.parent for recipe in RECIPES}
    found = {str(path.relative_to(ROOT)) for folder in folders for path in folder.glob("*.y*ml")}
    return {
        "different": [path for path in texts if path in found and (ROOT / path).read_text() != texts[path]],
        "missing": [path for path in texts if path not in found],
        "superfluous": sorted(found - texts.keys()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a file is not as it should be")
    if not parser.parse_args().check:
        for recipe in RECIPES:
            save_text(ROOT / recipe.path, recipe.text())
    wrong = "; ".join(f"{what}: {', '.join(paths)}" for what, paths in drift().items() if paths)
    if wrong:  # after writing, only superfluous files are left: they may be someone's, so none is deleted
        print(f"configs/generate.py: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
