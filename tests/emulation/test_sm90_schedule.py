"""The index, swizzle and schedule logic of the sm_90a LoRA kernels, function by function, against the PTX ISA."""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from itertools import product
from typing import NamedTuple

import pytest
from support.sm90 import load_emulation

WIDTHS = (128, 192, 256)
THIRD_ROWS = (0, 16, 32, 64)
"""Rows of A in a stage of the forward kernel; none in that of the input's gradient."""
SHARED_BYTES = 227 * 1024
"""Of dynamic shared memory that a block may have on compute capability 9.0."""
VARIANTS = list(product(WIDTHS, THIRD_ROWS))


@pytest.fixture(scope="module")
def layout() -> ctypes.CDLL:
    return load_emulation(few=True)


def numbers(count: int, function: object, *arguments: object) -> list[int]:
    """What a function writes to its last argument."""
    out = (ctypes.c_int * count)()
    function(*arguments, out)  # type: ignore[operator]
    return list(out)


class Memory(NamedTuple):
    stages: int
    stores: int
    stage: int
    second: int
    third: int
    store: int
    barriers: int
    total: int


def memory_of(layout: ctypes.CDLL, columns: int, third_rows: int) -> Memory:
    return Memory(*numbers(8, layout.layout_memory, columns, third_rows))


# ---- Shared memory as TMA fills it. ----


def tma_image(rows: int) -> dict[int, tuple[int, int]]:
    """Where 128-byte swizzling puts (row, 16-byte chunk) of a box whose rows are 128 bytes: address to pair.

    PTX ISA, "Swizzling modes": the pattern repeats every 1024 bytes; in its line l (of 128 bytes), the chunk at
    place c is chunk c xor l of the unswizzled line.
    """
    return {row * 128 + place * 16: (row, place ^ (row % 8)) for row in range(rows) for place in range(8)}


def test_swizzle_is_that_of_tma(layout: ctypes.CDLL) -> None:
    image = tma_image(256)
    assert len(image) == 256 * 8
    for address, (row, chunk) in image.items():
        assert layout.layout_tile_offset(row, chunk) == address


