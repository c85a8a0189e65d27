"""Build the extension ``mtbert._C`` with CMake. An install without it still works, and says what is missing.

Environment:
    MTBERT_BUILD=required    a failure to build ends the install (otherwise: a warning and a record)
    MTBERT_CUDA=0            leave CUDA out
    MTBERT_CUDA_ARCHS        GPU architectures, "80;90a" by default; PTX of the newest is added
    CXX, CUDACXX, CUDA_HOME  which compilers (nvcc is also looked for on PATH and in /usr/local/cuda)
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("MTBERT_BUILD") == "required"
DEFAULT_ARCHITECTURES = "80;90a"
WITHOUT_EXTENSION = "Everything works, on the Triton kernels (GPU) and plain PyTorch; a CPU is slower."
WITHOUT_CUDA = "Everything works; a GPU is served by the Triton kernels and plain PyTorch."

NAMES = {"extension": "compiled extension (mtbert._C)", "cuda": "CUDA kernels"}
FLAG_VARIABLES = ("CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")
NINJA_PROGRESS = re.compile(r"\[\d+/\d+\]|FAILED:|ninja: ")
PTXAS_INFO = re.compile(r"ptxas info|\s+\d+ bytes (stack frame|spill)")


class BuildError(Exception):
    """Why something could not be built, in words for the person who installs."""


def load_installation() -> ModuleType:
    """The module mtbert.installation, by its file: mtbert itself can't be imported before it is installed."""
    spec = importlib.util.spec_from_file_location("installation", ROOT / "mtbert" / "installation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


installation = load_installation()


def find_cxx() -> str:
    named = os.environ.get("CXX")
    if named:
        if shutil.which(shlex.split(named)[0]) is None:
            raise BuildError(f"no C++ compiler: CXX names {named!r}, which cannot be run")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name) is not None:
            return name
    raise BuildError("no C++ compiler: none of c++, g++, clang++ is on PATH (install one, or set CXX)")


def find_nvcc() -> str:
    if os.environ.get("MTBERT_CUDA", "1") == "0":
        raise BuildError("CUDA was switched off by MTBERT_CUDA=0")
    named = os.environ.get("CUDACXX")
    if named:
        found = shutil.which(named)
        if found is None:
            raise BuildError(f"no nvcc: CUDACXX names {named!r}, which cannot be run")
        return found
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            found = shutil.which("nvcc", path=str(Path(home) / "bin"))
            if found is None:
                raise BuildError(f"no nvcc: {variable} is {home!r}, which has no bin/nvcc")
            return found
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise BuildError("no nvcc: it is neither on PATH nor named by CUDACXX or CUDA_HOME")
    return found


def cuda_targets() -> list[str]:
    """The names nvcc knows the targets by: machine code for each architecture and PTX of the newest.

    An architecture with a suffix (90a) runs on that one generation only, its PTX too, so the PTX is that of
    the plain architecture: it is what later GPUs compile for themselves.
    """
    listed = os.environ.get("MTBERT_CUDA_ARCHS") or DEFAULT_ARCHITECTURES
    names = [name.replace(".", "") for name in re.split(r"[;,\s]+", listed) if name]
    for name in names:
        if not re.fullmatch(r"\d{2,3}[af]?", name):
            raise BuildError(f"MTBERT_CUDA_ARCHS is {listed!r}: {name!r} is no architecture (80, 90a, ...)")
    if not names:
        raise BuildError(f"MTBERT_CUDA_ARCHS is {listed!r}: it names no architecture (80, 90a, ...)")
    newest = max(int(name.rstrip("af")) for name in names)
    return [*(f"sm_{name}" for name in names), f"compute_{newest}"]


def version_of(*command: str) -> str:
    """What a compiler calls itself: a different answer means that old object files do not fit."""
    arguments = [*command, "--version"]
    return subprocess.run(arguments, text=True, errors="replace", capture_output=True).stdout.strip()


