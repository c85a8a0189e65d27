"""The loop: steps, evaluations, checkpoints, early stopping, and an end that loses nothing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mtbert.curriculum import Curriculum, Plan
from mtbert.engine.checkpoint import Checkpoint, CheckpointStore
from mtbert.engine.compiled import CompiledParts
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.environment import environment_differences
from mtbert.engine.evaluator import EvaluationConfig
from mtbert.engine.input_pipeline import InputConfig, InputPipeline
from mtbert.engine.interruptions import stop_requests
from mtbert.engine.metrics_log import MetricsLog
from mtbert.engine.optimizer_state import optimizer_tensors, restore_optimizer
from mtbert.engine.step import StepResult
from mtbert.engine.step_numbers import OnTheWay
from mtbert.engine.tensorboard import Listener
from mtbert.engine.window import Window
from mtbert.errors import CheckpointError, ConfigError, Interrupted
from mtbert.evaluation.metrics import TaskScores, aggregates
from mtbert.optim.schedule import ScheduleConfig, factor, set_learning_rate
from mtbert.optim.unfreezing import Unfreezing
from mtbert.ranges import span

logger = logging.getLogger(__name__)

_METHODS = "method/"
"""Begins the names of the methods' tensors, which stand in a checkpoint beside the optimizer's."""


@dataclass
class RunConfig:
    """Logging and checkpoints."""

    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 0
    """Steps between two checkpoints, beside the one after every evaluation; 0 for none."""
    tensorboard: bool = True
    """Also write TensorBoard events, when tensorboard is installed."""

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ConfigError(f"run.log_every: expected at least 1, found {self.log_every}")
        if self.checkpoint_every < 0:
            raise ConfigError(f"run.checkpoint_every: expected at least 0, found {self.checkpoint_every}")


@dataclass
class Progress:
    """Where a run stands: all of it goes into a checkpoint's state."""

    step: int = 0
    """Steps taken."""
    seconds: float = 0.0
    """Training time so far, without evaluations and checkpoints."""
    tokens: int = 0
    """Real tokens of the training examples so far."""
    best_step: int | None = None
    best_score: float = -math.inf
    evaluations_without_gain: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; an unset best score is null, since JSON has no infinity."""
        return vars(self) | {"best_score": None if self.best_step is None else self.best_score}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """What `to_json` gave."""
        score = values["best_score"]
        return cls(**(values | {"best_score": -math.inf if score is None else score}))


class Step(Protocol):
    """What the loop needs of a training step (see `mtbert.engine.step.TrainStep`)."""

    optimizer: torch.optim.Optimizer

    def prepare(self, plan: Plan, step: int) -> Any:
        """What `run` reads of the examples of `plan`, made ready on the host, in a thread of its own or not."""

    def run(self, ready: Any, progress: float) -> StepResult:
        """Train on what was prepared."""

    def state(self) -> dict[str, Tensor]:
        """What must be found again after a resumption, beside the model and the optimizer."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of `state()`."""


class Scored(Protocol):
    """What the loop needs of an evaluation (see `mtbert.engine.evaluator.Evaluation`)."""

    @property
    def dev(self) -> Mapping[str, TaskScores]:
        """Scores by task."""

    @property
    def score(self) -> float:
        """The number that checkpoints are chosen by; larger is better."""

    def to_json(self) -> dict[str, Any]:
        """Its part of a line of metrics.jsonl."""


class Scorer(Protocol):
    """What evaluates."""

    def evaluate(self) -> Scored:
        """Score the model as it is now."""


