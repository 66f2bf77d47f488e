"""Convolutions and classifiers whose maps lie in planes, dense and block sparse alike (in blocks: `lane_gemm`).

Both kernels compute, for the rows of one group and the pixels of one tile,

    y[row, q] = act(bias[row] + sum over k of weight[k, row] * x[offset[k] + q]  (+ residual[row, q]))

where k runs over the group's kept columns. What a column is (a channel, or a tap of a channel) and where it lies is
wholly in `offset`, so a pointwise, a 3x3 and a strided convolution are the same code. A dense layer is one whose
groups all keep every column: then one list of offsets serves every group.

`pixel_gemm` puts pixels in the lanes of a vector; `row_gemm`, for maps smaller than a vector, rows and pixels together.
"""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T

from ..onnx.graph import Activation
from .emit import Sums, activate, branch, columns, kernel, load, pick, splat, store, tasks
from .tiles import Band, pieces


@dataclass(frozen=True)
class Gemm:
    """The geometry from which a kernel is built; layers that agree in it share the kernel."""

    batch: int
    rows: int  # output channels
    group: int  # rows that share their columns
    columns: int  # kept columns a group if dense, of all groups together if sparse; a multiple of `unroll`
    sparse: bool
    x_size: int  # floats an image of the input
    x_total: int  # floats of the whole input buffer
    pixels: int  # of an output plane
    bands: tuple[Band, ...]  # pixel_gemm only
    unroll: int = 1  # columns a step, each with its own sums: hides the latency of few accumulators
    rows_first: bool = False  # neighbouring tasks share rows (and weights), not pixels
    activation: Activation = None
    residual: bool = False
    lanes: int = 16
    cycles: float = 1e9  # about what it takes on one thread

    @property
    def groups(self) -> int:
        return -(-self.rows // self.group)

    @property
    def tiles(self) -> int:
        return sum(len(band.starts) for band in self.bands) or 1


def _buffers(g: Gemm) -> list[tuple[str, int, str]]:
    steps = g.columns * (1 if g.sparse else g.groups)
    buffers = [("x", g.x_total, "float32"), ("weight", max(1, steps * g.group), "float32")]
    buffers += [("offset", max(1, g.columns), "int32"), ("pointer", g.groups + 1, "int32")]
    buffers += [("bias", g.groups * g.group, "float32"), ("tiles", 2 * g.tiles, "int32")]
    if g.residual:
        buffers.append(("residual", g.batch * g.rows * g.pixels, "float32"))
    return [*buffers, ("y", g.batch * g.rows * g.pixels, "float32")]


def _tasks(g: Gemm, body) -> None:
    """One parallel task for every image, tile and group."""
    with tasks(g.batch * g.tiles * g.groups, g.cycles) as task:
        inner = g.tiles if g.rows_first else g.groups
        a, b = T.bind(task % inner), T.bind(task // inner % (g.tiles * g.groups // inner))
        image = T.bind(task // (g.tiles * g.groups)) if g.batch > 1 else 0
        body(image, *((b, a) if g.rows_first else (a, b)))


def _write(g: Gemm, y, residual, at, value, lanes: int) -> None:
    if residual is not None:
        value = value + load(residual, at, lanes)
    store(y, at, activate(value, g.activation, lanes), lanes)


def _guarded(g: Gemm, row: int, group, body) -> None:
    """Emit `body()`, skipped for the rows that the last group lacks."""
    if g.rows % g.group and row >= g.rows % g.group:
        with T.If(group < g.groups - 1), T.Then():
            body()
    else:
        body()


def pixel_gemm(g: Gemm):
    """Lanes are pixels: group x vectors sums; every vector of x is used by all rows of the group."""

    def body(x, weight, offset, pointer, bias, tiles, *rest):
        residual, y = (rest[0], rest[1]) if g.residual else (None, rest[0])

        def tile_code(band: Band, image, group, tile):
            read = T.bind(image * g.x_size + tiles[tile * 2])
            write = T.bind((image * g.rows + group * g.group) * g.pixels + tiles[tile * 2 + 1])
            every = [(r, vector) for r in range(g.group) for vector in band.vectors]
            sums = {(u, r, v): Sums(1, v.lanes) for u in range(g.unroll) for r, v in every}
            for r, v in every:
                sums[0, r, v][0] = splat(bias[group * g.group + r], v.lanes)
                for u in range(1, g.unroll):
                    sums[u, r, v][0] = splat(0.0, v.lanes)

            def column(w, o, u):
                begin = T.bind(read + offset[o])
                for r, v in every:
                    product = splat(weight[w * g.group + r], v.lanes) * load(x, begin + v.source, v.lanes)
                    sums[u, r, v][0] = sums[u, r, v][0] + product

            columns(g, group, pointer, weight, column)
            for r in range(g.group):

                def finish(r=r):
                    for vector in band.vectors:
                        total = sums[0, r, vector][0]
                        for u in range(1, g.unroll):
                            total = total + sums[u, r, vector][0]
                        for s in vector.stores:
                            some = pick(total, range(s.lane, s.lane + s.width), vector.lanes)
                            _write(g, y, residual, write + r * g.pixels + s.at, some, s.width)

                _guarded(g, r, group, finish)

        def task(image, group, tile):
            ends, bodies = [], []
            for band in g.bands:
                ends.append((ends[-1] if ends else 0) + len(band.starts))
                bodies.append(lambda band=band: tile_code(band, image, group, tile))
            branch(tile, ends, bodies)

        _tasks(g, task)

    return kernel(_buffers(g), body)


def row_gemm(g: Gemm):
    """Lanes are rows x pixels, rows fastest, as the weights lie: for compact maps smaller than a vector (2x2, 1x1)."""
    high = min(g.group, g.lanes)  # rows in a vector
    wide = 1 << (min(g.pixels, g.lanes // high).bit_length() - 1)  # pixels in a vector
    lanes = high * wide
    vectors = [(row, pixel) for row in range(0, g.group, high) for pixel, _ in pieces(g.pixels, wide)]

    def body(x, weight, offset, pointer, bias, tiles, *rest):
        residual, y = (rest[0], rest[1]) if g.residual else (None, rest[0])

        def task(image, group, tile):
            read = image * g.x_size
            write = T.bind((image * g.rows + group * g.group) * g.pixels)
            sums = Sums(g.unroll * len(vectors), lanes)

            def at(u, v):
                return u * len(vectors) + v

            def repeated(buffer, start):  # `high` values, once a pixel
                return pick(load(buffer, start, high), list(range(high)) * wide, high)

            for v, (row, _) in enumerate(vectors):
                sums[at(0, v)] = repeated(bias, group * g.group + row)
                for u in range(1, g.unroll):
                    sums[at(u, v)] = splat(0.0, lanes)

            def column(w, o, u):
                begin = T.bind(read + offset[o])
                for v, (row, pixel) in enumerate(vectors):
                    some = pick(load(x, begin + pixel, wide), [p for p in range(wide) for _ in range(high)], wide)
                    product = repeated(weight, w * g.group + row) * some
                    sums[at(u, v)] = sums[at(u, v)] + product

            columns(g, group, pointer, weight, column)
            for v, (row, pixel) in enumerate(vectors):
                total = sums[at(0, v)]
                for u in range(1, g.unroll):
                    total = total + sums[at(u, v)]
                if wide == g.pixels and g.rows % g.group == 0:  # transposed, the vector is one run of the output
                    turned = pick(total, [p * high + r for r in range(high) for p in range(wide)], lanes)
                    _write(g, y, residual, write + row * g.pixels, turned, lanes)
                    continue
                for r in range(high):

                    def finish(r=r, row=row, pixel=pixel, total=total):
                        some = pick(total, [p * high + r for p in range(wide)], lanes)
                        _write(g, y, residual, write + (row + r) * g.pixels + pixel, some, wide)

                    _guarded(g, row + r, group, finish)

        _tasks(g, task)

    return kernel(_buffers(g), body)
