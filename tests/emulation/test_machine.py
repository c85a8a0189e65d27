"""The emulated GPU: fragments and conversions as documented, every checker, and a whole product on top of them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable

import pytest
import torch
from support.emulation import EmulationError, Library, Replacement, build, load
from torch import Tensor

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ORDERS = [0, 1, 2, 3]  # forward, reversed, two shuffles
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}

RACE = r"race: byte \d+ of \w+( memory)? is (read, and \w+ \d+ wrote|written, and \w+ \d+ (read|wrote)) it"
UNWAITED = (
    r"load_shared: byte \d+ of shared memory is read while a copy_async16 of thread \d+ to it is under way"
)
NEVER_WRITTEN = r"load_shared: byte \d+ of shared memory is read and was never written"

# What each kernel of mini_kernels.cpp is stopped for when its fault is in. Which of two unordered accesses comes
# second, and so is the one that is reported, is a matter of the order.
FAULTS = {
    "read_without_barrier": RACE,
    "read_without_warp_barrier": RACE,
    "warp_barrier_across_warps": RACE,
    "shuffle_as_barrier": RACE,
    "overwrite_without_barrier": RACE,
    "reader_and_writer": RACE,
    "overwrite_after_many_readers": f"{RACE}|byte 0 of shared memory is written, and threads of several warps read it",
    "write_twice": r"store_shared: race: byte 28 of shared memory is written, and thread (5|50) wrote it",
    "matrix_without_warp_barrier": f"load_matrix_x4: {RACE}",
    "shared_out_of_bounds": r"^thread 63 \(warp 1, lane 31\) of block \(0, 0, 0\): store_shared: "
    r"4 bytes at byte 252 of shared memory, out of bounds: the block has 252$",
    "shared_below_start": r"^thread 0 .*4 bytes at byte -4 of shared memory, out of bounds",
    "shared_misaligned": r"store_shared: 16 bytes at byte \d+ of shared memory, not aligned to 16",
    "matrix_misaligned": r"load_matrix_x2: 16 bytes at byte 8 of shared memory, not aligned to 16",
    "shared_uninitialised": NEVER_WRITTEN,
    "shared_of_another_block": NEVER_WRITTEN,
    "global_out_of_bounds": r"^thread 31 \(warp 0, lane 31\) of block \(0, 0, 1\): load_global: "
    r"4 bytes at byte 256 of numbers, out of bounds: it has 256$",
    "global_below_start": r"^thread 0 .*load_global: 4 bytes at byte -4 of numbers, out of bounds: it has 256$",
    "store_out_of_bounds": r"^thread 31 .*store_global: 16 bytes at byte 496 of sums, out of bounds: it has 508$",
    "global_misaligned": r"load_global: 16 bytes at byte \d+ of numbers, not aligned to 16",
    "null_pointer": r"load_global: 4 bytes at a null pointer",
    "store_to_input": r"store_global: byte \d+ of numbers, which was given for reading",
    "global_uninitialised": r"^thread 23 .*load_global: byte 160 of workspace is read and was never written",
    "blocks_write_the_same": r"byte (252|504) of numbers is written, and a thread of another block wrote it",
    "blocks_read_what_one_writes": r"race: byte 0 of numbers is (written, and a thread of another block read it"
    r"|read, and a thread of another block wrote it)",
    "threads_share_global_bytes": RACE,
    "copy_without_wait": UNWAITED,
    "copy_waits_for_too_few": UNWAITED,
    "copy_without_barrier": f"{RACE}|{UNWAITED}|{NEVER_WRITTEN}",
    "copy_not_committed": UNWAITED,
    "copy_overwritten": r"store_shared: byte \d+ of .* is written while a copy_async16 of thread \d+ to it is under",
    "copy_into_stage_in_use": f"{RACE}|{UNWAITED}",
    "copy_source_out_of_bounds": r"copy_async16: 10 bytes at byte 240 of numbers, out of bounds: it has 248",
    "copy_source_misaligned": r"copy_async16: 8 bytes at byte 8 of numbers, not aligned to 16",
    "copy_of_17_bytes": r"copy_async16: 17 bytes, expected 0 to 16",
    "copies_left_behind": UNWAITED,
    "divergent_shuffle": r"divergence: it is at \w+ and thread \d+ of its warp at \w+",
    "divergent_barrier": r"^thread 33 .*it is at warp_barrier and thread 32 of its warp at block_barrier",
    "early_return": r"^thread 63 .*divergence: it has returned and thread 32 of its warp is at shuffle",
    "shuffle_from_lane_32": r"^thread 31 .*shuffle: lane 32 is not 0 to 31",
    "endless_loop": r"the block does not end: more than 10000 operations",
    "block_of_48_threads": r"a block of 48 threads: expected a multiple of 32 up to 1024",
}


@pytest.fixture(scope="module")
def kernels() -> Library:
    return load("mini_kernels.cpp")


@pytest.fixture(scope="module")
def gemm() -> Library:
    return load("mini_gemm.cpp")


# ---- layouts ----


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix_layout(kernels: Library, count: int, transposed: bool) -> None:
    """PTX ISA, ldmatrix: lane l gets elements 2 (l % 4) and the next of row (.trans: column) l / 4 of each matrix."""
    values = torch.arange(64 * count, dtype=torch.int16).mul_(257).reshape(count, 8, 8)
    words = torch.full((32, count), -1, dtype=torch.int32)
    kernels.call("load_matrices", 0, values, words, count, transposed)
    matrices = values.mT if transposed else values
    expected = matrices.reshape(count, 32, 2).transpose(0, 1).contiguous()
    torch.testing.assert_close(words.view(torch.int16).reshape(32, count, 2), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "transposed"), [(d, False) for d in DTYPES] + [(torch.bfloat16, True)], ids=str
)
def test_product_of_one_warp(kernels: Library, dtype: torch.dtype, transposed: bool) -> None:
    depth = 32 // dtype.itemsize
    generator = torch.Generator().manual_seed(11)
    a = torch.randn(16, depth, generator=generator).to(dtype)
    b = torch.randn(8, depth, generator=generator).to(dtype)
    start = torch.randn(16, 8, generator=generator)
    given = b.T.contiguous() if transposed else b
    for order in ORDERS:
        d = start.clone()
        kernels.call("product", order, DTYPES[dtype], a, given, d, transposed)
        if (
            dtype == torch.float32
        ):  # what the machine makes of floats that were not rounded: the low bits do not count
            a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
        expected = start.double() + a.double() @ b.double().T
        torch.testing.assert_close(d.double(), expected, rtol=0, atol=2e-6 * depth)


def fragment_indices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Where each lane's elements a_i, b_i and c_i lie in a [16, k], b [k, 8] and c [16, 8], flattened.

    PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k8", in its own terms.
    """
    a, b, c = [], [], []
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        if dtype == torch.float32:
            rows = [group if i in (0, 2) else group + 8 for i in range(4)]
            columns = [member if i < 2 else member + 4 for i in range(4)]
            a.append([row * 8 + column for row, column in zip(rows, columns, strict=True)])
            b.append([(member + 4 * i) * 8 + group for i in range(2)])
        else:
            rows = [group if i < 2 or 4 <= i < 6 else group + 8 for i in range(8)]
            columns = [member * 2 + (i & 1) + (8 if i >= 4 else 0) for i in range(8)]
            a.append([row * 16 + column for row, column in zip(rows, columns, strict=True)])
            b.append([(member * 2 + (i & 1) + (8 if i >= 2 else 0)) * 8 + group for i in range(4)])
        c.append([(group if i < 2 else group + 8) * 8 + member * 2 + (i & 1) for i in range(4)])
    return torch.tensor(a), torch.tensor(b), torch.tensor(c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_of_registers(kernels: Library, dtype: torch.dtype) -> None:
    """Exact: small whole numbers, each element with a weight of its own."""
    depth = 32 // dtype.itemsize
    a = (torch.arange(16)[:, None] * 3 + torch.arange(depth) * 5 % 7).to(dtype)
    b = (torch.arange(depth)[:, None] * 3 % 11 - torch.arange(8) * 2).to(dtype)
    c = torch.arange(128.0)
    at_a, at_b, at_c = fragment_indices(dtype)
    registers = c[at_c]
    kernels.call(
        "multiply_registers", 0, DTYPES[dtype], a.flatten()[at_a], b.flatten()[at_b], registers
    )  # two 16-bit elements a register, the first in its low half
    assert torch.equal(registers, (c.reshape(16, 8) + a.float() @ b.float()).flatten()[at_c])


@pytest.mark.parametrize("order", ORDERS)
def test_places_and_shuffles(kernels: Library, order: int) -> None:
    x, y, z = 3, 2, 2
    flat = torch.full((z * y * x * 64 * 10 + 1,), -1, dtype=torch.int32)
    kernels.call("places", order, flat, x, y, z)
    assert flat[-1] == -1  # written by no thread
    numbers = flat[:-1].reshape(z, y, x, 64, 10)
    thread = torch.arange(64, dtype=torch.int32)
    lane, warp = thread % 32, thread // 32
    shape = (z, y, x, 64)
    block = torch.meshgrid(*(torch.arange(size, dtype=torch.int32) for size in (z, y, x)), indexing="ij")
    columns = [
        thread,
        lane,
        warp,
        *(index[..., None] for index in reversed(block)),
        torch.full(shape, z, dtype=torch.int32),
        100 * warp + 5,
        100 * warp + (lane + 1) % 32,
        100 * warp + (lane ^ 3),
    ]
    assert torch.equal(numbers, torch.stack([column.expand(shape) for column in columns], dim=-1))


# ---- conversions ----


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)


