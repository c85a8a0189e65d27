"""Dropout by the Triton kernel: Philox against its published vectors, and the bits of the reference."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from support.kernel_checks import DROPOUT, gradients, poisoned

from mtbert.kernels import Dropout, dropout, reference
from mtbert.kernels.triton_ops import dropout as operation
from mtbert.kernels.triton_ops.launch import launch, mask_arguments
from mtbert.kernels.triton_ops.philox import draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONES = 0xFFFFFFFF


@triton.jit
def _one_draw(counter, out, seed_low, seed_high):
    c0, c1 = tl.load(counter + 0), tl.load(counter + 1)
    c2, c3 = tl.load(counter + 2), tl.load(counter + 3)
    w0, w1, w2, w3 = draw(seed_low, seed_high, c0, c1, c2, c3)
    tl.store(out + 0, w0)
    tl.store(out + 1, w1)
    tl.store(out + 2, w2)
    tl.store(out + 3, w3)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES), (ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    device: torch.device, key: tuple[int, int], counter: tuple[int, ...], words: tuple[int, ...]
) -> None:
    """The test vectors of the Random123 distribution."""
    chosen = Dropout(p=0.1, seed=key[0] | key[1] << 32, step=0, site=0)
    given = torch.tensor(counter, dtype=torch.int64).to(torch.int32).to(device)
    found = torch.zeros(4, dtype=torch.int64, device=device)
    launch(_one_draw, (1,), given, found, *mask_arguments(chosen)[0][:2])
    assert tuple(found.tolist()) == words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 24, 384, 1500])
def test_mask_and_values_are_the_reference_s_bit_for_bit(
    device: torch.device, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(37, columns).to(dtype).to(device)
    rows = torch.randint(-(2**31), 2**31 - 1, (37,), dtype=torch.int32).to(device)
    expected = reference.dropout(x, rows, DROPOUT)
    poisoned(monkeypatch)
    assert torch.equal(dropout(x, rows, DROPOUT), expected)


@pytest.mark.parametrize("p", [0.0001, 0.5, 0.99])
def test_greatest_seed_step_and_site(device: torch.device, p: float) -> None:
    x = torch.ones(16, 200, device=device)
    rows = torch.arange(16, dtype=torch.int32, device=device)
    chosen = Dropout(p=p, seed=2**64 - 1, step=2**32 - 1, site=2**32 - 1)
    assert torch.equal(dropout(x, rows, chosen), reference.dropout(x, rows, chosen))


def test_a_step_on_the_device_is_the_step(device: torch.device) -> None:
    x = torch.ones(16, 200, device=device)
    rows = torch.arange(16, dtype=torch.int32, device=device)
    for step in (0, 7, 2**32 - 1):
        there = Dropout(p=0.1, seed=3, step=torch.tensor(step, device=device), site=4)
        here = Dropout(p=0.1, seed=3, step=step, site=4)
        assert torch.equal(dropout(x, rows, there), dropout(x, rows, here))
        assert torch.equal(reference.dropout(x, rows, there), dropout(x, rows, here))


def test_what_is_dropped_may_be_nan_and_gradients_are_masked_alike(device: torch.device) -> None:
    rows = torch.arange(8, dtype=torch.int32, device=device)
    kept = reference.dropout_mask(rows, torch.arange(64, device=device), DROPOUT)
    x = torch.where(kept, 1.0, float("nan"))
    output, gradient = gradients(lambda x: dropout(x, rows, DROPOUT), [x], x)
    expected = torch.where(kept, torch.tensor(DROPOUT.scale, dtype=torch.float32), 0.0)
    assert torch.equal(output, expected)
    assert torch.equal(gradient, expected)


def test_nothing_at_all(device: torch.device) -> None:
    rows = torch.empty(0, dtype=torch.int32, device=device)
    assert dropout(torch.empty(0, 5, device=device), rows, DROPOUT).shape == (0, 5)


def test_the_operator_keeps_torch_s_rules(device: torch.device) -> None:
    x = torch.randn(5, 24, device=device)
    rows = torch.arange(5, dtype=torch.int32, device=device)
    torch.library.opcheck(operation._dropout, (x, rows, *mask_arguments(DROPOUT)))
