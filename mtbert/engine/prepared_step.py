"""What a step reads, drawn and packed on the host before the device needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from mtbert.data.packing import Request
from mtbert.data.padding import PassShape
from mtbert.engine.forward import PassInput


@dataclass(frozen=True)
class PreparedStep:
    """What a step reads, on the host."""

    step: int
    """Steps taken before this one."""
    tasks: tuple[str, ...]
    """Those that have examples in the step, in its order."""
    examples: Mapping[str, np.ndarray]
    """The examples of every stream, those of the objectives among them."""
    passes: tuple[PassInput, ...]
    """This rank's; one without requests where its share is empty."""
    shares: Sequence[Sequence[Sequence[Request]]]
    """The requests of each pass by rank."""
    words: Tensor | None = None
    """int64, different ones: the words that the step holds; None where nothing asks for them."""
    orders: Tensor | None = None
    """int64 [K, K - 1]: for each task the others in the step's random order; None where nothing asks for it."""
    shape: PassShape | None = None
    """What its only pass is padded to; None for a step as it comes."""
    unfit: str = ""
    """Why it is not padded, where steps are."""
    counter: Tensor | None = None
    """int64 [1]: stands for `step` on the device, where the step is captured in a graph."""

    def mapped(self, move: Callable[[Tensor], Tensor]) -> PreparedStep:
        """The same step with other tensors in place of its own, always in the same order."""
        return replace(
            self,
            passes=tuple(
                p if p.batch is None else replace(p, batch=p.batch.mapped(move)) for p in self.passes
            ),
            words=None if self.words is None else move(self.words),
            orders=None if self.orders is None else move(self.orders),
            counter=None if self.counter is None else move(self.counter),
        )
