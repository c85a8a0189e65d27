"""The input of the next steps, made ready on a thread while the device works on this one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import torch

from mtbert.curriculum import Curriculum, Plan
from mtbert.errors import ConfigError
from mtbert.ranges import span

T = TypeVar("T")


@dataclass
class InputConfig:
    """How the input of a step is made ready."""

    ahead: Literal["auto"] | int = "auto"
    """Steps that a thread draws and packs ahead of the one that trains, which changes no result; 0: no thread, every
    step waits for its input. auto: 2 on a GPU, which would stand still meanwhile; 0 on a CPU, where packing
    is a few thousandths of a step."""

    def __post_init__(self) -> None:
        if isinstance(self.ahead, int) and self.ahead < 0:
            raise ConfigError(f"input.ahead: expected at least 0, or auto, found {self.ahead}")

    def steps_ahead(self, device: torch.device) -> int:
        """The number of steps on this device."""
        if self.ahead == "auto":
            return 2 if device.type == "cuda" else 0
        return self.ahead


class InputPipeline(Generic[T]):
    """Draws plans from a curriculum and prepares their steps, `ahead` steps before they are asked for.

    What comes out, and when the curriculum hears of scores, is as without a thread: a curriculum that follows the
    scores is not asked for a step behind an evaluation before it has seen its scores. `state` is that of the last step
    that was taken out, whatever has been drawn since.

    The thread runs within a `with` block. At its end, whatever the reason, the thread is over and the curriculum stands
    where the steps that were taken out have left it. An error of the thread is raised where its step is asked for.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        prepare: Callable[[Plan, int], T],
        *,
        ahead: int,
        evaluates: Callable[[int], bool],
    ) -> None:
        """prepare: from a plan and the steps before it to what the step reads; called in the steps' order.

        evaluates: whether an evaluation follows on this number of steps.
        """
        self.curriculum = curriculum
        self._prepare = prepare
        self._ahead = ahead
        self._evaluates = evaluates
        self._state = curriculum.state()
        self._ready: deque[tuple[T, dict[str, Any]]] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._awaits_scores = False
        self._made = curriculum.step
        """Steps of the training up to the last one that was made ready."""
        self._thread: threading.Thread | None = None

    def __enter__(self) -> InputPipeline[T]:
        self._state = self.curriculum.state()
        if self._ahead:
            self._closed, self._error, self._awaits_scores = False, None, False
            self._made = self.curriculum.step
            self._thread = threading.Thread(target=self._work, name="mtbert input", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._thread = None
        self._ready.clear()
        self.curriculum.restore(self._state)

    def next(self) -> T:
        """What the next step reads. Raises what its preparation has raised."""
        with span("data"):
            ready, self._state = self._make() if self._thread is None else self._take()
        return ready

    def state(self) -> dict[str, Any]:
        """The curriculum's state behind the last step that was taken out, and the scores that it has seen."""
        return self.curriculum.state() if self._thread is None else self._state

    def observe(self, scores: Mapping[str, float]) -> None:
        """Tell the curriculum the scores of an evaluation that follows on the last step that was taken out."""
        if not self.curriculum.follows_scores:
            return
        with self._changed:
            self.curriculum.observe(scores)
            self._state = self.curriculum.state()
            self._awaits_scores = False
            self._changed.notify_all()

    def _make(self) -> tuple[T, dict[str, Any]]:
        step = self.curriculum.step
        plan = self.curriculum.next()
        return self._prepare(plan, step), self.curriculum.state()

    def _take(self) -> tuple[T, dict[str, Any]]:
        with self._changed:
            while not self._ready:
                if self._error is not None:
                    raise self._error
                if not self._more_is_due():
                    raise RuntimeError(
                        f"step {self._made + 1} was asked for, which cannot be drawn yet, or at all"
                    )
                self._changed.wait()
            ready = self._ready.popleft()
            self._changed.notify_all()
            return ready

    def _work(self) -> None:
        try:
            while self._has_room():
                with span("prepare", self.curriculum.step + 1):
                    made = self._make()
                with self._changed:
                    self._ready.append(made)
                    self._made = self.curriculum.step
                    self._awaits_scores = self.curriculum.follows_scores and self._evaluates(self._made)
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, the training's own thread must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Wait until one more step may be made; False when none will be wanted."""
        with self._changed:
            while not self._closed and (len(self._ready) >= self._ahead or not self._more_is_due()):
                self._changed.wait()
            return not self._closed

    def _more_is_due(self) -> bool:
        return not self._awaits_scores and self._made < self.curriculum.total_steps
