"""The generator and the mask rule, against published vectors and a loop in plain Python."""

from __future__ import annotations

import pytest
import torch
from support.kernel_checks import DROPOUT

from mtbert.kernels import Dropout, reference

ONES = 0xFFFFFFFF


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
def test_known_answers(key: tuple[int, int], counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    """The test vectors of the Random123 distribution."""
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in reference.philox4x32(key, (c0, c1, c2, c3))) == words


def _lane(row: int, column: int, dropout: Dropout) -> int:
    """DESIGN.md's rule with Python's integers, one element at a time."""
    c = [column // 8, row & ONES, dropout.site, dropout.step]
    k = [dropout.seed & ONES, dropout.seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    lane = column % 8
    return (c[lane // 2] >> (16 * (lane % 2))) & 0xFFFF


def test_mask_follows_the_rule_element_by_element() -> None:
    rows = torch.tensor([0, 1, 4096, 2**31 - 1, -5], dtype=torch.int32)
    columns = torch.tensor([0, 1, 7, 8, 9, 383, 4096, 12 * 4096 + 511])
    mask = reference.dropout_mask(rows, columns, DROPOUT)
    expected = [[_lane(int(r), int(c), DROPOUT) >= DROPOUT.threshold for c in columns] for r in rows]
    assert mask.tolist() == expected


def test_share_dropped_and_scale() -> None:
    dropout = Dropout(p=0.3, seed=1, step=2, site=3)
    mask = reference.dropout_mask(torch.arange(1000, dtype=torch.int32), torch.arange(1000), dropout)
    # Ten standard errors of a million draws.
    assert abs((~mask).double().mean().item() - 0.3) < 0.005
    assert dropout.scale * (65536 - dropout.threshold) == 65536


@pytest.mark.parametrize("change", [{"seed": 9}, {"seed": 1 << 40}, {"step": 8}, {"site": 4}])
def test_every_field_changes_the_mask(change: dict[str, int]) -> None:
    rows, columns = torch.arange(16, dtype=torch.int32), torch.arange(64)
    base = {"seed": 5, "step": 7, "site": 3}
    mask = reference.dropout_mask(rows, columns, Dropout(p=0.5, **base))
    other = reference.dropout_mask(rows, columns, Dropout(p=0.5, **(base | change)))
    # Independent masks of rate one half agree on half of the elements.
    assert 0.4 < (mask == other).double().mean().item() < 0.6


@pytest.mark.parametrize(
    ("field", "value"), [("p", 1.0), ("p", -0.1), ("seed", 1 << 64), ("step", -1), ("site", 1 << 32)]
)
def test_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Dropout(**({"p": 0.1, "seed": 0, "step": 0, "site": 0} | {field: value}))  # type: ignore[arg-type]
