"""The sm_80 kernels of the LoRA products, their own source on the emulated GPU, against float64 with the same mask.

Two rules. That of the repository: the error is at most twice that of plain PyTorch in the same dtype plus eps times the
greatest magnitude; for float32, whose operands the kernels round to TF32, eps is 2^-10 and plain PyTorch multiplies
operands rounded so. And a sharper one, element by element: from the operands as the kernel rounds them, the result is
the exact one but for its own rounding and the additions', 2^-20 of the sum of the products' magnitudes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from support.emulation import EmulationError, Library, Replacement, load
from support.lora_variants import EVERY_KERNEL, name_of
from torch import Tensor

from mtbert.kernels import Dropout
from mtbert.kernels.philox import leading_columns_mask

ENTRY = "lora_sm80_entry.cpp"
CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
BRAIN, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
SCALE = 0.75
FUSED, GIVEN, THIN = 0, 1, 2


class Call(ctypes.Structure):
    """The entry file's structure of the same name."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("order", "dtype", "rows", "inputs", "outputs", "blocks", "rank", "wide_stride", "out_stride"),
            *("groups", "threshold", "seed", "step", "site", "rank_0", "rank_1", "rank_2"),
        )
    ]


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    rows: int
    inputs: int
    outputs: int  # of one block
    rank: int  # before it is padded
    blocks: int = 1
    threshold: int = 0
    padding: int = 0  # elements between the rows
    bias: bool = True
    bounds: tuple[int, ...] | None = None
    step_on_device: bool = False

    def __str__(self) -> str:
        shape = f"{str(self.dtype)[6:]}-{self.rows}x{self.inputs}x{self.blocks}x{self.outputs}-r{self.rank}"
        return f"{shape}-{self.threshold}"

    @property
    def padded(self) -> int:
        return next(size for size in (8, 16, 32, 64) if size >= self.rank)

    @property
    def low(self) -> int:
        return self.blocks * self.padded

    @property
    def all_outputs(self) -> int:
        return self.blocks * self.outputs

    @property
    def dropout(self) -> Dropout:
        return Dropout(p=self.threshold / 65536, seed=(9 << 40) + 77, step=41, site=6)

    @property
    def ranges(self) -> list[slice]:
        return [slice(a, b) for a, b in pairwise(self.bounds or (0, self.rows))]


TENTH = round(0.1 * 65536)
HALF_OF_ALL = 1 << 15
CASES = [
    Case(BRAIN, 1, 8, 8, 1, threshold=TENTH),
    Case(BRAIN, 15, 24, 24, 16, blocks=3, threshold=HALF_OF_ALL, padding=8, bounds=(0, 0, 3, 3, 15, 15)),
    Case(BRAIN, 17, 136, 264, 4, threshold=TENTH, padding=16, bias=False, step_on_device=True),
    Case(BRAIN, 127, 264, 24, 64, threshold=65535, bounds=(0, 63, 127)),
    Case(BRAIN, 129, 40, 136, 16, threshold=TENTH, padding=8),  # wide tiles
    Case(BRAIN, 300, 136, 136, 1, blocks=3, threshold=TENTH, bounds=(0, 1, 130, 131, 300)),  # wide tiles
    Case(BRAIN, 129, 264, 264, 64, blocks=3, padding=8),
    Case(BRAIN, 300, 264, 8, 16, bounds=(0, 300, 300)),
    Case(HALF, 17, 24, 136, 32, threshold=TENTH, padding=24, bounds=(0, 9, 17)),
    Case(HALF, 300, 72, 24, 16, threshold=HALF_OF_ALL, step_on_device=True),
    Case(FLOAT, 1, 8, 8, 1, threshold=TENTH, bias=False),
    Case(FLOAT, 15, 40, 136, 4, threshold=TENTH, padding=4, bounds=(0, 7, 15)),
    Case(FLOAT, 127, 24, 24, 16, threshold=HALF_OF_ALL, padding=12),
    Case(FLOAT, 129, 136, 40, 64, blocks=1, threshold=TENTH, bounds=(0, 64, 100, 129), step_on_device=True),
    Case(FLOAT, 33, 24, 8, 32, padding=4),
]
ONE_OF_EACH = [CASES[5], CASES[1], CASES[8], CASES[13]]


