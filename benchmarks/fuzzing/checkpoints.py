"""Damaged checkpoints: their bytes, and what they hold."""

import copy
from random import Random

from benchmarks.fuzzing import mutations
from benchmarks.fuzzing.kind import Kind, Wrong


class Checkpoints(Kind):
    """Networks in the formats of this program, of older PyTorch and of ResRep, with damaged bytes."""

    one_line = False

    def prepare(self) -> None:
        import h5py
        import torch

        import models

        self.network = models.create_model("resnet20", 10)
        self.good = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        own, plain, old, hdf5 = (self.folder / name for name in ("own.pt", "plain.pt", "old.pt", "flat.hdf5"))
        facts = {"epoch": 3, "best_prec1": 91.5, "classes": [*"abcdefghij"], "kept": {}, "accuracy": {"dense": 90.0}}
        self.facts = models.describe(self.network, options={"lr": 0.1, "N": 4}, **facts)
        models.save_checkpoint(own, self.network, **facts)
        torch.save({"state_dict": self.good, "epoch": 3}, plain)
        torch.save(self.good, old, _use_new_zipfile_serialization=False)
        with h5py.File(hdf5, "w") as file:
            for name, tensor in self.good.items():
                file[name] = tensor.numpy()
        self.files = {path: path.read_bytes() for path in (own, plain, old, hdf5)}
        self.path = self.folder / "damaged"
        self.path.write_bytes(self.files[own])
        self.load()  # what is imported then counts for no input

    def damage(self, random: Random) -> str:
        self.source = random.choice(sorted(self.files))
        content, note = mutations.damaged_bytes(self.files[self.source], random, head=4096)
        self.path.write_bytes(content)
        return f"{self.source.name}: {note}"

    def load(self) -> tuple[dict, dict]:
        """What the file says about itself, and the tensors that the network then has."""
        import models

        network = copy.deepcopy(self.network)
        for parameter in network.parameters():
            parameter.data.fill_(0.25)  # what the file does not fill would be seen
        info = models.load_checkpoint(network, self.path)
        return info, network.state_dict()

    def differing(self, loaded: dict, expected: dict) -> list[str]:
        """Names of tensors that are not as expected; counters of batches do not count."""
        names = [name for name in {**expected, **loaded} if not name.endswith("num_batches_tracked")]
        return [n for n in names if n not in loaded or n not in expected or not _same(loaded[n], expected[n])]

    def read(self) -> str:
        _, loaded = self.load()
        differing = self.differing(loaded, self.good)
        if not differing:
            return "every tensor equals the original's"
        if self.source.name in ("own.pt", "plain.pt"):
            raise Wrong(f"{differing[0]} is another, although the file has checksums")
        return "some weights differ: a file of this format has no checksums"


class CheckpointContents(Checkpoints):
    """Checkpoints that are whole, and hold odd tensors, facts and containers."""

    def damage(self, random: Random) -> str:
        import torch

        tensors, facts, note = dict(self.good), copy.deepcopy(self.facts), ""
        if random.random() < 0.6:
            tensors, note = mutations.damaged_tensors(tensors, random)
        if not note or random.random() < 0.2:
            facts, further = mutations.damaged_tree(facts, random)
            note = f"{note} {further}".strip()
        key = random.choice(["state_dict"] * 6 + ["model", "net", "model_ema", "module", "x"])
        content = {**facts, key: tensors} if isinstance(facts, dict) and random.random() < 0.85 else tensors
        if random.random() < 0.1:
            content = random.choice(
                [{"model": content}, {"state_dict": content}, [content], {"net": {"model": content}}]
            )
        self.tensors = tensors
        torch.save(content, self.path)
        return note

    def read(self) -> str:
        import torch

        _, loaded = self.load()
        expected, folded = dict(self.good), []
        for name, tensor in self.tensors.items():
            name = name.removeprefix("module.")
            if name in expected:
                ours, tensor = expected[name], torch.as_tensor(tensor).detach()
                tensor = tensor.to_dense() if tensor.is_sparse else tensor
                expected[name] = tensor.to(ours.dtype).reshape(ours.shape)
            elif name not in loaded:
                folded.append(name)
        differing = self.differing(loaded, expected)
        if differing and not any(self.explains(name, differing) for name in folded):
            raise Wrong(f"{differing[0]} is not what the file holds")
        if differing or folded:
            return "it also holds what a pruning method keeps beside the weights"
        return "every tensor is the file's, in the network's type and shape"

    def explains(self, name: str, differing: list[str]) -> bool:
        """Whether a method's tensor changes these: scales are multiplied into a weight, compactors merged."""
        _, _, end = name.rpartition(".")
        if end == "mask" and not ((self.tensors[name] == 0) | (self.tensors[name] == 1)).all():
            raise Wrong(f"{name} is multiplied into the weight, but is no mask of zeros and ones")
        return end in ("mask", "FilterSkeleton", "weight_orig") or "compactor" in name


def _same(a, b) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
