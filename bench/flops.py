"""A side of a comparison that does nothing but multiply matrices: the limit of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.measure import Side
from mtbert.engine.peaks import fastest_product, seconds


def product_side(
    name: str, device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]]
) -> Side:
    """A side that multiplies matrices as fast as torch does here: its rate is the limit in FLOP/s.

    `shapes` are (m, n, k). The fastest of them, in the fastest of the two layouts of the second factor, is found
    when the side is built; the side then measures that one.
    """
    work = fastest_product(device, dtype, shapes)
    times = max(1, round(0.3 / min(seconds(work.run, device) for _ in range(3))))

    def run(repeat: int) -> float:
        for _ in range(times):
            work.run()
        return times * work.amount

    return Side(name, run)
