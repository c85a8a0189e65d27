"""A training that is killed and resumed ends in the same weights as one that was left alone, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_bert import write_tiny_bert

from mtbert.engine.checkpoint import CheckpointStore
from mtbert.errors import CheckpointError

from .conftest import STEPS, Workplace, assert_same_run, copy_run, newest, steps_logged

MODES = {
    "several passes a step": ["--max_tokens=128"],
    "round robin": ["--curriculum.mixing=round-robin", "--curriculum.epoch_length=2"],
    "lora": ["--mode=lora", "--model.lora.dropout=0.1"],
    "frozen encoder": ["--mode=last-linear-layer"],
    "bfloat16": ["--precision=bf16"],
    "float16 with a loss scale": ["--precision=fp16", "--surgery.method=pcgrad", "--max_tokens=256"],
    "surgery and regularisers": [
        "--surgery.method=gradvac",
        "--mixout.p=0.2",
        "--optim.pretrained_decay=0.01",
        "--optim.layer_decay=0.9",
        "--sst.sampling=class-balanced",
    ],
    "objectives": [
        "--simcse.tasks=[sst]",
        "--mnrl.tasks=[para]",
        "--smart.tasks=[sts]",
        "--bregman.tasks=[sst]",
        "--surgery.method=pcgrad",
    ],
    "schedules": [
        "--curriculum.mixing=annealed",
        "--unfreezing.gradual=true",
        "--unfreezing.epochs_per_layer=0.5",
        "--schedule.shape=slanted-triangular",
        "--surgery.method=uncertainty",
    ],
    "dynamic": ["--curriculum.mixing=dynamic"],
}


def test_a_process_of_its_own_killed_and_resumed(
    workplace: Workplace, uninterrupted: Path, run: Path
) -> None:
    """The command lines of the README, without the tests' server."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mtbert.train"]
    arguments = [str(argument) for argument in workplace.arguments(run)]
    with subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.DEVNULL) as first:
        while steps_logged(run) < 6 and first.poll() is None:
            time.sleep(0.002)
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
    found = newest(run)
    assert found is not None
    assert 4 <= found.step < STEPS
    done = subprocess.run(
        [*command, "--resume", str(run)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed from step {found.step} of {STEPS}" in done.stdout
    assert_same_run(run, uninterrupted)
    assert (run / "report.md").is_file()


@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_every_mode(workplace: Workplace, tmp_path: Path, options: list[str]) -> None:
    """The killed run has its input made ready on a thread, the other one has not."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    plain = workplace.start(straight, "--input.ahead=0", *options)
    workplace.train_to_the_last_checkpoint(plain, straight)
    training = workplace.start(killed, "--input.ahead=3", *options)
    assert workplace.train_to_step(training, killed, 6)
    training.kill()
    assert not (killed / "checkpoints" / f"step-{STEPS}").exists(), "the kill came too late to prove anything"
    workplace.train_to_the_last_checkpoint(workplace.resume(killed), killed)
    assert_same_run(killed, straight)


def test_killed_at_random_moments(workplace: Workplace, uninterrupted: Path, run: Path) -> None:
    chance = random.Random(3)
    training = workplace.start(run)
    kills = 0
    for target in (1, 5, 6, 9, 12, 15):
        workplace.train_to_step(training, run, target)
        time.sleep(chance.uniform(0, 0.03))
        if not training.running():
            break
        training.kill()
        kills += 1
        training = workplace.resume(run)
    workplace.train_to_the_last_checkpoint(training, run)
    assert kills >= 3
    assert_same_run(run, uninterrupted)


def test_killed_in_the_middle_of_saves(workplace: Workplace, tmp_path: Path) -> None:
    """A wider BERT, whose checkpoints take some time to write."""
    bert = write_tiny_bert(tmp_path / "bert", hidden=256, intermediate=1024)
    options = (f"--model.pretrained={bert}", "--run.checkpoint_every=1", "--epochs=1")
    straight, run = tmp_path / "straight", tmp_path / "run"
    workplace.train_to_the_last_checkpoint(workplace.start(straight, *options), straight, steps=6)

    def saving() -> list[str]:
        folder = run / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return [name for name in names if name.endswith(".partial")]

    hits = 0
    training = workplace.start(run, *options)
    for delay in (0.0, 0.01, 0.02, 0.0, 0.005):
        if not training.until(saving, pause=0):
            break
        time.sleep(delay)
        training.kill()
        hits += bool(saving())
        before = newest(run)
        training = workplace.resume(run)
        # One step further than before this kill, so that the next one hits another save.
        wanted = run / "checkpoints" / f"step-{1 if before is None else before.step + 1}"
        training.until(wanted.exists)
    workplace.train_to_the_last_checkpoint(training, run, steps=6)
    assert hits >= 1, "no kill hit a save: the test proves nothing"
    assert_same_run(run, straight)
    assert saving() == []


def test_killed_before_the_first_checkpoint(workplace: Workplace, uninterrupted: Path, run: Path) -> None:
    training = workplace.start(run, "--run.checkpoint_every=0")
    assert training.until(lambda: (run / "metrics.jsonl").exists())
    training.kill()
    assert newest(run) is None
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("checkpoint_every: 0", "checkpoint_every: 4"))
    resumed = workplace.resume(run)
    workplace.train_to_the_last_checkpoint(resumed, run)
    assert "no checkpoint yet" in resumed.out
    assert_same_run(run, uninterrupted)


def test_killed_after_the_last_checkpoint_only_the_report_is_made(
    workplace: Workplace, uninterrupted: Path, run: Path
) -> None:
    copy_run(uninterrupted, run)
    assert not (run / "report.md").exists()
    training = workplace.resume(run)
    assert training.wait() == 0, training.err
    assert (run / "report.md").is_file()
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    workplace: Workplace, uninterrupted: Path, run: Path, name: str
) -> None:
    copy_run(uninterrupted, run)
    path = run / "checkpoints" / f"step-{STEPS}" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    training = workplace.resume(run)
    assert training.until(
        lambda: steps_logged(run) == STEPS and f"resumed from step 16 of {STEPS}" in training.out
    )
    assert str(path.parent) in training.out
    assert f"{name} is damaged" in training.out
    assert training.until(lambda: "is damaged" in (run / "log.txt").read_text())
    # The repaired run has replaced the damaged checkpoint when the next one is complete.
    assert training.until(lambda: not list((run / "checkpoints").glob(".*")) and whole(path.parent))
    training.kill()
    assert_same_run(run, uninterrupted)


def whole(checkpoint: Path) -> bool:
    try:
        CheckpointStore(checkpoint.parent).load(STEPS)
    except CheckpointError:
        return False
    return True


def test_another_number_of_threads_is_warned_of(workplace: Workplace, uninterrupted: Path, run: Path) -> None:
    copy_run(uninterrupted, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("threads: 1", "threads: 2"))
    training = workplace.resume(run)
    assert training.until(lambda: "resumed from step" in training.out)
    training.kill()
    assert "not bit for bit: threads: 1 then, 2 now" in training.out


def test_all_checkpoints_damaged(workplace: Workplace, uninterrupted: Path, run: Path) -> None:
    copy_run(uninterrupted, run)
    for path in (run / "checkpoints").glob("*/state.json"):
        path.unlink()
    training = workplace.resume(run)
    assert training.wait() == 2
    assert "Traceback" not in training.err
    for step in (16, STEPS):
        assert f"step-{step}: state.json is missing" in training.err
