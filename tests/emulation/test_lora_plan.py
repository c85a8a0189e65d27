"""What the LoRA products' entry points decide on the host: which kernel serves, and which arguments overlap."""

from __future__ import annotations

import random

import pytest
import torch
from support.emulation import load
from support.lora_plan import SM80, SM80_SPLIT, SM90, plan


@pytest.mark.parametrize(
    ("architecture", "sm90", "expected"),
    [
        (80, False, SM80),
        (86, True, SM80),
        (90, True, SM90),
        (90, False, SM80),
        (100, True, SM80),
        (120, True, SM80),
    ],
)
def test_the_architecture_decides(architecture: int, sm90: bool, expected: int) -> None:
    assert plan(architecture, 512, 768, 8, True, sm90) == (expected, expected)


def test_two_kernels_serve_only_where_one_would_repeat_itself() -> None:
    for rows in (1, 2048, 2049, 1 << 20):
        for outputs in (8, 512, 520, 1536, 3072):
            for dropout in (False, True):
                forward = [plan(80, rows, outputs, rank, dropout)[0] for rank in (8, 16, 32, 64)]
                assert forward == sorted(forward)
                assert plan(90, rows, outputs, 64, dropout) == (SM90, SM90)
    assert plan(80, 8192, 3072, 8, True) == (SM80_SPLIT, SM80)
    assert plan(80, 2048, 3072, 16, True) == (SM80, SM80)
    assert plan(80, 2048, 3072, 32, True) == (SM80_SPLIT, SM80)
    assert plan(80, 8192, 768, 16, True) == (SM80, SM80)
    assert plan(80, 8192, 768, 32, True) == (SM80_SPLIT, SM80)


Region = tuple[int, int, int, int]
"""begin, rows, row_bytes, stride_bytes"""


def overlaps(pairs: list[tuple[Region, Region]]) -> list[bool]:
    flat = torch.tensor(pairs, dtype=torch.int64).reshape(-1)
    results = torch.zeros(len(pairs), dtype=torch.int64)
    load("lora_plan.cpp").call("lora_overlaps", flat, len(pairs), results)
    return [bool(result) for result in results]


def bytes_of(region: Region) -> set[int]:
    begin, rows, row, stride = region
    return {begin + r * stride + c for r in range(rows) for c in range(row)}


def test_overlap_is_exact_for_equal_strides() -> None:
    draw = random.Random(0)
    pairs: list[tuple[Region, Region]] = []
    for _ in range(3000):
        stride = draw.randint(1, 9)

        def region(stride: int = stride) -> Region:
            return draw.randint(1, 40), draw.randint(0, 5), draw.randint(1, stride), stride

        pairs.append((region(), region()))
    found = overlaps(pairs)
    assert found == [bool(bytes_of(a) & bytes_of(b)) for a, b in pairs]
    assert {True, False} == set(found)


def test_overlap_is_never_missed() -> None:
    draw = random.Random(1)
    pairs: list[tuple[Region, Region]] = []
    for _ in range(3000):
        sides = []
        for _ in range(2):
            row = draw.randint(1, 6)
            sides.append((draw.randint(1, 60), draw.randint(0, 5), row, draw.randint(row, 9)))
        pairs.append((sides[0], sides[1]))
    for (a, b), found in zip(pairs, overlaps(pairs), strict=True):
        shared = bytes_of(a) & bytes_of(b)
        assert found or not shared
        if not shared and (max(bytes_of(a), default=0) < b[0] or max(bytes_of(b), default=0) < a[0]):
            assert not found
