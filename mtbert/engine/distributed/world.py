"""All ranks of a run from the view of one, and the world of a process that is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

Part = tuple[Tensor | None, Tensor]
"""What a rank adds to a sum, or None for nothing; and a tensor of the same shape, dtype and device."""

T = TypeVar("T")


class World:
    """All ranks of a run, from the view of one; this one is alone."""

    rank = 0
    size = 1
    local_rank = 0
    """Its number among the ranks of its machine."""
    local_size = 1
    launch: str | None = None
    """Names the call of torchrun that started this process, and starts it anew when a rank has failed; None without."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes into the run's folder."""
        return self.rank == 0

    def told(self, value: Callable[[], T]) -> T:
        """What `value` gives on rank 0, where alone it is called. It must be JSON."""
        return value()

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order. They must be JSON."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def summed(self, parts: Sequence[Part]) -> list[Tensor | None]:
        """The sums over the ranks; None where no rank has a part. The parts are used up.

        Every rank calls it with as many parts in the same order.
        """
        return [tensor for tensor, _ in parts]

    def joined_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows [sum(counts), ...] of all ranks in their order; own: [counts[rank], ...].

        A gradient flows to the rank's own rows alone.
        """
        return own

    def share_of(self, count: int) -> range:
        """Which of `count` equal pieces of work are this rank's."""
        return range(count)

    def added(self, array: np.ndarray) -> np.ndarray:
        """The sum of the ranks' arrays of one shape, on the host."""
        return array

    def copied(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""

    def wait_for_main(self) -> None:
        """Rank 0 says that it is done; the others wait for that, however long it takes."""

    def check_same(self, digests: Mapping[str, str]) -> None:
        """Raise ConfigError, naming rank and thing, unless all ranks have the same digests."""


ALONE = World()
"""A process on its own."""
