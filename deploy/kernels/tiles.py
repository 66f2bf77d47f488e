"""How the pixels of a map are distributed over vector registers.

A map of rows x columns pixels is read from planes whose rows lie `stride` apart and written without gaps. A *vector*
is a run of lanes read at once; a *tile* is the handful of vectors that one inner loop keeps in registers; tiles that
look alike except for where they start form a *band*, and a band is one piece of code.

No vector needs a mask: where a run does not divide, its last vector starts earlier and computes a few pixels twice.
Only where a row is shorter than a vector do vectors run across the gap between rows; those lanes are computed and not
stored.
"""

import itertools
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Store:
    lane: int  # first lane of the vector
    width: int  # lanes, a power of two
    at: int  # pixel written, counted from the tile's first


@dataclass(frozen=True)
class Vector:
    source: int  # where it is read, counted from the tile's first
    lanes: int
    stores: tuple[Store, ...]


@dataclass(frozen=True)
class Band:
    vectors: tuple[Vector, ...]
    starts: tuple[tuple[int, int], ...]  # (read, written) first pixel of every tile


def pieces(length: int, lanes: int) -> list[tuple[int, int]]:
    """(start, width) of equal power-of-two runs that cover 0..length; the last may overlap the one before."""
    width = min(lanes, 1 << (length.bit_length() - 1))
    starts = list(range(0, length - width + 1, width))
    if length % width:
        starts.append(length - width)
    return [(start, width) for start in starts]


def deal(items: list, most: int) -> list[list]:
    """`items` in as few runs of at most `most` as possible, of nearly equal length."""
    count = -(-len(items) // most)
    cuts = [len(items) * i // count for i in range(count + 1)]
    return [items[a:b] for a, b in itertools.pairwise(cuts)]


def _across_rows(first: int, rows: int, columns: int, stride: int, lanes: int) -> list[Vector]:
    """Vectors over `rows` short rows and the gaps between them."""
    span = (rows - 1) * stride + columns
    lanes = min(lanes, 1 << (span - 1).bit_length())
    vectors = []
    for start in range(0, span, lanes):
        stores = []
        for row in range(rows):
            begin, end = max(row * stride, start), min(row * stride + columns, start + lanes)
            for at, width in pieces(end - begin, lanes) if begin < end else []:
                written = (first + row) * columns + begin + at - row * stride
                stores.append(Store(begin + at - start, width, written))
        if stores:
            vectors.append(Vector(first * stride + start, lanes, tuple(stores)))
    return vectors


def _lines(rows: int, columns: int, stride: int, lanes: int) -> list[list[Vector]]:
    if stride == columns:
        rows, columns, stride = 1, rows * columns, rows * columns
    if rows == 1 or columns >= lanes:
        return [
            [
                Vector(row * stride + at, width, (Store(0, width, row * columns + at),))
                for at, width in pieces(columns, lanes)
            ]
            for row in range(rows)
        ]

    def together(height: int) -> list[list[Vector]]:
        return [_across_rows(row, min(height, rows - row), columns, stride, lanes) for row in range(0, rows, height)]

    return min((together(height) for height in range(1, rows + 1)), key=lambda lines: sum(map(len, lines)))


def _shape(tile: list[Vector]) -> tuple[tuple[int, int], tuple[Vector, ...]]:
    """A tile's (read, written) start, and its vectors relative to it."""
    read, written = tile[0].source, tile[0].stores[0].at
    vectors = tuple(
        Vector(v.source - read, v.lanes, tuple(Store(s.lane, s.width, s.at - written) for s in v.stores)) for v in tile
    )
    return (read, written), vectors


@cache
def plan(rows: int, columns: int, stride: int, lanes: int, per_tile: int) -> tuple[Band, ...]:
    """Deal a map of `rows` x `columns` pixels to tiles of at most `per_tile` vectors."""
    lines = _lines(rows, columns, stride, lanes)
    widest = max(map(len, lines))
    if widest <= per_tile:
        tiles = [list(itertools.chain(*some)) for some in deal(lines, per_tile // widest)]
    else:
        tiles = [tile for line in lines for tile in deal(line, per_tile)]
    bands: dict[tuple, list] = {}
    for tile in tiles:
        start, vectors = _shape(tile)
        bands.setdefault(vectors, []).append(start)
    return tuple(Band(vectors, tuple(starts)) for vectors, starts in bands.items())


@dataclass(frozen=True)
class Strip:
    """Tiles of one shape: output pixels relative to the first, and where the tiles begin."""

    pixels: tuple[tuple[int, int], ...]
    starts: tuple[tuple[int, int], ...]


@cache
def strips(rows: int, columns: int, most: int) -> tuple[Strip, ...]:
    """Deal a map to tiles of at most `most` pixels and nearly equal size, of as few shapes as possible."""
    if columns > most:  # pieces of a row; the last may overlap the one before
        width = -(-columns // -(-columns // most))
        begins = [min(x, columns - width) for x in range(0, columns, width)]
        shape = tuple((0, x) for x in range(width))
        return (Strip(shape, tuple((row, x) for row in range(rows) for x in begins)),)
    found: dict[tuple, list] = {}
    cells = [[(y, x) for x in range(columns)] for y in range(rows)]
    if rows % max(1, most // columns) == 0 or rows * columns > 8 * most:
        runs = deal(cells, most // columns)
    else:  # a small map: runs of pixels that ignore where rows end
        runs = deal([[cell] for row in cells for cell in row], most)
    for run in (list(itertools.chain(*some)) for some in runs):
        y0, x0 = run[0]
        found.setdefault(tuple((y - y0, x - x0) for y, x in run), []).append((y0, x0))
    return tuple(Strip(shape, tuple(starts)) for shape, starts in found.items())
