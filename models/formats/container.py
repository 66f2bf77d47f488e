"""The dictionary in a file, whoever wrote it, read without running any code that the file may hold."""

import os
import re
import warnings

import numpy as np
import torch

HDF5 = b"\x89HDF\r\n\x1a\n"  # how such a file begins


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The dictionary in the file, its tensors on the CPU.

    Raises:
        ValueError: no such file, a broken one, one that needs code to be rebuilt, or no dictionary in it.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(HDF5))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not head:
        raise ValueError(f"{path}: is empty")
    return read_hdf5(path) if head == HDF5 else read_torch(path)


def read_torch(path: str | os.PathLike) -> dict:
    """What `torch.save` wrote."""
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises a dozen types: RuntimeError, KeyError, EOFError, OSError, ...
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"holds {foreign[1]}, which only code could rebuild" if foreign else "truncated, or no checkpoint"
        raise ValueError(f"{path}: {reason} (code in a checkpoint is never run)") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary")
    return content


def read_hdf5(path: str | os.PathLike) -> dict:
    """A flat file of one data set a tensor. ResRep's files also have `deps`, the widths of all convolutions."""
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: an .hdf5 file needs h5py: pip install h5py") from None
    try:
        with h5py.File(path) as file:
            arrays = {name: torch.from_numpy(np.asarray(array)) for name, array in file.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: truncated, or no flat file of tensors ({str(error).splitlines()[0]})") from None
    deps = arrays.pop("deps", None)
    return {"state_dict": arrays} | ({} if deps is None else {"deps": deps.tolist()})
