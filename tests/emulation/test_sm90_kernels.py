"""The sm_90a LoRA kernels' own source on an emulated machine, against float64, and faults planted in copies of it."""

from __future__ import annotations

import ctypes
from itertools import product

import pytest
import torch
from support.emulation import EmulationError, Replacement
from support.lora_variants import EVERY_KERNEL
from support.sm90 import Case, Problem, close, load_emulation

HEADERS = "csrc/cuda/lora"


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load_emulation()


def run_forward(library: ctypes.CDLL, case: Case) -> Problem:
    problem = Problem(case)
    problem.forward(library)
    if not case.s_given:
        close(problem.s, problem.expected_s())
    close(problem.out, problem.expected_out())
    assert problem.out.untyped_storage().size() == problem.out.stride(0) * case.rows * 2
    assert storage_outside(problem.out, case.padding).isnan().all()
    return problem


def run_input(library: ctypes.CDLL, case: Case) -> Problem:
    problem = Problem(case)
    problem.input(library)
    close(problem.dx, problem.expected_dx())
    assert storage_outside(problem.dx, case.padding).isnan().all()
    return problem


def storage_outside(matrix: torch.Tensor, padding: int) -> torch.Tensor:
    """What lies between the rows of a matrix."""
    rows, columns = matrix.shape
    return matrix.as_strided((rows, columns + padding), (columns + padding, 1))[:, columns:]


BASE = Case(rows=40, inputs=72, outputs=136)
# Sizes: one element of a tile, a whole tile, one more; sums shorter than a step, than the ring, and longer.
SIZES = [
    BASE.but(rows=1, inputs=8, outputs=8),
    BASE.but(rows=16, inputs=64, outputs=128),
    BASE.but(rows=129, inputs=136, outputs=264),
    BASE.but(rows=17, inputs=704, outputs=72, rank=8),
    BASE.but(rows=128, inputs=320, outputs=192, columns=192, p=0.1),
    BASE.but(rows=257, inputs=328, outputs=520, columns=256, cluster=2, p=0.1, rank=32),
]
VARIANTS = [
    BASE.but(rank=rank, dtype=dtype, columns=columns, p=p, outputs=272, inputs=200)
    for rank, dtype, columns, p in [
        (1 << 3, torch.bfloat16, 128, 0.1),
        (16, torch.float16, 192, 0.5),
        (32, torch.float16, 128, 0.1),
        (32, torch.bfloat16, 256, 0.0),
        (64, torch.bfloat16, 192, 0.1),
        (64, torch.float16, 256, 0.3),
        (64, torch.bfloat16, 128, 0.0),
    ]
]
# Every kernel that is compiled, with and without dropout.
EVERY = [
    BASE.but(rows=20, inputs=24, outputs=72, rank=rank, dtype=dtype, columns=columns, p=p)
    for rank, dtype, columns, p in product(
        (16, 32, 64), (torch.bfloat16, torch.float16), (128, 192, 256), (0.0, 0.1)
    )
]
BLOCKS = [
    BASE.but(blocks=3, outputs=3 * 72, p=0.1, rank=rank, cluster=cluster, rows=200, columns=columns)
    for rank, cluster, columns in [(8, 1, 128), (16, 2, 192), (64, 2, 128)]
] + [BASE.but(blocks=3, outputs=3 * 200, rank=32, p=0.1, columns=128, rows=300, cluster=2, multiprocessors=3)]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("case", [*SIZES, *VARIANTS, *BLOCKS], ids=str)
def test_forward_and_input(library: ctypes.CDLL, case: Case, late: bool) -> None:
    run_forward(library, case.but(late=late))
    run_input(library, case.but(late=late))


def test_every_kernel_that_is_compiled_runs(library: ctypes.CDLL) -> None:
    for case in EVERY:
        run_forward(library, case)
        run_input(library, case)
    names = {torch.bfloat16: "BF16", torch.float16: "FP16"}
    forward = {f"sm90 forward_kernel {names[case.dtype]} {case.columns} {case.rank}" for case in EVERY}
    inputs = {f"sm90 input_kernel {names[case.dtype]} {case.columns}" for case in EVERY}
    assert forward | inputs == {name for name in EVERY_KERNEL if name.startswith("sm90")}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("late", [False, True])
