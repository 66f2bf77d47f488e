"""Networks of torchvision, of timm, and of the user's own Python files, by one name each.

- `torchvision/regnet_y_400mf`, `timm/mobilenetv4_conv_small`: as the library calls them.
- `my_network.py:build`, `package.module:function`: a function that takes `num_classes` and returns a network.

Importing this module imports neither torch nor a library, so that names are checked while the command line is read.
"""

import difflib
import functools
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils import machine
from utils.options import PUBLISHED

if TYPE_CHECKING:
    from torch import Tensor, nn

LIBRARIES = ("timm", "torchvision")

# These train through auxiliary classifiers and then return several outputs, where the logits alone are wanted.
DEFAULTS = {
    "torchvision/googlenet": {"aux_logits": False, "init_weights": False},
    "torchvision/inception_v3": {"aux_logits": False, "init_weights": False},
}
# Options of the libraries that load files or download: that is the business of --pretrained_model.
REFUSED = ("pretrained", "weights", "weights_backbone", "checkpoint_path", "cache_dir", "hub_id")


def of_library(name: str) -> bool:
    """Whether `name` is a network of torchvision or timm: `timm/...`, `torchvision/...`."""
    return name.partition("/")[0] in LIBRARIES and name.count("/") == 1 and not name.endswith("/")


def of_function(name: str) -> bool:
    """Whether `name` names a function that builds the network: `FILE.py:FUNCTION` or `package.module:FUNCTION`."""
    return ":" in name


def check_function(name: str) -> None:
    """Raise ValueError if the file of `FILE.py:FUNCTION` does not exist, or a part of the name is missing."""
    place, _, function = name.rpartition(":")
    if not place or not function.isidentifier():
        raise ValueError(f"--arch {name}: must be FILE.py:FUNCTION or package.module:FUNCTION")
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"--arch {name}: there is no file {place}")


def build(name: str, num_classes: int, options: dict[str, object]) -> "nn.Module":
    """The network called `name`, with fresh weights.

    Args:
        options: further arguments of the library's or the user's function.

    Raises:
        ValueError: the library is not installed, it has no such network, or the function fails.
    """
    from torch import nn

    arguments = DEFAULTS.get(name, {}) | options | {"num_classes": num_classes}
    network = _called(name, _maker(name, options), arguments)
    if not isinstance(network, nn.Module):
        raise ValueError(f"--arch {name}: returns a {type(network).__name__}, not a torch.nn.Module")
    return network


def published(name: str | None, options: dict[str, object]) -> dict[str, "Tensor"]:
    """The `state_dict` that the library publishes for its network. It downloads it, or finds it where it keeps files.

    Raises:
        ValueError: the network is of no library, there are no published weights, or they cannot be downloaded.
    """
    if name is None or not of_library(name):
        raise ValueError(f"--pretrained_model {PUBLISHED}: exists for timm/NAME and torchvision/NAME only, not {name}")
    library, _, own = name.partition("/")
    make = _maker(name, options)
    try:
        if library == "timm":
            return make(pretrained=True, **options).state_dict()
        return _torchvision().get_model_weights(own).DEFAULT.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # each library, and each way of having no network, raises errors of its own
        raise ValueError(
            f"--pretrained_model {PUBLISHED}: {library} could not download the weights of {own} "
            f"({_first_line(error)}): on a machine without a network, give their file (.pth, .safetensors)"
        ) from None


def preprocessing(name: str) -> dict[str, object]:
    """How the network's library prepares pictures: `mean`, `std`, `interpolation` and `crop`; empty if it says nothing.

    `crop` is the side of the centre crop, divided by the shorter side of the resized picture.
    """
    if not of_library(name):
        return {}
    library, _, own = name.partition("/")
    if library == "timm":
        config = _timm().get_pretrained_cfg(own, allow_unregistered=False)
        if config is None:
            return {}
        said = {"interpolation": config.interpolation, "crop": config.crop_pct, "mean": config.mean, "std": config.std}
    else:
        try:
            preset = _torchvision().get_model_weights(own).DEFAULT.transforms()
        except ValueError:  # of a network without published weights
            return {}
        crop = preset.crop_size[0] / preset.resize_size[0]
        said = {"interpolation": preset.interpolation.value, "crop": crop, "mean": preset.mean, "std": preset.std}
    return said | {"mean": list(said["mean"]), "std": list(said["std"])}


def version(name: str) -> str:
    """The library of a network and its version, "timm 1.0.31"; empty for a user's function."""
    library = name.partition("/")[0]
    return f"{library} {machine.versions((library,))[library]}" if of_library(name) else ""


def _maker(name: str, options: dict[str, object]) -> Callable:
    """The function that makes the network. Raises ValueError if there is none, or an option is refused."""
    if not of_library(name):
        return _function(name)
    library, _, own = name.partition("/")
    for option in options:
        if option.startswith(REFUSED):
            raise ValueError(f"--arch_options {option}: weights come from --pretrained_model FILE or {PUBLISHED}")
    if library == "timm":
        timm = _timm()
        known, base = timm.list_models(), own.partition(".")[0]
        if base in known:
            return functools.partial(timm.create_model, own)
    else:
        models = _torchvision()
        known = models.list_models(module=models)  # those that classify
        if own in known:
            return functools.partial(models.get_model, own)
        base = own
    close = difflib.get_close_matches(base, known, 4, 0.4) or known[:4]
    raise ValueError(f"--arch {name}: {library} has {len(known)} networks, but not this one; close: {', '.join(close)}")


def _timm():
    try:
        import timm
    except ImportError:
        raise ValueError("--arch timm/...: timm is not installed: pip install timm") from None
    return timm


def _torchvision():
    import torchvision

    return torchvision.models


def _function(name: str) -> Callable:
    place, _, function = name.rpartition(":")
    check_function(name)
    try:
        module = _module_of_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"--arch {name}: cannot be imported: {_where(error)}") from None
    if not callable(made := getattr(module, function, None)):
        raise ValueError(f"--arch {name}: {place} has no function {function}")
    return made


@functools.cache  # a file is run once, so that its classes stay the same classes
def _module_of_file(path: Path):
    spec = importlib.util.spec_from_file_location(f"network_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))  # it may import files beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _called(name: str, make: Callable, arguments: dict[str, object]):
    try:
        return make(**arguments)
    except Exception as error:  # libraries raise any type for an option that they do not know
        said = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ValueError(f"--arch {name} with {said}: {_where(error)}") from None


def _where(error: Exception) -> str:
    """The error in one line, with the place in the file where it happened."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {_first_line(error)} ({Path(last.filename).name}, line {last.lineno})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
