"""How long the LoRA products should take, by formula: bytes, FLOPs, waves of tiles, Philox draws and launches.

    python -m bench.lora.model                      tables for an A100 and an H200
    python -m bench.lora.model --markdown > bench/results/lora-model.md

A prediction, made before any measurement, to be compared with one: where they part, one of the two is wrong. Every
kernel's time is

    launch + max(bytes / bandwidth, tiles of the busiest multiprocessor * seconds of a tile)

A tile takes the longer of its matrix work and its draws, and `EXPOSED` of the shorter, plus `TILE_SECONDS` to fill its
pipeline and to store its result. Tiles, and how passes are cut into parts, are those of csrc/cuda/lora. Its `plan.h`
holds the choice of kernel that follows from here; a test compares the two.

Shapes: x [M, K], W [N, K] in J blocks of outputs, rank R (padded), elements of e bytes. Inputs are read from memory
once and outputs written once; what tiles read again comes from the level 2 cache and is not the limit at these sizes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

PHILOX_INSTRUCTIONS = 84
"""Of one draw and its eight decisions, a thread."""
SCHEDULERS = 4
"""Warp instructions that a multiprocessor issues a clock."""
EXPOSED = 0.25
"""Part of the shorter of matrix work and draws that the longer does not hide. Assumed, not measured."""
TILE_SECONDS = 0.35e-6
"""Of a tile of 128 x 128: to fill the pipeline and to store the result. Assumed; others in proportion to their size."""
WIDE, NARROW = (128, 256), (64, 128)
"""Rows and columns of the tiles of the mma.sync kernels."""
NARROW_PRODUCTS = 1.1
"""Time of a narrow tile's products, of a quarter of a wide one's: more traffic through shared memory. Assumed."""
MOST_WIDE_RANK = 16
"""With which the fused mma.sync kernel has registers for wide tiles."""
DRAW_COLUMNS = 18
"""What drawing costs each row of a tile that makes s, in columns of its product."""
THIN_ROWS = 64
"""Of a tile of the passes over x or dy, which is as large as a narrow one."""
LIBRARY_ROWS = 128
"""Of the tiles of cuBLAS and of the wgmma kernels."""
WGMMA_COSTS = {256: 256 + 32, 192: 192 + 32, 128: 144 + 32}
"""What a tile costs by its width, as the wgmma kernels' launcher weighs widths against each other."""
LANES = 8
"""Elements of one draw."""
_FLOAT = 4
_INDEX = 4


@dataclass(frozen=True)
class Machine:
    """A GPU as the model sees it. Rates are what a large product or copy reaches, not the data sheet's."""

    name: str
    architecture: int
    multiprocessors: int
    clock: float
    bandwidth: float
    """Bytes a second of a copy, read and written."""
    matrix: float
    """FLOP a second of a large 16-bit product by the architecture's own instructions."""
    mma: float
    """The same by mma.sync."""
    launch: float = 1.5e-6
    """Seconds between two kernels of a graph."""
    library_widths: tuple[int, ...] = (128, 256)
    """Columns of the tiles among which cuBLAS is taken to choose the best."""


A100 = Machine("A100", 80, 108, 1.41e9, 1.75e12, 265e12, 265e12)
"""108 multiprocessors, 312 TFLOP/s and 2.04 TB/s by the data sheet of the 80 GB card; 85% of both taken as reached."""
H200 = Machine("H200", 90, 132, 1.7e9, 4.3e12, 788e12, 500e12, library_widths=(128, 192, 256))
"""Copy and large bf16 product as measured on one such card. mma.sync reaches 63% of the peak on this generation (Luo et
al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking")."""
MACHINES = (A100, H200)


@dataclass(frozen=True)
class Shape:
    """One call."""

    rows: int
    inputs: int
    outputs: int
    rank: int
    """Padded: 8, 16, 32 or 64."""
    dropout: bool = True
    blocks: int = 1
    size: int = 2
    """Bytes of an element; 4: float32 by TF32, at half the rate."""

    @property
    def low(self) -> int:
        """Columns of s: J * R."""
        return self.blocks * self.rank


