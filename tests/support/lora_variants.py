"""The LoRA kernels that are compiled for a GPU, one name each, and which of them a call runs.

A name is that of the kernel, the element type and the numbers it is made for, as in `sm80 low_kernel BF16 32`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from itertools import product

from support.lora_plan import cuts, takes_wide

HALVES = ("BF16", "FP16")
RANKS = (8, 16, 32, 64)
LOW = (16, 32, 64, 96, 192)
"""Of all blocks together."""
WIDTHS = (128, 192, 256)

_MANGLED = re.compile(r"4cuda4(sm\d\d)\d+(\w+?_kernel)I(?:NS\w*?_7machine4(BF16|FP16)E|(f))((?:L[ib]\d+E)*)E")


def name_of(mangled: str) -> str:
    """The name of a kernel's symbol."""
    found = _MANGLED.search(mangled)
    assert found is not None, f"no LoRA kernel of this kind is known: {mangled}"
    family, kernel, half, single, numbers = found.groups()
    return " ".join([family, kernel, half or "float" * bool(single), *re.findall(r"\d+", numbers)])


def fused_ranks(element: str, wide: bool) -> tuple[int, ...]:
    """Those that the fused mma.sync kernel is made for."""
    if element == "float":
        return () if wide else (16, 64)
    return (8, 16) if wide else RANKS


def _all() -> set[str]:
    names = set()
    for element in (*HALVES, "float"):
        tiles = (False, True) if element != "float" else (False,)
        for wide in tiles:
            tile = "2 2" if wide else "1 1"
            names.add(f"sm80 forward_kernel {element} 0 0 {tile}")
            names.add(f"sm80 input_kernel {element} {tile}")
            names |= {
                f"sm80 forward_kernel {element} {rank} {dropout} {tile}"
                for rank, dropout in product(fused_ranks(element, wide), (0, 1))
            }
        names |= {f"sm80 low_kernel {element} {rank}" for rank in fused_ranks(element, False)}
        names |= {
            f"sm80 {kernel} {element} {low}" for kernel in ("thin_kernel", "grad_a_kernel") for low in LOW
        }
        names.add(f"sm80 reduce_kernel {element}")
    for element, width in product(HALVES, WIDTHS):
        names.add(f"sm90 input_kernel {element} {width}")
        names |= {f"sm90 forward_kernel {element} {width} {rank}" for rank in (16, 32, 64)}
    return names


EVERY_KERNEL = frozenset(_all())


def _first(sizes: Sequence[int], value: int) -> int:
    return next(size for size in sizes if size >= value)


@functools.cache
def _width(rows: int, columns: int, blocks: int) -> int:
    return cuts([(rows, columns, blocks)], 132)[0][0]


@functools.cache
def _is_wide(rows: int, columns: int, blocks: int, rank: int, dropout: bool) -> bool:
    return takes_wide([(rows, columns, blocks, rank, dropout)])[0]


def forward_variant(
    family: str, element: str, rows: int, outputs: int, blocks: int, rank: int, dropout: bool, split: bool
) -> set[str]:
    """What a forward call runs. outputs: of a block; rank: padded; split: s is made by a kernel of its own."""
    thin = {f"sm80 thin_kernel {element} {_first(LOW, blocks * rank)}"} if split else set()
    if family == "sm90":
        return thin | {f"sm90 forward_kernel {element} {_width(rows, outputs, blocks)} {max(rank, 16)}"}
    wide = element != "float" and _is_wide(rows, outputs, blocks, 0 if split else rank, dropout)
    if split:
        return thin | {f"sm80 forward_kernel {element} 0 0 {'2 2' if wide else '1 1'}"}
    wide = wide and rank <= max(fused_ranks(element, True))
    rank = _first(fused_ranks(element, wide), rank)
    return {f"sm80 forward_kernel {element} {rank} {int(dropout)} {'2 2' if wide else '1 1'}"}


def input_variant(family: str, element: str, rows: int, inputs: int) -> str:
    """What makes the input's gradient."""
    if family == "sm90":
        return f"sm90 input_kernel {element} {_width(rows, inputs, 1)}"
    wide = element != "float" and _is_wide(rows, inputs, 1, 0, False)
    return f"sm80 input_kernel {element} {'2 2' if wide else '1 1'}"


def thin_variants(element: str, blocks: int, rank: int) -> set[str]:
    """What makes ds, dA and dB, where the parts of some have to be summed."""
    ranks = fused_ranks(element, False)
    return {
        f"sm80 low_kernel {element} {_first(ranks, rank)}",
        f"sm80 grad_a_kernel {element} {_first(LOW, blocks * rank)}",
        f"sm80 reduce_kernel {element}",
    }
