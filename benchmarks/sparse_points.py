"""What `benchmarks/sparse_inference.py` measures: points of sparsity and type, their targets, and ratios to peers.

An entry is a network at an image size with a number of threads: `peers` (milliseconds of each on the dense network,
median and p10), `peer_facts` (the type that each computes in, or why it is absent), `builds` (by point: our
milliseconds, what was proven and counted, and `peers` that make use of zero blocks), `absent` (by type: why there are
no builds in it), `peak_gflops` of float32, and how it was measured.
"""

from typing import NamedTuple

from deploy.peers import PEERS


class Point(NamedTuple):
    """Blocks of N rows, `rate` per cent of them pruned, and a type; written N:rate or N:rate:type. Dense: 0:0."""

    N: int
    rate: int
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> "Point":
        N, rate, *dtype = text.split(":")
        return cls(int(N), int(rate), *dtype)

    def __str__(self) -> str:
        return f"{self.N}:{self.rate}" + (f":{self.dtype}" if self.dtype != "float32" else "")

    @property
    def blocks(self) -> str:
        return f"N={self.N}, {self.rate} %" if self.N else "dense"

    @property
    def label(self) -> str:
        return self.blocks + (f", {self.dtype}" if self.dtype != "float32" else "")


DENSE = Point(0, 0)
POINTS = [Point(4, 50), Point(16, 50), Point(32, 50), Point(16, 75), Point(32, 75), Point(32, 90)]
# Times as fast as the fastest dense peer of the same type, at POINTS.
TARGETS = {
    "mobilenet_v1": (1.5, 1.7, 1.9, 2.8, 3.3, 5.5),
    "mobilenet_v2": (1.4, 1.6, 1.7, 2.3, 2.6, 3.5),
    "mobilenet_v3_large": (1.4, 1.6, 1.7, 2.2, 2.4, 3.0),
    "resnet50": (1.5, 1.75, 1.9, 3.1, 3.5, 6.0),
}
NARROW_POINTS = [Point(16, 50, "bfloat16"), Point(16, 50, "int8"), Point(16, 75, "int8")]
NARROW_TARGETS = {  # at NARROW_POINTS, by the dot products of AVX-512
    "mobilenet_v1": (1.6, 1.6, 2.5),
    "mobilenet_v2": (1.5, 1.4, 2.0),
    "mobilenet_v3_large": (1.5, 1.3, 1.8),
    "resnet50": (1.7, 1.7, 2.8),
}
DENSE_TARGET, MEMORY_TARGET = 0.97, 1.3
SUMS = {"float32": 1, "bfloat16": 2, "int8": 4}  # products that one lane of a dot product adds up
COMPILE_TARGET = {"resnet50": 60}  # seconds; 20 for all others
KNOWN = "resnet20"  # whose accuracy at these points is in results/cifar10_1xn.md
KNOWN_POINTS = [Point(N, rate) for rate in (50, 75) for N in (2, 4, 8, 16)]


def type_of(entry: dict, name: str) -> str:
    """The type that a peer computes in: what it was asked for, or what it has chosen itself."""
    asked = PEERS[name].dtype
    return entry.get("peer_facts", {}).get(name, {}).get("dtype", "") if asked == "own choice" else asked


def fastest(entry: dict, dtype: str = "float32") -> float | None:
    """Median milliseconds of the fastest peer that computes in `dtype`; None if there is none.

    In float32 only peers that were asked for it count.
    """
    mine = (name for name in entry["peers"] if type_of(entry, name) == dtype)
    mine = (name for name in mine if dtype != "float32" or PEERS[name].dtype == dtype)
    return min((entry["peers"][name]["median"] for name in mine), default=None)


def bound(entry: dict, point: Point, build: dict) -> float | None:
    """How many times as fast as the fastest peer of its type a build would be at the peak of all its cores."""
    least = fastest(entry, point.dtype)
    return least and least * SUMS[point.dtype] * entry["peak_gflops"] / build["mflop"]


def ratio(entry: dict, times: dict, dtype: str = "float32") -> float | None:
    """How many times as fast as the fastest peer that computes in `dtype`."""
    least = fastest(entry, dtype)
    return least and least / times["median"]


def told(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def goal(entry: dict, point: Point) -> float | None:
    """The target of a build; None if it has none."""
    if point[:2] == DENSE[:2]:
        return DENSE_TARGET
    at_224 = entry["network"] if entry["image_size"] == 224 else None
    every = zip(POINTS + NARROW_POINTS, TARGETS.get(at_224, ()) + NARROW_TARGETS.get(at_224, ()), strict=False)
    return dict(every).get(point)


def missed(entry: dict) -> list[Point]:
    """The builds that are slower than their target, as the table rounds."""
    found = []
    for point, build in builds(entry).items():
        least, reached = goal(entry, point), ratio(entry, build["ms"], point.dtype)
        found += [point] if least and reached and round(reached, 2) < least else []
    return found


def builds(entry: dict) -> dict[Point, dict]:
    return {Point.parse(point): build for point, build in entry["builds"].items()}


def title(entry: dict) -> str:
    return f"{entry['network']}, {entry['image_size']}"


def peer_title(entry: dict, name: str) -> str:
    """Its name, and its type where it has chosen that itself."""
    return f"{PEERS[name].title}{f' ({type_of(entry, name)})' if PEERS[name].dtype == 'own choice' else ''}, dense"
