"""The sm_90a LoRA kernels on the emulated machine of tests/emulation/sm90, and problems for them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
from support.emulation import (
    FLAGS,
    ROOT,
    WARNINGS,
    EmulationError,
    Replacement,
    compiled,
    compiler,
    compiler_version,
    source_tree,
)
from torch import Tensor

from mtbert.kernels import Dropout, reference

FOLDER = "tests/emulation/sm90"

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""mtbert::cuda::DType."""


def load_emulation(replacements: Sequence[Replacement] = (), *, few: bool = False) -> ctypes.CDLL:
    """The emulated kernels, compiled unless they were before; with faults planted as `build` does.

    few: only the variants for tiles of 128 columns, rank 8 or 16 and bfloat16, which are compiled sooner.
    """
    flags = [*FLAGS, "-I", FOLDER, *(["-DMTBERT_FEW_VARIANTS"] if few else []), *WARNINGS]
    if "clang" not in compiler_version():
        flags.append("-fno-gnu-unique")  # each library has its own functions' constants
    command = [compiler(), *flags]
    machine, entry = (f"{FOLDER}/{name}" for name in ("machine_host.cpp", "entry.cpp"))
    machine_sources = source_tree(machine, (ROOT / machine).read_text(encoding="utf-8"))
    part = compiled([*command, "-c"], "sm90_machine.o", machine_sources)
    sources = source_tree(entry, (ROOT / entry).read_text(encoding="utf-8"), replacements)
    library = ctypes.CDLL(str(compiled([*command, "-shared"], "sm90.so", sources, [part])))
    for name in ("emulate_forward", "emulate_input"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in (
        "layout_descriptor_rows",
        "layout_descriptor_columns",
        "layout_rows_step",
        "layout_columns_step",
    ):
        getattr(library, name).restype = ctypes.c_uint64
    return library


class _Mask(ctypes.Structure):
    _fields_ = [
        ("dropout_row", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_int64),
        ("step_pointer", ctypes.c_void_p),
        ("site", ctypes.c_int64),
        ("threshold", ctypes.c_int64),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "blocks", "rank")),
        ("ranks", ctypes.c_int64 * 3),
        ("dtype", ctypes.c_int),
        ("scale", ctypes.c_double),
        ("mask", _Mask),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    ]


class _Forward(ctypes.Structure):
    _fields_ = [
        ("shape", _Shape),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "a", "b", "out", "s")),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("kernel", ctypes.c_int),
    ]


class _Input(ctypes.Structure):
    _fields_ = [
        ("shape", _Shape),
        *((name, ctypes.c_void_p) for name in ("grad", "weight", "a", "ds", "dx")),
        ("grad_stride", ctypes.c_int64),
        ("dx_stride", ctypes.c_int64),
        ("kernel", ctypes.c_int),
    ]


class _Way(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("order", "late", "columns", "cluster", "multiprocessors")]


@dataclass(frozen=True)
class Case:
    """One product and how it is cut up and emulated."""

    rows: int
    inputs: int
    outputs: int
    rank: int = 16
    """Padded."""
    ranks: tuple[int, ...] = ()
    """Of the blocks; empty: they are not padded."""
    blocks: int = 1
    dtype: torch.dtype = torch.bfloat16
    p: float = 0.0
    bias: bool = True
    s_given: bool = False
    step_on_device: bool = False
    padding: int = 0
    """Elements between the rows of x, y, dy and dx; a multiple of 8."""
    bias_offset: int = 0
    columns: int = 128
    cluster: int = 1
    multiprocessors: int = 4
    order: int = 0
    late: bool = False
    seed: int = 1

    def but(self, **changes: Any) -> Case:
        """The same with changes."""
        return replace(self, **changes)

    def __str__(self) -> str:
        changed = (f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default)
        return ",".join(f"{f.name}={getattr(self, f.name)}".removeprefix("dtype=") for f in changed)

    @property
    def dropout(self) -> Dropout | None:
        """The mask; the seed needs both words, the step and the site all bits."""
        if self.p == 0.0:
            return None
        return Dropout(p=self.p, seed=(1 << 63) + 12345, step=0xFEDCBA98, site=0xF0000001)

    @property
    def used(self) -> tuple[int, ...]:
        """The blocks' own ranks."""
        return self.ranks or (self.rank,) * self.blocks

    def way(self) -> _Way:
        """What the emulator is told."""
        return _Way(self.order, self.late, self.columns, self.cluster, self.multiprocessors)