def test_any_order_of_threads_and_of_loads(library: ctypes.CDLL, order: int, late: bool) -> None:
    case = BASE.but(
        rows=260, inputs=392, outputs=264, cluster=2, p=0.1, multiprocessors=6, order=order, late=late
    )
    run_forward(library, case)
    run_input(library, case)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": False},
        {"bias_offset": 1},
        {"padding": 8},
        {"step_on_device": True, "p": 0.1},
        {"s_given": True},
        {"s_given": True, "p": 0.1, "blocks": 3, "outputs": 3 * 136, "rank": 8},
        {"s_given": True, "cluster": 2, "rows": 300, "multiprocessors": 2},
        {"p": 0.9999},
    ],
    ids=str,
)
def test_options(library: ctypes.CDLL, change: dict[str, object]) -> None:
    run_forward(library, BASE.but(**change))
    run_input(library, BASE.but(**change))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_result_is_the_same_however_it_is_cut(library: ctypes.CDLL, p: float) -> None:
    """Bit for bit: widths of tiles, clusters, numbers of multiprocessors (so who computes s, and how often)."""
    case = BASE.but(rows=300, outputs=2 * 264, inputs=200, blocks=2, p=p)
    results = []
    for columns, cluster, multiprocessors in [
        (128, 1, 1),
        (128, 1, 5),
        (128, 2, 100),
        (192, 2, 4),
        (256, 1, 3),
    ]:
        cut = case.but(columns=columns, cluster=cluster, multiprocessors=multiprocessors)
        forward, inputs = run_forward(library, cut), run_input(library, cut)
        results.append((forward.out, forward.s, inputs.dx))
    for result in results[1:]:
        for found, first in zip(result, results[0], strict=True):
            assert torch.equal(found, first)


@pytest.mark.parametrize("more", [0, 1])
def test_threshold_is_exact(library: ctypes.CDLL, more: int) -> None:
    """A lane that is equal to the threshold is kept: low and high halves of several words."""
    problem = Problem(BASE.but(p=0.5, inputs=16))
    for column in (0, 3, 6):
        lane = 0
        for bit in reversed(range(16)):
            case = problem.case.but(p=(lane | 1 << bit) / 65536)
            if Problem(case).keep()[3, column] != 0:
                lane |= 1 << bit
        p = (lane + more) / 65536
        if 0 < p < 0.99:
            case = BASE.but(p=p, inputs=16)
            assert (Problem(case).keep()[3, column] != 0) == (more == 0)
            run_forward(library, case)
            run_input(library, case)


def test_what_is_dropped_is_not_looked_at(library: ctypes.CDLL) -> None:
    """Infinity and NaN in dropped elements of x leave s finite; those of ds reach no dropped element of dx."""
    case = BASE.but(p=0.5, outputs=128)
    problem = Problem(case)
    dropped = problem.keep() == 0
    problem.x[dropped] = float("inf")
    problem.weight.zero_()
    problem.forward(library)
    assert not problem.s.isnan().any()
    problem = Problem(case)
    problem.ds[3] = float("nan")
    problem.input(library)
    assert torch.equal(problem.dx[3].isnan(), ~dropped[3])
    assert not problem.dx[4].isnan().any()


