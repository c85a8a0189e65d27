"""The study that all processes of a sweep share: which trials there are, who runs them, and what they came to.

A study begins with a queue of as many waiting trials as the sweep has (those of a grid with their values), so that
every trial is begun exactly once however many processes take from it. Who runs a trial holds a lock that the operating
system releases with the process: a running trial whose lock is free was killed, and is gone on with.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtbert.engine.durable import replace_file
from mtbert.engine.folder_lock import FolderLock
from mtbert.errors import ConfigError, UserError
from mtbert.sweeps.space import Parameter, Scalar, Space

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"
MOST_ATTEMPTS = 3
"""Processes that may die of a trial at the same place before it counts as failed."""
_LEAST_TRIALS = 4
"""For a word on importance."""
_WAIT = 0.02
_LONGEST_WAIT = 120.0


def import_optuna() -> Any:
    """The library, quiet. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("sweeps need optuna: pip install -e '.[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class TrialFacts:
    """What the study knows of one trial."""

    number: int
    """From 0, in the order of the queue."""
    state: str
    """waiting, running, complete, pruned or failed."""
    values: dict[str, Scalar]
    """Of its parameters, by name."""
    score: float | None
    """Of a complete trial: its best dev score. Of a pruned one: the best until then."""
    curve: dict[int, float]
    """Dev scores by number of the evaluation, from 1."""
    facts: dict[str, Any]
    """What the process that ran it noted: name, seconds, scores of the tasks, reason."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return str(self.facts.get("name", f"{self.number:04d}"))


@dataclass
class Claim:
    """A trial that this process runs: it holds the trial's lock until `release`."""

    trial: optuna.Trial
    values: dict[str, Scalar]
    lock: FolderLock
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """The trial's."""
        return int(self.trial.number)

    def note(self, **facts: Any) -> None:
        """Keep facts with the trial."""
        for name, value in facts.items():
            self.facts[name] = value
            self.trial.set_user_attr(name, value)

    def release(self) -> None:
        """Somebody else may go on with the trial."""
        self.lock.release()


class Study:
    """A sweep's study in an optuna storage, seen from the sweep's folder."""

    def __init__(
        self, folder: Path, space: Space, *, storage: str | None = None, name: str = "sweep"
    ) -> None:
        """storage: an optuna storage URL; by default a journal in the folder. Raises UserError."""
        self.folder = folder
        self.space = space
        self.optuna = import_optuna()
        self._guard = FolderLock(_made(folder / "locks"))
        self.place = self._own_place()
        self._own_storage = storage is None
        try:
            with self.alone():
                if storage is None:
                    _cut_torn_line(folder)
                self.study = self.optuna.create_study(
                    storage=_journal(self.optuna, folder) if storage is None else storage,
                    study_name=name,
                    direction="maximize",
                    sampler=_sampler(self.optuna, space),
                    pruner=_pruner(self.optuna, space),
                    load_if_exists=True,
                )
        except UserError:
            raise
        except Exception as error:
            where = storage or folder / JOURNAL
            text = f"the study {name} in {where} cannot be opened ({type(error).__name__}: {error})"
            raise UserError(_without_password(text, storage)) from None  # the traceback would show it, too

    def prepare(self, definition: str) -> None:
        """Fill the queue; go on where it was begun. Raises ConfigError when the study is of another definition."""
        digest = hashlib.sha256(definition.encode()).hexdigest()
        with self.alone():
            known = self.study.user_attrs.get("definition")
            if known is None:
                self.study.set_user_attr("definition", digest)
                self.study.set_user_attr("filled by", self.place)
            elif known != digest:
                raise ConfigError(
                    f"{self.folder}: the study there was begun with other parameters or other fixed settings; give"
                    " another --output, or put the settings back (more trials are possible)"
                )
            if self.study.user_attrs.get("filled by") == self.place:
                self._fill()
        end = time.monotonic() + _LONGEST_WAIT
        while not self.study.user_attrs.get("filled"):  # another machine's process is at it
            if time.monotonic() > end:
                raise UserError(
                    f"the study waits for the process that began it in {self.study.user_attrs.get('filled by')}; start"
                    " that one again"
                )
            time.sleep(0.5)

    def _fill(self) -> None:
        queue: Sequence[Mapping[str, Scalar]]
        queue = self.space.grid() if self.space.method == "grid" else [{}] * self.space.total
        there = {trial.user_attrs.get("slot") for trial in self.study.get_trials(deepcopy=False)}
        for slot, values in enumerate(queue):
            if slot not in there:
                self.study.enqueue_trial(dict(values), user_attrs={"slot": slot})
        self.study.set_user_attr("filled", max(len(queue), self.study.user_attrs.get("filled", 0)))

    def claim(self) -> Claim | None:
        """A trial to run: one whose process was killed, or else a new one. None where nothing is left to begin."""
        with self.alone():
            for frozen in self.study.get_trials(deepcopy=False, states=(self._state.RUNNING,)):
                found = self._taken_over(frozen)
                if found is not None:
                    return found
            while True:
                queue = self._queue()
                begun = sum(trial.state != self._state.WAITING for trial in queue)
                if begun == len(queue) or begun >= self.space.total:
                    return None
                trial = self.study.ask()
                if trial.number in {each.number for each in queue}:
                    break
                # One that stands twice, or one too many: another machine took the last of the queue meanwhile.
                self.study.tell(trial, state=self._state.FAIL)
            lock = self._lock(trial.number)
            lock.acquire()
            claim = Claim(trial, {}, lock)
            claim.note(place=self.place)
            claim.values = self._suggest(trial)
            claim.note(attempts=1)
            return claim

    def _taken_over(self, frozen: Any) -> Claim | None:
        attributes = frozen.user_attrs
        place = attributes.get("place")
        if place is None:
            # Killed between two entries of the journal, before it could say where: nobody holds its lock.
            if self.study.user_attrs.get("filled by") != self.place:
                return None
            # Or another machine, which this folder's locks do not know, is about to say it.
            if not self._own_storage and _age(frozen) < _LONGEST_WAIT:
                return None
        elif place != self.place:
            return None
        lock = self._lock(frozen.number)
        if lock.acquire() is not None:
            return None
        trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
        claim = Claim(trial, {}, lock, dict(attributes))
        claim.note(place=self.place)
        claim.values = self._suggest(trial)
        claim.note(attempts=attributes.get("attempts", 0) + 1)
        return claim

    def _lock(self, number: int) -> FolderLock:
        return FolderLock(_made(self.folder / "locks" / f"{number:04d}"))

    def _queue(self) -> list[Any]:
        """Its trials: the first of each slot, since two machines that begin at once may both fill it."""
        first: dict[int, Any] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if "slot" in trial.user_attrs:
                first.setdefault(trial.user_attrs["slot"], trial)
        return sorted(first.values(), key=lambda trial: int(trial.number))

    def _suggest(self, trial: optuna.Trial) -> dict[str, Scalar]:
        """Values of the active parameters; a trial that is gone on with keeps those that it has."""
        values: dict[str, Scalar] = {}
        for parameter in self.space.parameters:
            if parameter.active(values):
                values[parameter.name] = _suggested(trial, parameter)
        return values

    # ---- results ----

    def complete(self, claim: Claim, score: float) -> None:
        """The trial came to this score."""
        self.study.tell(claim.trial, score)

    def pruned(self, claim: Claim) -> None:
        """The trial was stopped early."""
        self.study.tell(claim.trial, state=self._state.PRUNED)

    def failed(self, claim: Claim, reason: str) -> None:
        """The trial has no score."""
        claim.note(reason=reason)
        self.study.tell(claim.trial, state=self._state.FAIL)

    def trials(self) -> list[TrialFacts]:
        """All trials of the queue, in its order."""
        words = {"FAIL": "failed"}
        found = []
        for trial in self._queue():
            curve = {int(step): float(value) for step, value in trial.intermediate_values.items()}
            state = words.get(trial.state.name, trial.state.name.lower())
            score = trial.value if state == "complete" else max(curve.values(), default=None)
            found.append(
                TrialFacts(trial.number, state, dict(trial.params), score, curve, dict(trial.user_attrs))
            )
        return found

    def refusal(self) -> str | None:
        """The reason with which every trial has failed so far, after three of them; None where it is not so."""
        ended = [trial for trial in self.trials() if trial.state in ("complete", "pruned", "failed")]
        reasons = {re.sub(r"[\d.e+-]+", "#", str(trial.facts.get("reason"))) for trial in ended}
        if len(ended) < min(3, self.space.total) or any(trial.state != "failed" for trial in ended):
            return None
        return str(ended[0].facts.get("reason")) if len(reasons) == 1 else None

    def importances(self) -> tuple[dict[str, float], dict[str, float], str]:
        """The share of each parameter in what makes scores differ, and how it was found.

        Two mappings: of the parameters that all complete trials have, and of those with a condition, each among the
        trials that have it. Both are empty where nothing can be said; the text says why.
        """
        optuna = self.optuna
        complete = self.study.get_trials(deepcopy=False, states=(self._state.COMPLETE,))
        if len(complete) < _LEAST_TRIALS or len({trial.value for trial in complete}) < 2:
            return {}, {}, f"needs at least {_LEAST_TRIALS} complete trials with different scores"
        try:
            import sklearn  # noqa: F401
        except ImportError:
            evaluator, method = optuna.importance.PedAnovaImportanceEvaluator(), "PED-ANOVA"
        else:
            evaluator, method = optuna.importance.FanovaImportanceEvaluator(seed=self.space.seed), "fANOVA"

        def shares(names: Sequence[str]) -> dict[str, float]:
            having = [trial for trial in complete if all(name in trial.params for name in names)]
            if len(having) < _LEAST_TRIALS or len({trial.value for trial in having}) < 2:
                return {}
            try:
                with _quiet():
                    found = optuna.importance.get_param_importances(
                        self.study, evaluator=evaluator, params=list(names)
                    )
            except (ValueError, RuntimeError):  # the same value in all of them
                return {}
            return {name: float(value) for name, value in found.items() if math.isfinite(value)}

        always = [p.name for p in self.space.parameters if all(p.name in trial.params for trial in complete)]
        conditional: dict[str, float] = {}
        for parameter in self.space.parameters:
            if parameter.name not in always:
                share = shares([*always, parameter.name]).get(parameter.name)
                if share is not None:
                    conditional[parameter.name] = share
        ordered = sorted(shares(always).items(), key=lambda item: -item[1]) if always else []
        return dict(ordered), conditional, method

    @property
    def _state(self) -> Any:
        return self.optuna.trial.TrialState

    # ---- locks ----

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of this folder is within such a block."""
        _acquire(self._guard)
        try:
            yield
        finally:
            self._guard.release()

    def _own_place(self) -> str:
        """What tells this folder from those of other machines that share the study."""
        path = self.folder / "locks" / "place"
        with self.alone():
            if not path.is_file():
                replace_file(path, f"{uuid.uuid4()}\n".encode())
            return path.read_text(encoding="utf-8").strip()


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def _acquire(lock: FolderLock) -> None:
    end = time.monotonic() + _LONGEST_WAIT
    while True:
        try:
            holder = lock.acquire()
        except OSError as error:
            raise UserError(f"{lock.path} cannot be written: {error.strerror or error}") from error
        if holder is None:
            return
        if time.monotonic() > end:
            raise UserError(f"{lock.path.parent} is in use by {holder}")
        time.sleep(_WAIT)


class _JournalLock:
    """Of the journal's file; optuna's own locks outlive a killed process."""

    def __init__(self, folder: Path) -> None:
        self._lock = FolderLock(_made(folder / "locks" / "journal"))

    def acquire(self) -> bool:
        """Wait for it."""
        _acquire(self._lock)
        return True

    def release(self) -> None:
        """Give it back."""
        self._lock.release()


def _journal(optuna: Any, folder: Path) -> Any:
    from optuna.storages.journal import JournalFileBackend

    lock: Any = _JournalLock(folder)  # made as optuna's are
    return optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL), lock_obj=lock))


def _cut_torn_line(folder: Path) -> None:
    """Drop the half line that a machine without power leaves in the journal, which nobody is writing meanwhile."""
    path, lock = folder / JOURNAL, _JournalLock(folder)
    lock.acquire()
    try:
        data = path.read_bytes() if path.is_file() else b""
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
    finally:
        lock.release()


def _without_password(text: str, storage: str | None) -> str:
    """A message without the password of a storage's URL."""
    credentials = re.match(r"[^:/]+://(.*)@", storage or "")
    password = credentials[1].partition(":")[2] if credentials else ""
    return text.replace(password, "***") if password else text


def _age(frozen: Any) -> float:
    """Seconds since a trial was begun."""
    begun = frozen.datetime_start
    return math.inf if begun is None else (datetime.datetime.now() - begun).total_seconds()


def _suggested(trial: optuna.Trial, parameter: Parameter) -> Scalar:
    if parameter.choices:
        found: Scalar = trial.suggest_categorical(parameter.name, list(parameter.choices))
        return found
    if parameter.whole:
        step = int(parameter.step or 1)
        return trial.suggest_int(
            parameter.name, int(parameter.low), int(parameter.high), step=step, log=parameter.log
        )
    return trial.suggest_float(
        parameter.name, parameter.low, parameter.high, step=parameter.step, log=parameter.log
    )


def _sampler(optuna: Any, space: Space) -> Any:
    """Draws of a trial are a function of the sweep's seed, of the trial's number and of the trials before it."""

    class Sampler(optuna.samplers.BaseSampler):
        def __init__(self) -> None:
            self._inner: Any = None

        def before_trial(self, study: Any, trial: Any) -> None:
            # Seeded by the trial's number: two processes never draw the same; one that goes on draws the same again.
            seed = int(np.random.SeedSequence([space.seed, trial.number]).generate_state(1)[0])
            if space.method == "tpe":
                with _quiet():
                    self._inner = optuna.samplers.TPESampler(seed=seed, n_startup_trials=space.tpe_startup)
            else:
                self._inner = optuna.samplers.RandomSampler(seed=seed)
            self._inner.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self._inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self._inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            return self._inner.sample_independent(study, trial, name, distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            if self._inner is not None:
                self._inner.after_trial(study, trial, state, values)

        def reseed_rng(self) -> None:
            """Every trial has a seed of its own already."""

    return Sampler()


def _pruner(optuna: Any, space: Space) -> Any:
    if space.pruner == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=space.pruner_startup,
            n_warmup_steps=space.pruner_warmup + 1,  # evaluations count from 1, optuna's steps from 0
        )
    if space.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            max_resource="auto" if space.evaluations is None else space.evaluations
        )
    return optuna.pruners.NopPruner()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says of some of its parts that they may change; that is no news to the user of a sweep."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def definition_of(space: Space, base: Mapping[str, Any]) -> str:
    """What must agree between all processes of a study: space and fixed settings, but for where they compute."""
    free = ("cache", "compile", "device", "kernels", "output", "plugins", "threads")
    return json.dumps([space.describe(), {k: v for k, v in base.items() if k not in free}], sort_keys=True)
