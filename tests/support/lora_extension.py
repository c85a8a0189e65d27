"""The six LoRA functions of mtbert._C.cuda on host memory, written from their contract alone, in NumPy.

They take what the extension takes: addresses as integers, sizes, strides. Every address must lie in a buffer of the
right size, which the views are made over; results are written where they belong and nowhere else.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WORD = np.uint64(0xFFFFFFFF)


def _view(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], stride: int | None = None, align: int = 16
) -> Tensor:
    """The tensor of a shape at an address; the rows of a matrix may lie `stride` elements apart."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    assert address != 0, "a null pointer"
    assert address % align == 0, "a misaligned address"
    row = 1
    for size in shape[1:]:
        row *= size
    apart = row if stride is None else stride
    if len(shape) > 1:
        assert apart >= row, "a stride below the row"
        assert apart * dtype.itemsize % 16 == 0, "a misaligned stride"
    count = (shape[0] - 1) * apart + row
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    strides = (apart, *(int(np.prod(shape[i + 1 :])) for i in range(1, len(shape))))
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def draws(seed: int, counter: tuple[Any, Any, int, int]) -> np.ndarray:
    """Philox4x32-10 of a counter whose first two words are arrays: uint64 [..., 4]."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    c = list(np.broadcast_arrays(*c))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high, low = np.uint64(32), _WORD
        c = [
            (second >> high) ^ c[1] ^ np.uint64(k0),
            second & low,
            (first >> high) ^ c[3] ^ np.uint64(k1),
            first & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=-1)


@dataclass
class Mask:
    """Which elements of [rows, columns] are kept, and their scale."""

    arguments: dict[str, Any]

    def kept(self, rows: int, columns: int) -> Tensor:
        g = self.arguments
        if g["threshold"] == 0 or rows == 0:
            return torch.ones(rows, columns, dtype=torch.bool)
        numbers = _view(g["dropout_row"], torch.int32, (rows,), align=4).numpy().astype(np.uint32)
        step = g["step"]
        if g["step_pointer"]:
            step = int(_view(g["step_pointer"], torch.int64, (1,), align=8)) & 0xFFFFFFFF
        groups = np.arange(-(-columns // 8))
        words = draws(g["seed"], (groups[None, :], numbers[:, None], g["site"], step))
        lanes = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=-1)
        decisions = lanes.reshape(rows, -1)[:, :columns] >= g["threshold"]
        return torch.from_numpy(np.ascontiguousarray(decisions))

    @property
    def scale(self) -> float:
        return 65536 / (65536 - self.arguments["threshold"])

    def apply(self, values: Tensor) -> Tensor:
        return torch.where(self.kept(*values.shape), values, 0.0)


@dataclass
class HostExtension:
    """Stands in for mtbert._C.cuda: `kernels.extension.cuda_stand_in(HostExtension())`."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """The functions called, with their arguments."""

    def _sizes(self, name: str, given: dict[str, Any]) -> tuple[int, int, int, int, int, torch.dtype]:
        self.calls.append((name, given))
        sizes = tuple(given[key] for key in ("rows", "inputs", "outputs", "blocks", "rank"))
        _, inputs, outputs, blocks, rank = sizes
        assert inputs % 8 == 0
        assert inputs > 0
        assert outputs % (8 * blocks) == 0
        assert outputs > 0
        assert rank in (8, 16, 32, 64)
        return (*sizes, DTYPES[given["dtype"]])

    def _held(self, given: dict[str, Any], values: Tensor) -> Tensor:
        """Columns of s or ds that only fill up a block's rank are zero, whatever was computed there."""
        ranks, rank = given["ranks"], given["rank"]
        assert len(ranks) == given["blocks"]
        assert all(0 <= r <= rank for r in ranks)
        held = torch.arange(rank) < torch.tensor(ranks)[:, None]
        return torch.where(held.reshape(-1), values, 0.0)

    def _groups(self, given: dict[str, Any]) -> list[slice]:
        if not given["bounds"]:
            assert given["groups"] == 1
            return [slice(0, given["rows"])]
        bounds = _view(given["bounds"], torch.int32, (given["groups"] + 1,), align=4).tolist()
        assert bounds[0] == 0
        assert bounds[-1] == given["rows"]
        return [slice(low, high) for low, high in pairwise(bounds)]

    def _spoil(self, given: dict[str, Any], size: int) -> None:
        """Write over all of the workspace."""
        if size:
            _view(given["workspace"], torch.uint8, (size,)).fill_(0xFF)

    def lora_forward(self, **given: Any) -> None:
        rows, inputs, outputs, blocks, rank, dtype = self._sizes("lora_forward", given)
        assert given.get("kernel", "auto") == "auto"
        x = _view(given["x"], dtype, (rows, inputs), given["x_stride"]).double()
        weight = _view(given["weight"], dtype, (outputs, inputs)).double()
        a = _view(given["a"], dtype, (blocks * rank, inputs)).double()
        b = _view(given["b"], dtype, (outputs, rank)).double().chunk(blocks)
        mask = Mask(given)
        s = self._held(given, given["scale"] * mask.scale * (mask.apply(x) @ a.t())).to(dtype)
        own = zip(s.double().chunk(blocks, dim=1), b, strict=True)
        y = x @ weight.t() + torch.cat([low @ up.t() for low, up in own], dim=1)
        if given["bias"]:
            y += _view(given["bias"], dtype, (outputs,), align=dtype.itemsize).double()
        _view(given["out"], dtype, (rows, outputs), given["out_stride"]).copy_(y)
        _view(given["s"], dtype, (rows, blocks * rank)).copy_(s)

    def lora_low_workspace(self, **given: Any) -> int:
        """Odd, so that a wrong size is noticed."""
        rows, _, outputs, _, _, _ = self._sizes("lora_low_workspace", given)
        return 16 * rows * given["groups"] + outputs if rows else 0

    def lora_low(self, **given: Any) -> None:
        rows, _, outputs, blocks, rank, dtype = self._sizes("lora_low", given)
        sizes = ("rows", "inputs", "outputs", "blocks", "rank", "dtype", "groups")
        self._spoil(given, self.lora_low_workspace(**{key: given[key] for key in sizes}))
        grad = _view(given["grad"], dtype, (rows, outputs), given["grad_stride"]).double()
        b = _view(given["b"], dtype, (outputs, rank)).double().chunk(blocks)
        own = zip(grad.chunk(blocks, dim=1), b, strict=True)
        ds = given["scale"] * torch.cat([part @ up for part, up in own], dim=1)
        _view(given["ds"], dtype, (rows, blocks * rank)).copy_(self._held(given, ds))
        if not given["grad_b"]:
            return
        s = _view(given["s"], dtype, (rows, blocks * rank)).double()
        grad_b = _view(given["grad_b"], torch.float32, (given["groups"], outputs, rank))
        for number, group in enumerate(self._groups(given)):
            whole = (grad[group].t() @ s[group]).reshape(blocks, -1, blocks, rank)
            own = torch.cat([whole[block, :, block] for block in range(blocks)])
            grad_b[number] = own

    def lora_input(self, **given: Any) -> None:
        rows, inputs, outputs, blocks, rank, dtype = self._sizes("lora_input", given)
        grad = _view(given["grad"], dtype, (rows, outputs), given["grad_stride"]).double()
        weight = _view(given["weight"], dtype, (outputs, inputs)).double()
        a = _view(given["a"], dtype, (blocks * rank, inputs)).double()
        ds = _view(given["ds"], dtype, (rows, blocks * rank)).double()
        mask = Mask(given)
        dx = grad @ weight + mask.scale * mask.apply(ds @ a)
        _view(given["dx"], dtype, (rows, inputs), given["dx_stride"]).copy_(dx)

    def lora_grad_a_workspace(self, **given: Any) -> int:
        rows, inputs, *_ = self._sizes("lora_grad_a_workspace", given)
        return 4 * rows + inputs * given["groups"] if rows else 0

    def lora_grad_a(self, **given: Any) -> None:
        rows, inputs, _, blocks, rank, dtype = self._sizes("lora_grad_a", given)
        sizes = ("rows", "inputs", "outputs", "blocks", "rank", "dtype", "groups")
        self._spoil(given, self.lora_grad_a_workspace(**{key: given[key] for key in sizes}))
        mask = Mask(given)
        x = mask.apply(_view(given["x"], dtype, (rows, inputs), given["x_stride"]).double())
        ds = _view(given["ds"], dtype, (rows, blocks * rank)).double()
        grad_a = _view(given["grad_a"], torch.float32, (given["groups"], blocks * rank, inputs))
        for number, group in enumerate(self._groups(given)):
            grad_a[number] = mask.scale * (ds[group].t() @ x[group])
