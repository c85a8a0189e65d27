"""Named ranges of a run, for whoever profiles it; nobody listens unless a profile is asked for.

Every floor says what it is doing (`span`, `operation`); a profile says where that goes (`listening`). Without one, a
span is one shared object that does nothing, and an operation is called as it stands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

PHASES = (
    "data",
    "forward",
    "loss",
    "backward",
    "communication",
    "surgery",
    "regularisation",
    "optimizer",
    "synchronize",
)
"""What a step consists of; only several ranks communicate. A phase within a phase (the passes of an adversarial loss)
counts to the outer one."""
APART = ("evaluation", "checkpoint", "prediction")
"""What a run does beside its steps."""


class Range(AbstractContextManager["Range"], Protocol):
    """A range that is open while its `with` block runs, exceptions or not."""

    def ends_in(self, *outputs: Tensor) -> None:
        """Name the backward pass of what was computed within after this range, too: from `outputs` to its inputs."""


class Listener(Protocol):
    """What takes the ranges of a run."""

    def span(self, parts: tuple[object, ...]) -> Range:
        """The range that is called by these words."""

    def call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call an operation within its range; its backward pass is named after it."""


class _Nothing:
    """The range of a run that nobody profiles."""

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def ends_in(self, *outputs: Tensor) -> None:
        pass


NOTHING: Range = _Nothing()
_listener: Listener | None = None


def span(*parts: object) -> Range:
    """A range for a `with` block, called by these words: `span("loss", "sst")`. They are joined only when it counts."""
    return NOTHING if _listener is None else _listener.span(parts)


def operation(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: calls of the function are ranges of this name, and so is what they do in the backward pass."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _listener is None:
                return function(*args, **kwargs)
            result: R = _listener.call(name, function, args, kwargs)
            return result

        return call

    return decorate


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, `listener` takes all ranges of the process."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
