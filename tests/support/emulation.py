"""Builds C++ entry files against the emulated GPU of tests/emulation and calls them.

An entry file lies in tests/emulation, includes "machine_host.h" and the kernels under test, and offers
functions `extern "C" const char* name(...)` that return null or the text of an error (`guarded` in
machine_host.h). Their arguments are pointers, int64 and double.

    library = load("mini_gemm.cpp")
    library.call("gemm", order, a, b, c, 37, 45, 77)   # raises EmulationError
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
EMULATION = "tests/emulation"
INCLUDE_FOLDERS = ("csrc", EMULATION)
MACHINE = ("machine_host.cpp", "shadow.cpp", "global_memory.cpp", "fibre.cpp")
FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-fno-semantic-interposition", "-DMTBERT_EMULATION")
# How a loop is unrolled is another pragma in each compiler.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
KEPT_SECONDS = 7 * 24 * 3600

Argument = Tensor | int | float | bytes | None


class EmulationError(Exception):
    """What the emulated machine (or an entry function) objected to."""


class Replacement(NamedTuple):
    """A fault to plant: in a copy of `file` (a path from the repository's root), `old` becomes `new`."""

    file: str
    old: str
    new: str
    count: int = 1


class Library:
    """A compiled entry file."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: Argument) -> None:
        """Calls an entry function. A tensor is passed as its address, None as null, bytes as a string."""
        function = self._library[name]
        function.restype = ctypes.c_char_p
        error = function(*[_argument(argument) for argument in arguments])
        if error is not None:
            raise EmulationError(error.decode())


def _argument(value: Argument) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_char_p(value)


def load(entry: str, replacements: Sequence[Replacement] = (), flags: Sequence[str] = ()) -> Library:
    """The library of an entry file (its name in tests/emulation), compiled unless it was before."""
    return Library(build(entry, replacements, flags))


def build(
    entry: str,
    replacements: Sequence[Replacement] = (),
    flags: Sequence[str] = (),
    *,
    executable: bool = False,
) -> Path:
    """Compiles an entry file with the emulated machine into a shared library, or a program.

    The result is named by a hash of the compiler, the flags and every source that goes into it; another process
    that wants the same one waits for it. Replacements are made in copies; each `old` must occur exactly `count`
    times. The test is skipped where there is no C++ compiler.
    """
    command = [compiler(), *FLAGS, *flags, *WARNINGS]
    if "clang" not in compiler_version():
        command.append("-fno-gnu-unique")  # else a library could see a constant of one with another fault
    parts = "".join(f'#include "{name}"\n' for name in MACHINE)
    machine = compiled([*command, "-c"], "machine.o", source_tree(f"{EMULATION}/machine.cpp", parts))
    path = f"{EMULATION}/{entry}"
    sources = source_tree(path, (ROOT / path).read_text(encoding="utf-8"), replacements)
    kind, suffix = ([], "") if executable else (["-shared"], ".so")
    return compiled([*command, *kind], Path(entry).stem + suffix, sources, [machine])


@functools.cache
def compiler() -> str:
    """CXX, or the first C++ compiler there is."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    pytest.skip("the emulated GPU needs a C++ compiler, and there is none")


@functools.cache
def compiler_version() -> str:
    """What the compiler says of itself."""
    return subprocess.run([compiler(), "--version"], check=True, capture_output=True, text=True).stdout


def source_tree(entry: str, text: str, replacements: Sequence[Replacement] = ()) -> dict[str, str]:
    """The entry and all that it includes, by their paths from the repository's root, with the faults planted."""
    texts = {entry: text}
    waiting = [entry]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', texts[path], re.MULTILINE):
            for folder in (str(Path(path).parent), *INCLUDE_FOLDERS):
                found = os.path.normpath(f"{folder}/{name}")
                if (ROOT / found).is_file():
                    if found not in texts:
                        texts[found] = (ROOT / found).read_text(encoding="utf-8")
                        waiting.append(found)
                    break
    for change in replacements:
        assert change.file in texts, f"{entry} does not include {change.file}"
        found_times = texts[change.file].count(change.old)
        assert found_times == change.count, f"{change.file} holds {change.old!r} {found_times} times"
        texts[change.file] = texts[change.file].replace(change.old, change.new)
    return texts


def compiled(command: list[str], name: str, sources: dict[str, str], objects: Sequence[Path] = ()) -> Path:
    """The file that the compiler makes of the first source (and the objects); made once."""
    parts = [compiler_version(), *command, name, *[path.parent.name for path in objects]]
    parts += [part for item in sources.items() for part in item]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = _cache() / key
    target = folder / name
    with open(_cache() / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():
            os.utime(folder)
            return target
        with tempfile.TemporaryDirectory(dir=_cache(), prefix="build-") as temporary:
            tree = Path(temporary) / "sources"
            for path, text in sources.items():
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                (tree / path).write_text(text, encoding="utf-8")
            made = Path(temporary) / "made"
            made.mkdir()
            includes = [argument for item in INCLUDE_FOLDERS for argument in ("-I", item)]
            first = next(iter(sources))
            arguments = [*command, *includes, "-o", str(made / name), first, *map(str, objects)]
            result = subprocess.run(arguments, cwd=tree, capture_output=True, text=True)
            assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout}{result.stderr}"
            made.rename(folder)
    return target


@functools.cache
def _cache() -> Path:
    """A folder of this user's alone; what was not used for a week goes away."""
    folder = Path(tempfile.gettempdir()) / f"mtbert-emulation-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    assert status.st_uid == os.getuid(), f"{folder} belongs to somebody else"
    assert status.st_mode & 0o077 == 0, f"{folder} is open to others"
    for old in folder.iterdir():
        if old.suffix != ".lock" and time.time() - old.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return folder