@pytest.fixture(scope="module")
def library() -> Library:
    return load(ENTRY)


# ---- data ----


def strided(rows: Tensor, padding: int) -> Tensor:
    """The rows with NaN between them, in memory that ends with the last row."""
    count, columns = rows.shape
    memory = torch.full((max(count * (columns + padding) - padding, 0),), torch.nan, dtype=rows.dtype)
    view = memory.as_strided(rows.shape, (columns + padding, 1))
    view.copy_(rows)
    return view


@dataclass
class Data:
    """Random operands of a case; s and ds stand for what other kernels computed."""

    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    grad: Tensor
    s: Tensor
    ds: Tensor
    dropout_row: Tensor
    step: Tensor
    bounds: Tensor | None

    @property
    def keep(self) -> Tensor:
        """bool [rows, inputs]."""
        case = self.case
        if case.threshold == 0:
            return torch.ones(case.rows, case.inputs, dtype=torch.bool)
        return leading_columns_mask(self.dropout_row, case.inputs, case.dropout)


def make(case: Case, seed: int = 1) -> Data:
    generator = torch.Generator().manual_seed(seed + case.rows + case.inputs + case.rank)

    def normal(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * factor).to(case.dtype)

    a, b = (normal(case.low, case.inputs), normal(case.all_outputs, case.padded))
    a.view(case.blocks, case.padded, -1)[:, case.rank :] = 0
    b[:, case.rank :] = 0
    limit = (1 << 31) - 1
    return Data(
        case,
        strided(normal(case.rows, case.inputs), case.padding),
        normal(case.all_outputs, case.inputs),
        normal(case.all_outputs) if case.bias else None,
        a,
        b,
        strided(normal(case.rows, case.all_outputs), case.padding),
        normal(case.rows, case.low),
        normal(case.rows, case.low),
        torch.randint(-limit, limit, (case.rows,), generator=generator, dtype=torch.int32),
        torch.tensor([case.dropout.step], dtype=torch.int64),
        None if case.bounds is None else torch.tensor(case.bounds, dtype=torch.int32),
    )


def call_of(case: Case, order: int) -> Tensor:
    """The structure's bytes. Where the step lies on the device, the one given here is another."""
    dropout = case.dropout
    step = 12345 if case.step_on_device else dropout.step
    fields = Call(
        *(order, CODES[case.dtype], case.rows, case.inputs, case.all_outputs, case.blocks, case.padded),
        *(case.inputs + case.padding, case.all_outputs + case.padding),
        *(len(case.ranges), case.threshold, dropout.seed, step, dropout.site),
        *(case.rank if block < case.blocks else 0 for block in range(3)),
    )
    return torch.frombuffer(bytearray(fields), dtype=torch.int64)


def mask_arguments(data: Data) -> tuple[Tensor | None, Tensor | None]:
    if data.case.threshold == 0:
        return None, None
    return data.dropout_row, data.step if data.case.step_on_device else None


def forward(library: Library, data: Data, mode: int, order: int = 0) -> tuple[Tensor, Tensor]:
    """y and s."""
    case = data.case
    out = strided(torch.full((case.rows, case.all_outputs), torch.nan, dtype=case.dtype), case.padding)
    s = data.s.clone() if mode == GIVEN else torch.full_like(data.s, torch.nan)
    a, b, weight, bias = data.a, data.b, data.weight, data.bias
    call = call_of(case, order)
    library.call("lora_forward", call, mode, SCALE, data.x, weight, bias, a, b, out, s, *mask_arguments(data))
    return out, s


def input_gradient(library: Library, data: Data, order: int = 0) -> Tensor:
    case = data.case
    dx = strided(torch.full((case.rows, case.inputs), torch.nan, dtype=case.dtype), case.padding)
    call = call_of(case, order)
    library.call("lora_input", call, data.grad, data.weight, data.a, data.ds, dx, *mask_arguments(data))
    return dx


