"""Choose each convolution's kernel from a few candidates, by a rule that counts cycles.

The numbers are of a processor whose multiply-adds have a latency of four and that loads twice a cycle; the rates of the
second and third cache are fitted to measured layers. Only the order of candidates matters, not the cycles themselves.
"""

from dataclasses import dataclass
from functools import lru_cache

from ..targets import Machine
from . import tiles

L1_BYTES = 32 * 1024  # of pixels that a tile may use before they come from the second cache
L2_BYTES = 512 * 1024
L2_VECTOR = 2.2  # cycles to fetch one vector of pixels from the second cache
L2_RATE, L3_RATE = 32, 20  # bytes of weights a cycle
SPARSE_MARGIN = 0.95  # a sparse kernel must promise this part of the dense one's time

plan = lru_cache(maxsize=None)(tiles.plan)


@dataclass(frozen=True)
class Site:
    """What a schedule needs to know of a convolution."""

    rows: int
    columns: int
    out_rows: int
    out_columns: int
    width: int  # of a row of the input planes
    pointwise: bool  # reads its input as it lies
    whole: bool = False  # a task is a tile with all its rows, since a depthwise convolution comes first

    @property
    def pixels(self) -> int:
        return self.out_rows * self.out_columns


@dataclass(frozen=True)
class Choice:
    kernel: str  # pixel, row, lanes
    sparse: bool
    group: int
    vectors: int  # of pixels a tile has at most (pixel), pixels a tile has at most (lanes)
    unroll: int
    cycles: float


def _step(m: Machine, fmas: int, loads: float, pixel_cycles: float, weight_cycles: float, unroll: int) -> float:
    """Cycles of one column: bound by arithmetic, by loads, by the slower caches, or by the latency of few sums."""
    return max(fmas / m.multiply_adds, loads / 2, pixel_cycles, weight_cycles, 4 / unroll)


