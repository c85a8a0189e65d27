"""Checkpoints: what is saved comes back; damage, kills and full disks never cost more than the newest one."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_disk import small_disk
from torch import Tensor

import mtbert.engine.checkpoint as checkpoint_module
from mtbert.engine.checkpoint import Checkpoint, CheckpointStore
from mtbert.errors import CheckpointError

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"]


def tensors(step: int, size: int = 100) -> dict[str, Tensor]:
    return {"a": torch.full((size,), float(step)), "b": torch.tensor(step)}


def save(store: CheckpointStore, step: int, best: int | None = None, size: int = 100) -> Path:
    return store.save(
        step, model=tensors(step, size), optimizer=tensors(-step, size), state={"step": step}, best_step=best
    )


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.state == {"step": step}
    assert (checkpoint.model["a"] == step).all()
    assert (checkpoint.optimizer["a"] == -step).all()
    assert int(checkpoint.model["b"]) == step


def no_problem(text: str) -> None:
    raise AssertionError(f"unexpected problem: {text}")


def hidden(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_what_is_saved_comes_back(store: CheckpointStore) -> None:
    model = {"w": torch.randn(3, 4).bfloat16(), "t": torch.randn(5, 2).t(), "n": torch.tensor(7)}
    optimizer = {"exp_avg.w": torch.randn(3, 4), "on": torch.tensor([True, False])}
    state = {
        "floats": [0.1, 1 / 3, 1e-320, -0.0, math.inf, -math.inf],
        "big": 2**63,
        "text": "naïve 🙂",
        "none": None,
        "nested": {"list": [True, {"x": 1}]},
    }
    path = store.save(12, model=model, optimizer=optimizer, state=state, best_step=12)
    assert path == store.folder / "step-12"
    assert sorted(entry.name for entry in path.iterdir()) == sorted(FILES)
    found = store.load_newest(no_problem)
    assert found is not None
    assert (found.path, found.step) == (path, 12)
    assert found.state == state
    assert math.copysign(1, found.state["floats"][3]) == -1
    for name, tensor in model.items():
        assert torch.equal(found.model[name], tensor)
        assert found.model[name].dtype == tensor.dtype
    assert found.optimizer.keys() == optimizer.keys()
    assert hidden(store.folder) == []


def test_nan_in_the_state_comes_back(store: CheckpointStore) -> None:
    store.save(1, model={}, optimizer={}, state={"loss": math.nan}, best_step=None)
    assert math.isnan(store.load(1).state["loss"])


def test_the_empty_checkpoint(store: CheckpointStore) -> None:
    store.save(0, model={}, optimizer={}, state={}, best_step=None)
    found = store.load_newest(no_problem)
    assert found is not None
    assert (found.model, found.optimizer, found.state) == ({}, {}, {})


def test_no_checkpoint_at_all(store: CheckpointStore) -> None:
    assert store.load_newest(no_problem) is None
    assert store.load_best(no_problem) is None
    assert store.steps() == []
    store.folder.mkdir()
    assert store.load_newest(no_problem) is None
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        store.load(3)


def test_the_newest_is_the_highest_step_not_the_last_name(store: CheckpointStore) -> None:
    for step in (9, 10, 100):
        save(store, step)
    assert_is(store.load_newest(no_problem), 100)
    assert_is(store.load(10), 10)


def test_foreign_names_are_left_alone(store: CheckpointStore) -> None:
    save(store, 1)
    foreign = ("step-007", "step-x", "notes", "step-3.old", ".step-4")
    for name in foreign:
        (store.folder / name).mkdir()
    save(store, 2)
    save(store, 3)
    assert store.steps() == [2, 3]
    assert {*foreign} <= {entry.name for entry in store.folder.iterdir()}


@pytest.mark.parametrize(
    "state", [{1: "x"}, {"a": {None: 1}}, {"a": [{2: 3}]}, {"a": {1, 2}}, {"a": object()}]
)
def test_a_state_that_would_come_back_different_is_refused(store: CheckpointStore, state: Any) -> None:
    with pytest.raises(TypeError):
        store.save(1, model={}, optimizer={}, state=state, best_step=None)
    assert not store.folder.exists()


def test_a_state_too_large_to_be_read_is_not_written(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "_MOST_JSON_BYTES", 1000)
    with pytest.raises(ValueError, match="may not take"):
        store.save(1, model={}, optimizer={}, state={"x": "y" * 1000}, best_step=None)


@pytest.mark.parametrize(("step", "best"), [(-1, None), (3, 4), (3, -1)])
def test_impossible_steps(store: CheckpointStore, step: int, best: int | None) -> None:
    with pytest.raises(ValueError, match="best step"):
        save(store, step, best)


# ---- which ones are kept


def test_the_last_two_and_the_best_are_kept(store: CheckpointStore) -> None:
    kept = []
    for step, best in [(10, 10), (20, 20), (30, 20), (40, 20), (50, 50), (60, 50), (70, 50)]:
        save(store, step, best)
        kept.append(store.steps())
    assert kept == [[10], [10, 20], [20, 30], [20, 30, 40], [40, 50], [50, 60], [50, 60, 70]]
    assert_is(store.load_best(no_problem), 50)
    assert_is(store.load_newest(no_problem), 70)


def test_without_a_best_the_last_two_are_kept(store: CheckpointStore) -> None:
    for step in (1, 2, 3, 4):
        save(store, step)
    assert store.steps() == [3, 4]
    assert store.load_best(no_problem) is None


def test_nothing_is_deleted_before_the_new_one_is_complete(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    save(store, 2)
    seen = []
    real = checkpoint_module._remove

    def remove(path: Path) -> None:
        seen.append(path.name)
        assert_is(CheckpointStore(store.folder).load_newest(no_problem), 3)
        real(path)

    monkeypatch.setattr(checkpoint_module, "_remove", remove)
    save(store, 3)
    assert seen == [".step-1.removed"]


def test_a_damaged_one_is_not_counted_among_the_last_two(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2)
    (store.folder / "step-2" / "model.safetensors").write_bytes(b"short")
    save(store, 3)
    assert store.steps() == [1, 3]


def test_one_that_cannot_be_read_today_is_not_deleted_as_damaged(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    save(store, 2)
    real = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.parent.name == "step-2":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", broken)
        save(store, 3)
    assert_is(store.load(2), 2)


def test_an_abandoned_future_is_deleted(store: CheckpointStore) -> None:
    """The newest is damaged and the run goes on from the one before: the damaged one is not its last."""
    save(store, 10, 10)
    save(store, 20, 20)
    (store.folder / "step-20" / "model.safetensors").unlink()
    found = store.load_newest(lambda text: None)
    assert_is(found, 10)
    save(store, 15, 10)
    assert store.steps() == [10, 15]
    assert_is(store.load_best(no_problem), 10)


def test_going_on_from_an_older_one_abandons_whole_ones_too(store: CheckpointStore) -> None:
    for step in (10, 20):
        save(store, step, 10)
    save(store, 15, 10)
    assert store.steps() == [10, 15]


def test_the_same_step_is_replaced(store: CheckpointStore) -> None:
    save(store, 5)
    store.save(5, model=tensors(8), optimizer={}, state={"second": True}, best_step=5)
    found = store.load(5)
    assert found.state == {"second": True}
    assert (found.model["a"] == 8).all()
    assert store.steps() == [5]
    assert hidden(store.folder) == []


def test_leftovers_of_killed_saves_are_removed(store: CheckpointStore) -> None:
    save(store, 1)
    for name in (".step-2.partial", ".step-9.partial", ".step-0.removed", ".step-1.replaced"):
        (store.folder / name).mkdir()
        (store.folder / name / "model.safetensors").write_bytes(b"half")
    (store.folder / ".step-7.partial").write_bytes(b"a file")
    assert_is(store.load_newest(no_problem), 1)
    save(store, 2)
    assert hidden(store.folder) == []
    assert store.steps() == [1, 2]


def test_killed_between_the_two_renames_of_a_replacement(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2)
    (store.folder / "step-2").rename(store.folder / ".step-2.replaced")
    assert_is(store.load_newest(no_problem), 2)
    assert_is(store.load(2), 2)
    save(store, 3)
    assert store.steps() == [2, 3]
    assert_is(store.load(2), 2)
    assert hidden(store.folder) == []


def test_an_old_one_that_cannot_be_deleted_is_a_warning(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1)
    save(store, 2)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_module, "_remove", refuse)
    save(store, 3)
    assert "step-1" in caplog.text
    assert "Permission denied" in caplog.text
    monkeypatch.undo()
    save(store, 4)
    assert store.steps() == [3, 4]
    assert hidden(store.folder) == []


# ---- damage


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def size_of(path: Path) -> int:
    return path.stat().st_size


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: cut(path, 0),
    "cut to 1 byte": lambda path: cut(path, 1),
    "cut to 8 bytes": lambda path: cut(path, 8),
    "cut in half": lambda path: cut(path, size_of(path) // 2),
    "cut by 1 byte": lambda path: cut(path, size_of(path) - 1),
    "one byte longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path: flip(path, 0),
    "a bit in the header": lambda path: flip(path, 12),
    "a bit in the middle": lambda path: flip(path, size_of(path) // 2),
    "last bit": lambda path: flip(path, size_of(path) - 1),
    "garbage": lambda path: path.write_bytes(os.urandom(size_of(path))),
    "zeros": lambda path: path.write_bytes(bytes(size_of(path))),
    "deleted": lambda path: path.unlink(),
    "a folder": replace_by_folder,
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = CheckpointStore(tmp_path_factory.mktemp("two") / "checkpoints")
    save(store, 1, 1)
    save(store, 2, 1)
    return store.folder


@pytest.fixture
def copy(two_checkpoints: Path, tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints")))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(
    copy: CheckpointStore, name: str, damage: str
) -> None:
    DAMAGE[damage](copy.folder / "step-2" / name)
    problems: list[str] = []
    assert_is(copy.load_newest(problems.append), 1)
    assert len(problems) == 1
    assert str(copy.folder / "step-2") in problems[0]
    assert name in problems[0]
    with pytest.raises(CheckpointError, match=name):
        copy.load(2)
    assert_is(copy.load_best(no_problem), 1)


def test_all_damaged(copy: CheckpointStore) -> None:
    (copy.folder / "step-1" / "state.json").unlink()
    cut(copy.folder / "step-2" / "model.safetensors", 100)
    problems: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        copy.load_newest(problems.append)
    assert len(problems) == 2
    lines = str(caught.value).splitlines()
    assert str(copy.folder) in lines[0]
    assert "step-2" in lines[1]
    assert "model.safetensors is truncated (100 bytes instead of" in lines[1]
    assert "step-1: state.json is missing" in lines[2]


def test_any_flipped_bit_of_complete_is_found(copy: CheckpointStore) -> None:
    path = copy.folder / "step-2" / "COMPLETE"
    whole = path.read_bytes()
    for offset in range(len(whole)):
        data = bytearray(whole)
        data[offset] ^= 1 << (5 * offset % 8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="COMPLETE is damaged"):
            copy.load(2)


def test_a_save_that_never_finished_under_its_final_name(copy: CheckpointStore) -> None:
    (copy.folder / "step-3").mkdir()
    (copy.folder / "step-4").write_bytes(b"a file")
    problems: list[str] = []
    assert_is(copy.load_newest(problems.append), 2)
    assert "step-4" in problems[0]
    assert "COMPLETE is missing" in problems[1]


def test_a_checkpoint_under_another_steps_name(copy: CheckpointStore) -> None:
    (copy.folder / "step-2").rename(copy.folder / "step-900")
    problems: list[str] = []
    assert_is(copy.load_newest(problems.append), 1)
    assert "checkpoint of step 2 under another name" in problems[0]


def test_files_of_two_checkpoints_mixed(copy: CheckpointStore) -> None:
    shutil.copy(copy.folder / "step-1" / "model.safetensors", copy.folder / "step-2" / "model.safetensors")
    problems: list[str] = []
    assert_is(copy.load_newest(problems.append), 1)
    assert "model.safetensors is damaged (its SHA-256 differs)" in problems[0]


def test_a_read_error_is_named(copy: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint_module.file_record

    def broken(path: Path) -> Any:
        if path.parent.name == "step-2" and path.name == "optimizer.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(checkpoint_module, "file_record", broken)
    problems: list[str] = []
    assert_is(copy.load_newest(problems.append), 1)
    assert "optimizer.safetensors cannot be read: Input/output error" in problems[0]


def reseal(path: Path, **changes: Any) -> None:
    fields = json.loads(path.read_text()) | changes
    del fields["seal"]
    path.write_text(json.dumps({**fields, "seal": checkpoint_module._seal(fields)}))


def test_a_newer_format_is_an_error_and_not_passed_over(copy: CheckpointStore) -> None:
    reseal(copy.folder / "step-2" / "COMPLETE", format=checkpoint_module.FORMAT + 1)
    for attempt in (copy.load_newest, copy.load_best):
        with pytest.raises(CheckpointError, match="newer mtbert"):
            attempt(no_problem)
    with pytest.raises(CheckpointError, match="newer mtbert"):
        copy.load(2)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": {"model.safetensors": {"size": 1}}},
        {"files": [1]},
        {"format": None},
        {"format": "1"},
        {"step": None},
    ],
)
def test_a_complete_that_makes_no_sense(copy: CheckpointStore, changes: dict[str, Any]) -> None:
    reseal(copy.folder / "step-2" / "COMPLETE", **changes)
    problems: list[str] = []
    assert_is(copy.load_newest(problems.append), 1)
    assert len(problems) == 1


def test_a_deep_or_huge_json_does_no_harm(copy: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy.folder / "step-2" / "COMPLETE").write_bytes(b"[" * 1_000_000)
    with pytest.raises(CheckpointError, match="COMPLETE is damaged"):
        copy.load(2)
    with (copy.folder / "step-2" / "COMPLETE").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: no disk is used, and nothing of it may be read
    with pytest.raises(CheckpointError, match="too much"):
        copy.load(2)


# ---- the best


def test_the_best_is_usable_when_all_newer_ones_are_gone(store: CheckpointStore) -> None:
    for step, best in [(1, 1), (2, 1), (3, 1)]:
        save(store, step, best)
    for step in (2, 3):
        flip(store.folder / f"step-{step}" / "COMPLETE", 30)
    assert_is(store.load_best(no_problem), 1)
    assert_is(store.load_newest(lambda text: None), 1)


def test_a_damaged_best_is_named_and_the_best_before_it_used(store: CheckpointStore) -> None:
    save(store, 1, 1)
    save(store, 2, 2)
    flip(store.folder / "step-2" / "model.safetensors", 50)
    problems: list[str] = []
    assert_is(store.load_best(problems.append), 1)
    assert "step-2" in problems[0]


def test_a_missing_best_is_an_error_that_names_it(store: CheckpointStore) -> None:
    for step, best in [(1, 1), (2, 1), (3, 1)]:
        save(store, step, best)
    shutil.rmtree(store.folder / "step-1")
    with pytest.raises(CheckpointError, match=r"step-1: COMPLETE is missing"):
        store.load_best(lambda text: None)
    for step in (2, 3):
        (store.folder / f"step-{step}" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match=r"step-3: COMPLETE is missing"):
        store.load_best(lambda text: None)


# ---- a full disk


class Fault:
    """Makes the n-th call of one kind fail as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, number: int) -> None:
        self.left = number
        self.fired = False
        if kind == "write":
            real_open = Path.open

            def full(path: Path, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
                if "x" in mode and self.due():
                    return open("/dev/full", "wb", buffering=buffering)
                return real_open(path, mode, buffering, **options)

            monkeypatch.setattr(Path, "open", full)
            return
        target, name = {"open": (Path, "open"), "mkdir": (os, "mkdir")}.get(kind, (os, kind))
        real = getattr(target, name)

        def failing(*arguments: Any, **options: Any) -> Any:
            if self.due():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            return real(*arguments, **options)

        monkeypatch.setattr(target, name, failing)

    def due(self) -> bool:
        self.left -= 1
        self.fired |= self.left == 0
        return self.left == 0


def failure(store: CheckpointStore, *steps: int) -> str:
    """Save with step 1 as the best; the message of the error, or nothing."""
    try:
        for step in steps:
            save(store, step, best=1)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("step", [2, 3], ids=["replacing", "new"])
@pytest.mark.parametrize(
    ("kind", "least"), [("open", 4), ("write", 4), ("mkdir", 1), ("fsync", 6), ("rename", 1)]
)
def test_a_disk_that_fills_up_at_any_call(
    two_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, least: int, step: int
) -> None:
    if kind == "write" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    failures = 0
    for number in range(1, 100):
        store = CheckpointStore(Path(shutil.copytree(two_checkpoints, tmp_path / str(number))))
        with monkeypatch.context() as patch:
            fault = Fault(patch, kind, number)
            message = failure(store, step)
        if message:
            failures += 1
            assert str(store.folder) in message
            assert "No space left on device: 0.1 MB are needed" in message
            assert "MB are free" in message
            assert "The last good checkpoint is kept: " in message
        assert not [name for name in hidden(store.folder) if name.endswith(".partial")]
        assert_is(store.load(1), 1)
        assert_is(store.load(2), 2)
        assert_is(store.load_newest(no_problem), max(store.steps()))
        save(store, step, best=1)
        assert_is(store.load_newest(no_problem), step)
        assert hidden(store.folder) == []
        if not fault.fired:
            break
    assert failures >= least


def test_the_space_is_checked_before_anything_is_written(
    copy: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(copy.folder)._replace(free=4_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError) as caught:
        save(copy, 3, size=1_000_000)
    message = str(caught.value)
    assert message.startswith(f"the checkpoint {copy.folder / 'step-3'} cannot be written: No space left")
    assert "8.1 MB are needed" in message
    assert "4.0 MB are free" in message
    assert message.endswith(f"The last good checkpoint is kept: {copy.folder / 'step-2'}")
    assert copy.steps() == [1, 2]


@pytest.mark.parametrize("pre_check", [True, False], ids=["checked before", "while writing"])
def test_a_real_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pre_check: bool) -> None:
    with small_disk(tmp_path / "disk", size="4m") as disk:
        store = CheckpointStore(disk / "checkpoints")
        save(store, 1, 1, size=150_000)  # 1.2 MB each
        save(store, 2, 1, size=150_000)
        save(store, 3, 1, size=150_000)
        with monkeypatch.context() as patch:
            if not pre_check:
                usage = shutil.disk_usage(tmp_path)._replace(free=10**12)
                patch.setattr(shutil, "disk_usage", lambda path: usage)
            with pytest.raises(CheckpointError, match=r"No space left on device: 1.3 MB are needed"):
                save(store, 4, 1, size=150_000)
        assert hidden(store.folder) == []
        assert store.steps() == [1, 2, 3]
        assert_is(store.load_newest(no_problem), 3)
        assert_is(store.load_best(no_problem), 1)
        shutil.rmtree(store.folder / "step-2")
        save(store, 4, 1, size=150_000)
        assert_is(store.load_newest(no_problem), 4)


def test_a_disk_without_room_for_another_file(tmp_path: Path) -> None:
    failures = 0
    for inodes in range(8, 20):
        with small_disk(tmp_path / "disk", size="4m", inodes=inodes) as disk:
            store = CheckpointStore(disk / "checkpoints")
            if message := failure(store, 1, 2, 3):
                failures += 1
                assert "No space left" in message
            assert hidden(store.folder) == []
            if store.steps():
                assert_is(store.load_newest(no_problem), max(store.steps()))
    assert failures >= 5


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot be written"):
        save(CheckpointStore(tmp_path / "checkpoints"), 1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        CheckpointStore(tmp_path / "checkpoints").load_newest(no_problem)


def test_an_interrupt_leaves_nothing(copy: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, data: bytes) -> Any:
        assert path.parent.name == ".step-3.partial"
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "_write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(copy, 3)
    assert hidden(copy.folder) == []
    assert_is(copy.load_newest(no_problem), 2)


# ---- kills

_KILLED_AT_RANDOM = textwrap.dedent(
    """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    from mtbert.engine.checkpoint import CheckpointStore

    folder, same_step, rounds = Path(sys.argv[1]), sys.argv[2] == "same", int(sys.argv[3])
    store, chance = CheckpointStore(folder), random.Random(int(sys.argv[4]))
    torch.set_num_threads(1)

    def save(count):
        tensors = {f"t{i}": torch.full((40_000,), count, dtype=torch.int64) for i in range(4)}
        step = 7 if same_step else count
        best = step // 10 * 10 or None
        store.save(step, model=tensors, optimizer=tensors, state={"count": count}, best_step=best)

    def check():
        problems = []
        found = store.load_newest(problems.append)
        assert not problems, problems
        count = found.state["count"]
        assert found.step == (7 if same_step else count)
        for tensors in (found.model, found.optimizer):
            assert len(tensors) == 4
            assert all(bool((tensor == count).all()) for tensor in tensors.values())
        return count

    started = time.perf_counter()
    save(1)
    save(2)
    one_save = (time.perf_counter() - started) / 2
    count, interrupted = 2, 0
    for _ in range(rounds):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            while True:
                count += 1
                save(count)
                os.write(writing, count.to_bytes(8, "little"))
        os.close(writing)
        time.sleep(chance.uniform(0, 4 * one_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = b""
        while piece := os.read(reading, 1 << 16):
            told += piece
        os.close(reading)
        finished = int.from_bytes(told[-8:], "little") if told else count
        interrupted += any(entry.name.startswith(".") for entry in folder.iterdir())
        found = check()
        assert found >= finished, f"a finished save is lost: {found} < {finished}"
        assert found <= finished + 1
        count = found
    print(count, interrupted)
    """
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is made by fork")
@pytest.mark.parametrize("steps", ["new", "same"])
def test_killed_at_random_moments_a_complete_one_is_always_there(tmp_path: Path, steps: str) -> None:
    arguments = [str(tmp_path / "checkpoints"), steps, "30", "1"]
    command = [sys.executable, "-c", _KILLED_AT_RANDOM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    saves, interrupted = map(int, done.stdout.split())
    assert saves >= 8
    assert interrupted >= 8, "hardly any kill hit a save: the test proves nothing"
