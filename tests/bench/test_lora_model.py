"""The model of the LoRA products' times: its counts by hand, the plan that follows, and the page made from it."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from support.emulation import load
from support.lora_plan import SM80, cuts, plan, takes_wide

from bench import records
from bench.lora import model as lora_model
from bench.lora.model import A100, H200, NARROW, WIDE, Machine, Shape, Tile

SHAPE = Shape(rows=300, inputs=64, outputs=192, rank=16, dropout=True, blocks=3)
"""Three row tiles; a tile of outputs for each block."""


def test_the_products_by_hand() -> None:
    # A tile is 128 wide where a block has 64 outputs: whole tiles count.
    cost = lora_model.fused_forward(A100, SHAPE, (64, 128))
    tiles = 5 * 3
    assert cost.tiles == tiles
    matrices = 300 * 64 + 192 * 64 + 300 * 192
    adapters = 48 * 64 + 192 * 16 + 300 * 48
    assert cost.bytes == 2 * (matrices + adapters) + 4 * 300
    assert cost.flops == tiles * 2 * 64 * (64 * 128 + 64 * 16 + 16 * 128)
    assert cost.draws == tiles * 64 * 64 / 8

    plain = lora_model.fused_forward(A100, replace(SHAPE, dropout=False), (64, 128))
    assert plain.draws == 0
    assert plain.bytes == cost.bytes - 4 * 300

    given = lora_model.given_forward(SHAPE, (128, 256))
    assert given.tiles == 3 * 3
    assert given.bytes == 2 * (matrices + 192 * 16 + 300 * 48)
    assert given.flops == 9 * 2 * 128 * 256 * (64 + 16)
    assert given.draws == 0

    thin = lora_model.thin(SHAPE)
    assert thin.bytes == 2 * (300 * 64 + 48 * 64 + 300 * 48) + 4 * 300
    assert thin.tiles == 5
    assert thin.flops == 5 * 64 * 2 * 64 * 48
    assert thin.draws == 5 * 64 * 8

    wide = replace(SHAPE, size=4)
    assert lora_model.thin(wide).bytes == 4 * (300 * 64 + 48 * 64 + 300 * 48) + 4 * 300


def test_the_backward_pass_by_hand() -> None:
    dx = lora_model.input_gradient(SHAPE, (64, 128))
    assert dx.tiles == 5
    assert dx.bytes == 2 * (300 * 192 + 192 * 64 + 300 * 64 + 300 * 48 + 48 * 64) + 4 * 300
    assert dx.flops == 5 * 2 * 64 * 128 * (192 + 48)
    assert dx.draws == 5 * 64 * 128 / 8
    # 300 rows are 3 pieces; 64 outputs of a block are one step of 128 bytes, which is not split.
    main, added = lora_model.low(SHAPE)
    parts, sums = 3 * 192 * 16 * 4, 192 * 16 * 4 + 300 * 48 * 2
    assert main.bytes == 2 * (300 * 192 + 192 * 16 + 300 * 48) + parts
    assert main.tiles == 3 * 3
    assert main.flops == pytest.approx(4 * 300 * 192 * 16)
    assert added.bytes == parts + sums
    # 128 rows are one piece: nothing to add up.
    main, added = lora_model.low(replace(SHAPE, rows=128))
    assert main.bytes == 2 * (128 * 192 + 192 * 16 + 128 * 48) + 192 * 16 * 4 + 128 * 48 * 2
    assert added.bytes == 0
    # 8,192 rows in 32 pieces, with the 12 steps of 768 outputs in four runs, leave smaller parts than 64 and two.
    large = Shape(8192, 768, 768, 16)
    main, added = lora_model.low(large)
    parts = 32 * 768 * 16 * 4 + 4 * 8192 * 16 * 4
    assert main.tiles == 32 * 4
    assert main.bytes == 2 * (8192 * 768 + 768 * 16 + 8192 * 16) + parts
    assert added.bytes == parts + 768 * 16 * 4 + 8192 * 16 * 2

    # 64 inputs are one run of columns; 300 rows are 5 pieces of 64.
    main, added = lora_model.grad_a(SHAPE)
    result = 48 * 64 * 4
    assert main.bytes == 2 * (300 * 64 + 300 * 48) + 4 * 300 + 5 * result
    assert added.bytes == 6 * result
    # 768 inputs are 6 runs; 8,192 rows are 43 pieces of 192.
    main, added = lora_model.grad_a(large)
    assert main.tiles == 43 * 6
    assert main.bytes == 2 * (8192 * 768 + 8192 * 16) + 4 * 8192 + 43 * 16 * 768 * 4
    assert added.bytes == 44 * 16 * 768 * 4


def test_the_tiles_are_the_kernels_own() -> None:
    """By hand, then all shapes by the extension's own rules."""

    def tile(rows: int, columns: int, rank: int, *, size: int = 2, makes_s: bool = True) -> tuple[int, int]:
        shape = Shape(rows, 768, columns, rank, dropout=False, size=size)
        return lora_model.tile_shape(A100, shape, columns, 1, makes_s=makes_s)

    assert tile(8192, 768, 16) == WIDE
    assert tile(8192, 768, 32) == NARROW  # too few registers
    assert tile(8192, 768, 32, makes_s=False) == WIDE
    assert tile(8192, 768, 16, size=4) == NARROW
    assert tile(1024, 768, 16) == NARROW  # a third of the card
    # 256 wide tiles are three rounds of 108 multiprocessors, the last of 40; 1,024 narrow ones are nine and a half.
    assert tile(8192, 1024, 16) == tile(8192, 1024, 64, makes_s=False) == NARROW

    shapes = [
        (rows, columns, blocks, rank, dropout)
        for rows in (1, 64, 127, 128, 129, *ROWS, 1 << 20)
        for columns in (8, 128, 136, 384, 640, 768, 1024, 1536, 3072, 4096)
        for blocks in (1, 3)
        for rank in (0, 8, 16)
        for dropout in (False, True)
    ]
    mine = [
        lora_model.tile_shape(A100, Shape(m, 768, n * j, r or 64, dropout, j), n, j, makes_s=r > 0) == WIDE
        for m, n, j, r, dropout in shapes
    ]
    assert mine == takes_wide(shapes)
    assert 100 < sum(mine) < len(mine) - 100