class Trainer:
    """Trains from wherever `progress` stands to the last step."""

    def __init__(
        self,
        model: nn.Module,
        train_step: Step,
        curriculum: Curriculum,
        evaluator: Scorer,
        store: CheckpointStore,
        log: MetricsLog | None,
        *,
        schedule: ScheduleConfig,
        evaluation: EvaluationConfig,
        run: RunConfig,
        fingerprint: dict[str, Any],
        inputs: InputConfig,
        device: torch.device,
        unfreezing: Unfreezing | None = None,
        listeners: Sequence[Listener] = (),
        compiled: CompiledParts | None = None,
        world: World = ALONE,
    ) -> None:
        """`fingerprint` is kept in every checkpoint: what must agree for a resumed run to be the same run.

        compiled: what torch.compile runs; every epoch's line says how often it compiled. world: all of its ranks train
        together; rank 0 has the log and saves.
        """
        self.model = model
        self.train_step = train_step
        self.optimizer = train_step.optimizer
        self.curriculum = curriculum
        self.evaluator = evaluator
        self.store = store
        self.log = log
        self.schedule = schedule
        self.evaluation = evaluation
        self.run = run
        self.fingerprint = fingerprint
        self.unfreezing = unfreezing
        self.listeners = listeners
        self.compiled = compiled
        self.world = world
        self.total_steps = curriculum.total_steps
        self.progress = Progress()
        self._window = Window()
        self._pending: OnTheWay | None = None
        self._inputs = InputPipeline(
            curriculum, train_step.prepare, ahead=inputs.steps_ahead(device), evaluates=self._evaluates_after
        )

    def fit(self) -> None:
        """Train to the end, or until early stopping. Raises Interrupted and NonFiniteError."""
        progress = self.progress
        with stop_requests() as stop, self._bar() as bar, self._inputs as inputs:
            while progress.step < self.total_steps and not self._out_of_patience():
                share = factor(self.schedule, progress.step, self.total_steps)
                lr = set_learning_rate(self.optimizer, share)
                if self.unfreezing is not None:
                    self.unfreezing.apply(self.epoch)
                with span("step", progress.step + 1):
                    started = time.perf_counter()
                    ready = inputs.next()
                    waited = time.perf_counter() - started
                    result = self.train_step.run(ready, progress.step / self.total_steps)
                    with span("synchronize"):
                        self._collect()
                    elapsed = time.perf_counter() - started
                self._pending = OnTheWay(result)
                progress.step += 1
                progress.seconds += elapsed
                progress.tokens += result.tokens
                self._window.tokens += result.tokens
                self._window.seconds += elapsed
                self._window.input_wait_seconds += waited
                bar.update()
                self._after_step(lr, bar)
                if self.world.any(stop.is_set()):
                    self._collect()
                    path = self.checkpoint()
                    self.world.told(lambda: None)  # a rank that ended before it is saved would end the others
                    raise Interrupted(f"stopped after step {progress.step}; the checkpoint is {path}")
            if progress.step < self.total_steps:
                patience = self.evaluation.patience
                logger.info("stopped early: no better dev score in the last %d evaluations", patience)

    def _after_step(self, lr: float, bar: tqdm[Any]) -> None:
        step = self.progress.step
        last = step == self.total_steps
        evaluate = self._evaluates_after(step)
        checkpoint = evaluate or (self.run.checkpoint_every and step % self.run.checkpoint_every == 0)
        if checkpoint or step % self.run.log_every == 0:
            self._collect()
            self._log_window(lr, bar)
        if evaluate:
            self.evaluate(self.curriculum.finished_task(step))
        if self.curriculum.ends_epoch(step) or last or self._out_of_patience():
            self._log_epoch()
        if checkpoint:
            self.checkpoint()

    def _evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows on step number `step`, from 1."""
        every = self.evaluation.every
        if step == self.total_steps:
            return True
        if isinstance(every, int):
            return step % every == 0
        phase_over = every == "phase" and self.curriculum.finished_task(step) is not None
        return phase_over or self.curriculum.ends_epoch(step)

    def _out_of_patience(self) -> bool:
        patience = self.evaluation.patience
        return bool(patience) and self.progress.evaluations_without_gain >= patience

    def _bar(self) -> tqdm[Any]:
        # disable=None: no bar where the output is no terminal, so that log files stay readable
        quiet = None if self.world.is_main else True
        return tqdm(
            total=self.total_steps, initial=self.progress.step, desc="training", unit="step", disable=quiet
        )

    def _collect(self) -> None:
        """Read the last step's figures, while the device works on the next, and stop if they are not finite."""
        pending, self._pending = self._pending, None
        if pending is not None:
            result = pending.result()
            result.check()
            self._window.add(result)

    def _write(self, line: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.append(line)
        for listener in self.listeners:
            listener(line)

    @property
    def epoch(self) -> float:
        """Epochs done, with their fraction."""
        return self.curriculum.epoch_of(self.progress.step)

    def _log_window(self, lr: float, bar: tqdm[Any]) -> None:
        window, self._window = self._window, Window()
        if not window.steps and not window.skipped:
            return
        line = window.to_json()
        self._write(
            {
                "kind": "step",
                "step": self.progress.step,
                "epoch": round(self.epoch, 6),
                "lr": lr,
                **line,
            }
        )
        speed = window.tokens / max(window.seconds, 1e-9)
        bar.set_postfix({t: f"{v:.3f}" for t, v in line["loss"].items()} | {"tok/s": f"{speed:,.0f}"})

    def _log_epoch(self) -> None:
        seconds, tokens = self.progress.seconds, self.progress.tokens
        self._write(
            {
                "kind": "epoch",
                "step": self.progress.step,
                "epoch": round(self.epoch, 6),
                "seconds": seconds,
                "tokens": tokens,
                "tokens_per_second": tokens / max(seconds, 1e-9),
            }
            | ({} if self.compiled is None else {"compiled": self.compiled.to_json()})
        )

    def evaluate(self, phase: str | None = None) -> None:
        """Score train and dev, log a line, and remember whether this is the best so far.

        phase: the task whose pass has just ended, where tasks have passes of their own.
        """
        progress = self.progress
        with span("evaluation"):
            self.model.eval()
            result = self.evaluator.evaluate()
            self.model.train()
        self._write(
            {
                "kind": "evaluation",
                "step": progress.step,
                "epoch": round(self.epoch, 6),
                "seconds": progress.seconds,
                "tokens": progress.tokens,
            }
            | ({} if phase is None else {"phase": phase})
            | result.to_json()
        )
        self._inputs.observe({task: scores.headline for task, scores in result.dev.items()})
        better = result.score > progress.best_score
        if better:
            progress.best_score, progress.best_step = result.score, progress.step
            progress.evaluations_without_gain = 0
        else:
            progress.evaluations_without_gain += 1
        parts = [f"{task} {scores.headline:.3f}" for task, scores in result.dev.items()]
        joint = aggregates(result.dev)
        parts += [f"{name} {joint[name]:.4f}" for name in ("overall", "mean") if joint[name] is not None]
        logger.info(
            "epoch %.2f, step %d, %.0f s: dev %s%s",
            self.epoch,
            progress.step,
            progress.seconds,
            "  ".join(parts),
            "  (best)" if better else "",
        )

    def checkpoint(self) -> Path | None:
        """Save everything that the rest of the run depends on; returns the checkpoint's folder, None but on rank 0."""
        if self.log is None:
            return None
        with span("checkpoint"):
            self.log.sync()
            return self.store.save(
                self.progress.step,
                model=self.model.state_dict(),
                optimizer=optimizer_tensors(self.optimizer, self.model)
                | {f"{_METHODS}{name}": value for name, value in self.train_step.state().items()},
                state={
                    "progress": self.progress.to_json(),
                    "curriculum": self._inputs.state(),
                    "window": vars(self._window),
                    "fingerprint": self.fingerprint,
                },
                best_step=self.progress.best_step,
            )

    def resume(self) -> None:
        """Continue from the newest usable checkpoint, or from the start when there is none yet."""
        checkpoint = self._newest_checkpoint()
        if checkpoint is None:
            logger.info("there is no checkpoint yet: starting from the beginning")
            if self.log is not None:
                self.log.rewind(-1)
            return
        before = checkpoint.state.get("fingerprint")
        if not isinstance(before, dict) or not isinstance(before.get("environment"), dict):
            raise CheckpointError(
                f"{checkpoint.path} does not say what it was trained on; it cannot be resumed from"
            )
        if before.get("data") != self.fingerprint["data"]:
            raise CheckpointError(
                f"{checkpoint.path}: the training data is not what the run began with (its tokens or labels"
                " differ); put the tables back, or start a new run"
            )
        for difference in environment_differences(before["environment"], self.fingerprint["environment"]):
            logger.warning("resuming, but not bit for bit: %s", difference)
        try:
            self.model.load_state_dict(checkpoint.model)
            moments = {n: v for n, v in checkpoint.optimizer.items() if not n.startswith(_METHODS)}
            restore_optimizer(self.optimizer, self.model, moments)
            self.train_step.restore(
                {
                    n.removeprefix(_METHODS): v
                    for n, v in checkpoint.optimizer.items()
                    if n.startswith(_METHODS)
                }
            )
            self.curriculum.restore(checkpoint.state["curriculum"])
            self.progress = Progress.from_json(checkpoint.state["progress"])
            self._window = Window(**checkpoint.state["window"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
        if self.log is not None:
            self.log.rewind(self.progress.step)
        logger.info("resumed from step %d of %d", self.progress.step, self.total_steps)

    def _newest_checkpoint(self) -> Checkpoint | None:
        """What rank 0 finds, on every rank: the others need not see its disk."""
        found = self.store.load_newest(logger.warning) if self.world.is_main else None
        described = self.world.told(lambda: None if found is None else _describe(found))
        if described is None:
            return None
        if found is None:
            tensors = {
                group: {
                    name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, shape, dtype in layout
                }
                for group, layout in described["tensors"].items()
            }
            path, step, state = Path(described["path"]), described["step"], described["state"]
            found = Checkpoint(path, step, tensors["model"], tensors["optimizer"], state)
        self.world.copied([*found.model.values(), *found.optimizer.values()])
        return found


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint without the numbers in its tensors, as JSON."""

    def layout(tensors: Mapping[str, Tensor]) -> list[list[Any]]:
        return [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]

    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "state": checkpoint.state,
        "tensors": {"model": layout(checkpoint.model), "optimizer": layout(checkpoint.optimizer)},
    }
