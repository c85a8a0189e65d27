"""The card of an exported model: what the hub reads, what people read, and code that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.made_runs import loaded, make_run, own_hidden, own_outputs

from mtbert import export
from mtbert.engine.record import CONTAMINATION
from mtbert.errors import ConfigError
from mtbert.evaluation.predictions import Predictions, predictions_path, write_outputs
from mtbert.tasks.registry import TASKS

VALUES = {"tasks": ["sst", "para", "sts"], "sts": {"head": {"pair": ["cosine"], "pooling": "mean"}}}
QUIET, PAIR = [("A quiet triumph.", "")], [("A man is eating.", "Someone eats food.")]


def described(run: Any) -> Any:
    """The run with predictions of sst's dev table, and with facts of its tables."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 40)
    outputs = np.eye(5)[np.where(generator.random(40) < 0.7, labels, 0)]
    write_outputs(
        predictions_path(run.path, "sst", "dev"),
        TASKS["sst"],
        Predictions("sst", "dev", tuple(map(str, range(40))), labels, outputs),
    )
    tables = {
        "train": {
            "file": "/home/me/sst-train.csv",
            "rows": 90,
            "sha256": "ab" * 32,
            "extra": [{"file": "/home/me/more.csv", "rows": 30, "left_out": 1, "sha256": "cd" * 32}],
        },
        "dev": {"rows": 40, "overlap": 2},
    }
    facts = {
        "name": "first",
        "tasks": list(TASKS)[:3],
        "git": "abc",
        "data": {"sst": tables},
        "contamination": CONTAMINATION,
    }
    run.write_json(run.record_path, facts)
    return run


def card_of(folder: Path) -> tuple[dict[str, Any], str, str]:
    """Metadata, text and code."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert code is not None
    return yaml.safe_load(header), body, code[1]


def run_code(code: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    return names["result"]


def test_the_card_of_a_minilm(tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard

    values = {**VALUES, "extra_data": ["sst=/home/me/more.csv"]}
    run = described(make_run(tmp_path / "run", "minilm", values))
    own, _ = loaded(run)
    before = run.path / "pretraining" / "cfimdb"
    before.mkdir(parents=True)
    tables = {"train": {"file": "/home/me/reviews.csv", "rows": 7, "sha256": "ef" * 32}}
    (before / "run.json").write_text(json.dumps({"tasks": ["cfimdb"], "data": {"cfimdb": tables}}))
    export.main([str(run.path), "--format", "hf", "--task", "sst", "--output", str(tmp_path / "my-sst")])
    metadata, body, code = card_of(tmp_path / "my-sst")
    card = ModelCard.load(tmp_path / "my-sst" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    [result] = card.data.eval_results
    assert (result.dataset_type, result.metric_type) == ("sst", "accuracy")
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(0.75, abs=0.12)
    assert "95% interval" in metadata["model-index"][0]["results"][0]["metrics"][0]["name"]
    for piece in (
        f"| sst | train | sst-train.csv | 60 | {'ab' * 32} |",
        f"| sst | train: extra | more.csv | 30 | {'cd' * 32} |",
        f"| cfimdb (before the run) | train | reviews.csv | 7 | {'ef' * 32} |",
        "2 of sst",
        "Quora question pairs among them",
        "apache-2.0",
        "step 4",
    ):
        assert piece in body
    assert "/home/me" not in body
    answer = run_code(code, monkeypatch, tmp_path)
    found = {
        entry["label"]: entry["score"] for entry in (answer[0] if isinstance(answer[0], list) else answer)
    }
    wanted = own_outputs(own, "sst", QUIET).softmax(-1)[0]
    assert list(map(found.__getitem__, TASKS["sst"].class_names)) == pytest.approx(wanted.tolist(), abs=1e-5)
    # The same for two rows: embeddings as sentence-transformers has them.
    export.main(
        [
            str(run.path),
            "--format",
            "sentence-transformers",
            "--task",
            "sts",
            "--output",
            str(tmp_path / "my-sts"),
        ]
    )
    _, body, code = card_of(tmp_path / "my-sts")
    assert "0 + 5 * similarity" in body
    similarity = run_code(code, monkeypatch, tmp_path)
    assert 5 * similarity.item() == pytest.approx(own_outputs(own, "sts", PAIR).item(), abs=1e-5)


def test_the_cards_of_the_other_formats(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = described(make_run(tmp_path / "run", tiny_bert, {**VALUES, "mode": "lora"}))
    own, _ = loaded(run)
    formats = [
        ("hf", []),
        ("peft", []),
        ("sentence-transformers", ["--task", "para"]),
        ("onnx", ["--task", "sts"]),
    ]
    found = {}
    for name, task in formats:
        export.main([str(run.path), "--format", name, *task, "--output", str(tmp_path / f"my-{name}")])
        metadata, body, code = card_of(tmp_path / f"my-{name}")
        assert metadata["license"] == "unknown"
        assert "Unknown: nothing says the licence" in body
        assert str(tmp_path) not in body
        found[name] = run_code(code, monkeypatch, tmp_path)
    hidden = own_hidden(own, "sst", QUIET)[0]
    for name in ("hf", "peft"):
        torch.testing.assert_close(found[name][0].detach(), hidden, rtol=0, atol=1e-5)
    wanted = own_outputs(own, "para", PAIR).sigmoid().item()
    assert found["sentence-transformers"][0] == pytest.approx(wanted, abs=1e-5)
    assert found["onnx"].item() == pytest.approx(own_outputs(own, "sts", PAIR).item(), abs=1e-5)


def test_what_the_command_refuses(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", tiny_bert, {"tasks": ["sst"]})
    for options, message in (
        (["--output", "x"], "--output belongs to a format"),
        (["--task", "sst"], "--task belongs to a format"),
        (["--format", "hf"], "--output: name a new folder"),
        (["--format", "hf", "--output", "x", "--task", "para"], "was trained on sst, not on para"),
    ):
        with pytest.raises(ConfigError, match=message):
            export.main([str(run.path), *options])
    export.main([str(run.path)])  # the encoder for another run, in the run's own folder
    assert capsys.readouterr().out == f"step 4: {run.path / 'encoder'}\n"
    assert sorted(path.name for path in (run.path / "encoder").iterdir())[0] == "config.json"
