"""Ctrl-C and SIGTERM: the step is finished, a checkpoint and a message are left, and nothing is lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .conftest import STEPS, Workplace, assert_same_run, newest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_a_checkpoint_and_says_where(
    workplace: Workplace, uninterrupted: Path, run: Path, number: signal.Signals
) -> None:
    training = workplace.start(run)
    assert workplace.train_to_step(training, run, 4)
    training.signal(number)
    assert training.wait() == 130
    found = newest(run)
    assert found is not None
    assert 4 <= found.step < STEPS, "the signal came too late to prove anything"
    assert training.err == f"stopped after step {found.step}; the checkpoint is {found.path}\n"
    assert f"{number.name}: stopping after this step" in (run / "log.txt").read_text()
    workplace.train_to_the_last_checkpoint(workplace.resume(run), run)
    assert_same_run(run, uninterrupted)


def test_ctrl_c_again_and_again(workplace: Workplace, uninterrupted: Path, run: Path) -> None:
    """Wherever the stop falls in the window of a line of metrics.jsonl, the resumed line is the uninterrupted one."""
    training = workplace.start(run)
    stops = 0
    for target in (3, 6, 9, 12, 15):
        if not workplace.train_to_step(training, run, target):
            break
        training.signal(signal.SIGINT)
        assert training.wait() == 130, training.err
        stops += 1
        training = workplace.resume(run)
    workplace.train_to_the_last_checkpoint(training, run)
    assert stops >= 3
    assert_same_run(run, uninterrupted)


def test_ctrl_c_before_the_first_step(workplace: Workplace, run: Path) -> None:
    training = workplace.start(run)
    assert training.until(run.exists)
    training.signal(signal.SIGINT)
    assert training.wait() == 130
    assert "Traceback" not in training.err
    assert len(training.err.splitlines()) == 1
