"""The entry points together, in one process: train, evaluate, predict, compare, on small things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtbert import compare, evaluate, predict, train
from mtbert.errors import CheckpointError, ConfigError, DataError, UserError


def tiny_options(bert: Path, cache: Path) -> list[str]:
    sizes = [
        f"--{name}.{option}"
        for name in ("sst", "para", "sts")
        for option in ("batch_size=8", "max_length=64")
    ]
    return [
        f"--model.pretrained={bert}",
        f"--cache={cache}",
        "--epochs=1",
        "--curriculum.epoch_length=6",
        *sizes,
    ]


def last_evaluation(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "evaluation"][-1]


@pytest.fixture(scope="module")
def run(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train.main(
        [*tiny_options(tiny_bert, folder / "cache"), f"--output={folder / 'first'}", "--run.log_every=2"]
    )
    return folder / "first"


def test_a_run_leaves_what_the_design_promises(run: Path) -> None:
    present = {entry.name for entry in run.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "log.txt",
        "run.json",
        "report.md",
        "checkpoints",
        "predictions",
    } <= present
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "step", "step", "evaluation", "epoch"]
    assert set(lines[0]["loss"]) == {"sst", "para", "sts"}
    assert lines[-2]["dev"]["sst"]["examples"] == 200
    assert lines[-2]["overall"] is not None
    for name in ("sst", "para", "sts"):
        for split, rows in (("dev", 200), ("test", 100)):
            file = run / "predictions" / f"{name}-{split}-output.csv"
            assert len(file.read_text().splitlines()) == rows + 1
    assert len(list((run / "plots").glob("*.png"))) >= 5
    assert "Synthetic" in (run / "report.md").read_text()


def test_the_resolved_configuration_reruns_the_same_experiment(run: Path) -> None:
    again = run.parent / "again"
    train.main(["--config", str(run / "config.yaml"), "--output", str(again)])

    def losses(folder: Path) -> list[object]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "step"]

    assert losses(again) == losses(run)


def test_evaluate_gives_the_scores_of_the_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([str(run), "--json", str(run.parent / "scores.json")])
    scores = json.loads((run.parent / "scores.json").read_text())
    recorded = last_evaluation(run)
    assert scores["tasks"]["para"]["accuracy"] == recorded["dev"]["para"]["accuracy"]
    assert scores["overall"] == pytest.approx(recorded["overall"], abs=1e-9)
    assert "SST-5 sentiment" in capsys.readouterr().out


def test_predict_answers_sentences_pairs_and_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.main([str(run), "--task", "sst", "A quiet triumph.", "Dull.", "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["text"] for a in answers] == [["A quiet triumph."], ["Dull."]]
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1.0)
    file = tmp_path / "pairs.txt"
    file.write_text("a cat\ta dog\n\nthe sea\tthe ocean\n")
    predict.main([str(run), "--task", "sts", "--file", str(file)])
    assert len(capsys.readouterr().out.splitlines()) == 2
    table = tmp_path / "mine.csv"
    table.write_text("\tid\tsentence1\tsentence2\n0\tx\tone\ttwo\n1\ty\tthree\tfour\n")
    predict.main([str(run), "--task", "para", "--file", str(table)])
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--task", "sts", "one sentence"], ConfigError, "takes pairs of sentences; found 1"),
        (["--task", "cfimdb", "x"], ConfigError, "was trained on sst, para, sts, not on cfimdb"),
        (["a sentence"], ConfigError, "--task: name the task"),
        (["--task", "sst", "  "], DataError, "a sentence is empty"),
        (["--task", "sst", "--file", "absent.txt"], DataError, "absent.txt: cannot be read"),
    ],
)
def test_predict_refuses(run: Path, arguments: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict.main([str(run), *arguments])


def test_compare_writes_a_page_with_pictures(run: Path, tmp_path: Path) -> None:
    other = run.parent / "other"
    if not other.exists():
        train.main(["--config", str(run / "config.yaml"), "--output", str(other), "--optim.lr", "1e-3"])
    compare.main([str(run), str(other), "--output", str(tmp_path / "comparison")])
    text = (tmp_path / "comparison" / "compare.md").read_text()
    assert "optim.lr" in text
    assert list((tmp_path / "comparison").glob("*.png"))


@pytest.mark.parametrize("mode", ["lora", "last-linear-layer"])
def test_other_modes_train_only_what_they_should(mode: str, tiny_bert: Path, tmp_path: Path) -> None:
    train.main([*tiny_options(tiny_bert, tmp_path), f"--output={tmp_path / 'run'}", f"--mode={mode}"])
    parts = json.loads((tmp_path / "run" / "run.json").read_text())["parameters"]["parts"]
    assert parts["embeddings"]["trainable"] == parts["layers"]["trainable"] == 0
    assert parts["head sst"]["trainable"] > 0
    assert ("lora" in parts) == (mode == "lora")


def test_a_single_sentiment_task_writes_the_files_of_the_second_objective(
    tiny_bert: Path, tmp_path: Path
) -> None:
    options = [*tiny_options(tiny_bert, tmp_path), "--tasks=[cfimdb]", "--cfimdb.max_length=128"]
    train.main([*options, f"--output={tmp_path / 'run'}", "--curriculum.epoch_length=2"])
    names = {file.name for file in (tmp_path / "run" / "predictions").iterdir()}
    assert {"full-model-cfimdb-dev-out.csv", "full-model-cfimdb-test-out.csv"} <= names
    evaluation = last_evaluation(tmp_path / "run")
    assert evaluation["overall"] is None


def test_seeds_give_a_summary_and_skip_what_is_done(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny_options(tiny_bert, tmp_path), "--tasks=[sst]", "--curriculum.epoch_length=2"]
    train.main([*options, f"--output={tmp_path / 'runs'}", "--seeds=2"])
    assert (tmp_path / "runs" / "seeds.md").is_file()
    before = (tmp_path / "runs" / "seed-1" / "metrics.jsonl").read_text()
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "runs")])
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "runs" / "seed-1" / "metrics.jsonl").read_text() == before
    with pytest.raises(ConfigError, match="holds the runs of 2 seeds"):
        evaluate.main([str(tmp_path / "runs")])


def test_early_stopping_ends_before_the_last_epoch(tiny_bert: Path, tmp_path: Path) -> None:
    options = [*tiny_options(tiny_bert, tmp_path), "--tasks=[sst]", "--curriculum.epoch_length=1"]
    train.main(
        [
            *options,
            f"--output={tmp_path / 'run'}",
            "--epochs=30",
            "--optim.lr=1e-9",
            "--evaluation.patience=2",
        ]
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [1, 2, 3]
    assert lines[-1]["kind"] == "epoch"


def test_a_second_run_on_the_same_folder_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        train.main(["--output", str(run)])


def test_changed_training_data_is_noticed_on_resume(tiny_bert: Path, tmp_path: Path) -> None:
    options = [*tiny_options(tiny_bert, tmp_path), "--tasks=[sst]", "--curriculum.epoch_length=2"]
    train.main([*options, f"--output={tmp_path / 'run'}"])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["sst"]["max_length"] = 8
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match="training data is not what the run began with"):
        train.main(["--resume", str(tmp_path / "run")])


def test_real_tables_end_to_end(shared_data: Path, minilm: Path, tmp_path: Path) -> None:
    """MiniLM learns STS-B from a few dozen small steps: far above its untrained head's correlation of about 0."""
    train.main(
        [
            *("--preset", "minilm", "--data", str(shared_data), "--output", str(tmp_path / "run")),
            *("--tasks", "[sts]", "--epochs", "1", "--curriculum.epoch_length", "48", "--optim.lr", "3e-4"),
            *("--evaluation.train_examples", "100", "--cache", str(tmp_path / "cache")),
        ]
    )
    evaluation = last_evaluation(tmp_path / "run")
    assert evaluation["dev"]["sts"]["examples"] == 863
    assert evaluation["dev"]["sts"]["pearson"] > 0.7
    assert len((tmp_path / "run" / "predictions" / "sts-test-output.csv").read_text().splitlines()) == 1726