@dataclass(frozen=True)
class Tile:
    """What one thread block does for one tile of the result."""

    flops: float
    draws: float = 0.0
    overhead: float = TILE_SECONDS
    slower: float = 1.0
    """Its products than those of a large product."""

    def seconds(self, machine: Machine, rate: float) -> float:
        """On one multiprocessor. rate: FLOP a second of the whole machine for these elements."""
        matrix = self.slower * self.flops / (rate / machine.multiprocessors)
        draw = self.draws * PHILOX_INSTRUCTIONS / 32 / SCHEDULERS / machine.clock
        return max(matrix, draw) + EXPOSED * min(matrix, draw) + self.overhead


@dataclass(frozen=True)
class Cost:
    """What one kernel does: bytes, and `tiles` tiles, of which `special` are of another kind."""

    bytes: float
    tile: Tile
    tiles: int
    other: Tile = Tile(0.0)
    special: int = 0
    busiest: tuple[int, int] | None = None
    """Of tiles and of special ones, how many the busiest multiprocessor has. None: they are dealt out evenly."""

    @property
    def flops(self) -> float:
        """Of all tiles."""
        return (self.tiles - self.special) * self.tile.flops + self.special * self.other.flops

    @property
    def draws(self) -> float:
        """Of all tiles."""
        return (self.tiles - self.special) * self.tile.draws + self.special * self.other.draws

    def seconds(self, machine: Machine, rate: float) -> float:
        """Predicted, with its launch."""
        tiles, special = self.busiest or (math.ceil(self.tiles / machine.multiprocessors), 0)
        plain = (tiles - special) * self.tile.seconds(machine, rate)
        work = plain + special * self.other.seconds(machine, rate)
        return machine.launch + max(self.bytes / machine.bandwidth, work)


def _rate(machine: Machine, shape: Shape, own: bool) -> float:
    """FLOP a second: by the architecture's own instructions, or by mma.sync; TF32 at half of it."""
    return (machine.matrix if own else machine.mma) / (2 if shape.size == _FLOAT else 1)


TileShape = tuple[int, int]
"""Rows and columns."""


