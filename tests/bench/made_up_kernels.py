"""Run on its own, without Triton's interpreter: what the compile report says of made-up kernels and of recorded calls.

Prints JSON for test_kernel_report.py. The pytest process itself imports Triton for the interpreter, as a rule, and
cannot compile.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import torch
import triton
import triton.language as tl

from bench.kernels.calls import OPERATIONS
from bench.kernels.cases import launches_of, plain
from bench.kernels.compile import derive, variant_of
from bench.kernels.report import report, to_text
from bench.kernels.shapes import MINILM
from mtbert.kernels.triton_ops.launch import Launch


@triton.jit(do_not_specialize=["free"])
def add(x, out, nothing, count, one, free, factor, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    value = tl.load(x + place, mask=place < count * one + free, other=0.0) * factor
    if nothing is not None:
        value += tl.load(nothing)
    tl.store(out + place, value)


@triton.jit
def spilling(x, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    value = tl.load(x + place)
    tl.store(out + place, value * tl.sum(value))


@triton.jit
def oversized(x, y, out, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    row, inner, column = tl.arange(0, ROWS), tl.arange(0, INNER), tl.arange(0, COLUMNS)
    a = tl.load(x + row[:, None] * INNER + inner[None, :])
    b = tl.load(y + inner[:, None] * COLUMNS + column[None, :])
    tl.store(out + row[:, None] * COLUMNS + column[None, :], tl.dot(a, b))


@triton.jit
def mistaken(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.zeros([2 * SIZE], tl.float32))


def derived() -> dict[str, Any]:
    tensor = torch.zeros(64)
    options = {"SIZE": 32, "num_warps": 2}
    alike = derive(add, (tensor, tensor[1:], None, 32, 1, 32, 0.5), options)
    other = derive(add, (tensor, tensor[1:], None, 48, 1, 1, 2.0), options)
    unlike = derive(add, (tensor, tensor[1:], None, 33, 1, 32, 0.5), options)
    return {**asdict(alike), "other": other.key, "unlike": unlike.key}


def reported() -> dict[str, Any]:
    wide = torch.zeros(1 << 17, dtype=torch.bfloat16)
    launches = {
        "add": Launch(add, (1,), (torch.zeros(64), torch.zeros(64), None, 32, 1, 32, 0.5), {"SIZE": 32}),
        "spilling": Launch(
            spilling, (1,), (torch.zeros(1 << 14), torch.zeros(1 << 14)), {"SIZE": 1 << 14, "num_warps": 1}
        ),
        "oversized": Launch(oversized, (1,), (wide, wide, wide), {"ROWS": 256, "INNER": 512, "COLUMNS": 64}),
        "mistaken": Launch(mistaken, (1,), (torch.zeros(64),), {"SIZE": 32}),
    }
    rows = report([(variant_of(x), [name]) for name, x in launches.items()], ["sm_80", "sm_90"], 1)
    return {"rows": [asdict(row) for row in rows], "text": to_text(rows)}


def recorded_keys() -> dict[str, dict[str, list[str]]]:
    """For each operation, the kernels and keys of calls that differ only in what must not be compiled in."""
    setting = plain(MINILM, max_seqlen=64)
    changes: dict[str, dict[str, Any]] = {
        "as is": {},
        "1 token": {"lengths": (1,)},
        "16 tokens": {"lengths": (16,)},
        "17 tokens": {"lengths": (0, 17)},
        "1000 tokens": {"lengths": (64,) * 15 + (40,)},
        "16 rows": {"lengths": (3,) * 16},
        "a small seed": {"seed": 1},
        "a seed of 16": {"seed": 16},
        "a great seed": {"seed": 2**63},
        "step 0": {"step": 0},
        "step 1": {"step": 1},
        "step 16": {"step": 16},
        "a great step": {"step": 2**31},
        "another rate": {"p": 0.5},
    }
    found = {}
    for operation in OPERATIONS:
        for segments in (0, 3):
            if segments and operation in ("attention", "first_token_attention", "softmax", "dropout"):
                continue
            found[f"{operation}, {segments} segments"] = {
                name: sorted(
                    f"{v.kernel} {v.key}"
                    for v in map(
                        variant_of, launches_of(operation, replace(setting, groups=segments, **change))
                    )
                )
                for name, change in changes.items()
            }
    return found


if __name__ == "__main__":
    found = {"derived": derived(), "reported": reported(), "recorded": recorded_keys()}
    from mtbert.kernels.triton_ops import attention_tile  # as recorded_keys() left it

    print(json.dumps({**found, "interpreted": attention_tile._INTERPRETED.value}))
