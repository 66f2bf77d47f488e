"""Kinds of inputs, and how each is damaged and read."""

from benchmarks.fuzzing.checkpoints import CheckpointContents, Checkpoints
from benchmarks.fuzzing.kind import Kind, Wrong
from benchmarks.fuzzing.libraries import Libraries, TuneFiles
from benchmarks.fuzzing.networks import CompiledNetworks, Networks
from benchmarks.fuzzing.pictures import Pictures, Records
from benchmarks.fuzzing.words import CommandLines, Recipes, TuneCommandLines

__all__ = ["KINDS", "Kind", "Wrong"]

KINDS = {
    "checkpoint files": Checkpoints,
    "checkpoint contents": CheckpointContents,
    "recipes": Recipes,
    "command lines": CommandLines,
    "command lines of model_tune": TuneCommandLines,
    "pictures": Pictures,
    "LMDB records": Records,
    "ONNX files": Networks,
    "ONNX files, compiled": CompiledNetworks,
    "saved libraries": Libraries,
    "tune files": TuneFiles,
}