def floats_of_interest(dtype: torch.dtype) -> Tensor:
    """Every value of the 16-bit type, every midpoint between neighbours, the floats beside those, and random bits."""
    values = all_halves(dtype).float()
    values = values[values.isfinite()].unique()
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    beyond = torch.tensor([65519.996, 65520.0, 65536.0, 3.4e38, float("inf"), 2.0**-25, 2.0**-26, 1e-45])
    exact = torch.cat([values, middles, beyond, -beyond]).view(torch.int32)
    random = torch.randint(-(1 << 31), 1 << 31, (200_000,), generator=torch.Generator().manual_seed(5))
    return torch.cat([exact, exact + 1, exact - 1, random.to(torch.int32)]).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_of_16_bits(kernels: Library, dtype: torch.dtype) -> None:
    halves = all_halves(dtype)
    floats = torch.zeros(halves.shape)
    kernels.call("convert", DTYPES[dtype], halves, floats, halves.numel())
    assert torch.equal(floats.isnan(), halves.float().isnan())
    assert torch.equal(floats[~floats.isnan()], halves.float()[~floats.isnan()])
    assert torch.equal(floats.signbit(), halves.float().signbit())

    floats = floats_of_interest(dtype)
    rounded = torch.zeros(floats.shape, dtype=dtype)
    kernels.call("convert", 2 + DTYPES[dtype], floats, rounded, floats.numel())
    nan = floats.isnan()
    assert bool((rounded[nan].view(torch.int16) == 0x7FFF).all())
    assert torch.equal(rounded[~nan].view(torch.int16), floats[~nan].to(dtype).view(torch.int16))