def test_matrix_accesses_have_no_bank_conflicts(layout: ctypes.CDLL) -> None:
    """The eight rows of each 8 x 8 matrix lie in the 32 banks of 4 bytes once each."""
    for first_row, first_chunk in product((0, 16, 112), (0, 2, 4, 6)):
        lanes = [
            layout.layout_tile_offset(
                first_row + layout.layout_matrix(lane, 0), first_chunk + layout.layout_matrix(lane, 1)
            )
            for lane in range(32)
        ]
        for matrix in range(4):
            addresses = lanes[8 * matrix : 8 * matrix + 8]
            banks = {(address + 4 * word) // 4 % 32 for address in addresses for word in range(4)}
            assert len(banks) == 32


# ---- wgmma's operands, from the bits of the descriptors. ----


class Descriptor(NamedTuple):
    """PTX ISA, "Matrix descriptor": bits 0 to 13, 16 to 29, 32 to 45 in units of 16 bytes, 49 to 51, 62 and 63."""

    start: int
    leading: int
    stride: int
    base: int
    mode: int


def decode(bits: int) -> Descriptor:
    used = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
    assert bits & ~used == 0
    return Descriptor(
        (bits & 0x3FFF) * 16,
        (bits >> 16 & 0x3FFF) * 16,
        (bits >> 32 & 0x3FFF) * 16,
        bits >> 49 & 7,
        bits >> 62,
    )


def swizzled(address: int) -> int:
    return address ^ (address >> 7 & 7) << 4


def k_major_address(d: Descriptor, row: int, k: int) -> int:
    """128-byte swizzle, 16-bit elements: eight rows of 128 bytes are an atom; `stride` from atom to atom."""
    return swizzled(d.start + row // 8 * d.stride + row % 8 * 128 + 2 * k)


def mn_major_address(d: Descriptor, column: int, k: int) -> int:
    """Atoms of 64 columns by 8 along the sum: `leading` to the next 64 columns, `stride` to the next 8."""
    return swizzled(d.start + column // 64 * d.leading + k // 8 * d.stride + k % 8 * 128 + column % 64 * 2)


def test_descriptor_of_rows_reads_the_matrix(layout: ctypes.CDLL) -> None:
    """Row and element of every byte that the four products of a stage read, against the image that TMA left."""
    for base, rows in ((1024, 64), (17 * 1024, 128), (200 * 1024, 256)):
        image = tma_image(rows)
        for step in range(4):
            bits = layout.layout_descriptor_rows(base) + step * layout.layout_rows_step()
            d = decode(bits)
            assert (d.base, d.mode) == (0, 1)
            for row, k in product(range(rows), range(16)):
                address = k_major_address(d, row, k) - base
                chunk_row, chunk = image[address // 16 * 16]
                assert (chunk_row, 8 * chunk + address % 16 // 2) == (row, 16 * step + k)


def test_descriptor_of_columns_reads_the_matrix(layout: ctypes.CDLL) -> None:
    """The same of an operand whose rows run along the sum: blocks of 64 columns, each loaded as 64 rows."""
    image = tma_image(64)
    for base, columns in ((1024, 128), (17 * 1024, 192), (150 * 1024, 256)):
        for step in range(4):
            d = decode(layout.layout_descriptor_columns(base) + step * layout.layout_columns_step())
            assert (d.base, d.mode) == (0, 1)
            for column, k in product(range(columns), range(16)):
                block, address = divmod(mn_major_address(d, column, k) - base, 64 * 128)
                row, chunk = image[address // 16 * 16]
                assert (row, 64 * block + 8 * chunk + address % 16 // 2) == (16 * step + k, column)


# ---- Fragments. ----


def test_fragments_cover_their_matrices(layout: ctypes.CDLL) -> None:
    """Every element of a warp's rows has one owner, and owners are where the PTX ISA's figures have them."""
    for columns in (16, 192):
        owners = Counter(
            (layout.layout_accumulator(lane, i, 0), layout.layout_accumulator(lane, i, 1))
            for lane in range(32)
            for i in range(columns // 2)
        )
        assert owners == Counter(product(range(16), range(columns)))
    pairs = Counter(
        (layout.layout_operand(lane, i, 0), layout.layout_operand(lane, i, 1))
        for lane in range(32)
        for i in range(4)
    )
    assert pairs == Counter(product(range(16), range(0, 16, 2)))
    # Thread 5 is the second of the second row: figures "WGMMA .m64nNk16 register fragment layout".
    assert [layout.layout_accumulator(5, i, 0) for i in range(4)] == [1, 1, 9, 9]
    assert [layout.layout_accumulator(5, i, 1) for i in (0, 1, 2, 3, 4)] == [2, 3, 2, 3, 10]
    assert [(layout.layout_operand(5, i, 0), layout.layout_operand(5, i, 1)) for i in range(4)] == [
        (1, 2),
        (9, 2),
        (1, 10),
        (9, 10),
    ]


def test_accumulators_of_s_are_the_next_products_operand(layout: ctypes.CDLL) -> None:
    """Register i of step t holds the accumulators of two neighbouring columns."""
    for lane, step, i, e in product(range(32), range(4), range(4), range(2)):
        accumulator = layout.layout_pair_accumulator(step, i, e)
        assert layout.layout_accumulator(lane, accumulator, 0) == layout.layout_operand(lane, i, 0)
        assert layout.layout_accumulator(lane, accumulator, 1) == 16 * step + e + layout.layout_operand(
            lane, i, 1
        )


def test_matrix_loads_make_operands(layout: ctypes.CDLL) -> None:
    """ldmatrix gives lane l, of matrix i, the elements 2 (l % 4) and the next of row l / 4."""
    for lane, i in product(range(32), range(4)):
        giver = 8 * i + lane // 4
        assert layout.layout_matrix(giver, 0) == layout.layout_operand(lane, i, 0)
        assert 8 * layout.layout_matrix(giver, 1) + 2 * (lane % 4) == layout.layout_operand(lane, i, 1)


def test_each_draw_of_a_quad_is_made_once(layout: ctypes.CDLL) -> None:
    """The quad's lane i makes the draw that all four need for register i: its row, and its 8 columns."""
    for lane, i in product(range(32), range(4)):
        giver = lane // 4 * 4 + i
        assert layout.layout_draw(giver, 0) == layout.layout_operand(lane, i, 0)
        assert layout.layout_draw(giver, 1) == layout.layout_operand(lane, i, 1) // 8


@pytest.mark.parametrize("columns", WIDTHS)
def test_mask_bits_of_a_tile_have_places_of_their_own(layout: ctypes.CDLL, columns: int) -> None:
    pairs = columns // 16
    places = [layout.layout_pair_shift(pairs, pair) + bit for pair in range(pairs) for bit in range(8)]
    assert sorted(places) == list(range(columns // 2))
    accumulators = [
        layout.layout_pair_accumulator(pair, i, e) for pair, i, e in product(range(pairs), range(4), range(2))
    ]
    assert sorted(accumulators) == list(range(columns // 2))
    # Pushing a byte at the low end moves those before it up.
    word = 0
    for pair in range(pairs):
        word = word << 8 | pair + 1
    for pair in range(pairs):
        assert word >> layout.layout_pair_shift(pairs, pair) & 0xFF == pair + 1


# ---- Shared memory and registers. ----


@pytest.mark.parametrize(("columns", "third_rows"), VARIANTS)
def test_shared_memory(layout: ctypes.CDLL, columns: int, third_rows: int) -> None:
    memory = memory_of(layout, columns, third_rows)
    assert memory.total <= SHARED_BYTES
    assert memory.stages >= 3
    tiles = [(0, 128), (memory.second, columns), (memory.third, third_rows)]
    end = 0
    for start, rows in tiles:
        assert start == end
        assert start % 1024 == 0
        end = start + rows * 128
    assert memory.stage == end
    assert memory.store == memory.stages * memory.stage
    assert memory.store % 1024 == 0
    # Eight warps' buffers of 16 rows of 128 bytes; used in turn over tiles, so a tile uses each equally often.
    assert memory.barriers == memory.store + 8 * memory.stores * 16 * 128
    assert columns // 64 % memory.stores == 0
    places = [
        place
        for index in range(memory.stages)
        for place in numbers(2, layout.layout_places, columns, third_rows, index)
    ]
    assert len(set(places)) == 2 * memory.stages
    assert all(place % 8 == 0 and memory.barriers <= place <= memory.total - 8 for place in places)


@pytest.mark.parametrize(("columns", "third_rows"), VARIANTS)
def test_expected_bytes_are_those_of_the_boxes(layout: ctypes.CDLL, columns: int, third_rows: int) -> None:
    first, second, third = 128 * 128, columns * 128, third_rows * 128
    assert layout.layout_expected(columns, third_rows, 0) == first + second
    assert layout.layout_expected(columns, third_rows, 1) == first + second + third
    assert layout.layout_expected(columns, third_rows, 2) == second
    assert first + second + third < 1 << 20  # an mbarrier counts no further


def test_registers(layout: ctypes.CDLL) -> None:
    start, producer, consumer = numbers(3, layout.layout_registers)
    assert all(count % 8 == 0 and 24 <= count <= 256 for count in (start, producer, consumer))
    assert 384 * start <= 65536
    # What the loading warpgroup gives up is enough for the others.
    assert 128 * (producer + 2 * consumer) <= 384 * start


# ---- The ring. ----


class Barrier:
    """An mbarrier without bytes: a phase ends when all have arrived."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.pending = arrivals
        self.phase = 0

    def arrive(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            self.pending = self.arrivals
            self.phase += 1

    def passes(self, parity: int) -> bool:
        return self.phase % 2 != parity


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("cluster", [1, 2])
def test_ring_neither_stops_nor_overruns(layout: ctypes.CDLL, stages: int, cluster: int) -> None:
    """Loaders and warps of a cluster in random turns: what a warp reads is what it is there for, to the end."""
    chance = random.Random(stages)
    warps = 8
    assert layout.layout_empty_arrivals(cluster) == warps * cluster
    for items in [*range(1, 3 * stages + 2), 40]:
        ring = [numbers(2, layout.layout_ring, stages, item) for item in range(items)]
        # A load fills its stage in every block; a stage is full when all blocks' loads are there.
        full = [[Barrier(cluster) for _ in range(stages)] for _ in range(cluster)]
        empty = [[Barrier(warps * cluster) for _ in range(stages)] for _ in range(cluster)]
        held = [[[-1] * cluster for _ in range(stages)] for _ in range(cluster)]
        loaded = [0] * cluster
        read = [[0] * warps for _ in range(cluster)]
        while True:
            moves = []
            for block in range(cluster):
                item = loaded[block]
                if item < items and empty[block][ring[item][0]].passes(ring[item][1] ^ 1):
                    moves.append((block, -1))
                for warp, item in enumerate(read[block]):
                    if item < items and full[block][ring[item][0]].passes(ring[item][1]):
                        moves.append((block, warp))
            if not moves:
                break
            block, warp = chance.choice(moves)
            if warp < 0:
                stage = ring[loaded[block]][0]
                for target in range(cluster):
                    held[target][stage][block] = loaded[block]
                    full[target][stage].arrive()
                loaded[block] += 1
            else:
                item = read[block][warp]
                stage = ring[item][0]
                assert held[block][stage] == [item] * cluster
                for target in range(cluster):
                    empty[target][stage].arrive()
                read[block][warp] += 1
        assert loaded == [items] * cluster
        assert read == [[items] * warps] * cluster


# ---- Tiles. ----

SHAPES = [
    # rows, columns of a block of outputs, blocks of outputs
    (1, 8, 1),
    (128, 384, 1),
    (129, 200, 3),
    (1000, 768, 1),
    (8192, 768, 3),
    (8192, 1000, 1),
]


@pytest.mark.parametrize(("rows", "block_columns", "blocks"), SHAPES)
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
def test_tiles_cover_the_output_once(
    layout: ctypes.CDLL,
    rows: int,
    block_columns: int,
    blocks: int,
    columns: int,
    cluster: int,
    multiprocessors: int,
) -> None:
    arguments = (
        ctypes.c_int64(rows),
        ctypes.c_int64(block_columns),
        blocks,
        columns,
        cluster,
        multiprocessors,
    )
    clusters, tiles, share = numbers(3, layout.layout_schedule, *arguments)
    assert clusters * cluster <= max(multiprocessors, cluster)
    assert (clusters - 1) * share < tiles <= clusters * share
    covered: Counter[tuple[int, int, int]] = Counter()
    out = (ctypes.c_int * 4)()
    for index, rank in product(range(clusters), range(cluster)):
        place = 0
        while layout.layout_tile(*arguments, index, place, rank, out):
            row, block, column, first = out
            covered[row, block, column] += 1
            assert (first != 0) == (column == 0)
            # The blocks of a cluster stand below each other, in tiles of the same columns.
            assert row // 128 % cluster == rank
            place += 1
        assert 1 <= place <= share
    lines = -(-rows // (128 * cluster)) * cluster
    assert covered == Counter(
        product(range(0, 128 * lines, 128), range(blocks), range(0, block_columns, columns))
    )


def test_the_goals_shapes_fill_the_chip(layout: ctypes.CDLL) -> None:
    """8,192 rows on 66 clusters: the widths whose waves are fullest."""
    shapes = [(384, 1, 192), (768, 1, 192), (768, 3, 192), (1024, 1, 256), (3072, 1, 256)]
    for block_columns, blocks, width in shapes:
        assert (
            layout.layout_choose_columns(ctypes.c_int64(8192), ctypes.c_int64(block_columns), blocks) == width
        )
    assert [layout.layout_choose_cluster(ctypes.c_int64(rows)) for rows in (1, 128, 129)] == [1, 1, 2]
