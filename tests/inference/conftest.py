"""One small run of three tasks, whose heads read their examples in different ways."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.inference import options

import mtbert
from mtbert import train
from mtbert.api import Model


@pytest.fixture(scope="package")
def run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sst reads one row, para a row a pair; sts compares two rows by features without an order, behind a tower."""
    folder = tmp_path_factory.mktemp("inference")
    heads = ["--sts.head.pooling=mean", "--sts.head.pair=[difference,product]", "--sts.head.tower_layers=1"]
    more = ["--sts.head.hidden_size=20", "--curriculum.epoch_length=2", f"--output={folder / 'run'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtbert.evaluation.report.write_plots", lambda *arguments: {})
        train.main(options(tiny_bert, folder, *heads, *more))
    return folder / "run"


@pytest.fixture
def model(run: Path) -> Model:
    return mtbert.load(run)