def _cycles(site: Site, m: Machine, kernel: str, sparse: bool, density: float, group: int, vectors: int, unroll: int):
    groups = -(-site.rows // group)
    columns = site.columns * (density if sparse else 1.0)
    weight_bytes = 4 * groups * columns * (group + sparse)
    weight_cycles = 4 * (group + sparse) / (L2_RATE if weight_bytes < L2_BYTES else L3_RATE)
    if kernel == "row":
        high = min(group, m.lanes)
        wide = 1 << (min(site.pixels, m.lanes // high).bit_length() - 1)
        runs, parts = len(tiles.pieces(site.pixels, wide)), group // high
        shuffles = (parts if wide > 1 else 0) + (runs if wide > 1 else 0)
        step = _step(m, parts * runs, parts + runs + 1 + shuffles / 2, 0, weight_cycles, unroll)
        return groups * (columns * step + 30 + 2 * parts * runs * unroll)
    total = 0.0
    for band in plan(site.out_rows, site.out_columns, site.width, m.lanes, vectors):
        v = len(band.vectors)
        near = site.columns * v * 4 * m.lanes <= L1_BYTES
        pixel_cycles = v * (0.5 if near else L2_VECTOR * m.lanes / 16)
        step = _step(m, group * v, group + v + 1, pixel_cycles, weight_cycles, unroll)
        stores = group * sum(len(vector.stores) for vector in band.vectors)
        total += len(band.starts) * groups * (columns * step + 30 + stores + group * v * unroll / 2)
    return total


def tap_cycles(kernel: tuple[int, int], stride: tuple[int, int], m: Machine) -> float:
    """Of one vector of a depthwise convolution whose lanes are channels; strides fetch more pixels for each."""
    fetched = (stride[0] * stride[1] - 1) * L2_VECTOR
    return max(0.6, 1 / m.multiply_adds) * kernel[0] * kernel[1] + 2 + fetched


def _lane_cycles(site: Site, m: Machine, sparse: bool, density: float, group: int, most: int, unroll: int) -> float:
    v, columns = group // m.lanes, site.columns * (density if sparse else 1.0)
    total, count = 0.0, 0
    for strip in tiles.strips(site.out_rows, site.out_columns, most):
        pixels = len(strip.pixels)
        # Two loads a cycle are what is promised; 1.65 is what is measured.
        step = max(v * pixels / m.multiply_adds, 0.6 * (v + pixels + 1), 4 / unroll)
        total += len(strip.starts) * (columns * step + 30 + v * pixels * (1 + unroll / 2))
        count += len(strip.starts)
    idle = -(-count // m.threads) * m.threads / count if site.whole else 1.0  # threads wait for the last tile
    return -(-site.rows // group) * total * idle


def candidates(site: Site, m: Machine, groups: list[int]):
    """(kernel, group, vectors, unroll) that fit the registers, pixels in lanes."""
    for group in groups:
        most = min(8, m.accumulators // group)
        for vectors in range(1, most + 1):
            if group * vectors + vectors < m.registers - 2:
                unroll = 1
                while group * vectors * unroll < 8 and unroll < 8:
                    unroll *= 2
                yield "pixel", group, vectors, unroll
        if site.pointwise and site.pixels < m.lanes:
            high = min(group, m.lanes)
            wide = 1 << (min(site.pixels, m.lanes // high).bit_length() - 1)
            sums = group // high * len(tiles.pieces(site.pixels, wide))
            if group % high == 0 and sums <= m.accumulators:
                yield "row", group, 0, max(1, 1 << ((8 // sums).bit_length() - 1)) if sums < 8 else 1


def lane_candidates(site: Site, m: Machine, groups: list[int]):
    """(kernel, group, pixels, unroll) that fit the registers, channels in lanes."""
    for v in (group // m.lanes for group in groups if group % m.lanes == 0):
        # Broadcast from memory if used once; else the compiler wants some registers more, or it spills sums.
        most = (m.registers - 2) if v == 1 else (m.registers - 2 * v - 2) // v
        sizes = {min(most, 28 // v), min(most, 24 // v), 14 // v, most - most % site.out_columns}
        for pixels in sorted(sizes - {0}):
            sums = min(pixels, site.pixels) * v
            yield "lanes", v * m.lanes, pixels, 1 << max(0, (8 // sums).bit_length() - 1) if sums < 8 else 1


def ranked(site: Site, m: Machine, sparse: bool, block: int, density: float, lanes: bool) -> list[Choice]:
    """All kernels by counted cycles: sparse with a divisor of the block's rows, or dense with any number of rows.

    lanes: those that keep channels in the lanes; there may be none.
    """
    if sparse:
        groups = [g for g in (1, 2, 4, 8, 16, 32) if block % g == 0 and (g == block or g >= 4)]
    elif lanes:
        groups = [v * m.lanes for v in (1, 2, 3, 4)]
    else:
        groups = [g for g in (4, 8, 12, 16, 32, 64) if g < site.rows + 4] or [site.rows]
    if lanes:
        every = [(c, _lane_cycles(site, m, sparse, density, *c[1:])) for c in lane_candidates(site, m, groups)]
    else:
        every = [(c, _cycles(site, m, c[0], sparse, density, *c[1:])) for c in candidates(site, m, groups)]
    return sorted((Choice(c[0], sparse, *c[1:], cycles) for c, cycles in every), key=lambda c: c.cycles)


def rivals(site: Site, m: Machine, block: int, density: float, lanes: bool, most: int) -> list[Choice]:
    """The `most` cheapest dense kernels and, unless every block is kept, as many sparse ones."""
    kinds = (False, True) if density < 1.0 else (False,)
    return [choice for sparse in kinds for choice in ranked(site, m, sparse, block, density, lanes)[:most]]


def choose(site: Site, m: Machine, block: int, density: float, lanes: bool = False) -> Choice | None:
    """The cheapest kernel, None if there is none; a sparse one must win by a margin."""

    def handicap(choice: Choice) -> float:
        return choice.cycles / (SPARSE_MARGIN if choice.sparse else 1)

    return min(rivals(site, m, block, density, lanes, 1), key=handicap, default=None)
