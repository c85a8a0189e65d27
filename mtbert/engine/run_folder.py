"""A run's folder: where each of its files lies, and that only one process trains into it.

The layout: runs/NAME/ config.yaml metrics.jsonl log.txt run.json checkpoints/ predictions/ plots/ report.md
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from mtbert.engine.distributed import World
from mtbert.engine.durable import replace_file
from mtbert.engine.folder_lock import FolderLock
from mtbert.engine.metrics_log import plain
from mtbert.errors import UserError
from mtbert.model.pretrained import ENCODER_FOLDER
from mtbert.outside_files import is_inside, read_json_object

MLM_RUN = "masked-language modelling"
"""What run.json calls a run that trains no task."""


class RunFolder:
    """The folder of one run: `create` begins a run, `open` finds one; the attributes are the paths in it."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.log_path = self.path / "log.txt"
        self.record_path = self.path / "run.json"
        self.report_path = self.path / "report.md"
        self.checkpoints = self.path / "checkpoints"
        self.predictions = self.path / "predictions"
        self.plots = self.path / "plots"
        self._launch_path = self.path / ".launch"
        self._lock = FolderLock(self.path)

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.path.resolve().name

    @property
    def is_mlm(self) -> bool:
        """Whether masked words are what the run trains on; False while it has no run.json yet."""
        try:
            return read_json_object(self.record_path, UserError).get("kind") == MLM_RUN
        except UserError:
            return False

    @classmethod
    def create(
        cls,
        output: str | Path | None,
        name_hint: str,
        *,
        parent: Path = Path("runs"),
        launch: str | None = None,
    ) -> RunFolder:
        """Make the folder of a new run, and lock it.

        `output` is its path; None makes a new one, `parent`/<date>-<time>-<name_hint>. launch: whom `of_launch` finds
        it for. Raises UserError when the folder already holds a run, is in use, is a file, or can't be written.
        """
        if output is not None:
            folder = cls(Path(output))
            folder._make(exist_ok=True)
            folder.lock()
            folder._refuse_a_run()
            folder._remember(launch)
            return folder
        hint = re.sub(r"[^A-Za-z0-9._-]+", "-", name_hint).strip("-.") or "run"
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{hint}"
        number = 1
        while True:
            folder = cls(parent / (stem if number == 1 else f"{stem}-{number}"))
            if not folder.path.exists():
                try:
                    folder._make(exist_ok=False)
                except FileExistsError:  # another process was as quick
                    continue
                folder.lock()
                folder._remember(launch)
                return folder
            number += 1

    @classmethod
    def of_launch(
        cls, launch: str | None, output: str | Path | None, *, parent: Path = Path("runs")
    ) -> RunFolder | None:
        """The folder that `create` made for this launch with this output; None when there is none."""
        if launch is None:
            return None
        if output is not None:
            places = [Path(output)]
        else:
            places = sorted(parent.iterdir(), reverse=True) if parent.is_dir() else []
        return next((folder for folder in map(cls, places) if folder._launched_by(launch)), None)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an existing run, for reading; `lock` it to go on with the run. Raises UserError."""
        folder = cls(Path(path))
        if not os.path.exists(folder.path):
            raise UserError(f"there is no run's folder {folder.path}{_suggestion(folder.path)}")
        if not folder.path.is_dir():
            raise UserError(f"{folder.path} is a file, not a run's folder")
        if not folder.config_path.is_file():
            raise UserError(f"{folder.path} is no run's folder (no config.yaml){_suggestion(folder.path)}")
        folder._refuse_ways_out()
        return folder

    def lock(self) -> RunFolder:
        """Lock the folder until `close`, the end of a `with` on it, or the process's end; returns the folder.

        Locking twice is once. Raises UserError when another process holds the lock.
        """
        try:
            holder = self._lock.acquire()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error
        if holder is not None:
            raise UserError(f"the run {self.path} is in use by {holder}: wait, or give another --output")
        return self

    def close(self) -> None:
        """Release the lock, if it is held."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write_text(self, path: Path, text: str) -> None:
        """Write a file of this folder (UTF-8), as a whole or not at all. Raises UserError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text.encode("utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error

    def write_json(self, path: Path, value: Any) -> None:
        """Write `value` as JSON, as a whole or not at all; NaN and infinity become null. Raises UserError."""
        self.write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def _remember(self, launch: str | None) -> None:
        if launch is not None:
            self.write_text(self._launch_path, launch + "\n")

    def _launched_by(self, launch: str) -> bool:
        try:
            return self._launch_path.read_text(encoding="utf-8") == launch + "\n"
        except (OSError, ValueError):
            return False

    def _make(self, *, exist_ok: bool) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            if os.path.isfile(self.path):
                raise UserError(f"{self.path} is a file; --output must name a folder") from error
            if isinstance(error, FileExistsError) and not exist_ok:
                raise
            reason = error.strerror or error
            raise UserError(f"the run's folder {self.path} cannot be made: {reason}") from error

    def _refuse_ways_out(self) -> None:
        """Whoever made the folder may have put links into it: what is read or written by its names must be in it."""
        try:
            entries = [path for path in self.path.iterdir() if path.is_symlink()]
            for inner in (self.path / ENCODER_FOLDER, self.predictions, self.plots):
                if inner.is_dir():
                    entries += [path for path in inner.iterdir() if path.is_symlink()]
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        for path in entries:
            if not is_inside(path, self.path):
                raise UserError(
                    f"{path}: leads out of the run's folder, to {os.path.realpath(path)}; put a copy in its place"
                )

    def _refuse_a_run(self) -> None:
        # Not log.txt: a run that fails for its data leaves no more than that, and may be tried again here.
        files = (self.config_path, self.metrics_path, self.record_path, self.report_path)
        folders = (self.checkpoints, self.predictions, self.plots)
        found = next((path for path in (*files, *folders) if path.exists()), None)
        if found is not None:
            self.close()
            raise UserError(
                f"{self.path} already holds a run ({found.name} is there): "
                f"continue it with --resume {self.path}, or give another --output"
            )


@contextlib.contextmanager
def new_run(world: World, output: str | Path | None, name_hint: str) -> Iterator[tuple[RunFolder, bool]]:
    """The folder of a new run for all ranks, and whether the run in it has begun: rank 0 makes and locks it.

    Where torchrun has started the ranks anew, it is the folder that they made the time before.
    """
    made: list[RunFolder] = []

    def make() -> tuple[str, bool]:
        run = RunFolder.of_launch(world.launch, output)
        run = RunFolder.create(output, name_hint, launch=world.launch) if run is None else run.lock()
        made.append(run)
        return str(run.path), run.config_path.is_file()

    path, begun = world.told(make)
    with made[0] if made else RunFolder(Path(path)) as run:
        yield run, begun


@contextlib.contextmanager
def begun_run(world: World, path: Path) -> Iterator[RunFolder]:
    """The folder of a run to go on with, for all ranks; rank 0 has locked it."""
    opened: list[RunFolder] = []
    world.told(lambda: opened.append(RunFolder.open(path).lock()))
    with opened[0] if opened else RunFolder(path) as run:
        yield run


def _suggestion(path: Path) -> str:
    """The run next to `path` with the most similar name, or the newest one below it."""
    try:
        beside = [entry.name for entry in path.parent.iterdir() if (entry / "config.yaml").is_file()]
        inside = path.iterdir() if path.is_dir() else ()
        below = [entry for entry in inside if (entry / "config.yaml").is_file()]
    except OSError:
        return ""
    if below:
        newest = max(below, key=lambda entry: (entry / "config.yaml").stat().st_mtime)
        return f"; the newest run below it is {newest}"
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
