"""The compiled extension: what it says of itself, its generator, and what it links."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mtbert
from mtbert import installation

PACKAGE = Path(mtbert.__file__).parent
ROOT = PACKAGE.parent

if installation.missing_extension(PACKAGE) is not None:
    pytest.skip("the extension is not built", allow_module_level=True)

from mtbert import _C  # noqa: E402


def test_build_info_is_of_these_sources() -> None:
    info = _C.build_info()
    assert info["version"] == mtbert.__version__
    assert info["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert "baseline" in info["instruction_sets"]
    assert (info["cuda"] is not None) == hasattr(_C, "cuda")
    record = installation.build_record(PACKAGE)
    assert record is not None
    assert record["sources"] == info["sources"]
    assert record["extension"]["file"] == Path(_C.__file__).name
    targets = info["cuda"]["architectures"] if info["cuda"] else []
    assert record["extension"]["architectures"] == targets


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout")
def test_fingerprint_follows_the_sources(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    before = installation.fingerprint(tmp_path)
    assert before == installation.fingerprint(ROOT)
    with (tmp_path / "csrc" / "common" / "philox.h").open("a") as file:
        file.write("\n")
    assert installation.fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    # The test vectors that Random123 publishes for philox4x32-10.
    assert list(_C.philox4x32_10(counter, key)) == expected


def lanes_seen_through_dropout(row: int, columns: int, seed: int, step: int, site: int) -> list[int]:
    """The 16-bit lanes behind a row's mask: the largest threshold at which each column is still kept."""
    x = torch.ones(1, columns)
    out = torch.empty(1, columns)
    rows = torch.tensor([row], dtype=torch.int32)
    lane = torch.zeros(columns, dtype=torch.int64)
    for bit in reversed(range(16)):
        for candidate in {int(value) for value in lane + (1 << bit)}:
            if candidate > 65535:
                continue
            out.fill_(float("nan"))
            _C.cpu.dropout(
                x=x.data_ptr(),
                out=out.data_ptr(),
                rows=1,
                columns=columns,
                dtype="float32",
                threads=1,
                dropout_row=rows.data_ptr(),
                seed=seed,
                step=step,
                site=site,
                threshold=candidate,
            )
            here = lane + (1 << bit) == candidate
            lane = torch.where(here & (out[0] != 0), candidate, lane)
    return lane.tolist()


@pytest.mark.parametrize(
    ("row", "seed", "step", "site"),
    [
        (0, 0, 0, 0),
        (5 * 4096 + 17, 0x0123456789ABCDEF, 41, 3 + (2 << 20)),
        (-1, (1 << 64) - 1, (1 << 32) - 1, 1),
    ],
)
def test_mask_is_made_of_the_lanes_of_the_draws(row: int, seed: int, step: int, site: int) -> None:
    columns = 19
    draws = [
        _C.philox4x32_10([group, row & 0xFFFFFFFF, site, step], [seed & 0xFFFFFFFF, seed >> 32])
        for group in range(-(-columns // 8))
    ]
    lanes = [half for draw in draws for word in draw for half in (word & 0xFFFF, word >> 16)]
    assert lanes_seen_through_dropout(row, columns, seed, step, site) == lanes[:columns]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_no_cuda_library_and_no_search_path_is_linked() -> None:
    shown = subprocess.run(
        ["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
    ).stdout
    needed = [line for line in shown.splitlines() if "(NEEDED)" in line]
    assert any("libc.so" in line for line in needed)
    for name in ("libcuda", "torch", "libpython"):
        assert not any(name in line for line in needed), f"the extension needs {name}"
    assert "RPATH" not in shown
    assert "RUNPATH" not in shown
