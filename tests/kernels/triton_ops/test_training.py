"""A whole run with kernels=triton is the run with kernels=reference: same losses, same scores."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bert import WORDS

pytest.importorskip("jsonargparse")  # a GPU machine without it still tests the kernels

from mtbert import train

COLUMNS = {
    "ids-sst": ["id", "sentence", "sentiment"],
    "quora": ["id", "sentence1", "sentence2", "is_duplicate"],
    "sts": ["id", "sentence1", "sentence2", "similarity"],
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few sentences for each task."""
    folder = tmp_path_factory.mktemp("tables")
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(2, 6)))

    for name, columns in COLUMNS.items():
        for split, rows in (("train", 4), ("dev", 2)):
            with open(folder / f"{name}-{split}.csv", "w", newline="") as file:
                table = csv.writer(file, delimiter="\t")
                table.writerow(["", *columns])
                for number in range(rows):
                    label = number % 5 if columns[-1] == "sentiment" else float(number % 2)
                    texts = [sentence() for _ in columns[1:-1]]
                    table.writerow([number, f"{split}{number}", *texts, label])
    return folder


def trained(folder: Path, *options: str) -> list[dict[str, Any]]:
    train.main([*options, f"--output={folder}"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "step", "evaluation", "epoch"]
    return lines


@pytest.mark.parametrize(
    "options",
    [["--mode=full", "--surgery.method=pcgrad"], ["--mode=lora", "--model.lora.rank=2"]],
    ids=["full-pcgrad", "lora"],
)
def test_the_same_run(
    device: torch.device, tiny_bert: Path, tables: Path, tmp_path: Path, options: list[str]
) -> None:
    sizes = [f"--{name}.batch_size=2" for name in ("sst", "para", "sts")]
    common = [
        f"--data={tables}",
        f"--model.pretrained={tiny_bert}",
        f"--cache={tmp_path / 'cache'}",
        f"--device={device.type}",
        "--precision=float32",
        "--epochs=1",
        "--evaluation.train_examples=0",
        "--optim.lr=1e-3",
        "--sts.head.pair=[cosine]",
        *sizes,
        *options,
    ]
    found = trained(tmp_path / "triton", *common, "--kernels=triton", "--run.log_every=1")
    expected = trained(tmp_path / "reference", *common, "--kernels=reference", "--run.log_every=1")
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        losses = "loss" if ours["kind"] == "step" else "dev_loss"
        for task, loss in theirs[losses].items():
            assert ours[losses][task] == pytest.approx(loss, rel=2e-5)
    assert found[1]["loss"] != found[0]["loss"]
