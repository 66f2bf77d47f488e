"""Damaged folders of saved libraries, and files of measured kernels."""

import json
import shutil
from random import Random

import numpy as np

from benchmarks.fuzzing import mutations
from benchmarks.fuzzing.kind import Kind, Wrong
from benchmarks.fuzzing.networks import images, onnxruntime_of, small_networks


class Libraries(Kind):
    """Folders of compiled networks with damaged files, loaded and run."""

    together, seconds = 1, 20.0

    def prepare(self) -> None:
        import onnx

        import deploy

        self.good, self.path = self.folder / "good", self.folder / "damaged"
        onnx.save(small_networks()[0], str(self.folder / "model.onnx"))
        library = deploy.compile_onnx(self.folder / "model.onnx", threads=1)
        library.save(self.good)
        self.shape = library.info["input"]["shape"]
        self.expected = onnxruntime_of(self.folder / "model.onnx")

    def damage(self, random: Random) -> str:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.good, self.path)
        file = random.choice(sorted(path for path in self.path.iterdir() if path.is_file()))
        if file.suffix == ".json" and random.random() < 0.7:
            tree, note = mutations.damaged_tree(json.loads(file.read_text()), random)
            file.write_text(json.dumps(tree))
        elif random.random() < 0.05:
            note = "gone"
            file.unlink()
        else:
            content, note = mutations.damaged_bytes(file.read_bytes(), random)
            file.write_bytes(content)
        return f"{file.name}: {note}"

    def read(self) -> str:
        import deploy

        logits = deploy.load(self.path).run(images(self.shape))
        if not np.abs(logits - self.expected).max() <= 1e-4 * np.abs(self.expected).max():
            raise Wrong("the logits are others")
        return "the logits are right"


class TuneFiles(Kind):
    """Files of measured kernels, with damaged bytes and values."""

    def prepare(self) -> None:
        from dataclasses import replace

        from deploy import targets
        from deploy.tuning import tune

        self.path = self.folder / "damaged.json"
        self.machine = replace(targets.find_machine("native"), threads=1)
        self.path.unlink(missing_ok=True)
        times = tune.Times(self.path, self.machine)
        facts = {"family": "nchw_conv", "x": [1, 8, 8, 8], "stride": [1, 1]}
        self.good = times.state | {
            "gigahertz": 3.0,
            "times_ms": {json.dumps(facts | {"tile": n}): 0.5 for n in range(3)},
        }

    def damage(self, random: Random) -> str:
        if random.random() < 0.5:
            content, note = mutations.damaged_bytes(json.dumps(self.good, indent=1).encode(), random)
        else:
            tree, note = mutations.damaged_tree(self.good, random)
            content = json.dumps(tree).encode()
        self.path.write_bytes(content)
        return note

    def read(self) -> str:
        from deploy.tuning import tune

        state = tune.Times(self.path, self.machine).state
        numbers = [state["gigahertz"], *state["times_ms"].values()]
        if not all(0 < n < np.inf and not isinstance(n, bool) for n in numbers):
            raise Wrong("a time is no positive number")
        return "its times are positive; what was measured, only the file knows"