def test_the_resolved_configuration_alone_is_a_new_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    assert values["output"] is None
    assert values["precision"] in ("bf16", "float32")
    assert values["device"] == "cpu"
    assert values["threads"] >= 1
    assert Path(values["model"]["pretrained"]).is_absolute()
    monkeypatch.chdir(tmp_path)
    train.main(["--config", str(run / "config.yaml"), "--epochs", "0.2"])
    (created,) = (tmp_path / "runs").iterdir()
    assert (created / "report.md").is_file()


def test_a_mistake_found_late_leaves_the_folder_free(tiny_bert: Path, tmp_path: Path) -> None:
    options = [*tiny_options(tiny_bert, tmp_path), f"--output={tmp_path / 'run'}", "--tasks=[sst]"]
    with pytest.raises(ConfigError, match="expected 5 numbers"):
        train.main([*options, "--sst.loss.class_weights=[1,2]"])
    with pytest.raises(ConfigError, match="kernels=cuda cannot serve attention"):
        train.main([*options, "--kernels=cuda"])
    train.main([*options, "--curriculum.epoch_length=1"])
    assert (tmp_path / "run" / "report.md").is_file()


@pytest.mark.parametrize("more", ["--curriculum.mixing=round-robin", "--max_tokens=128"])
def test_a_head_without_parameters_over_a_frozen_encoder(more: str, tiny_bert: Path, tmp_path: Path) -> None:
    options = [*tiny_options(tiny_bert, tmp_path), "--mode=last-linear-layer", "--sts.head.pair=[cosine]"]
    train.main([*options, f"--output={tmp_path / 'run'}", more, "--curriculum.epoch_length=2"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"]["sts"] > 0


def test_other_tables_are_scored_without_train_and_predicted_elsewhere(run: Path, tmp_path: Path) -> None:
    from mtbert.data.sample import write_sample
    from mtbert.tasks.registry import TASKS

    (tmp_path / "tables").mkdir()
    for name in ("sst", "para", "sts"):
        write_sample(tmp_path / "tables", name, TASKS[name].layout, TASKS[name].files)
        (tmp_path / "tables" / TASKS[name].files["train"]).unlink()
        (tmp_path / "tables" / TASKS[name].files["test"]).unlink()
    evaluate.main([str(run), "--data", str(tmp_path / "tables")])
    with pytest.raises(ConfigError, match="--output: name a folder"):
        predict.main([str(run), "--data", str(tmp_path / "tables")])
    predict.main([str(run), "--data", str(tmp_path / "tables"), "--output", str(tmp_path / "elsewhere")])
    assert (tmp_path / "elsewhere" / "predictions" / "sst-dev-output.csv").is_file()
    with pytest.raises(DataError, match="no such file"):
        evaluate.main([str(run), "--data", str(tmp_path / "tables"), "--split", "test"])


def test_rows_left_out_are_all_named(tiny_bert: Path, tmp_path: Path) -> None:
    from mtbert.data.sample import write_sample
    from mtbert.tasks.registry import TASKS

    task = TASKS["sst"]
    (tmp_path / "tables").mkdir()
    write_sample(tmp_path / "tables", "sst", task.layout, task.files)
    table = tmp_path / "tables" / task.files["train"]
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join([*lines, *(f"{n}\tbad-{n}\tno label\t\n" for n in range(150))]))
    options = [*tiny_options(tiny_bert, tmp_path), "--tasks=[sst]", "--curriculum.epoch_length=1"]
    train.main([*options, f"--data={tmp_path / 'tables'}", f"--output={tmp_path / 'run'}"])
    problems = (tmp_path / "run" / "problems.txt").read_text().splitlines()
    assert len(problems) == 150
    assert problems[-1] == f"{table}, line {len(lines) + 150}: no sentiment"


def test_a_text_file_is_split_at_line_ends_only(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes("one\u2028still one\r\ntwo\x0cstill two\n".encode())
    predict.main([str(run), "--task", "sst", "--file", str(file), "--json"])
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.strip().split("\n")] == ["1", "2"]
