"""Read the dictionary in a checkpoint's file. No code in the file is run, and a damaged file is refused."""

import argparse
import os
import pathlib
import re
import stat
import types
import warnings
import zipfile

import numpy as np
import torch

HDF5 = b"\x89HDF\r\n\x1a\n"  # how such a file begins
SAFETENSORS = ".safetensors"  # how such a file is called
MOST_NUMBERS = 1 << 28  # in one tensor that a file describes in fewer bytes than it has: none is larger
_SCALAR, _ARRAY = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]  # what NumPy rebuilds its values with
HARMLESS = [  # classes that only hold values: other trainers store their options and figures in them
    argparse.Namespace,
    types.SimpleNamespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),  # as Python 3.13 writes it
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU"),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # NumPy 1's name, and NumPy 2's
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def read_checkpoint(path: str | os.PathLike, needs: tuple[str, ...] = ()) -> dict:
    """The dictionary in the file, its tensors on the CPU.

    Args:
        needs: keys that must be in it, for what is more than a network: a run to resume.

    Raises:
        ValueError: no such file, a damaged one, one that needs code to be rebuilt, no dictionary in it, or one that
            lacks one of `needs`.
    """
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise ValueError(f"{path}: is no regular file")
        with open(path, "rb") as file:
            head = file.read(len(HDF5))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not head:
        raise ValueError(f"{path}: is empty")
    if head == HDF5:
        content = read_hdf5(path)
    elif str(path).endswith(SAFETENSORS):
        content = read_safetensors(path)
    else:
        content = read_torch(path)
    lacking = [key for key in needs if key not in content]
    if lacking:
        raise ValueError(f"{path}: no run to resume: it has no {', '.join(lacking)}")
    return content


def read_torch(path: str | os.PathLike) -> dict:
    """What `torch.save` wrote."""
    check_records(path)
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises a dozen types: RuntimeError, KeyError, EOFError, OSError, ...
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"holds {foreign[1]}, which only code could rebuild" if foreign else "truncated, or no checkpoint"
        if "TorchScript" in str(error):
            reason = "is a TorchScript program, not a state_dict"
        raise ValueError(f"{path}: {reason} (code in a checkpoint is never run)") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary")
    return content


def check_records(path: str | os.PathLike) -> None:
    """Hold every record of a zip file against its checksum, which `torch.load` does not do.

    Files before PyTorch 1.6 are no zip files and have no checksums. A checksum of 0 was not computed.

    Raises:
        ValueError: a record is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    record = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                record = info.filename
                if info.file_size > max(info.compress_size, os.path.getsize(path)):
                    raise ValueError(f"it declares {info.file_size} bytes")
                with archive.open(info) as file:
                    while info.CRC and file.read(1 << 22):
                        pass  # the end of a record is where its checksum is compared
    except Exception as error:  # as for `torch.load`
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: damaged: record {record or 'list'}: {reason}") from None


def read_safetensors(path: str | os.PathLike) -> dict:
    """A file of tensors without any code in it; it says nothing about its network."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path}: a {SAFETENSORS} file needs safetensors: pip install safetensors") from None
    try:
        return dict(load_file(path))
    except Exception as error:  # as for `torch.load`
        raise ValueError(f"{path}: truncated, or no file of safetensors ({str(error).splitlines()[0]})") from None


def read_hdf5(path: str | os.PathLike) -> dict:
    """A file with one data set for each tensor. In ResRep's there is also `deps`: the widths of all convolutions."""
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: an .hdf5 file needs h5py: pip install h5py") from None
    try:
        with h5py.File(path) as file:
            large = [name for name, array in file.items() if array.size > MOST_NUMBERS]
            arrays = {name: torch.from_numpy(np.asarray(array)) for name, array in file.items() if not large}
    except Exception as error:  # as for `torch.load`
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: truncated, or no flat file of tensors ({reason})") from None
    if large:
        raise ValueError(f"{path}: {large[0]} is too large for a network's tensor")
    deps = arrays.pop("deps", None)
    return {"state_dict": arrays} | ({} if deps is None else {"deps": deps.tolist()})
