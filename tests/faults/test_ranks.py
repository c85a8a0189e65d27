"""Ranks that fail, are killed or stopped: all of them end within seconds, say why, and the run can go on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ranks import environment_of, free_port
from support.trainings import Training

from .conftest import STEPS, Workplace, metrics_without_times, newest, steps_logged

SECONDS = 30.0
"""Within which all ranks must have ended, on a machine that is busy with other tests."""


def main_process(run: Path) -> int:
    """The process id of rank 0, which holds the run's lock."""
    words = (run / ".lock").read_text().split()
    return int(words[1]) if words else 0  # a process that has just taken it


def wait(job: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Wait until `condition` holds while the job runs."""
    end = time.monotonic() + 60
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)


def start_ranks(
    workplace: Workplace, run: Path, size: int = 2, *more: object, **of_rank_1: object
) -> list[Training]:
    """The same command line on each rank, but for options of rank 1 alone."""
    port = free_port()
    started = []
    for rank in range(size):
        options = (
            [f"--{name.replace('__', '.')}={value}" for name, value in of_rank_1.items()] if rank == 1 else []
        )
        arguments = [*workplace.arguments(run, *more), *options]
        started.append(workplace.server.start(arguments, environment_of(rank, size, port)))
    return started


def ends(ranks: list[Training]) -> list[int]:
    """The exit codes of all ranks, which must come soon."""
    begun = time.monotonic()
    codes = [rank.wait() for rank in ranks]
    assert time.monotonic() - begun < SECONDS
    return codes


def test_a_killed_rank_ends_the_others_and_its_run_goes_on(workplace: Workplace, run: Path) -> None:
    ranks = start_ranks(workplace, run, 3)
    assert workplace.train_to_step(ranks[0], run, 6), ranks[0].err
    ranks[1].kill()
    assert ends([ranks[0], ranks[2]]) == [2, 2]
    for rank in (0, 2):
        assert f"error: rank {rank}: ended, because rank 1 " in ranks[rank].err
        assert "is gone: killed, crashed or cut off" in ranks[rank].err
        assert "Traceback" not in ranks[rank].err
    found = newest(run)
    assert found is not None
    assert 4 <= found.step < STEPS
    alone = workplace.resume(run)
    workplace.train_to_the_last_checkpoint(alone, run)
    assert "not bit for bit: ranks: 3 then, 1 now" in alone.out


def test_a_rank_with_another_table_is_named(workplace: Workplace, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(workplace.tables, tmp_path / "other"))
    table = other / "sts-dev.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:-1], lines[-1] + "1"]) + "\n")
    ranks = start_ranks(workplace, run, 2, data=other)
    assert ends(ranks) == [2, 2]
    said = ranks[0].err + ranks[1].err
    assert said.count("the tables of rank 1 differ from those of rank 0") == 1
    assert not (run / "config.yaml").exists()


def test_a_missing_table_on_one_rank(workplace: Workplace, run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    ranks = start_ranks(workplace, run, 2, data=empty)
    assert ends(ranks) == [2, 2]
    assert "error: rank 1: " in ranks[1].err
    assert "error: rank 0: ended, because rank 1 failed: " in ranks[0].err
    assert str(empty) in ranks[0].err
    assert not (run / "config.yaml").exists()


def test_a_mistake_of_all_ranks_is_said_once(workplace: Workplace, run: Path) -> None:
    ranks = start_ranks(workplace, run, 2, "--surgery.method=gradvac", "--surgery.gradvac_decay=7")
    assert ends(ranks) == [2, 2]
    said = ranks[0].err + ranks[1].err
    assert said.count("surgery.gradvac_decay: expected above 0") == 1
    assert "Traceback" not in said


def test_a_stop_of_one_rank_stops_all_with_one_checkpoint(workplace: Workplace, run: Path) -> None:
    ranks = start_ranks(workplace, run)
    assert workplace.train_to_step(ranks[0], run, 4), ranks[0].err
    ranks[1].signal(signal.SIGTERM)
    assert ends(ranks) == [130, 130]
    found = newest(run)
    assert found is not None
    assert ranks[0].err == f"stopped after step {found.step}; the checkpoint is {found.path}\n"
    assert ranks[1].err == ""
    assert ranks[1].out == ""


def test_torchrun_starts_killed_ranks_anew(workplace: Workplace, uninterrupted: Path, run: Path) -> None:
    """One call of torchrun: a rank is killed, all start anew and go on; Ctrl-C; then a process alone ends the run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--standalone", "--monitor-interval", "0.1", "-m", "mtbert.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    arguments = [str(argument) for argument in workplace.arguments(run)]
    with subprocess.Popen([*command, *arguments], env=environment, **options) as job:
        try:
            wait(job, lambda: steps_logged(run) >= 6)
            first = main_process(run)
            os.kill(first, signal.SIGKILL)
            wait(job, lambda: main_process(run) != first and steps_logged(run) >= 9)
            job.send_signal(signal.SIGINT)
            text, _ = job.communicate(timeout=60)
        finally:
            job.kill()
    assert job.returncode != 0
    assert "resumed from step" in text
    assert re.search(r"stopped after step \d+; the checkpoint is", text), text
    alone = workplace.resume(run)
    assert alone.wait() == 0, alone.err
    assert "ranks: 2 then, 1 now" in alone.out
    mine, theirs = metrics_without_times(run), metrics_without_times(uninterrupted)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for found, expected in zip(mine, theirs, strict=True):
        assert found.get("tokens") == expected.get("tokens")
        if found["kind"] == "step":
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        if found["kind"] == "evaluation":
            assert found["dev_loss"] == pytest.approx(expected["dev_loss"], rel=1e-4)
    assert (run / "report.md").is_file()
