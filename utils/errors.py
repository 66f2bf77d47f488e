"""What went wrong, in one line: for a user's mistakes, for the machine's troubles and for exceptions of libraries.

A bug of this program is not among them: it shows its traceback. Needs no torch.
"""

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from utils.files import unwritable

LIBRARIES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "tvm",
    "tvm_ffi",
    "openvino",
    "nncf",
    "nvidia",
)
GO_ON = "--resume goes on from the last checkpoint"
LONGEST = 400  # characters of a library's message
# What gloo and NCCL say when the other side of a connection is gone.
LOST = (
    "Gloo connectFullMesh failed",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL Error",
    "ncclRemoteError",
)


def answer(program: str, main: Callable[[], int | None]) -> int:
    """The exit status of `main`: what it returns, 130 after Ctrl-C, and after an error that one line explains its
    `status`, or 2.

    The line goes to stderr. A bug of ours is raised again.
    """
    try:
        return main() or 0
    except KeyboardInterrupt:
        line, status = "stopped by Ctrl-C", 130
    except Exception as error:
        line, status = in_one_line(error), getattr(error, "status", 2)
        if line is None:
            raise
    print(f"{program}: {line}", file=sys.stderr)
    return status


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until this block has ended.

    Libraries that are imported in it would swallow the interrupt and be broken afterwards, as torch does with NumPy's.
    """
    if threading.current_thread() is not threading.main_thread():  # no signal reaches it
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def in_one_line(error: Exception) -> str | None:
    """What to tell the user in place of a traceback; None if `error` may be a bug of this program."""
    text = _line(str(error))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    library = _library(error)
    if isinstance(error, ValueError | OSError) and not library:
        return text
    if unwritable(error):
        return f"{unwritable(error)} ({text})"
    if "DataLoader worker" in text:
        return f"a process that decodes pictures has died; {GO_ON}; fewer --workers need less memory ({text})"
    if type(error).__name__ == "OutOfMemoryError":
        return f"the GPU's memory is full: a smaller batch needs less; {GO_ON} ({text})"
    if any(sign in text for sign in LOST):
        return f"another process of this run was lost; {GO_ON} ({text.split('. ')[0]})"
    if library:
        first = _first(error)
        layer = _layer(first) or _layer(error)
        return f"{f'layer {layer}: ' if layer else ''}{library} says: {_line(str(first))}"
    return None


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _first(error: BaseException) -> BaseException:
    """The error at the start of the chain of causes: exporters wrap it in advice of many lines."""
    while error.__cause__:
        error = error.__cause__
    return error


def _library(error: Exception) -> str | None:
    """The library that raised `error`: it is of a class of its own, or a RuntimeError from within its code."""
    for cls in type(error).__mro__:
        if cls.__module__.split(".")[0] in LIBRARIES:
            return cls.__module__.split(".")[0]
    if not isinstance(error, RuntimeError):
        return None
    *_, last = _frames(error)
    name = last.f_globals.get("__name__", "").split(".")[0]
    return name if name in LIBRARIES else None


def _layer(error: BaseException) -> str | None:
    """The name of the innermost layer of a network that was computing when `error` was raised."""
    torch = sys.modules.get("torch")
    modules = [frame.f_locals.get("self") for frame in _frames(error)] if torch else []
    modules = [module for module in modules if torch and isinstance(module, torch.nn.Module)]
    if not modules:
        return None
    names = {id(module): name for network in modules for name, module in network.named_modules()}
    names |= {id(module): name for name, module in modules[0].named_modules()}  # as the whole network calls it
    return names[id(modules[-1])] or None


def _frames(error: BaseException) -> Iterator:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))
