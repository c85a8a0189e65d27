"""Checkpoints on the disk: storage only; when to save, and which one is best, is the trainer's affair.

    checkpoints/step-120/  model.safetensors  optimizer.safetensors  state.json  COMPLETE

A checkpoint is written into the hidden folder `.step-120.partial`, every file flushed; COMPLETE is its last
file; then the folder is renamed and the rename flushed. So a folder named `step-N` is whole unless something
damaged it later, and COMPLETE (JSON) is there to find that out: it holds the format's version, the step, the
best step known when it was written, and the size and SHA-256 of every other file. Its `seal` is the SHA-256
of its own remaining fields; the rule of the seal is the same in every version of the format, so damage is
never mistaken for a newer version.

The best step stands in every COMPLETE, the best checkpoint's own included, so each checkpoint is usable
alone. Nothing is pickled: reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from mtbert.engine.durable import sync_file, sync_folder
from mtbert.engine.tensor_file import FileRecord, TensorFile, file_record, read_tensors
from mtbert.errors import CheckpointError
from mtbert.outside_files import is_inside

FORMAT = 1
MODEL, OPTIMIZER, STATE, COMPLETE = "model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"

_STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"\.step-(0|[1-9][0-9]*)\.(partial|replaced|removed)")
_MOST_JSON_BYTES = 64 << 20  # of state.json and COMPLETE: more is damage, and never parsed
_SPARE_BYTES = 64 << 10  # room for COMPLETE and the folder itself

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One checkpoint in memory: tensors on the CPU, and the state as it was given to `save`."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class _Manifest(NamedTuple):
    """The content of COMPLETE."""

    step: int
    best_step: int | None
    files: dict[str, FileRecord]


class _Unusable(Exception):
    """Why a checkpoint cannot be used, in a few words."""


class _Unreadable(_Unusable):
    """The disk does not give it now; that need not be so tomorrow."""


class CheckpointStore:
    """The checkpoints of one run: the last two and the best. One process may save (see RunFolder.lock)."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        best_step: int | None,
    ) -> Path:
        """Write the checkpoint of `step`, then delete those that are no longer kept; returns its folder.

        `state` must be JSON with string keys (NaN and infinities are allowed and come back; tuples come back
        as lists). `best_step` is the step of the best checkpoint so far, this one included; None when
        nothing was evaluated yet. Checkpoints of later steps belong to a future that was given up (their
        files were damaged): they go, too.

        Raises CheckpointError when the disk refuses; all earlier checkpoints are still there then, and
        nothing of the new one. TypeError and ValueError are for values that can't be stored; nothing has
        been written then.
        """
        if step < 0 or (best_step is not None and not 0 <= best_step <= step):
            raise ValueError(f"a checkpoint of step {step} cannot have best step {best_step}")
        state_bytes = _encode(state)
        layouts = {MODEL: TensorFile(model), OPTIMIZER: TensorFile(optimizer)}
        needed = sum(layout.size for layout in layouts.values()) + len(state_bytes) + _SPARE_BYTES
        partial, final = self.folder / f".step-{step}.partial", self.folder / f"step-{step}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            partial.mkdir()
            files = {name: layout.write(partial / name) for name, layout in layouts.items()}
            files[STATE] = _write_file(partial / STATE, state_bytes)
            _write_file(partial / COMPLETE, _encode_manifest(_Manifest(step, best_step, files)))
            sync_folder(partial)
            self._publish(partial, final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(self._explain(error, final, needed)) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._delete_old(step, best_step)
        return final

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or not, in ascending order. Raises CheckpointError."""
        return sorted(self._folders())

    def load(self, step: int) -> Checkpoint:
        """Load the checkpoint of `step`. Raises CheckpointError: missing, damaged, or of a newer format."""
        folders = self._folders()
        if step not in folders:
            there = ", ".join(map(str, sorted(folders))) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step} (steps there: {there})")
        try:
            return _load(folders[step], step)
        except _Unusable as problem:
            raise CheckpointError(f"the checkpoint {folders[step]} cannot be used: {problem}") from problem

    def load_newest(self, on_problem: Callable[[str], None]) -> Checkpoint | None:
        """Load the newest checkpoint that is whole; None when there is none at all.

        Each unusable one is named to `on_problem` with its path and the reason, and the one before it is
        tried. Raises CheckpointError when checkpoints exist but none can be used, or when one to try was
        written by a newer format.
        """
        return self._load_first(sorted(self._folders(), reverse=True), on_problem)

    def load_best(self, on_problem: Callable[[str], None]) -> Checkpoint | None:
        """Load the best checkpoint; None when there is no checkpoint, or when none was called the best.

        Which one is best is read from the newest COMPLETE that is whole. If the best one can't be used,
        `on_problem` hears why, and what an older COMPLETE calls the best is tried. Raises CheckpointError
        when all of them fail.
        """
        folders = self._folders()
        candidates: list[int] = []
        unread: list[str] = []
        for step in sorted(folders, reverse=True):
            try:
                best = _read_manifest(folders[step], step).best_step
            except _Unusable as problem:
                unread.append(f"{folders[step]}: {problem}")
                continue
            if best is not None and best not in candidates:
                candidates.append(best)
        if not candidates and folders and len(unread) == len(folders):
            raise CheckpointError(_list_of_problems(self.folder, unread))
        return self._load_first(candidates, on_problem)

    def _load_first(self, steps: list[int], on_problem: Callable[[str], None]) -> Checkpoint | None:
        problems = []
        for step in steps:
            path = self._folders().get(step, self.folder / f"step-{step}")
            try:
                return _load(path, step)
            except _Unusable as problem:
                problems.append(f"{path}: {problem}")
                on_problem(f"the checkpoint {path} cannot be used: {problem}")
        if problems:
            raise CheckpointError(_list_of_problems(self.folder, problems))
        return None

    def _folders(self) -> dict[int, Path]:
        """Where each step's checkpoint lies; an interrupted replacement may have left only the old one."""
        set_aside, folders = {}, {}
        for entry in self._entries():
            if found := _STEP_FOLDER.fullmatch(entry.name):
                folders[int(found[1])] = entry
            elif (found := _LEFTOVER.fullmatch(entry.name)) and found[2] == "replaced":
                set_aside[int(found[1])] = entry
        return {**set_aside, **folders}

    def _entries(self) -> Iterator[Path]:
        try:
            yield from list(self.folder.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error.strerror or error}") from error

    def _remove_leftovers(self) -> None:
        """Finish what a killed process left half done."""
        for entry in self._entries():
            found = _LEFTOVER.fullmatch(entry.name)
            if found is None:
                continue
            whole = self.folder / f"step-{found[1]}"
            if found[2] == "replaced" and not whole.exists():
                os.rename(entry, whole)
            else:
                _remove(entry)

    def _publish(self, partial: Path, final: Path) -> None:
        """Rename `partial` to `final`. One that is there already is set aside first, and deleted last."""
        replaced = self.folder / f".{final.name}.replaced"
        if final.exists():
            os.rename(final, replaced)
        try:
            os.rename(partial, final)
        except BaseException:
            if replaced.exists() and not final.exists():
                os.rename(replaced, final)
            raise
        sync_folder(self.folder)
        if replaced.exists():
            self._delete(replaced)

    def _delete_old(self, step: int, best_step: int | None) -> None:
        """Delete all but `step`, the newest one before it that looks whole, and the best one."""
        folders = self._folders()
        previous = next((s for s in _whole(folders) if s < step), None)
        for other in sorted(set(folders) - {step, previous, best_step}):
            # Renamed first, so that no folder named step-N is ever seen half deleted.
            removed = self.folder / f".step-{other}.removed"
            with contextlib.suppress(OSError):
                os.rename(folders[other], removed)
            self._delete(removed if removed.exists() else folders[other])

    def _delete(self, path: Path) -> None:
        try:
            _remove(path)
        except OSError as error:
            _log.warning("the old checkpoint %s cannot be deleted: %s", path, error)

    def _explain(self, error: OSError, final: Path, needed: int) -> str:
        message = f"the checkpoint {final} cannot be written: "
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += f"{error.strerror}: {_megabytes(needed)} are needed in {self.folder}"
            with contextlib.suppress(OSError):
                message += f", {_megabytes(shutil.disk_usage(self.folder).free)} are free there"
        else:
            message += f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        with contextlib.suppress(OSError, CheckpointError):
            folders = self._folders()
            last = next(_whole(folders), None)
            message += "" if last is None else f". The last good checkpoint is kept: {folders[last]}"
        return message


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _list_of_problems(folder: Path, problems: list[str]) -> str:
    return f"no checkpoint in {folder} can be used:\n" + "\n".join(f"  {problem}" for problem in problems)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _check_keys(value: object) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} of a checkpoint's state must be a string")
            _check_keys(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_keys(inner)


def _encode(value: Mapping[str, Any]) -> bytes:
    _check_keys(value)
    # Python's JSON gives floats back bit for bit, and has words for NaN and the infinities.
    data = json.dumps(dict(value), indent=1).encode("ascii")
    if len(data) > _MOST_JSON_BYTES:
        raise ValueError(f"a checkpoint's state may not take {_megabytes(len(data))}")
    return data


def _seal(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the fields as JSON with sorted keys and without spaces."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _encode_manifest(manifest: _Manifest) -> bytes:
    fields = {
        "format": FORMAT,
        "step": manifest.step,
        "best_step": manifest.best_step,
        "files": {name: record._asdict() for name, record in manifest.files.items()},
    }
    return _encode({**fields, "seal": _seal(fields)})


def _write_file(path: Path, data: bytes) -> FileRecord:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        sync_file(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)[:300]


def _own(path: Path) -> Path:
    """The path itself. Raises _Unusable for a link that leads out of the folder it is in, and for a pipe or device."""
    if not is_inside(path, path.parent):
        raise _Unusable(f"{path.name} leads out of {path.parent}")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise _Unusable(f"{path.name} is no ordinary file")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object of bounded size. Raises _Unusable."""
    try:
        _own(path)
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise _Unusable(f"{path.name} is damaged ({_megabytes(path.stat().st_size)} is too much for it)")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _Unusable(f"{path.name} is missing") from None
    except OSError as error:
        raise _Unreadable(f"{path.name} cannot be read: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"{path.name} is damaged (no JSON: {error})") from error
    if not isinstance(value, dict):
        raise _Unusable(f"{path.name} is damaged (no JSON object)")
    return value


def _read_manifest(path: Path, step: int) -> _Manifest:
    """Read COMPLETE. Raises _Unusable when it is missing or damaged, CheckpointError for a newer format."""
    _own(path)
    fields = _read_json(path / COMPLETE)
    if fields.pop("seal", None) != _seal(fields):
        raise _Unusable(f"{COMPLETE} is damaged (its seal differs)")
    try:
        if fields["format"] > FORMAT:
            raise CheckpointError(
                f"{path} was written by a newer mtbert (checkpoint format {fields['format']!r:.40}; "
                f"this one reads up to {FORMAT}): use that version, or a newer one"
            )
        if fields["step"] != step:
            raise _Unusable(f"it is the checkpoint of step {fields['step']!r:.40} under another name")
        files = {name: FileRecord(**fields["files"][name]) for name in (MODEL, OPTIMIZER, STATE)}
        best = fields["best_step"]
        if best is not None and (type(best) is not int or best < 0):
            raise _Unusable(f"{COMPLETE} is damaged (its best step is {best!r:.80})")
        if not all(type(record.size) is int and type(record.sha256) is str for record in files.values()):
            raise _Unusable(f"{COMPLETE} is damaged (it has impossible sizes)")
        return _Manifest(step, best, files)
    except (KeyError, TypeError, AttributeError) as error:
        raise _Unusable(f"{COMPLETE} is damaged ({type(error).__name__}: {error!s:.80})") from error


def _check_size(path: Path, wanted: FileRecord) -> None:
    try:
        size = _own(path).stat().st_size
    except FileNotFoundError:
        raise _Unusable(f"{path.name} is missing") from None
    except OSError as error:
        raise _Unreadable(f"{path.name} cannot be read: {_reason(error)}") from error
    if size != wanted.size:
        state = "truncated" if size < wanted.size else "damaged"
        raise _Unusable(f"{path.name} is {state} ({size:,} bytes instead of {wanted.size:,})")


def _looks_whole(path: Path, step: int) -> bool:
    """Whether all files seem to be there in their sizes: a quick look that reads COMPLETE only.

    What cannot be judged (a read error, a newer format) is not called damaged: damaged ones are deleted.
    """
    try:
        for name, wanted in _read_manifest(path, step).files.items():
            _check_size(path / name, wanted)
    except (_Unreadable, CheckpointError):
        return True
    except _Unusable:
        return False
    return True


def _whole(folders: Mapping[int, Path]) -> Iterator[int]:
    return (step for step in sorted(folders, reverse=True) if _looks_whole(folders[step], step))


def _load(path: Path, step: int) -> Checkpoint:
    """Check every file and read them. Raises _Unusable, and CheckpointError for a newer format."""
    manifest = _read_manifest(path, step)
    for name, wanted in manifest.files.items():
        _check_size(path / name, wanted)
        try:
            found = file_record(path / name)
        except OSError as error:
            raise _Unreadable(f"{name} cannot be read: {_reason(error)}") from error
        if found != wanted:
            raise _Unusable(f"{name} is damaged (its SHA-256 differs)")
    try:
        model, optimizer = read_tensors(path / MODEL), read_tensors(path / OPTIMIZER)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Unusable(f"its tensors cannot be read: {_reason(error)}") from error
    return Checkpoint(path, step, model, optimizer, _read_json(path / STATE))