class Problem:
    """Random operands of a case. NaN stands in everything a kernel has to write, and around it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)
        low = case.blocks * case.rank
        self.x = self.matrix(case.rows, case.inputs, padding=case.padding)
        self.weight = self.matrix(case.outputs, case.inputs)
        self.grad = self.matrix(case.rows, case.outputs, padding=case.padding)
        self.a = self.matrix(low, case.inputs)
        self.b = self.matrix(case.outputs, case.rank)
        self.ds = self.matrix(case.rows, low)
        for block, used in enumerate(case.used):
            padding = slice(block * case.rank + used, (block + 1) * case.rank)
            of_block = slice(block * case.outputs // case.blocks, (block + 1) * case.outputs // case.blocks)
            self.a[padding], self.b[of_block, used:], self.ds[:, padding] = 0, 0, 0
        bias = self.matrix(1, case.outputs + case.bias_offset)[0]
        self.bias = bias[case.bias_offset :] if case.bias else None
        self.s = self.ds.clone() if case.s_given else self.unwritten(case.rows, low)
        self.out = self.unwritten(case.rows, case.outputs, case.padding)
        self.dx = self.unwritten(case.rows, case.inputs, case.padding)
        # Rows of any order, negative as int32 ones can be.
        self.dropout_row = (
            (torch.randperm(case.rows, generator=self.generator) * 4099 - 50).to(torch.int32).contiguous()
        )
        self.step = torch.tensor([0 if case.dropout is None else int(case.dropout.step)])

    def matrix(self, rows: int, columns: int, padding: int = 0) -> Tensor:
        """Normal values at the start of rows `padding` elements longer."""
        values = torch.randn(rows, columns + padding, generator=self.generator)
        return values.to(self.case.dtype)[:, :columns]

    def unwritten(self, rows: int, columns: int, padding: int = 0) -> Tensor:
        """NaN."""
        return torch.full((rows, columns + padding), float("nan"), dtype=self.case.dtype)[:, :columns]

    def keep(self) -> Tensor:
        """Of every element of x: 0, or the scale of what is kept, in float64."""
        case = self.case
        if case.dropout is None:
            return torch.ones(case.rows, case.inputs, dtype=torch.float64)
        mask = reference.dropout_mask(self.dropout_row, torch.arange(case.inputs), case.dropout)
        return mask.double() * case.dropout.scale

    def shape(self) -> _Shape:
        """The call's LoraShape."""
        case = self.case
        mask = _Mask()
        if case.dropout is not None:
            mask = _Mask(
                self.dropout_row.data_ptr(),
                case.dropout.seed,
                0 if case.step_on_device else case.dropout.step,
                self.step.data_ptr() if case.step_on_device else None,
                case.dropout.site,
                case.dropout.threshold,
            )
        return _Shape(
            case.rows,
            case.inputs,
            case.outputs,
            case.blocks,
            case.rank,
            (ctypes.c_int64 * 3)(*case.used),
            DTYPES[case.dtype],
            SCALE,
            mask,
            0,
            None,
        )

    def forward(self, library: ctypes.CDLL) -> None:
        """y and s. Raises EmulationError."""
        pointers = [None if t is None else t.data_ptr() for t in self.forward_operands()]
        call = _Forward(self.shape(), *pointers, self.x.stride(0), self.out.stride(0), 0)
        error = library.emulate_forward(
            ctypes.byref(call), int(self.case.s_given), ctypes.byref(self.case.way())
        )
        if error is not None:
            raise EmulationError(error.decode())

    def forward_operands(self) -> list[Tensor | None]:
        """In the order of LoraForward."""
        return [self.x, self.weight, self.bias, self.a, self.b, self.out, self.s]

    def input(self, library: ctypes.CDLL) -> None:
        """dx. Raises EmulationError."""
        operands = (self.grad, self.weight, self.a, self.ds, self.dx)
        call = _Input(
            self.shape(), *(t.data_ptr() for t in operands), self.grad.stride(0), self.dx.stride(0), 0
        )
        error = library.emulate_input(ctypes.byref(call), ctypes.byref(self.case.way()))
        if error is not None:
            raise EmulationError(error.decode())

    def expected_s(self) -> Tensor:
        """The sums before they are rounded, in float64."""
        return SCALE * (self.x.double() * self.keep()) @ self.a.double().t()

    def expected_out(self) -> Tensor:
        """From the s that the kernel made, in float64."""
        case = self.case
        out = self.x.double() @ self.weight.double().t()
        if self.bias is not None:
            out += self.bias.double()
        of_block = case.outputs // case.blocks
        for block in range(case.blocks):
            columns = slice(block * of_block, (block + 1) * of_block)
            low = self.s[:, block * case.rank : (block + 1) * case.rank].double()
            out[:, columns] += low @ self.b[columns].double().t()
        return out

    def expected_dx(self) -> Tensor:
        """In float64."""
        return self.grad.double() @ self.weight.double() + self.keep() * (self.ds.double() @ self.a.double())


SCALE = 0.37


def close(found: Tensor, expected: Tensor) -> None:
    """A result is its float64 value rounded once, from a float32 sum in some order."""
    assert not found.isnan().any()
    epsilon = torch.finfo(found.dtype).eps
    # Half a unit in the last place is eps / 2 of the value; the sums' own error is far below another half.
    limit = epsilon * expected.abs() + 1e-4 * expected.abs().max()
    worst = (found.double() - expected).abs() - limit
    assert worst.max() <= 0, f"off by {worst.max():.3g} at {divmod(int(worst.argmax()), found.shape[1])}"
