"""metrics.jsonl: every line whole, and after a resume the same as without an interruption."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_disk import small_disk

import mtbert.engine.metrics_log as metrics_log
from mtbert.engine.metrics_log import MetricsLog, plain
from mtbert.errors import UserError


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_lines_are_there_as_soon_as_they_are_appended(path: Path) -> None:
    log = MetricsLog(path)
    assert path.read_bytes() == b""
    log.append({"kind": "step", "step": 1, "loss": {"sst": 0.5}})
    assert lines(path) == [{"kind": "step", "step": 1, "loss": {"sst": 0.5}}]
    log.append({"kind": "epoch", "step": 1, "text": "ä\nb"})
    assert len(lines(path)) == 2
    log.close()


def test_numbers_of_all_kinds_become_json(path: Path) -> None:
    with MetricsLog(path) as log:
        log.append(
            {
                "step": np.int64(3),
                "float32": np.float32(0.5),
                "bool": np.bool_(True),
                "tensor": torch.tensor(2.5),
                "array": np.array([[1.0, math.nan]]),
                "nan": math.nan,
                "inf": [math.inf, -np.float64("inf"), torch.tensor(math.inf)],
                "tuple": (1, "a", None, False),
            }
        )
    assert lines(path) == [
        {
            "step": 3,
            "float32": 0.5,
            "bool": True,
            "tensor": 2.5,
            "array": [[1.0, None]],
            "nan": None,
            "inf": [None, None, None],
            "tuple": [1, "a", None, False],
        }
    ]
    assert "NaN" not in path.read_text()
    with pytest.raises(TypeError, match="object"):
        plain({"x": object()})


@given(st.floats())
def test_finite_numbers_keep_every_bit(value: float) -> None:
    back = json.loads(json.dumps(plain(value)))
    assert back == value if math.isfinite(value) else back is None


def test_rewind_equals_a_run_without_interruption(path: Path, tmp_path: Path) -> None:
    def run(log: MetricsLog, first: int, last: int) -> None:
        for step in range(first, last + 1):
            log.append({"kind": "step", "step": step, "loss": 1 / step})
            if step % 5 == 0:
                log.append({"kind": "evaluation", "step": step})

    with MetricsLog(tmp_path / "straight.jsonl") as log:
        run(log, 1, 20)
    with MetricsLog(path) as log:
        run(log, 1, 13)  # killed at step 13; the newest checkpoint is that of step 10
    with MetricsLog(path) as log:
        assert log.rewind(10) == 3
        run(log, 11, 20)
    assert path.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_rewind_keeps_everything_of_the_step_itself_and_what_has_no_step(path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"note": "x"},
        {"step": 4},
        {"step": 5},
        {"kind": "evaluation", "step": 5},
        {"step": 6},
    ]
    with MetricsLog(path) as log:
        for record in records:
            log.append(record)
        assert log.rewind(5) == 1
        log.append({"step": 7})
        assert lines(path) == [*records[:4], {"step": 7}]
        assert log.rewind(100) == 0
        assert log.rewind(-1) == 4
        assert lines(path) == [{"note": "x"}]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\0\0\0", b'{"step": 1}\n{"a'])
def test_a_torn_last_line_is_cut_off_when_opened(path: Path, torn: bytes) -> None:
    path.write_bytes(b'{"step": 1}\n' + torn)
    with MetricsLog(path) as log:
        log.append({"step": 3})
    found = lines(path)
    assert found[0] == {"step": 1}
    assert found[-1] == {"step": 3}


def test_a_damaged_line_in_the_middle_goes_at_the_next_rewind(path: Path) -> None:
    path.write_bytes(b'{"step": 1}\n\xff\xfe garbage\n[1, 2]\n{"step": 2}\n')
    with MetricsLog(path) as log:
        assert log.rewind(2) == 2
    assert lines(path) == [{"step": 1}, {"step": 2}]


def test_a_crash_in_the_middle_of_a_rewind_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLog(path) as log:
        for step in range(5):
            log.append({"step": step})
        before = path.read_bytes()

        def crash(path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(metrics_log, "replace_file", crash)
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
            log.rewind(2)
        assert path.read_bytes() == before


def test_a_full_disk_is_one_clear_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="16k") as disk:
        path = disk / "metrics.jsonl"
        count = 0
        with MetricsLog(path) as log:

            def fill() -> None:
                nonlocal count
                while True:
                    log.append({"step": count, "padding": "x" * 700})
                    count += 1

            with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No space left on device"):
                fill()
            assert [line["step"] for line in lines(path)] == list(range(count))
            assert count > 5


def test_a_path_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No such file"):
        MetricsLog(tmp_path / "missing" / "metrics.jsonl")


def test_a_killed_process_loses_no_line(path: Path) -> None:
    code = "import os, signal, sys; from pathlib import Path\n"
    code += "from mtbert.engine.metrics_log import MetricsLog\n"
    code += "log = MetricsLog(Path(sys.argv[1]))\n"
    code += "for step in range(50): log.append({'step': step})\n"
    code += "os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert [line["step"] for line in lines(path)] == list(range(50))
