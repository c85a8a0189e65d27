"""The file of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import records


def test_records_round_trip_and_keep_other_comparisons(tmp_path: Path) -> None:
    facts = {"git": "abc", "load": [1.5, None]}
    path = records.write(tmp_path, "AMD EPYC (2x)", "one", {"cases": [{"ratio": 1.23456789}]}, facts)
    records.write(tmp_path, "AMD EPYC (2x)", "two", {"goals": [{"met": False, "wanted": 1.3}]}, facts)
    assert path.name == "amd-epyc-2x.json"
    record = records.read(tmp_path, "AMD EPYC (2x)")
    assert record["device"] == "AMD EPYC (2x)"
    assert record["comparisons"] == {
        "one": {"measured": facts, "cases": [{"ratio": 1.235}]},
        "two": {"measured": facts, "goals": [{"met": False, "wanted": 1.3}]},
    }
    records.write(tmp_path, "AMD EPYC (2x)", "one", {"cases": []}, {})
    assert records.read(tmp_path, "AMD EPYC (2x)")["comparisons"]["one"] == {"measured": {}, "cases": []}
    assert [file.name for file in tmp_path.iterdir()] == ["amd-epyc-2x.json"]


def test_records_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"gpu\.json.*99"):
        records.write(tmp_path, "GPU", "one", {}, {})
    assert records.read(tmp_path, "Other")["comparisons"] == {}
