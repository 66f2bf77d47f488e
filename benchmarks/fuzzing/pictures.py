"""Damaged pictures, and LMDB files of them."""

import io
import pickle
from random import Random

import numpy as np

from benchmarks.fuzzing import mutations
from benchmarks.fuzzing.kind import Kind, Wrong


class Pictures(Kind):
    """Encoded pictures of every format and mode, with damaged bytes."""

    def prepare(self) -> None:
        from PIL import Image

        from data.folder import Encoded, decode

        random = np.random.default_rng(0)
        colours = Image.fromarray(random.integers(0, 256, (24, 30, 3), np.uint8).repeat(4, 0).repeat(4, 1))
        deep = Image.fromarray(random.integers(0, 65536, (24, 30)).astype(np.uint16))
        made = {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "L", "P", "1", "RGBA", "LA"], "GIF": ["P", "L"]}
        made |= {
            "TIFF": ["RGB", "L", "1", "CMYK", "RGBA"],
            "BMP": ["RGB", "L"],
            "WEBP": ["RGB", "RGBA"],
            "PPM": ["RGB"],
        }
        pairs = [(form, colours.convert(mode)) for form, modes in made.items() for mode in modes]
        pairs += [(form, deep) for form in ("PNG", "TIFF", "PPM")]
        self.files = []
        for form, picture in pairs:
            buffer = io.BytesIO()
            options = {"progressive": True} if form == "JPEG" and picture.mode == "L" else {}
            picture.save(buffer, form, **options)
            self.files.append((f"{form} {picture.mode}", buffer.getvalue()))
        decode(Encoded("whole", self.files[0][1]))  # what is imported then counts for no input

    def damage(self, random: Random) -> str:
        self.source, content = random.choice(self.files)
        self.content, note = mutations.damaged_bytes(content, random, head=64)
        self.original = content
        return f"{self.source}: {note}"

    def read(self) -> str:
        import torch

        from data.folder import Encoded, decode

        picture = decode(Encoded("damaged", self.content))
        if picture.dtype != torch.uint8 or picture.dim() != 3 or len(picture) != 3 or not picture.numel():
            raise Wrong(f"a picture is {picture.dtype} {tuple(picture.shape)}")
        if torch.equal(picture, decode(Encoded("whole", self.original))):
            return "every pixel equals the original's"
        form = self.source.split()[0]
        if form == "PNG":
            raise Wrong("some pixels differ, although a PNG has checksums")
        return f"some pixels differ: a {form} has no checksums"


class Records(Kind):
    """LMDB files, with damaged bytes, and with records that hold something else."""

    together = 10

    def prepare(self) -> None:
        pictures = Pictures(self.folder)
        names = [source for source, _ in pictures.files]
        chosen = [pictures.files[names.index(name)][1] for name in ("JPEG RGB", "PNG L", "GIF P")]
        self.records = {str(n).encode(): (content, n % 2) for n, content in enumerate(chosen)}
        self.path = self.folder / "damaged.lmdb"
        self._write({key: pickle.dumps(value) for key, value in self._all().items()})
        self.good = self.path.read_bytes()

    def _all(self) -> dict:
        return self.records | {b"__keys__": list(self.records), b"__len__": len(self.records)}

    def _write(self, content: dict[bytes, bytes]) -> None:
        import lmdb

        self.path.unlink(missing_ok=True)
        how = {"subdir": False, "map_size": 10**7, "lock": False}
        with lmdb.open(str(self.path), **how) as environment, environment.begin(write=True) as put:
            for key, value in content.items():
                put.put(key, value)

    def damage(self, random: Random) -> str:
        if random.random() < 0.4:
            content, note = mutations.damaged_bytes(self.good, random, head=8192)
            self.path.write_bytes(content)
            return f"file: {note}"
        key = random.choice(sorted(self._all()))
        if random.random() < 0.5:
            value, note = mutations.damaged_bytes(pickle.dumps(self._all()[key]), random, head=32)
        else:
            value = mutations.odd(random)
            note, value = f"{value!r:.50}", pickle.dumps(value)
        self._write({k: pickle.dumps(v) for k, v in self._all().items()} | {key: value})
        return f"{key!r}: {note}"

    def read(self) -> str:
        from data import records
        from data.folder import decode

        found = records.Records(self.path, 2)
        got = [found[number] for number in range(len(found))]
        for picture, _ in got:
            decode(picture)
        if [(picture.content, label) for picture, label in got] == list(self.records.values()):
            return "every record equals the original's"
        if [label for _, label in got] != [label for _, label in self.records.values()]:
            return "another label or number of records, within what the file may hold: LMDB has no checksums"
        return "other pictures, which decode: LMDB has no checksums"
