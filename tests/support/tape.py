"""What a CUDA graph does, on the host: a list of operations on fixed addresses, without the Python that made it.

Recording keeps every ATen operation below autograd with the memory that it read and wrote; a replay does them again on
the same memory. Python runs no second time: what it reads, decides or keeps between steps stays as it was recorded,
just as in a graph. What a graph could not hold raises RuntimeError: a value read from the device, a shape that depends
on one, a number or an array that comes fresh from the host. Only what PyTorch dispatches is seen, so that the reference
must serve the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mtbert.engine.capture import Recorded

T = TypeVar("T")

FORBIDDEN = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "bincount",
    "lift_fresh",
    "_pin_memory",
    "_linalg_check_errors",
)


class Tape(TorchDispatchMode):
    """Does operations, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} cannot be captured")
        kwargs = kwargs or {}
        # Aliases: what a parameter's `data` is at this moment, not what it will be.
        held_args, held_kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        result = func(*args, **kwargs)
        read = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        fresh = [leaf.detach() for leaf in _tensors(result) if leaf.untyped_storage()._cdata not in read]
        assert len(fresh) in (0, len(_tensors(result))), f"{name} gives both new memory and old"
        self.calls.append((func, held_args, held_kwargs, fresh))
        return result

    def replay(self) -> None:
        """Do them again."""
        for func, args, kwargs, fresh in self.calls:
            result = func(*args, **kwargs)
            for before, now in zip(fresh, _tensors(result) if fresh else [], strict=True):
                before.copy_(now)


class TapeRecorder:
    """Records on the host, and counts."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def run(self, work: Callable[[], T]) -> T:
        """Do the work."""
        return work()

    def record(self, work: Callable[[], Any]) -> Recorded:
        """Do it, and keep its operations."""
        self.tapes.append(Tape())
        with no_host_values(), self.tapes[-1]:
            result = work()
        return Recorded(result, self.tapes[-1].replay, done=True)


@contextmanager
def no_host_values() -> Iterator[None]:
    """Ways between tensors and the host that PyTorch does not dispatch raise RuntimeError."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a value from or for the host cannot be captured")

    with mock.patch.object(torch, "from_numpy", refuse):
        originals = {name: getattr(Tensor, name) for name in ("numpy", "tolist", "item")}
        try:
            for name in originals:
                setattr(Tensor, name, refuse)
            yield
        finally:
            for name, original in originals.items():
                setattr(Tensor, name, original)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
