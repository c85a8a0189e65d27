"""A full disk ends the training with one clear message; the last good checkpoint is there to go on from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support.small_disk import small_disk

from .conftest import STEPS, Workplace, assert_same_run, newest


def test_a_disk_that_fills_up_during_the_training(
    workplace: Workplace, uninterrupted: Path, tmp_path: Path
) -> None:
    first = uninterrupted / "checkpoints" / f"step-{STEPS}"
    size = sum(path.stat().st_size for path in first.iterdir())
    with small_disk(tmp_path / "disk", size=f"{int(2.6 * size) // 1024}k") as disk:
        run = disk / "run"
        training = workplace.start(run)
        assert training.wait() == 2
        assert "Traceback" not in training.err
        assert training.err.startswith(f"error: the checkpoint {run}/checkpoints/step-")
        assert "No space left on device" in training.err
        assert "MB are needed" in training.err
        found = newest(run)
        assert found is not None
        assert f"The last good checkpoint is kept: {found.path}\n" in training.err
        assert not list((run / "checkpoints").glob(".*"))
        again = workplace.resume(run)
        assert again.wait() == 2, "still full"
        assert newest(run) is not None
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        workplace.train_to_the_last_checkpoint(workplace.resume(run), run)
        assert_same_run(run, uninterrupted)


def test_a_disk_that_is_full_from_the_beginning(workplace: Workplace, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="64k") as disk:
        (disk / "ballast").write_bytes(bytes(64 << 10))
        training = workplace.start(disk / "run")
        assert training.wait() == 2
        assert "Traceback" not in training.err
        assert str(disk / "run") in training.err
        assert "No space left on device" in training.err


def test_a_disk_without_room_for_a_line_of_metrics(workplace: Workplace, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="4m") as disk:
        run = disk / "run"
        options = (
            "--epochs=1000",
            "--evaluation.every=1000000",
            "--run.checkpoint_every=0",
            "--run.log_every=1",
        )
        training = workplace.start(run, *options)
        assert workplace.train_to_step(training, run, 1)
        (disk / "ballast").touch()
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={disk / 'ballast'}", "bs=64k"], check=False, capture_output=True
        )
        assert training.wait() == 2
        assert "Traceback" not in training.err
        assert "metrics.jsonl cannot be written: No space left on device" in training.err
        assert (run / "metrics.jsonl").read_bytes().endswith(b"}\n")