def test_conversion_to_tf32(kernels: Library) -> None:
    floats = floats_of_interest(torch.bfloat16)
    bits = floats.view(torch.int32)
    ties = (bits & ~0x1FFF) | 0x1000
    floats = torch.cat([floats, ties.view(torch.float32), (ties - 1).view(torch.float32)])
    result = torch.zeros(floats.shape)
    kernels.call("convert", 4, floats, result, floats.numel())
    assert not bool((result.view(torch.int32) & 0x1FFF).any())
    assert torch.equal(result.isnan(), floats.isnan())
    finite = floats.abs() < 2.0**127
    below = (floats[finite].view(torch.int32) & ~0x1FFF).view(torch.float32).double()
    above = ((floats[finite].view(torch.int32) & ~0x1FFF) + 0x2000).view(torch.float32).double()
    exact = floats[finite].double()
    expected = torch.where(
        (exact - below).abs() < (above - exact).abs(), below, above
    )  # a tie goes away from zero
    assert torch.equal(result[finite].double(), expected)


# ---- checkers ----


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(kernels: Library, name: str) -> None:
    for order in range(20):
        kernels.call("run_case", name.encode(), 0, order)
        with pytest.raises(EmulationError, match=FAULTS[name]):
            kernels.call("run_case", name.encode(), 1, order)
        kernels.call("run_case", name.encode(), 0, order)  # nothing is left of the fault


def test_every_case_is_named(kernels: Library) -> None:
    count = torch.zeros(1, dtype=torch.int64)
    kernels.call("count_cases", count)
    assert count.item() == len(FAULTS)