def run(command: list[str], log: Path) -> str:
    """Run one step of the build and log it; a failure carries the lines that say why."""
    print("+ " + shlex.join(command), flush=True)
    try:
        process = subprocess.run(
            command, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    with log.open("a", encoding="utf-8") as file:
        file.write(f"+ {shlex.join(command)}\n{process.stdout}\n")
    lines = [line for line in process.stdout.splitlines() if line.strip()]
    print("\n".join(line for line in lines if not PTXAS_INFO.match(line)), flush=True)
    if process.returncode != 0:
        lines = [line for line in lines if not NINJA_PROGRESS.match(line)]
        telling = (
            number for number, line in enumerate(lines) if re.search(r"error|fatal", line, re.IGNORECASE)
        )
        first = next(telling, max(len(lines) - 4, 0))
        told = "\n".join(lines[first : first + 4])
        raise BuildError(f"{Path(command[0]).name} failed ({log} has all of it):\n{told}")
    return process.stdout


def spilled_bytes(log: str) -> dict[str, int]:
    """For every CUDA kernel that ``ptxas -v`` reported on: the bytes of registers spilled to memory."""
    compiled = re.findall(
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        log,
        re.DOTALL,
    )
    return {f"{target} {name}": int(stores) + int(loads) for name, target, stores, loads in compiled}


def read_json(path: Path) -> dict[str, Any]:
    """A file that an earlier build wrote; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class BuildWithCMake(build_ext):
    """Builds ``mtbert._C`` and, beside it, ``_build_info.json``: what was built, or why it was not."""

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("mtbert._C")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        record: dict[str, Any] = {
            "version": self.distribution.get_version(),
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            "sources": installation.fingerprint(ROOT),
            "extension": None,
            "problems": [],
        }
        try:
            self.build(target, record)
        except (BuildError, ImportError, OSError) as error:
            if REQUIRED:
                raise SystemExit(f"MTBERT_BUILD=required: mtbert._C could not be built: {error}") from error
            record["problems"] = [{"missing": "extension", "why": str(error), "then": WITHOUT_EXTENSION}]
            # An extension of older sources must not pass for this one.
            target.unlink(missing_ok=True)
        record["seconds"] = round(time.monotonic() - started, 1)
        self.write_record(target, record)
        self.report(record)

    def build(self, target: Path, record: dict[str, Any]) -> None:
        """Build with CUDA, or say why not and build without."""
        if not sys.platform.startswith("linux"):
            raise BuildError(f"it is built on Linux only, and this is {platform.system()}")
        include = Path(sysconfig.get_paths()["include"])
        if not (include / "Python.h").is_file():
            raise BuildError(f"no Python.h in {include} (install Python's headers: python3-dev)")
        cxx = find_cxx()
        nvcc = ""
        try:
            nvcc = find_nvcc()
            record["extension"] = self.compile(target, cxx, nvcc, cuda_targets())
        except BuildError as error:
            if REQUIRED and nvcc:
                raise
            record["problems"].append({"missing": "cuda", "why": str(error), "then": WITHOUT_CUDA})
            record["extension"] = self.compile(target, cxx, "", [])

    def compile(self, target: Path, cxx: str, nvcc: str, targets: list[str]) -> dict[str, Any]:
        """Run CMake and ninja in a folder that is kept, and put the module in its place."""
        import pybind11

        if shutil.which("cmake") is None or shutil.which("ninja") is None:
            raise BuildError("cmake or ninja is not on PATH")
        compilers = {"cxx": version_of(*shlex.split(cxx)), "nvcc": version_of(nvcc) if nvcc else ""}
        configuration = {
            "root": str(ROOT),
            "compilers": compilers,
            "commands": [cxx, nvcc],
            "cmake": version_of("cmake"),
            "python": sys.version,
            "pybind11": pybind11.__version__,
            "targets": targets,
            "environment": {name: os.environ.get(name) for name in FLAG_VARIABLES},
        }
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            stamp = folder / "configuration.json"
            wanted = json.dumps(configuration, indent=1)
            if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
                shutil.rmtree(folder)
                # Build isolation puts pybind11 into a new temporary folder every time; a copy stays put.
                shutil.copytree(pybind11.get_include(), folder / "include")
                stamp.write_text(wanted, encoding="utf-8")
            log = folder / "build.log"
            log.unlink(missing_ok=True)
            run(self.configure_command(folder, cxx, nvcc, targets), log)
            printed = run(["cmake", "--build", str(folder)], log)
            # Kernels whose object files are still good were reported on by an earlier build.
            kernels = {**read_json(folder / "kernels.json"), **spilled_bytes(printed)}
            (folder / "kernels.json").write_text(json.dumps(kernels, indent=1), encoding="utf-8")
            beside = target.with_name(target.name + ".new")
            shutil.copy2(folder / "_C.so", beside)
            beside.replace(target)
        return {
            "file": target.name,
            "compiler": compilers["cxx"].partition("\n")[0],
            "nvcc": match[1] if (match := re.search(r"\bV([\d.]+)", compilers["nvcc"])) else None,
            "architectures": targets,
            "kernels": len(kernels),
            "spilling": sorted(name for name, spilled in kernels.items() if spilled),
        }

    def configure_command(self, folder: Path, cxx: str, nvcc: str, targets: list[str]) -> list[str]:
        settings = {
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "CMAKE_BUILD_TYPE": "Release",
            "MTBERT_PYTHON_INCLUDE": sysconfig.get_paths()["include"],
            "MTBERT_PYBIND11_INCLUDE": folder / "include",
            "MTBERT_VERSION": self.distribution.get_version(),
            "MTBERT_SOURCES": installation.fingerprint(ROOT),
            "MTBERT_CUDA_TARGETS": " ".join(targets),
        }
        if "CXX" not in os.environ:
            settings["CMAKE_CXX_COMPILER"] = shutil.which(cxx)
        if nvcc:
            settings["CMAKE_CUDA_COMPILER"] = nvcc
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        return ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *definitions]

    def write_record(self, target: Path, record: dict[str, Any]) -> None:
        """Keep one record for every Python that shares this folder, under its suffix of extension modules."""
        path = target.with_name(installation.RECORD_NAME)
        records = {**read_json(path), installation.extension_suffix(): record}
        path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

    def report(self, record: dict[str, Any]) -> None:
        extension = record["extension"]
        if extension is not None:
            targets = ", ".join(extension["architectures"]) or "without CUDA"
            print(
                f"mtbert._C: built in {record['seconds']} s, {extension['compiler']}, {targets}", flush=True
            )
        for problem in record["problems"]:
            rule = "*" * 100
            print(
                f"{rule}\nWARNING: mtbert is installed without its {NAMES[problem['missing']]}.\n"
                f"Why: {problem['why']}\n{problem['then']}\n"
                f"`python -m mtbert.doctor` shows this again.\n{rule}",
                file=sys.stderr,
                flush=True,
            )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time build in a folder."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class CleanBuild(build):
    """Starts from an empty folder, so that a module deleted since the last wheel is not in the next."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def find_all_packages() -> list[str]:
    """Every package by the name it is imported under: kernels/ is mtbert.kernels."""
    found = ["mtbert", "mtbert.kernels"]
    for package, folder in (("mtbert", "mtbert"), ("mtbert.kernels", "kernels")):
        found += [f"{package}.{name}" for name in find_packages(str(ROOT / folder))]
    return found


if __name__ == "__main__":
    depends = [path.relative_to(ROOT).as_posix() for path in installation.source_files(ROOT)]
    setup(
        packages=find_all_packages(),
        package_dir={"mtbert": "mtbert", "mtbert.kernels": "kernels"},
        ext_modules=[Extension("mtbert._C", sources=[], depends=depends)],
        cmdclass={"build": CleanBuild, "build_ext": BuildWithCMake},
        zip_safe=False,
    )