def test_wgmma_s_cuts_are_the_kernels_own() -> None:
    """The width of the tiles, who makes s (and so draws the mask), and how often, for every layer."""
    shapes = [(rows, n // j, j) for _, n, j in LAYERS for rows in (1, 128, 129, *ROWS)]
    for (rows, columns, blocks), (width, *counts) in zip(shapes, cuts(shapes, 132), strict=True):
        shape = Shape(rows, 768, columns * blocks, 16, True, blocks)
        assert lora_model.tile_shape(H200, shape, columns, blocks) == (128, width)
        cost = lora_model.fused_forward(H200, shape, (128, width))
        assert [cost.tiles, cost.special, *(cost.busiest or ())] == counts
        assert cost.draws == counts[1] * 128 * 768 / 8


def test_the_cuts_of_ds_and_db_are_the_kernels_own() -> None:
    shapes = [
        Shape(rows, 768, outputs, rank, True, blocks, size)
        for rows in (1, 128, 300, 2048, 5000, 8192, 16384, 1 << 17)
        for outputs in (24, 384, 768, 2304, 3072)
        for rank in lora_model.PADDED
        for blocks in (1, 3)
        for size in (2, 4)
    ]
    numbers = [[s.rows, s.outputs, s.blocks, s.rank, s.size] for s in shapes]
    results = torch.zeros(len(shapes), 2, dtype=torch.int64)
    given = torch.tensor(numbers, dtype=torch.int64)
    load("lora_sm80_entry.cpp").call("lora_low_cuts", given, len(shapes), results)
    assert [tuple(row) for row in results.tolist()] == [lora_model.low_parts(shape) for shape in shapes]
    # At the sizes of the goals the parts are less than a third of dy.
    for outputs in (768, 1024, 3072):
        pieces, splits = lora_model.low_parts(Shape(8192, 768, outputs, 16))
        assert 3 * (pieces * outputs + splits * 8192) * 16 * 4 < 8192 * outputs * 2


@pytest.mark.parametrize("dropout", [False, True])
def test_the_width_that_wgmma_takes_is_a_good_one(dropout: bool) -> None:
    for inputs, outputs, blocks in LAYERS:
        for rows in ROWS:
            shape = Shape(rows, inputs, outputs, 16, dropout, blocks)
            taken = lora_model.tile_shape(H200, shape, outputs // blocks, blocks)
            times = {
                tile: lora_model.fused_forward(H200, shape, tile).seconds(H200, H200.matrix)
                for tile in ((128, 128), (128, 192), (128, 256))
            }
            assert times[taken] <= 1.1 * min(times.values()), (shape, taken, times)


def test_the_tiles_that_make_s() -> None:
    """768 outputs in tiles of 192: 32 rows of tiles for pairs of blocks, 4 tiles each; 66 pairs take 2 tiles each."""
    shape = Shape(8192, 768, 768, 16)
    cost = lora_model.fused_forward(H200, shape, (128, 192))
    assert cost.tiles == 256
    assert cost.busiest == (2, 1)
    assert cost.special == 128
    assert cost.draws == 128 * 128 * 768 / 8
    # 3,072 outputs: 16 tiles a row, 512 in all, 8 for each of 64 pairs.
    cost = lora_model.fused_forward(H200, replace(shape, outputs=3072), (128, 192))
    assert cost.busiest == (8, 1)
    assert cost.special == 128
    # Three blocks of outputs: a pair that goes from one to the next makes s of that one too.
    cost = lora_model.fused_forward(H200, replace(shape, outputs=2304, blocks=3), (128, 192))
    assert cost.busiest == (6, 2)
    assert cost.special == 2 * sum(
        1 + sum(place % 4 == 0 for place in range(begin + 1, min(begin + 6, 384)))
        for begin in range(0, 384, 6)
    )


def test_seconds() -> None:
    machine = Machine("made up", 80, 10, 1e9, 1e9, 1e12, 1e12, launch=1.0)
    tile = Tile(flops=1e11, draws=0.0, overhead=0.0)
    assert tile.seconds(machine, 1e12) == pytest.approx(1.0)
    # 84 instructions for 32 lanes at once, four of them a clock.
    drawn = Tile(0.0, draws=1e9, overhead=0.0)
    assert drawn.seconds(machine, 1e12) == pytest.approx(84 / 32 / 4)
    both = Tile(1e11, 1e9, 0.5)
    assert both.seconds(machine, 1e12) == pytest.approx(1.0 + lora_model.EXPOSED * 84 / 128 + 0.5)
    # 21 tiles on 10 multiprocessors: one has three.
    assert lora_model.Cost(0.0, tile, 21).seconds(machine, 1e12) == pytest.approx(4.0)
    assert lora_model.Cost(9e9, tile, 21).seconds(machine, 1e12) == pytest.approx(10.0)


def test_tf32_takes_twice_as_long_by_mma() -> None:
    shape = Shape(8192, 1024, 1024, 16, size=4)
    assert not lora_model.uses_sm90(H200, shape)
    half = lora_model.forward(A100, replace(shape, size=2))
    wide = lora_model.forward(A100, shape)
    assert 1.7 < wide.fused / half.fused < 2.1


@pytest.mark.parametrize("machine", lora_model.MACHINES, ids=lambda machine: machine.name)
def test_what_it_says(machine: Machine) -> None:
    """Sizes of the goals: the extension is between the bare product and the composition; more work takes longer."""
    for inputs, outputs, blocks in lora_model.SIZES:
        for rank in lora_model.PADDED:
            shape = Shape(8192, inputs, outputs, rank, True, blocks)
            ahead, behind = lora_model.forward(machine, shape), lora_model.backward(machine, shape)
            assert ahead.bare < ahead.best < ahead.composed
            assert behind.bare < behind.own < behind.composed
            plain = lora_model.forward(machine, replace(shape, dropout=False))
            assert plain.best <= ahead.best
            longer = lora_model.forward(machine, replace(shape, rows=16384))
            assert longer.best > 1.5 * ahead.best


# ---- the plan ----

LAYERS = [
    (inputs, outputs, blocks)
    for width, inner in ((384, 1536), (768, 3072), (1024, 4096))
    for inputs, outputs, blocks in (
        (width, width, 1),
        (width, 3 * width, 3),
        (width, inner, 1),
        (inner, width, 1),
    )
]
ROWS = (256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


def times(machine: Machine, shape: Shape, fused: bool) -> float:
    """Of a choice, over that of the better one."""
    found = lora_model.forward(machine, shape)
    return (found.fused if fused else found.split) / found.best


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0, 512), (512, 1536), (1536, 1 << 20)])
@pytest.mark.parametrize("few", [True, False], ids=["few rows", "many rows"])
def test_the_plan_is_the_model_s(few: bool, low: int, high: int, dropout: bool) -> None:
    """Of every cell of the table: on average within 6% of the better choice, and no other limit 1% better."""
    shapes = [
        Shape(rows, inputs, outputs, rank, dropout, blocks, size)
        for size in (2, 4)
        for inputs, outputs, blocks in LAYERS
        for rows in ROWS
        for rank in lora_model.PADDED
        if low < outputs <= high and (rows <= 2048) == few
    ]
    chosen = [plan(80, s.rows, s.outputs, s.rank, s.dropout)[0] == SM80 for s in shapes]
    mine = statistics.mean(times(A100, s, fused) for s, fused in zip(shapes, chosen, strict=True))
    assert mine < 1.06
    for limit in (0, *lora_model.PADDED):
        assert mine < 0.01 + statistics.mean(times(A100, s, s.rank <= limit) for s in shapes)


def test_one_kernel_is_never_much_slower_where_s_is_kept() -> None:
    for inputs, outputs, blocks in LAYERS:
        for rows in ROWS:
            for rank in lora_model.PADDED:
                for dropout in (False, True):
                    assert times(H200, Shape(rows, inputs, outputs, rank, dropout, blocks), True) < 1.03


# ---- the tables ----


def test_the_page_is_of_this_model() -> None:
    page = records.RESULTS / "lora-model.md"
    assert page.read_text(encoding="utf-8") == lora_model.markdown(), (
        "python -m bench.lora.model --markdown > bench/results/lora-model.md"
    )


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert lora_model.main([]) == 0
    said = capsys.readouterr().out
    assert "H200, 8,192 rows of bfloat16, microseconds" in said
    assert "768 x 2304 (3 blocks)" in said
    assert lora_model.main(["--markdown"]) == 0
    assert capsys.readouterr().out == lora_model.markdown()
