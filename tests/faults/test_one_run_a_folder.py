"""One folder, one run, one process: what would mix two runs is refused and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

from mtbert.engine.checkpoint import FORMAT, _seal

from .conftest import STEPS, Workplace, copy_run


def contents(run: Path) -> dict[str, bytes]:
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in (".lock", "log.txt")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_a_second_run_on_the_same_folder_is_refused(
    workplace: Workplace, uninterrupted: Path, run: Path
) -> None:
    copy_run(uninterrupted, run)
    before = contents(run)
    training = workplace.start(run)
    assert training.wait() == 2
    assert training.err.startswith(f"error: {run} already holds a run")
    assert f"--resume {run}" in training.err
    assert "--output" in training.err
    assert contents(run) == before


def test_while_one_process_trains_no_other_may(workplace: Workplace, uninterrupted: Path, run: Path) -> None:
    first = workplace.start(run, "--epochs=1000")
    assert workplace.train_to_step(first, run, 1)
    for second in (workplace.start(run), workplace.resume(run)):
        assert second.wait() == 2
        assert f"{run} is in use by process {first.pid} on " in second.err
        assert "Traceback" not in second.err
    assert first.running()
    first.kill()
    third = workplace.resume(run)
    assert third.until(lambda: "resumed from step" in third.out), "the lock outlived its process"
    third.kill()


def test_a_checkpoint_of_a_newer_program_is_not_passed_over(
    workplace: Workplace, uninterrupted: Path, run: Path
) -> None:
    copy_run(uninterrupted, run)
    path = run / "checkpoints" / f"step-{STEPS}" / "COMPLETE"
    fields = json.loads(path.read_text()) | {"format": FORMAT + 1}
    del fields["seal"]
    path.write_text(json.dumps({**fields, "seal": _seal(fields)}))
    before = contents(run)
    training = workplace.resume(run)
    assert training.wait() == 2
    assert "newer mtbert" in training.err
    assert contents(run) == before


def test_other_training_data_is_refused(workplace: Workplace, uninterrupted: Path, run: Path) -> None:
    copy_run(uninterrupted, run)
    before = contents(run)
    path = workplace.tables / "sts-train.csv"
    original = path.read_text(encoding="utf-8")
    lines = original.splitlines()
    try:
        path.write_text(
            "\n".join([*lines[:-1], lines[-1].rpartition("\t")[0] + "\t2.25"]) + "\n", encoding="utf-8"
        )
        training = workplace.resume(run)
        assert training.wait() == 2
        assert "the training data is not what the run began with" in training.err
    finally:
        path.write_text(original, encoding="utf-8")
    assert contents(run) == before