def low(library: Library, data: Data, order: int = 0, wants_b: bool = True) -> tuple[Tensor, Tensor]:
    """ds and dB."""
    case = data.case
    ds = torch.full_like(data.ds, torch.nan)
    grad_b = torch.full((len(case.ranges), case.all_outputs, case.padded), torch.nan)
    s, target = (data.s, grad_b) if wants_b else (None, None)
    call = call_of(case, order)
    library.call("lora_low", call, SCALE, data.grad, data.b, s, ds, target, data.bounds)
    return ds, grad_b


def a_gradient(library: Library, data: Data, order: int = 0) -> Tensor:
    case = data.case
    grad_a = torch.full((len(case.ranges), case.low, case.inputs), torch.nan)
    call = call_of(case, order)
    library.call("lora_grad_a", call, data.x, data.ds, grad_a, data.bounds, *mask_arguments(data))
    return grad_a


# ---- references ----


def tf32(x: Tensor) -> Tensor:
    """As a product sees it: floats to the nearest with 10 bits of mantissa, ties away from zero."""
    if x.dtype != FLOAT:
        return x.contiguous()
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(FLOAT)


@dataclass
class Result:
    """One tensor: found, as PyTorch computes it in the same dtype, exact, and exact from the rounded operands."""

    found: Tensor
    plain: Tensor
    exact: Tensor
    sharp: Tensor
    magnitude: Tensor  # the sum of the products' magnitudes