def test_blocks_of_outputs_do_not_touch(library: ctypes.CDLL) -> None:
    """NaN in one block's W, A and B stays in its outputs and its columns of s, also where tiles reach over."""
    case = BASE.but(blocks=3, outputs=3 * 72, rank=8, p=0.1)
    problem = Problem(case)
    problem.weight[72:144] = float("nan")
    problem.b[72:144] = float("nan")
    problem.a[8:16] = float("nan")
    problem.forward(library)
    assert problem.out[:, 72:144].isnan().all()
    assert not problem.out[:, :72].isnan().any()
    assert not problem.out[:, 144:].isnan().any()
    assert problem.s[:, 8:16].isnan().all()
    assert not problem.s[:, :8].isnan().any()


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 8},
        {"ranks": (1,), "p": 0.5},
        {"rank": 32, "ranks": (17,), "columns": 192},
        {"rank": 8, "ranks": (1, 0, 3), "blocks": 3, "outputs": 3 * 72, "cluster": 2, "rows": 140},
    ],
    ids=str,
)
def test_infinity_does_not_leave_the_rank(library: ctypes.CDLL, change: dict[str, object]) -> None:
    """Ranks are multiplied as 16 or more; zero times infinity is NaN."""
    case = BASE.but(**change)
    problem = Problem(case)
    column = int(problem.keep()[7].nonzero()[0])
    problem.x[7, column] = float("inf")
    # Positive, so that no sum of infinities is NaN.
    for matrix in (problem.weight, problem.a):
        matrix[:, column].abs_()
    problem.b.abs_()
    problem.forward(library)
    own = (torch.arange(case.rank) < torch.tensor(case.used)[:, None]).flatten()
    assert (problem.s[:, ~own] == 0).all()
    assert problem.s[7, own].isposinf().all()
    assert problem.out[7].isposinf().all()
    assert problem.out[:7].isfinite().all()
    assert problem.out[8:].isfinite().all()


# ---- Faults. ----

# Two tiles one after the other, for a cluster of two blocks, and more slices than stages.
FAULTY = BASE.but(rows=129, inputs=392, outputs=136, cluster=2, p=0.1, multiprocessors=2)

