"""A real file system of a few megabytes, to be filled: needs the right to mount (root on Linux)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, *, size: str, inodes: int = 0) -> Iterator[Path]:
    """Mount a tmpfs of `size` at `path`, for `inodes` entries if above 0; skips the test if it can't."""
    path.mkdir(parents=True, exist_ok=True)
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("this system has no mount")
    command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