# ---- a product through everything: asynchronous copies, stages, swizzle, fragments, odd sizes ----


def run_gemm(library: Library, order: int, dtype: torch.dtype, m: int, n: int, k: int) -> tuple[float, int]:
    """The largest error, and the bank conflicts; what lies between the rows is NaN."""
    generator = torch.Generator().manual_seed(m + n + k)
    strides = [(k + 7) // 8 * 8 + extra for extra in (0, 8)]
    a, b = (
        torch.cat(
            [torch.randn(rows, k, generator=generator), torch.full((rows, stride - k), torch.nan)], dim=1
        ).to(dtype)
        for rows, stride in zip((m, n), strides, strict=True)
    )
    c = torch.full((m, n), torch.nan)
    conflicts = torch.zeros(1, dtype=torch.int64)
    library.call("gemm", order, DTYPES[dtype], a, b, c, m, n, k, *strides, conflicts)
    error = (c.double() - a[:, :k].double() @ b[:, :k].double().T).abs().max()
    return float(error.nan_to_num(torch.inf)), int(conflicts.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_product(gemm: Library, order: int, dtype: torch.dtype) -> None:
    for m, n, k in [(1, 1, 1), (63, 33, 31), (101, 45, 77), (64, 64, 129)]:
        error, conflicts = run_gemm(gemm, order, dtype, m, n, k)
        assert error < 1e-4
        assert conflicts == 0


GEMM = "tests/emulation/mini_gemm.h"
PLANTED = {
    "barrier": (Replacement(GEMM, "block_barrier();", ";"), r"race: |under way|never written"),
    "wait": (Replacement(GEMM, "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>"), r"under way"),
    "bound": (Replacement(GEMM, "row < m && column < n", "row <= m && column < n"), r"of c, out of bounds"),
    "swizzle": (Replacement(GEMM, "warp * 16 + lane % 16, 2 * half", "warp * 16 + lane % 8, 2 * half"), None),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_in_the_product_is_found(fault: str) -> None:
    replacement, message = PLANTED[fault]
    library = load("mini_gemm.cpp", [replacement])
    for order in ORDERS:
        if message is None:
            assert run_gemm(library, order, torch.bfloat16, 101, 45, 77)[0] > 0.1
        else:
            with pytest.raises(EmulationError, match=message):
                run_gemm(library, order, torch.bfloat16, 101, 45, 77)


def test_bank_conflicts_are_counted() -> None:
    library = load("mini_gemm.cpp", [Replacement(GEMM, "16 * (piece ^ (row / 2 % 4))", "16 * piece")])
    error, conflicts = run_gemm(library, 0, torch.bfloat16, 64, 32, 32)
    assert error < 1e-4
    assert conflicts > 0


def test_replacement_must_occur() -> None:
    with pytest.raises(AssertionError, match="0 times"):
        load("mini_gemm.cpp", [Replacement(GEMM, "no such text", "")])
    with pytest.raises(AssertionError, match="does not include"):
        load("mini_gemm.cpp", [Replacement("csrc/cuda/dropout.h", "namespace", "")])


# ---- sanitizers: what the emulation itself cannot see ----


def test_sanitizers(sanitized: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    """Every kernel here is clean under AddressSanitizer, and an overrun of a thread's own array is found."""
    clean = sanitized("3")
    assert clean.returncode == 0, clean.stdout + clean.stderr
    assert "the loop ran to 3" in clean.stdout
    overrun = sanitized("4")
    assert overrun.returncode != 0
    assert "all cases ran" in overrun.stdout
    assert re.search(r"stack-buffer-overflow|index 4 out of bounds", overrun.stderr), overrun.stderr


@pytest.fixture
def sanitized() -> Callable[[str], subprocess.CompletedProcess[str]]:
    try:
        program = build(
            "mini_kernels.cpp",
            flags=[*SANITIZERS, "-O1", "-DMTBERT_EMULATION_PROGRAM"],
            executable=True,
        )
    except AssertionError as problem:
        if "cannot find" in str(problem) and "san" in str(problem):
            pytest.skip("the compiler comes without its sanitizers' libraries")
        raise
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
    }  # a fault leaves its threads where they stand

    def run(argument: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, argument], capture_output=True, text=True, timeout=120, env=environment, check=False
        )

    return run