WAIT = "            machine::product_wait<1>();\n"
RELEASE = "            if (slice > 0) {\n                release_stage(previous);\n            }\n"
FAULTS = [
    # name, which kernel shows it, header, what becomes what
    ("swizzle", "forward", "sm90_layout.h", "(chunk ^ (row & 7))", "(chunk ^ (row & 3))"),
    (
        "stride_of_descriptor",
        "forward",
        "sm90_layout.h",
        "descriptor(address, 16, kAtomBytes)",
        "descriptor(address, 16, 512)",
    ),
    (
        "leading_offset",
        "input",
        "sm90_layout.h",
        "descriptor(address, kColumnBlockBytes, kAtomBytes)",
        "descriptor(address, kAtomBytes, kAtomBytes)",
    ),
    (
        "step_of_rows",
        "forward",
        "sm90_layout.h",
        "kRowsStep = kStep * kElementBytes >> 4",
        "kRowsStep = kStep >> 4",
    ),
    (
        "step_of_columns",
        "input",
        "sm90_layout.h",
        "kColumnsStep = kStep * kRowBytes >> 4",
        "kColumnsStep = kStep >> 3",
    ),
    (
        "draw_of_the_wrong_row",
        "forward",
        "sm90_layout.h",
        "operand_row(lane & ~3, lane & 3)",
        "operand_row(lane & ~3, 0)",
    ),
    ("phase_never_turns", "forward", "sm90_layout.h", "phase ^= 1u;", "phase ^= 0u;"),
    (
        "too_few_arrivals",
        "forward",
        "sm90_layout.h",
        "return kConsumerWarps * cluster;",
        "return kConsumerWarps + 0 * cluster;",
    ),
    (
        "bytes_of_a_not_expected",
        "forward",
        "sm90_layout.h",
        "(with_third ? memory.third_bytes : 0)",
        "(with_third ? 0 : memory.third_bytes)",
    ),
    (
        "tile_left_out",
        "input",
        "sm90_layout.h",
        "last < tiles ? last : tiles",
        "last < tiles ? last : tiles - 1",
    ),
    (
        "stage_never_free",
        "forward",
        "sm90_forward.h",
        "memory.empty(ring.stage), ring.phase ^ 1u",
        "memory.empty(ring.stage), ring.phase",
    ),
    (
        "load_without_waiting",
        "forward",
        "sm90_forward.h",
        "            machine::barrier_wait(shared + memory.empty(ring.stage), ring.phase ^ 1u);\n",
        "",
    ),
    (
        "products_without_waiting",
        "forward",
        "sm90_forward.h",
        "        machine::barrier_wait(shared + Plan::get().full(ring.stage), ring.phase);\n",
        "",
    ),
    (
        "mask_of_the_next_columns",
        "forward",
        "sm90_forward.h",
        "step * (kStep / kDropoutLanes)",
        "step * (kStep / kDropoutLanes) + 1",
    ),
    (
        "release_before_the_products_end",
        "forward",
        "sm90_forward.h",
        WAIT + RELEASE + "            previous",
        RELEASE + WAIT + "            previous",
    ),
    (
        "fragments_while_they_are_read",
        "forward",
        "sm90_forward.h",
        WAIT + RELEASE + "            MTBERT",
        WAIT.replace("1", "2") + RELEASE + "            MTBERT",
    ),
    (
        "result_before_the_products_end",
        "input",
        "sm90_input.h",
        "        machine::product_wait<0>();\n        release_stage(previous);",
        "        release_stage(previous);",
    ),
    (
        "no_fence",
        "input",
        "sm90_input.h",
        "        machine::product_fence();\n        MTBERT",
        "        MTBERT",
    ),
    (
        "mask_not_drawn_for_the_next",
        "input",
        "sm90_input.h",
        "draw_pair(next, pair++, row);",
        "draw_pair(next, ++pair, row);",
    ),
    (
        "bits_in_another_order",
        "input",
        "sm90_input.h",
        "place_of_bit = pair_shift(kPairs, pair) + bit",
        "place_of_bit = 8 * pair + bit",
    ),
    ("no_scale", "input", "sm90_input.h", "value * key.scale", "value"),
    (
        "half_of_a_shared_load",
        "input",
        "sm90_input.h",
        "column, depth + part);\n                } else",
        "column, depth + part);\n                } else if (place.rank == 0)",
    ),
    ("no_async_fence", "input", "sm90_common.h", "        machine::async_fence();\n", ""),
    (
        "buffer_before_it_is_read",
        "forward",
        "sm90_common.h",
        "            machine::tma_store_wait_read<kStores - 1>();\n",
        "",
    ),
    (
        "block_ends_too_early",
        "forward",
        "sm90_common.h",
        "    machine::warp_barrier();\n    machine::cluster_barrier();\n}\n\n// Hands",
        "}\n\n// Hands",
    ),
    ("no_fence_of_the_barriers", "forward", "sm90_common.h", "        machine::barrier_init_fence();\n", ""),
    (
        "barriers_before_the_cluster_meets",
        "forward",
        "sm90_common.h",
        "    machine::cluster_barrier();\n    return shared;",
        "    return shared;",
    ),
    ("quad_not_transposed", "forward", "sm90_common.h", "    transpose_quad(word, lane);\n", ""),
    (
        "arrival_at_this_block_alone",
        "forward",
        "sm90_common.h",
        "machine::barrier_arrive_at(shared + memory.empty(stage), lane);",
        "machine::barrier_arrive_at(shared + memory.empty(stage), 0);",
    ),
    (
        "bias_of_another_column",
        "forward",
        "sm90_common.h",
        "bias.pair[first / 4]",
        "bias.pair[first / 4 ^ 1]",
    ),
    (
        "bias_beyond_the_block",
        "forward",
        "sm90_common.h",
        "const int left = end - first;",
        "const int left = end - first + 8;",
    ),
]


@pytest.mark.parametrize(
    ("kernel", "header", "old", "new"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_a_fault_is_found(kernel: str, header: str, old: str, new: str) -> None:
    """By the emulator or by the result, in one of the orders and at one of the times of asynchronous work."""
    faulty = load_emulation([Replacement(f"{HEADERS}/{header}", old, new)], few=True)
    for order, late in product((0, 2, 1, 3), (True, False)):
        case = FAULTY.but(order=order, late=late)
        try:
            run_forward(faulty, case) if kernel == "forward" else run_input(faulty, case)
        except (EmulationError, AssertionError):
            return
    pytest.fail("nothing noticed")