def check(result: Result, dtype: torch.dtype) -> None:
    """Both rules. A float32 result of 16-bit operands (dB, dA) is held to float32's."""
    found, exact = result.found.double(), result.exact
    assert bool(found.isfinite().all())
    eps = 2.0**-10 if dtype == FLOAT else 2.0**-20 if result.found.dtype == FLOAT else torch.finfo(dtype).eps
    allowed = 2 * (result.plain.double() - exact).abs().max() + eps * exact.abs().max()
    error = (found - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    rounding = 0.0 if result.found.dtype == FLOAT else torch.finfo(dtype).eps / 2
    smallest = 2.0**-25 if result.found.dtype == HALF else 0.0
    bound = rounding * 1.001 * result.sharp.abs() + 2.0**-20 * result.magnitude + smallest
    beyond = ((found - result.sharp).abs() - bound).max()
    assert beyond <= 0, f"an element is {beyond:.3g} further off than its rounding"


def times(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a b from the operands as given, from the operands as a product sees them, and of magnitudes: float64."""
    sharp_a, sharp_b = tf32(a).double(), tf32(b).double()
    return a.double() @ b.double(), sharp_a @ sharp_b, sharp_a.abs() @ sharp_b.abs()


def per_block(data: Data, function: Callable[[Tensor, Tensor], Tensor], low: Tensor) -> Tensor:
    """function(columns of s, rows of B) of each block, beside each other."""
    lows, rows = low.chunk(data.case.blocks, dim=1), data.b.chunk(data.case.blocks)
    return torch.cat([function(s, b) for s, b in zip(lows, rows, strict=True)], dim=1)


def reference_s(data: Data, found: Tensor) -> Result:
    factor = SCALE * data.case.dropout.scale
    dropped = torch.where(data.keep, data.x, 0)
    exact, sharp, magnitude = times(dropped, data.a.T)
    plain = (tf32(dropped) @ tf32(data.a).T) * factor
    return Result(found, plain, factor * exact, factor * sharp, factor * magnitude)


def reference_y(data: Data, found: Tensor, s: Tensor, exact_s: Tensor) -> Result:
    """s: what the kernel rounded and multiplied with B. exact_s: what it stands for."""
    weight = times(data.x, data.weight.T)
    bias = torch.zeros(data.case.all_outputs, dtype=data.case.dtype) if data.bias is None else data.bias
    plain = tf32(data.x) @ tf32(data.weight).T + bias + per_block(data, lambda v, b: tf32(v) @ tf32(b).T, s)
    exact = weight[0] + bias.double() + per_block(data, lambda v, b: v @ b.double().T, exact_s)
    sharp = weight[1] + bias.double() + per_block(data, lambda v, b: times(v, b.T)[1], s)
    magnitude = weight[2] + bias.double().abs() + per_block(data, lambda v, b: times(v, b.T)[2], s)
    return Result(found, plain, exact, sharp, magnitude)


def reference_dx(data: Data, found: Tensor) -> Result:
    first, second = times(data.grad, data.weight), times(data.ds, data.a)
    kept = data.keep.double() * data.case.dropout.scale
    plain = tf32(data.grad) @ tf32(data.weight) + (tf32(data.ds) @ tf32(data.a)) * kept.to(data.case.dtype)
    return Result(found, plain, *(f + kept * s for f, s in zip(first, second, strict=True)))


def reference_ds(data: Data, found: Tensor) -> Result:
    parts = data.grad.chunk(data.case.blocks, dim=1), data.b.chunk(data.case.blocks)
    products = [times(g, b) for g, b in zip(*parts, strict=True)]
    plain = [tf32(g) @ tf32(b) for g, b in zip(*parts, strict=True)]
    three = [SCALE * torch.cat(columns, dim=1) for columns in zip(*products, strict=True)]
    return Result(found, torch.cat(plain, dim=1) * SCALE, *three)


def reference_grad_b(data: Data, found: Tensor) -> Result:
    def of(rows: slice) -> list[tuple[Tensor, ...]]:
        parts = data.grad[rows].chunk(data.case.blocks, dim=1), data.s[rows].chunk(data.case.blocks, dim=1)
        return [(*times(g.T, s), tf32(g).T.float() @ tf32(s).float()) for g, s in zip(*parts, strict=True)]

    groups = [[torch.cat(parts) for parts in zip(*of(rows), strict=True)] for rows in data.case.ranges]
    *three, plain = [torch.stack(tensors) for tensors in zip(*groups, strict=True)]
    return Result(found, plain, *three)


def reference_grad_a(data: Data, found: Tensor) -> Result:
    dropped, factor = torch.where(data.keep, data.x, 0), data.case.dropout.scale
    groups = [times(data.ds[rows].T, dropped[rows]) for rows in data.case.ranges]
    plain = [tf32(data.ds[rows]).T.float() @ tf32(dropped[rows]).float() for rows in data.case.ranges]
    three = [factor * torch.stack(tensors) for tensors in zip(*groups, strict=True)]
    return Result(found, factor * torch.stack(plain), *three)


# ---- accuracy ----


def assert_padding_is_untouched(tensor: Tensor) -> None:
    rows, columns = tensor.shape
    if tensor.stride(0) > columns and rows > 1:
        between = tensor.as_strided((rows - 1, tensor.stride(0) - columns), tensor.stride(), columns)
        assert bool(between.isnan().all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(library: Library, case: Case) -> None:
    data = make(case)
    out, s = forward(library, data, FUSED)
    low = reference_s(data, s)
    check(low, case.dtype)
    check(reference_y(data, out, s, low.exact), case.dtype)
    assert_padding_is_untouched(out)

    _, alone = forward(library, data, THIN)
    check(reference_s(data, alone), case.dtype)

    given, unchanged = forward(library, data, GIVEN)
    assert torch.equal(unchanged, data.s)
    check(reference_y(data, given, data.s, data.s.double()), case.dtype)
    assert_padding_is_untouched(given)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input(library: Library, case: Case) -> None:
    data = make(case)
    dx = input_gradient(library, data)
    check(reference_dx(data, dx), case.dtype)
    assert_padding_is_untouched(dx)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_low(library: Library, case: Case) -> None:
    data = make(case)
    ds, grad_b = low(library, data)
    check(reference_ds(data, ds), case.dtype)
    check(reference_grad_b(data, grad_b), case.dtype)
    for group, rows in enumerate(case.ranges):
        assert rows.start < rows.stop or not bool(grad_b[group].any())
    alone, untouched = low(library, data, wants_b=False)
    assert torch.equal(alone, ds)
    assert bool(untouched.isnan().all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grad_a(library: Library, case: Case) -> None:
    data = make(case)
    grad_a = a_gradient(library, data)
    check(reference_grad_a(data, grad_a), case.dtype)
    for group, rows in enumerate(case.ranges):
        assert rows.start < rows.stop or not bool(grad_a[group].any())


# Both kinds of tile, all ranks and sums of the blocks' ranks, with and without dropout.
EVERY = [
    Case(dtype, 20, 24, 24, rank, blocks=blocks, threshold=threshold, bounds=(0, 9, 20))
    for dtype in CODES
    for rank in (8, 16, 32, 64)
    for blocks, threshold in ((1, TENTH), (3, 0))
] + [
    Case(dtype, 140, 136, 136, rank, threshold=threshold)
    for dtype in (BRAIN, HALF)
    for rank in (8, 16)
    for threshold in (0, TENTH)
]


def test_every_kernel_that_is_compiled_runs() -> None:
    # Not optimised: so many variants take longer to compile than to run once.
    library = load(ENTRY, flags=["-DMTBERT_EVERY_VARIANT", "-O0"])
    for case in EVERY:
        run_forward(library, case)
        data = make(case)
        check(reference_s(data, forward(library, data, THIN)[1]), case.dtype)
        given, _ = forward(library, data, GIVEN)
        check(reference_y(data, given, data.s, data.s.double()), case.dtype)
        for run in (run_input, run_low, run_grad_a):
            run(library, case)
    text = torch.zeros(1 << 20, dtype=torch.uint8)
    library.call("take_launched", text, text.numel())
    names = bytes(text).partition(b"\0")[0].decode().splitlines()
    assert {name_of(name) for name in names} == {name for name in EVERY_KERNEL if name.startswith("sm80")}


# ---- what is dropped stays out; equal inputs give equal bits ----


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_nan_at_a_dropped_place_reaches_nothing(library: Library, case: Case) -> None:
    """The mask selects: 0 * NaN would be NaN."""
    data = make(case)
    dropped = ~data.keep
    assert bool(dropped.any())
    s = {mode: forward(library, data, mode)[1] for mode in (FUSED, THIN)}
    grad_a = a_gradient(library, data)
    data.x[dropped] = torch.nan
    for mode, expected in s.items():
        assert torch.equal(forward(library, data, mode)[1], expected)
    assert torch.equal(a_gradient(library, data), grad_a)

    column = case.inputs - 1
    clean = input_gradient(library, data)
    data.a[:, column] = torch.nan
    found = input_gradient(library, data)
    assert torch.equal(found[:, column].isnan(), data.keep[:, column])
    place = dropped[:, column]
    assert torch.equal(found[place, column], clean[place, column])


PADDED = [
    CASES[0],
    CASES[2],
    CASES[5],
    CASES[11],
    Case(BRAIN, 20, 40, 24, 20, blocks=3, threshold=TENTH),
    # Nothing is padded, but the kernel that serves is made for more columns.
    Case(FLOAT, 20, 40, 24, 8, blocks=3),
    Case(HALF, 20, 40, 24, 8, blocks=3),
]


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_infinity_does_not_leave_the_rank(library: Library, case: Case) -> None:
    """Rows of A and columns of B that fill up the rank are zero, and zero times infinity is NaN."""
    data = make(case)
    row = case.rows // 2
    column = int(data.keep[row].nonzero()[0])
    data.x[row, column], data.grad[row, 0] = torch.inf, torch.inf
    # Positive, so that no sum of infinities is NaN.
    for matrix in (data.weight[:, column], data.a[:, column], data.b):
        matrix.abs_()
    own = torch.arange(case.padded).repeat(case.blocks) < case.rank
    for mode in (FUSED, THIN):
        out, s = forward(library, data, mode)
        assert bool((s[:, ~own] == 0).all())
        assert bool(s[row, own].isposinf().all())
        if mode == FUSED:
            assert bool(out[row].isposinf().all())
            assert bool(out[torch.arange(case.rows) != row].isfinite().all())
    ds, _ = low(library, data)
    assert bool((ds[:, ~own] == 0).all())
    assert ds[row].isposinf().nonzero().flatten().tolist() == list(range(case.rank))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_order_of_threads_changes_no_bit(library: Library, case: Case) -> None:
    data = make(case)

    def everything(order: int) -> list[Tensor]:
        results = [*forward(library, data, FUSED, order), forward(library, data, THIN, order)[1]]
        results += [forward(library, data, GIVEN, order)[0], input_gradient(library, data, order)]
        return [*results, *low(library, data, order), a_gradient(library, data, order)]

    first = everything(0)
    for order in (1, 7):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(order), strict=True))


def test_no_rows(library: Library) -> None:
    data = make(Case(BRAIN, 0, 24, 24, 16, threshold=TENTH))
    out, s = forward(library, data, FUSED)
    assert out.shape == (0, 24)
    assert s.shape == (0, 16)
    assert input_gradient(library, data).shape == (0, 24)


# ---- planted faults: the emulation or the comparison has to find them ----

HEADERS = "csrc/cuda/lora/sm80_"
SMALL = Case(BRAIN, 80, 264, 136, 16, threshold=TENTH)
WIDE = Case(BRAIN, 140, 72, 136, 16, threshold=TENTH)
CUT = Case(BRAIN, 300, 24, 24, 16, threshold=TENTH, bounds=(0, 5, 140, 300))
MAIN_WAIT = """        machine::copy_async_wait<kStages - 2>();
        machine::block_barrier();
        copy_main();
"""
LATE_WAIT = """        machine::copy_async_wait<kStages - 2>();
        machine::block_barrier();
        copy_late(step + kStages - 1);
        multiply_main(step);
"""
LOW_WAIT = """                machine::copy_async_wait<kStages - 2>();
                machine::block_barrier();
"""


def run_forward(library: Library, case: Case) -> None:
    data = make(case)
    out, s = forward(library, data, FUSED)
    low = reference_s(data, s)
    check(low, case.dtype)
    check(reference_y(data, out, s, low.exact), case.dtype)


def run_input(library: Library, case: Case) -> None:
    data = make(case)
    check(reference_dx(data, input_gradient(library, data)), case.dtype)


def run_low(library: Library, case: Case) -> None:
    data = make(case)
    ds, grad_b = low(library, data)
    check(reference_ds(data, ds), case.dtype)
    check(reference_grad_b(data, grad_b), case.dtype)


def run_grad_a(library: Library, case: Case) -> None:
    data = make(case)
    check(reference_grad_a(data, a_gradient(library, data)), case.dtype)


@dataclass(frozen=True)
class Fault:
    """In a copy of a header `old`, good code, becomes `new`, where `{n}` is whether the fault is in force."""

    header: str
    old: str
    new: str
    run: Callable[[Library, Case], None]
    case: Case
    error: type[Exception]
    match: str


RACE = r"race: |under way|never written"
FAULTS = {
    "barrier of the main loop": Fault(
        "forward.h",
        MAIN_WAIT,
        MAIN_WAIT.replace("machine::block_barrier();", "if (!{n}) { machine::block_barrier(); }"),
        *(run_forward, SMALL, EmulationError, RACE),
    ),
    "wait of the main loop": Fault(
        "forward.h",
        LATE_WAIT,
        LATE_WAIT.replace(
            "machine::copy", "if ({n}) { machine::copy_async_wait<kStages - 1>(); } else machine::copy", 1
        ),
        *(run_forward, SMALL, EmulationError, RACE),
    ),
    "s beyond a rank of 8": Fault(
        "forward.h",
        "machine::store_shared(start + reads.offset() + Tile::kXOffset + panel_offset(row, 1)",
        "if (!{n}) machine::store_shared(start + reads.offset() + Tile::kXOffset + panel_offset(row, 1)",
        *(run_forward, replace(SMALL, rank=8, inputs=24), EmulationError, RACE),
    ),
    "no swizzle": Fault(
        "tile.h",
        "(piece ^ (row >> 3) % kPanelPieces)",
        "(piece ^ ({n} ? 0 : (row >> 3) % kPanelPieces))",
        *(run_forward, SMALL, EmulationError, "bank conflicts"),
    ),
    "wrong piece of a fragment": Fault(
        "tile.h",
        "2 * product + matrix / 2",
        "2 * product + ({n} ? matrix % 2 : matrix / 2)",
        *(run_forward, SMALL, AssertionError, "error"),
    ),
    "mask of the step before": Fault(
        "forward.h",
        "(step + 1) * kPairElements<T>",
        "({n} ? step : step + 1) * kPairElements<T>",
        *(run_forward, WIDE, AssertionError, "error"),
    ),
    "mask of the next row": Fault(
        "forward.h",
        "first_row + row_of(0, 1), p.rows",
        "first_row + row_of(0, 1) + ({n} ? 1 : 0), p.rows",
        *(run_forward, SMALL, AssertionError, "error"),
    ),
    "one row too many": Fault(
        "forward.h",
        "if (row < rows_there) {",
        "if (row < rows_there + ({n} ? 1 : 0)) {",
        *(run_forward, SMALL, EmulationError, "out, out of bounds"),
    ),
    "one column of pieces too many": Fault(
        "forward.h",
        "const bool there = copy_byte < x_bytes;",
        "const bool there = copy_byte < x_bytes + ({n} ? 16 : 0);",
        *(run_forward, SMALL, EmulationError, "out of bounds"),
    ),
    "mask after the sum over the outputs began": Fault(
        "input.h",
        "if (step == low_steps && p.mask",
        "if (step == low_steps + ({n} ? 1 : 0) && p.mask",
        *(run_input, SMALL, AssertionError, "error"),
    ),
    "accumulators' draws swapped": Fault(
        "mask.h",
        "column / kDropoutLanes + q / 2",
        "column / kDropoutLanes + ({n} ? 1 - q / 2 : q / 2)",
        *(run_input, SMALL, AssertionError, "error"),
    ),
    "rows of the next group": Fault(
        "low.h",
        "piece.end - first_row < kTogether ? piece.end - first_row : kTogether",
        "!{n} && piece.end - first_row < kTogether ? piece.end - first_row : kTogether",
        *(run_low, CUT, EmulationError, "of s, out of bounds"),
    ),
    "only the last rows of a piece": Fault(
        "low.h",
        "if (!is_first) {\n                                const auto before",
        "if (!is_first && !{n}) {\n                                const auto before",
        *(run_low, replace(CUT, rank=64), AssertionError, "error"),
    ),
    "s of the first rows": Fault(
        "low.h",
        "s_tile + pass * Tile::kSBytes);",
        "s_tile + ({n} ? 0 : pass) * Tile::kSBytes);",
        *(run_low, replace(CUT, bounds=None), AssertionError, "error"),
    ),
    "wait for dy": Fault(
        "low.h",
        LOW_WAIT,
        LOW_WAIT.replace("machine::block_barrier();", "if (!{n}) { machine::block_barrier(); }"),
        *(run_low, replace(CUT, outputs=264), EmulationError, RACE),
    ),
    "masked pieces without a barrier": Fault(
        "grad_a.h",
        "        machine::block_barrier();\n        copy_step",
        "        if (!{n}) { machine::block_barrier(); }\n        copy_step",
        *(run_grad_a, CUT, EmulationError, RACE),
    ),
    "mask of the piece beside": Fault(
        "grad_a.h",
        "first_column / kDropoutLanes + mine.column)",
        "first_column / kDropoutLanes + ({n} ? mine.column ^ 1 : mine.column))",
        *(run_grad_a, CUT, AssertionError, "error"),
    ),
    "a piece beyond the group": Fault(
        "pieces.h",
        "static_cast<int>((high - 1) / p.slab) + group",
        "static_cast<int>((high - ({n} ? 0 : 1)) / p.slab) + group",
        *(run_low, replace(CUT, bounds=(0, 256, 300)), EmulationError, "never written"),
    ),
}


@pytest.fixture(scope="module")
def faulty() -> Library:
    """All faults in one library, each in force when it is asked for."""
    replacements = [
        Replacement(
            HEADERS + fault.header, fault.old, fault.new.replace("{n}", f"(planted_fault == {number})")
        )
        for number, fault in enumerate(FAULTS.values(), start=1)
    ]
    return load(ENTRY, replacements, ["-DMTBERT_BFLOAT16_ONLY"])


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(faulty: Library, name: str) -> None:
    fault = FAULTS[name]
    faulty.call("plant", 0)
    fault.run(faulty, fault.case)
    faulty.call("plant", list(FAULTS).index(name) + 1)
    try:
        with pytest.raises(fault.error, match=fault.match):
            fault.run(faulty, fault.case)
    finally:
        faulty.call("plant", 0)
