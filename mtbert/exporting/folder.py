"""A folder that appears with all of its files or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from mtbert.engine.durable import sync_file, sync_folder
from mtbert.errors import UserError


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which becomes `target` when the block ends without an error.

    Raises UserError where `target` is there and not an empty folder, and when the disk refuses; nothing is left of the
    new folder then.
    """
    _refuse_what_is_there(target)
    partial = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if partial.is_symlink():
            raise UserError(f"{partial} is a link; remove it, this name is where {target} is made")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _flush(partial)
        _refuse_what_is_there(target)
        os.replace(partial, target)  # an empty folder is replaced, a full one never
        sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_what_is_there(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"{target} is not a folder; --output must name a new one")
    try:
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"{target} is not empty: remove it, or name another --output")
    except OSError as error:
        raise UserError(f"{target} cannot be read: {error.strerror or error}") from error


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                sync_file(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)
