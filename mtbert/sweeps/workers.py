"""The processes of a sweep: each takes trials from the study until nothing is left to begin."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from mtbert.engine.host_memory import give_back_freed_memory
from mtbert.errors import Interrupted, UserError
from mtbert.sweeps.study import Study, TrialFacts
from mtbert.sweeps.trial import Outcome, Workshop, remove_checkpoints

_POLL_SECONDS = 0.2
_ENDED = ("complete", "pruned", "failed")
_MOST_RESTARTS = 20
"""Of workers that die at once, one after the other."""


def work(workshop: Workshop, *, jobs: int, say: Callable[[str], None]) -> None:
    """Run trials until none is left to begin. jobs: how many processes do so.

    Raises UserError when every trial fails for the same reason, and Interrupted when asked to stop.
    """
    study = workshop.study
    while (claim := study.claim()) is not None:
        try:
            outcome = workshop.run(claim)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted(
                f"stopped during trial {claim.facts.get('name', claim.number)}; the same command goes on"
            ) from None
        finally:
            claim.release()
        give_back_freed_memory()
        remove_checkpoints(workshop.folder, study, workshop.space.keep)
        say(progress_line(outcome, study.trials(), workshop.space.total, jobs))
        refusal = study.refusal()
        if refusal is not None:
            raise UserError(f"every trial has failed for the same reason: {refusal}")


def progress_line(outcome: Outcome, trials: Sequence[TrialFacts], total: int, jobs: int) -> str:
    """One trial's end: name, score, the best so far, time, and an estimate of the rest."""
    ended = [trial for trial in trials if trial.state in _ENDED]
    complete = [trial for trial in trials if trial.state == "complete" and trial.score is not None]
    result = outcome.state if outcome.score is None else f"{outcome.state} {outcome.score:.4f}"
    if outcome.state == "failed":
        result = f"failed: {outcome.reason}"
    parts = [result]
    if complete:
        best = max(complete, key=lambda trial: trial.score or 0.0)
        parts.append(f"best {best.score:.4f} (trial {best.number})")
    parts.append(f"{outcome.seconds:.0f} s")
    left = total - len(ended)
    if left > 0:
        mean = sum(float(trial.facts.get("seconds", 0.0)) for trial in ended) / max(len(ended), 1)
        parts.append(f"about {duration(mean * left / jobs)} left")
    return f"[{len(ended)}/{total}] {outcome.name}: {'; '.join(parts)}"


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def supervise(command: Sequence[str], study: Study, *, jobs: int, threads: int, total: int) -> None:
    """Keep `jobs` worker processes at work; one that is killed is replaced while trials are left.

    command: of one worker. threads: of the processor, for each. Raises Interrupted after Ctrl-C, when all have stopped,
    and UserError when the workers give up.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running: list[subprocess.Popen[bytes]] = []
    restarts = 0

    def start() -> None:
        # A session of its own: Ctrl-C in the terminal is for this process, which asks its workers to stop, once.
        running.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
        )

    code = 0
    try:
        for _ in range(min(jobs, total)):
            start()
        while running:
            time.sleep(_POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode == 0:
                    continue
                if process.returncode > 0:  # it has said why on standard error
                    code = process.returncode if code in (0, Interrupted.exit_code) else code
                    _ask(running, signal.SIGINT)
                    continue
                restarts += 1
                name = _signal_name(-process.returncode)
                print(f"a worker was killed by {name}", file=sys.stderr, flush=True)
                if restarts <= _MOST_RESTARTS and not code and _left(study):
                    start()
    except KeyboardInterrupt:
        _stop(running)
        raise Interrupted("stopped; the same command goes on") from None
    except BaseException:
        _kill(running)
        raise
    if code == Interrupted.exit_code:
        raise Interrupted("stopped; the same command goes on")
    if code:
        raise UserError("a worker ended with an error")


def _left(study: Study) -> bool:
    return any(trial.state in ("waiting", "running") for trial in study.trials())


def _ask(running: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _stop(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask for an end with a checkpoint, and wait for it; a KeyboardInterrupt meanwhile kills."""
    try:
        _ask(running, signal.SIGINT)
        for process in running:
            process.wait()
    except KeyboardInterrupt:
        _kill(running)


def _kill(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.kill()
        process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
