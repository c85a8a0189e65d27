"""One trial: an ordinary training run in a folder of its own, watched so that it can be stopped early."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtbert.config import TrainConfig
from mtbert.engine.build import curriculum_of, prepare_data, task_batches, tasks_of
from mtbert.engine.durable import replace_file
from mtbert.engine.reproduction import CONSOLE, FAILURE
from mtbert.engine.run_folder import RunFolder
from mtbert.engine.shared import SharedParts
from mtbert.engine.tensorboard import Listener
from mtbert.errors import Interrupted, UserError
from mtbert.evaluation.run import Run, read_run
from mtbert.sweeps.space import Read, Space
from mtbert.sweeps.study import MOST_ATTEMPTS, Claim, Study
from mtbert.sweeps.wandb_log import wandb_run

TRIALS = "trials"
_LONGEST_NAME = 120
"""Bytes."""

logger = logging.getLogger(__name__)

Train = Callable[..., None]
"""`mtbert.train.train`: entry points stand above this package."""


class Pruned(Exception):
    """The trial is stopped: others were better at this evaluation."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    name: str
    state: str
    """complete, pruned or failed."""
    score: float | None
    seconds: float
    reason: str = ""


@dataclasses.dataclass
class Workshop:
    """What the trials of one process have in common."""

    folder: Path
    space: Space
    study: Study
    read: Read
    train: Train
    shared: SharedParts | None
    """None: every trial reads and computes everything itself."""

    def run(self, claim: Claim) -> Outcome:
        """Run the trial, or go on with it, and tell the study. Raises Interrupted and KeyboardInterrupt."""
        started = time.monotonic()
        tags = self.space.tags(claim.values)
        name = str(claim.facts.get("name") or trial_name(claim.number, tags))
        folder = self.folder / TRIALS / name
        claim.note(name=name, tags=tags)
        before = float(claim.facts.get("seconds", 0.0))
        state, reason = "complete", ""
        try:
            if claim.facts["attempts"] > MOST_ATTEMPTS and _newest_step(folder) <= claim.facts.get(
                "step", -1
            ):
                raise UserError(
                    f"the process that ran it was killed {MOST_ATTEMPTS} times, as the system does when memory runs out"
                )
            if _newest_step(folder) > claim.facts.get("step", -1):
                claim.note(attempts=1, step=_newest_step(folder))
            if not (folder / "report.md").is_file():  # else it was killed behind its end
                self._train(claim, folder)
        except Pruned as stop:
            state, reason = "pruned", str(stop)
        except (Interrupted, KeyboardInterrupt):
            claim.note(attempts=claim.facts["attempts"] - 1, seconds=before + time.monotonic() - started)
            raise
        except UserError as error:
            state, reason = "failed", str(error)
        except Exception as error:
            state, reason = "failed", _first_line(error)
            _append(folder / CONSOLE, traceback.format_exc())
        seconds = before + time.monotonic() - started
        score = None
        claim.note(seconds=seconds)
        if state != "failed":
            try:
                run = read_run(folder)
                score, scores = _best(run)
                claim.note(scores=scores)
            except UserError as error:
                state, reason = "failed", str(error)
        if state == "complete" and (score is None or not math.isfinite(score)):
            state, reason = "failed", f"the best dev score is {score}"
        if state == "complete":
            assert score is not None
            self.study.complete(claim, score)
        elif state == "pruned":
            claim.note(reason=reason)
            self.study.pruned(claim)
        else:
            self.study.failed(claim, reason)
            _note_failure(folder, reason)
        return Outcome(name, state, score, seconds, reason)

    def _train(self, claim: Claim, folder: Path) -> None:
        config = dataclasses.replace(
            self.read(self.space.options(claim.values)), output=str(folder)
        )  # raises ConfigError for a combination that is refused
        begun = (folder / "config.yaml").is_file()
        config = self._with_evaluations(config)
        with contextlib.ExitStack() as stack:
            run = stack.enter_context(
                RunFolder.open(folder).lock() if begun else RunFolder.create(folder, "trial")
            )
            (folder / FAILURE).unlink(missing_ok=True)
            console = stack.enter_context((folder / CONSOLE).open("a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(console))
            stack.enter_context(contextlib.redirect_stderr(console))
            listeners: list[Listener] = [_Watch(claim, self.space)]
            if self.space.wandb is not None:
                facts = dict(self.space.settings(claim.values))
                # First in the line, so that it sees the evaluation at which a trial is pruned.
                listeners.insert(
                    0, stack.enter_context(wandb_run(self.space.wandb, self.folder, folder, facts, claim))
                )
            try:
                self.train(config, run, resumed=begun, shared=self.shared, listeners=listeners)
            except BaseException as error:
                if not isinstance(error, (Pruned, Interrupted, KeyboardInterrupt)):
                    console.write(traceback.format_exc())
                raise
            finally:
                if self.shared is not None:
                    self.shared.forget(folder)
                    self.shared.verify()

    def _with_evaluations(self, config: TrainConfig) -> TrainConfig:
        """The configuration with as many evaluations as the sweep wants of each trial."""
        wanted = self.space.evaluations
        if wanted is None:
            return config
        shared = SharedParts() if self.shared is None else self.shared
        tables = shared.tables(config.data, list(tasks_of(config).values()), extra=config.extra_data)
        tokeniser = shared.tokeniser(shared.folder(config.model.pretrained))
        data = prepare_data(config, tables, tokeniser, shared)
        steps = curriculum_of(config, task_batches(config, data)).total_steps
        every = max(1, math.ceil(steps / wanted))
        return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, every=every))