def _product(m: int, n: int, k: int, size: int, shape: TileShape, blocks: int = 1) -> Cost:
    """[m, k] [k, n] in whole tiles, `blocks` equal parts of the columns each on its own.

    Bytes: both factors and the result. FLOPs: those of whole tiles, 2 rows columns k each.
    """
    rows, columns = shape
    tiles = math.ceil(m / rows) * blocks * math.ceil(n // blocks / columns)
    return Cost((m * k + n * k + m * n) * size, _tile(shape, 2.0 * rows * columns * k), tiles)


def _tile(shape: TileShape, flops: float, draws: float = 0.0) -> Tile:
    rows, columns = shape
    slower = NARROW_PRODUCTS if shape == NARROW else 1.0
    return Tile(flops, draws, TILE_SECONDS * rows * columns / 128**2, slower)


def _thin_tile(flops: float, draws: float = 0.0) -> Tile:
    return Tile(flops, draws, TILE_SECONDS / 2)


def frozen_forward(shape: Shape, tile: TileShape) -> Cost:
    """x W^T: F.linear on the frozen weight."""
    return _product(shape.rows, shape.outputs, shape.inputs, shape.size, tile)


def frozen_input(shape: Shape, tile: TileShape) -> Cost:
    """dy W."""
    return _product(shape.rows, shape.inputs, shape.outputs, shape.size, tile)


def fused_forward(machine: Machine, shape: Shape, tile: TileShape) -> Cost:
    """One kernel: y and s. Bytes beside the product's: A (J R K), B (N R), s out (M J R), the mask's rows (4 M).

    A tile that makes the rows of s it needs has 2 rows (K (columns + R) + columns R) FLOPs and rows K / 8 draws; one
    that has them already 2 rows columns (K + R) and none. With mma.sync every tile is of the first kind; the wgmma
    kernels' blocks keep s for the tiles of the same rows that follow (`_runs`).
    """
    m, k, n, r = shape.rows, shape.inputs, shape.outputs, shape.rank
    rows, columns = tile
    base = _product(m, n, k, shape.size, tile, shape.blocks)
    moved = base.bytes + (shape.low * k + n * r + m * shape.low) * shape.size + _INDEX * m * shape.dropout
    draws = rows * k / LANES * shape.dropout
    with_s = _tile(tile, 2.0 * rows * (k * (columns + r) + columns * r), draws)
    if not uses_sm90(machine, shape):
        return Cost(moved, with_s, base.tiles)
    tiles, making, busiest = _runs(machine, shape, tile)
    return Cost(moved, _tile(tile, 2.0 * rows * columns * (k + r)), tiles, with_s, making, busiest)


def _runs(machine: Machine, shape: Shape, tile: TileShape) -> tuple[int, int, tuple[int, int]]:
    """Tiles, how many of them make s, and both of the busiest block, where each block takes neighbouring tiles.

    Tiles are in order of rows, then blocks of outputs, then columns. Two blocks of threads work together on two rows of
    tiles, and every pair takes as many neighbours. s is made with the first of a pair's tiles and with the first of
    every rows and block of outputs.
    """
    rows, columns = tile
    pair = 2 if shape.rows > rows else 1
    of_block = math.ceil(shape.outputs // shape.blocks / columns)
    tiles = math.ceil(shape.rows / (rows * pair)) * shape.blocks * of_block
    share = math.ceil(tiles / max(1, machine.multiprocessors // pair))
    making = []
    for begin in range(0, tiles, share):
        end = min(begin + share, tiles)
        making.append(1 + (end - 1) // of_block - begin // of_block)
    return pair * tiles, pair * sum(making), (share, max(making))


def thin(shape: Shape) -> Cost:
    """s = dropout(x) A^T alone. Bytes: x, A, the mask's rows in; s out. Draws: one for eight elements of x."""
    m, k, rows = shape.rows, shape.inputs, THIN_ROWS
    moved = (m * k + shape.low * k + m * shape.low) * shape.size + _INDEX * m * shape.dropout
    tile = _thin_tile(2.0 * rows * k * shape.low, rows * k / LANES * shape.dropout)
    return Cost(moved, tile, math.ceil(m / rows))


def given_forward(shape: Shape, tile: TileShape) -> Cost:
    """[x | s] [W | B]^T: the product's bytes and B and s beside them; 2 rows columns (K + R) FLOPs a tile."""
    m, n, k, r = shape.rows, shape.outputs, shape.inputs, shape.rank
    base = _product(m, n, k, shape.size, tile, shape.blocks)
    moved = base.bytes + (n * r + m * shape.low) * shape.size
    return Cost(moved, _tile(tile, 2.0 * tile[0] * tile[1] * (k + r)), base.tiles)


def low_parts(shape: Shape) -> tuple[int, int]:
    """Pieces of the rows and of the columns that dy is cut into: about 128 of both in all, and the smallest parts.

    A piece of rows is of a multiple of 128: up to 512 where s leaves room for so many.
    """
    steps = math.ceil(shape.outputs // shape.blocks * shape.size / 128)
    least = max(1, math.ceil(shape.rows / 128**2))
    ways: list[tuple[int, int]] = []
    for lines in range(least, max(least, 4 if shape.rank * shape.size <= 64 else 1) + 1):
        pieces = math.ceil(shape.rows / (128 * lines))
        wanted = math.ceil(128 / (pieces * shape.blocks))
        ways.append((pieces, math.ceil(steps / math.ceil(steps / min(steps, wanted)))))
    enough = min(math.prod(ways[0]), math.ceil(128 / shape.blocks))

    def parts(way: tuple[int, int]) -> int:
        pieces, splits = way
        return shape.outputs * pieces * (pieces > 1) + shape.rows * shape.blocks * splits * (splits > 1)

    return min((way for way in ways if math.prod(way) >= enough), key=parts)


def low(shape: Shape) -> tuple[Cost, Cost]:
    """ds and dB in one pass over dy, and the addition of its partial sums, in float32.

    Bytes: dy, B, s in, and out ds and dB or, where dy is cut into pieces of rows or columns, their parts: N R for each
    piece of rows, M J R for each of columns; then the parts in and the sums out. FLOPs: 2 M N R twice.
    """
    m, n, r = shape.rows, shape.outputs, shape.rank
    pieces, splits = low_parts(shape)
    of_b, of_ds = n * r * _FLOAT, m * shape.low * _FLOAT
    parts = pieces * of_b * (pieces > 1) + splits * of_ds * (splits > 1)
    sums = of_b + m * shape.low * shape.size
    tiles = pieces * shape.blocks * splits
    moved = (m * n + n * r + m * shape.low) * shape.size + (parts or sums)
    return Cost(moved, _thin_tile(4.0 * m * n * r / tiles), tiles), _moved(parts + sums if parts else 0.0)


def input_gradient(shape: Shape, tile: TileShape) -> Cost:
    """dy W + dropout'(ds A) in one kernel; depth N + J R, each element of dx drawn for once."""
    base = frozen_input(shape, tile)
    moved = (
        shape.rows * shape.low + shape.low * shape.inputs
    ) * shape.size + _INDEX * shape.rows * shape.dropout
    area = tile[0] * tile[1]
    work = _tile(tile, 2.0 * area * (shape.outputs + shape.low), area / LANES * shape.dropout)
    return Cost(base.bytes + moved, work, base.tiles)


def grad_a(shape: Shape) -> tuple[Cost, Cost]:
    """dA in one pass over x, cut into runs of 128 columns and pieces of rows, about 256 in all; and their addition.

    Bytes: x, ds, the mask's rows in; J R K out for each piece, in float32; then those in, and dA out.
    """
    m, k = shape.rows, shape.inputs
    runs = math.ceil(k / 128)
    slab = 64 * max(1, math.ceil(m * runs / (256 * 64)))
    pieces = math.ceil(m / slab)
    result = shape.low * k * _FLOAT
    moved = (m * k + m * shape.low) * shape.size + _INDEX * m * shape.dropout + pieces * result
    tiles = pieces * runs
    work = _thin_tile(2.0 * m * k * shape.low / tiles, m * k / LANES * shape.dropout / tiles)
    return Cost(moved, work, tiles), _moved((pieces + 1) * result if pieces > 1 else 0.0)


def _moved(amount: float, draws: float = 0.0) -> Cost:
    """An elementwise kernel, in many small tiles."""
    tiles = 1 << 12
    return Cost(amount, Tile(0.0, draws / tiles, 0.0), tiles)


@dataclass(frozen=True)
class Forward:
    """Seconds of the ways to compute y and s."""

    bare: float
    composed: float
    fused: float
    split: float

    def taken(self, machine: Machine, shape: Shape) -> float:
        """By the kernel that is planned: with sm_90a's, one kernel whatever the shape."""
        return self.fused if uses_sm90(machine, shape) else self.best

    @property
    def best(self) -> float:
        """Of the two kernels."""
        return min(self.fused, self.split)


@dataclass(frozen=True)
class Backward:
    """Seconds of the ways to compute dx, dA and dB (bare: dx of the frozen weight alone)."""

    bare: float
    composed: float
    own: float


def uses_sm90(machine: Machine, shape: Shape) -> bool:
    """Whether the wgmma kernels serve: that architecture, 16-bit elements."""
    return machine.architecture // 10 == 9 and shape.size == 2


def takes_wide(rows: int, columns: int, blocks: int, low_columns: int = 0) -> bool:
    """Whether the mma.sync kernels take wide tiles for a product of 16-bit elements: what the busiest of an A100's
    multiprocessors has to do. low_columns: columns' worth of work beside a tile's own.
    """

    def cost(tile: TileShape, slower: float) -> float:
        tiles = math.ceil(rows / tile[0]) * math.ceil(columns / tile[1]) * blocks
        return math.ceil(tiles / A100.multiprocessors) * tile[0] * (tile[1] + low_columns) * slower

    return cost(WIDE, 1.0) <= cost(NARROW, NARROW_PRODUCTS)


def tile_shape(
    machine: Machine, shape: Shape, columns: int, blocks: int, *, makes_s: bool = False
) -> TileShape:
    """The tile that the extension takes for a result of so many columns in each block."""
    if uses_sm90(machine, shape):
        pair, most = (
            (2, H200.multiprocessors // 2) if shape.rows > LIBRARY_ROWS else (1, H200.multiprocessors)
        )
        rows = math.ceil(shape.rows / (LIBRARY_ROWS * pair)) * blocks

        def cost(width: int) -> int:
            return math.ceil(rows * math.ceil(columns / width) / most) * WGMMA_COSTS[width]

        return LIBRARY_ROWS, min(WGMMA_COSTS, key=cost)
    low = shape.rank + DRAW_COLUMNS * shape.dropout if makes_s else 0
    fits = shape.size == 2 and (shape.rank <= MOST_WIDE_RANK or not makes_s)
    return WIDE if fits and takes_wide(shape.rows, columns, blocks, low) else NARROW


def _library(cost: Callable[[Shape, TileShape], Cost], machine: Machine, shape: Shape) -> float:
    rate = _rate(machine, shape, True)
    tiles = [(LIBRARY_ROWS, width) for width in machine.library_widths]
    return min(cost(shape, tile).seconds(machine, rate) for tile in tiles)


def forward(machine: Machine, shape: Shape) -> Forward:
    """The composition's four kernels: the product, dropout of x, dropout(x) A^T, and y += s B^T."""
    m, k, n, size = shape.rows, shape.inputs, shape.outputs, shape.size
    own = uses_sm90(machine, shape)
    rate, mma = _rate(machine, shape, own), _rate(machine, shape, False)
    bare = _library(frozen_forward, machine, shape)
    plain = replace(shape, dropout=False)
    kernels = [thin(plain), _moved((2 * m * n + m * shape.low + n * shape.low) * size)]
    if shape.dropout:
        kernels.append(_moved(2 * m * k * size + _INDEX * m, m * k / LANES))
    composed = bare + sum(kernel.seconds(machine, mma) for kernel in kernels)
    of_block = n // shape.blocks
    tiles = {
        makes_s: tile_shape(machine, shape, of_block, shape.blocks, makes_s=makes_s)
        for makes_s in (True, False)
    }
    fused = fused_forward(machine, shape, tiles[True]).seconds(machine, rate)
    given = given_forward(shape, tiles[False]).seconds(machine, rate)
    return Forward(bare, composed, fused, thin(shape).seconds(machine, mma) + given)


def backward(machine: Machine, shape: Shape) -> Backward:
    """The composition's kernels: dy W, dy B, ds A, its mask, the sum, dropout of x, dA, dB."""
    m, k, n, size, r = shape.rows, shape.inputs, shape.outputs, shape.size, shape.low
    own = uses_sm90(machine, shape)
    rate, mma = _rate(machine, shape, own), _rate(machine, shape, False)
    bare = _library(frozen_input, machine, shape)
    kernels = [
        _moved((m * n + n * r + m * r) * size),
        _moved((m * r + r * k + m * k) * size),
        _moved(3 * m * k * size),
        _moved((m * k + m * r + r * k) * size),
        _moved((m * n + m * r + n * r) * size),
    ]
    if shape.dropout:
        kernels += 2 * [_moved(2 * m * k * size + _INDEX * m, m * k / LANES)]
    composed = bare + sum(kernel.seconds(machine, mma) for kernel in kernels)
    mine = sum(kernel.seconds(machine, mma) for kernel in (*low(shape), *grad_a(shape)) if kernel.bytes)
    mine += input_gradient(shape, tile_shape(machine, shape, k, 1)).seconds(machine, rate)
    return Backward(bare, composed, mine)


# ---- the tables ----

SIZES = ((768, 768, 1), (768, 3072, 1), (3072, 768, 1), (1024, 1024, 1), (384, 384, 1), (768, 2304, 3))
"""Inputs, outputs, blocks."""
TOKENS = 8192
PADDED = (8, 16, 32, 64)
TITLES = (
    "inputs x outputs",
    "rank",
    "dropout",
    "F.linear",
    "composed",
    "fused",
    "split",
    "of F.linear",
    "F.linear, dx",
    "composed, both",
    "own, both",
    "of F.linear, dx",
)

_PAGE = """\
# LoRA products: predicted times

Written by `python -m bench.lora.model --markdown`. **Nothing here was measured**: these are the formulas of
`bench/lora/model.py` with {tokens:,} rows of bfloat16. Microseconds. *F.linear*: the frozen weight alone; *composed*:
the same result by PyTorch's products beside it; *fused* and *split*: the extension's one kernel, and its two. *dx*:
with the gradient of the input; *both*: forward and backward, with the gradients of A and B. The better of fused and
split is bold.
"""


def line(machine: Machine, shape: Shape) -> tuple[str, ...]:
    """One line of a table."""
    ahead, behind = forward(machine, shape), backward(machine, shape)
    taken = ahead.taken(machine, shape)
    bare, own = ahead.bare + behind.bare, taken + behind.own

    def micro(seconds: float) -> str:
        return f"{1e6 * seconds:.1f}"

    named = [micro(ahead.fused), micro(ahead.split)]
    winner = int(ahead.split < ahead.fused)
    named[winner] = f"**{named[winner]}**"
    blocks = f" ({shape.blocks} blocks)" if shape.blocks > 1 else ""
    return (
        f"{shape.inputs} x {shape.outputs}{blocks}",
        str(shape.rank),
        "yes" if shape.dropout else "no",
        micro(ahead.bare),
        micro(ahead.composed),
        *named,
        f"{taken / ahead.bare:.2f}",
        micro(bare),
        micro(ahead.composed + behind.composed),
        micro(own),
        f"{own / bare:.2f}",
    )


def table(machine: Machine) -> list[tuple[str, ...]]:
    """A line a size, rank and dropout, without titles."""
    shapes = [
        Shape(TOKENS, inputs, outputs, rank, dropout, blocks)
        for inputs, outputs, blocks in SIZES
        for rank in PADDED
        for dropout in (False, True)
    ]
    return [line(machine, shape) for shape in shapes]


GOAL_TITLES = ("inputs x outputs", "passes", "rank", "dropout", "predicted", "goal", "")
GOAL_SIZES = ((768, 768), (768, 3072), (3072, 768), (1024, 1024))


def goal_lines(machine: Machine) -> list[tuple[str, ...]]:
    """The goals set for an H200, how many times as long as F.linear's, and whether the model sees them met."""
    lines = []
    for inputs, outputs in GOAL_SIZES:
        with_dropout = 1.4 if inputs == outputs == 768 else 1.25
        wanted = [("forward", 16, False, 1.15), ("forward", 16, True, with_dropout)]
        wanted += [("both", rank, True, 1.5) for rank in PADDED]
        for passes, rank, dropout, goal in wanted:
            shape = Shape(TOKENS, inputs, outputs, rank, dropout)
            ahead, behind = forward(machine, shape), backward(machine, shape)
            bare, own = ahead.bare, ahead.taken(machine, shape)
            if passes == "both":
                bare, own = bare + behind.bare, own + behind.own
            ratio = own / bare
            said = "met" if ratio <= goal else "**missed**"
            cells = (passes, str(rank), "yes" if dropout else "no", f"{ratio:.2f}", f"{goal:.2f}", said)
            lines.append((f"{inputs} x {outputs}", *cells))
    return lines


_GOALS_PAGE = """\
## The goals, on an {name}

How many times as long as `F.linear` with the frozen weight (*both*: with the gradient of its input) the extension takes
by the kernels that its plan chooses, beside what was set as a goal. Predicted, not measured.
"""


def markdown() -> str:
    """The page of bench/results."""
    text = [_PAGE.format(tokens=TOKENS)]
    for machine in MACHINES:
        text += [f"## {machine.name} (sm_{machine.architecture})", ""]
        text += [f"| {' | '.join(TITLES)} |", f"|{' --- |' + ' ---: |' * (len(TITLES) - 1)}"]
        text += [f"| {' | '.join(cells)} |" for cells in table(machine)] + [""]
    text += [_GOALS_PAGE.format(name=H200.name)]
    text += [f"| {' | '.join(GOAL_TITLES)} |", f"|{' --- |' * 2 + ' ---: |' * 4 + ' --- |'}"]
    text += [f"| {' | '.join(cells)} |" for cells in goal_lines(H200)]
    return "\n".join(text).rstrip() + "\n"


def text() -> str:
    """For the terminal."""
    parts = []
    for machine in MACHINES:
        lines = [TITLES, *([cell.replace("**", "") for cell in cells] for cells in table(machine))]
        widths = [max(len(cells[column]) for cells in lines) for column in range(len(TITLES))]
        parts.append(f"{machine.name}, {TOKENS:,} rows of bfloat16, microseconds")
        parts += [
            "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in lines
        ]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lora.model", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--markdown", action="store_true", help="print the page of bench/results")
    print(markdown() if parser.parse_args(arguments).markdown else text() + "\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
