"""How long one waits for a first score: fresh processes that import, read, tokenise, train four steps and score dev."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.comparison import Goal
from bench.first_result import own_side, peer_side, write_small_tables
from bench.harness import RECORDED_REPEATS, Bench, Candidate
from bench.test_train_step import DTYPES, fast
from mtbert.engine.precision import Precision

__all__ = ["fast"]


@pytest.mark.usefixtures("full")
def test_first_result(bench: Bench, benchmark: Any, fast: Precision, tmp_path: Path) -> None:
    small = write_small_tables(bench.workload, tmp_path / "data")
    workload, device = bench.workload, str(bench.device)
    mtbert, plain = f"mtbert {fast}, a process", f"transformers bucketed {fast}, a process"
    compiled = f"{plain}, compiled"

    bench.compare(
        "time to a first result",
        [
            Candidate(mtbert, lambda: own_side(mtbert, workload, small, device, fast), DTYPES[fast], None),
            Candidate(
                plain,
                lambda: peer_side(plain, workload, small, device, fast),
                DTYPES[fast],
                None,
                needs=("transformers",),
            ),
            *(
                [
                    Candidate(
                        compiled,
                        lambda: peer_side(compiled, workload, small, device, fast, compiled=True),
                        DTYPES[fast],
                        None,
                        needs=("transformers",),
                    )
                ]
                if bench.device.type == "cuda"  # on a CPU compiling alone takes minutes
                else []
            ),
        ],
        benchmark,
        baseline=mtbert,
        goals=[Goal(mtbert, plain), Goal(mtbert, compiled)],
        repeats=RECORDED_REPEATS,
    )