class _Watch:
    """Tells the study every dev score, and ends the run when the study says so."""

    def __init__(self, claim: Claim, space: Space) -> None:
        self.claim = claim
        self.known = dict(claim.trial.study._storage.get_trial(claim.trial._trial_id).intermediate_values)
        self.space = space
        self.count = 0
        self.best = -math.inf
        self.seen: list[int] = [int(step) for step in claim.facts.get("evaluated", [])]

    def __call__(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if line["kind"] != "evaluation":
            return
        step = int(line["step"])
        if step not in self.seen:
            self.seen.append(step)
            self.claim.note(evaluated=self.seen)
        number = self.seen.index(step) + 1  # the same again where a run goes on from before it
        score = float(line["score"])
        if number not in self.known:
            self.claim.trial.report(score, number)
            self.known[number] = score
        if self.claim.trial.should_prune():
            logger.info("pruned after evaluation %d: dev score %.4f", number, score)
            raise Pruned(
                f"after evaluation {number} of {self.space.evaluations or 'several'}: dev score {score:.4f}"
            )


def trial_name(number: int, tags: list[str]) -> str:
    """The name of a trial's folder: its number, and what tells it from others."""
    text = "-".join(re.sub(r"[^\w.=+-]+", "_", tag).strip("_") for tag in tags)
    name = f"{number:04d}-{text}".encode()[:_LONGEST_NAME]  # a file system counts bytes
    return name.decode(errors="ignore").rstrip("-._")


def remove_checkpoints(folder: Path, study: Study, keep: int | str) -> None:
    """Delete the checkpoints of all ended trials but the best `keep`. Everything else of them stays."""
    if keep == "all":
        return
    with study.alone():
        trials = [trial for trial in study.trials() if trial.state in ("complete", "pruned", "failed")]
        complete = [trial for trial in trials if trial.state == "complete" and trial.score is not None]
        best = sorted(complete, key=lambda trial: -(trial.score or 0.0))[: int(keep)]
        for trial in trials:
            if trial not in best and trial.facts.get("place") == study.place:
                shutil.rmtree(folder / TRIALS / trial.name / "checkpoints", ignore_errors=True)


def _best(run: Run) -> tuple[float | None, dict[str, float]]:
    """The best dev score of a run so far, and what the tasks had there."""
    best = run.history.best_evaluation()
    if best is None:
        return None, {}
    scores = {
        task: found.get("accuracy") if found.get("accuracy") is not None else found.get("pearson")
        for task, found in (best.get("dev") or {}).items()
    }
    joint = {name: best.get(name) for name in ("overall", "mean")}
    values = {name: float(value) for name, value in (scores | joint).items() if value is not None}
    return float(best["score"]), values


def _newest_step(folder: Path) -> int:
    """The step of the newest checkpoint; -1 without one."""
    steps = [
        int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit()
    ]
    return max(steps, default=-1)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _append(path: Path, text: str) -> None:
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(text)


def _note_failure(folder: Path, reason: str) -> None:
    note: Mapping[str, Any] = {"reason": reason, "time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    with contextlib.suppress(OSError):  # a full disk must not end the other trials
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FAILURE, (json.dumps(note, indent=2) + "\n").encode())
