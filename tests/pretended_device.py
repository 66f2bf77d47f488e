"""A pretended GPU, so that the CUDA path is walked on machines that have none.

Inside `with PretendedGPU() as gpu:` device "cuda" works. Its tensors (`DeviceTensor`) say that they are there, hold
their numbers in the CPU's memory, and as on a GPU

- do not mix with tensors of the CPU: RuntimeError;
- make the host wait where it asks for a value or copies without need: noted in `gpu.waits`, by the place in our code;
- are computed by operators, each of which has to be launched: counted in `gpu.operators`.

A copy to the CPU that was not waited for holds NaN (integers: -1) until an event or another wait lets it arrive.
"""

import collections
import contextlib
import sys
import threading
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda", 0)

aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy, aten._foreach_copy_}
INDEXED = {aten.index, aten.index_put_, aten._index_put_impl_}  # by a mask, or by indices that may be the CPU's
# Operators whose result, or its size, the host has to read.
READ = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount, aten.repeat_interleave}
READ |= {aten._unique2, aten.unique_dim, aten.unique_consecutive}


class DeviceTensor(Tensor):
    """A tensor on the pretended GPU; `numbers` is the real one."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, numbers: Tensor):
        tensor = Tensor._make_subclass(cls, numbers.detach(), numbers.requires_grad)
        tensor.numbers = numbers.detach()
        return tensor

    def __deepcopy__(self, memo: dict):
        if id(self) not in memo:
            copied = DeviceTensor(self.numbers.clone()).requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)  # as torch marks parameters of a type of their own
            memo[id(self)] = copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        operator, everything = func.overloadpacket, (args, kwargs or {})
        tensors = [leaf for leaf in tree_leaves(everything) if isinstance(leaf, Tensor)]
        here = {id(tensor.numbers): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
        elsewhere = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
        mixes = operator in COPIES or (operator in INDEXED and isinstance(args[0], DeviceTensor))
        if not mixes and any(tensor.dim() for tensor in elsewhere):  # a single number of the CPU is an argument
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} got cuda:0 and cpu")
        gpu = PretendedGPU.current
        by_mask = operator in INDEXED and any(map(_is_mask, args[1]))
        if operator in READ or by_mask or (mixes and elsewhere):
            gpu.wait(str(operator))
        gpu.operators += not func.is_view
        args, kwargs = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, DeviceTensor) else leaf, everything)
        results = func(*args, **kwargs)
        return tree_map(lambda leaf: here[id(leaf)] if id(leaf) in here else _on_device(leaf), results)


def _is_mask(index) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


def _on_device(leaf):
    return DeviceTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor) else leaf


class PretendedGPU(TorchFunctionMode):
    """Makes "cuda" a device while it is entered.

    Attributes:
        waits: place ("utils/run.py check_finite") and what it asked for -> how often the host waited for the device.
        operators: how many were launched.
    """

    current: "PretendedGPU"

    def __init__(self, count: int = 1):
        super().__init__()
        self.count = count
        self.reset()
        self.arriving: list[tuple[Tensor, Tensor]] = []  # copies under way: where to, what

    def reset(self) -> None:
        self.waits, self.operators = collections.Counter(), 0

    def wait(self, what: str) -> None:
        """The host waits: what was launched before is done then."""
        self.waits[f"{_place()}: {what}"] += 1
        for copy, numbers in self.arriving:
            copy.copy_(numbers)
        self.arriving.clear()

    def __enter__(self):
        PretendedGPU.current = self
        thread = threading.local()  # each has a current device of its own
        known = {
            "is_available": lambda: True,
            "device_count": lambda: self.count,
            "get_device_name": lambda *_: "pretended",
            "set_device": lambda device: setattr(thread, "device", getattr(device, "index", device)),
            "current_device": lambda: getattr(thread, "device", 0),
            "is_bf16_supported": lambda *_: True,
            "is_current_stream_capturing": lambda: False,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None,
            "Event": Event,
            "_lazy_init": lambda: None,
        }
        with contextlib.ExitStack() as patches:
            for name, value in known.items():
                patches.enter_context(mock.patch.object(torch.cuda, name, value))
            patches.enter_context(mock.patch.object(torch, "autocast", Autocast))
            # Modules replace their parameters when they move, since one cannot become a tensor of another type.
            overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
            patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            self.patches = patches.pop_all()
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.close()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        there = isinstance(first, DeviceTensor)
        if isinstance(first, Tensor) and name in ("to", "cpu", "cuda"):
            where = {"cpu": [torch.device("cpu")], "cuda": [DEVICE]}.get(name, [])
            return self.move(first, *where, *args[1:], **kwargs)
        if there and func is Tensor.data.__get__:
            return first.detach()
        if there and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if there and name == "tolist":
            self.wait(name)
            return first.numbers.tolist()
        if there and name in ("__getitem__", "__setitem__") and isinstance(args[1], list):
            self.wait("a list as indices")
            args = (first, DeviceTensor(torch.tensor(args[1], dtype=torch.long)), *args[2:])
        if there and name == "__setitem__" and isinstance(args[2], int | float) and _is_mask(args[1]):
            self.wait("masked __setitem__")  # the CPU fills without asking where; a GPU's kernel needs indices
        made_here = torch.device(kwargs.get("device") or "cpu").type == "cuda" or (there and name == "new_tensor")
        if made_here:
            kwargs["device"] = "cpu"
            if name in ("tensor", "as_tensor", "new_tensor"):
                self.wait(name)
        result = func(*args, **kwargs)
        return _on_device(result) if made_here else result

    def move(self, tensor: Tensor, *args, **kwargs) -> Tensor:
        """`Tensor.to`, between the devices."""
        args = [part for arg in args for part in ((arg.device, arg.dtype) if isinstance(arg, Tensor) else (arg,))]
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        form = {"dtype": dtype, "memory_format": memory_format}
        form = {name: value for name, value in form.items() if value is not None}
        there = isinstance(tensor, DeviceTensor)
        goes_there = device.type == "cuda" if device else there
        if there == goes_there:
            return Tensor.to(tensor, **form)
        if goes_there:
            if not (non_blocking and tensor.is_pinned()):
                self.wait("copy to the GPU")
            return DeviceTensor(tensor.to(**form))
        numbers = tensor.numbers.to(**form).clone()
        if not non_blocking:
            self.wait("copy from the GPU")
            return numbers
        copy = torch.full_like(numbers, torch.nan if numbers.is_floating_point() else -1)
        self.arriving.append((copy, numbers))
        return copy


class Event:
    """`torch.cuda.Event`."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        PretendedGPU.current.wait("event")


class Autocast(torch.autocast):
    """`torch.autocast` that acts on the numbers, which are the CPU's."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__(device_type.replace("cuda", "cpu"), *args, **kwargs)


def _place() -> str:
    """The innermost function of our own code, tests left out: "file function"."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
        if not path.startswith(("/", "<", ".", "tests/")):  # what is installed may lie in .venv
            return f"{path} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
