"""Training reads further tables: which rows join, what is refused, and what the run says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from mtbert import train
from mtbert.cli import joined_extra_data, parse_train
from mtbert.data.tables import read_table
from mtbert.engine.mlm_run import training_tables
from mtbert.errors import CheckpointError, ConfigError, DataError
from mtbert.evaluation.run import read_run, run_baselines
from mtbert.tasks.extra_data import join, read_extra
from mtbert.tasks.loading import load_tables
from mtbert.tasks.registry import TASKS, get_task

from .conftest import CLASSES, Augment, sentence, write

SST = get_task("sst")


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    path = tmp_path / "extra.csv"
    rows = [(f"x{n}", sentence(60 + n), 2) for n in range(9)]
    rows.append(("leak", sentence(100).upper().replace(" ,", ","), 0))
    write(path, ["sentence", "sentiment", "source"], [(*row, "t0") for row in rows])
    return path


def options(tables: Path, bert: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"--data={tables}", "--tasks=[sst]", f"--model.pretrained={bert}", f"--cache={folder / 'cache'}",
        f"--output={folder / 'run'}", "--sst.batch_size=4", "--sst.max_length=32", "--evaluation.resamples=50", *more,
    ]  # fmt: skip


def test_rows_join_train_alone_and_a_leak_is_left_out(tables: Path, extra: Path) -> None:
    plain = load_tables(str(tables), [SST])["sst"]
    joined = load_tables(str(tables), [SST], extra=[f"sst={extra}"])["sst"]
    train_table = joined["train"]
    assert len(train_table) == sum(CLASSES) + 9
    assert (joined["dev"].ids, joined["test"].ids) == (plain["dev"].ids, plain["test"].ids)
    assert train_table.labels is not None
    assert train_table.labels[-9:].tolist() == [2] * 9
    assert [str(problem) for problem in train_table.problems] == [
        f"{extra}, line 11: the example also stands in dev (id d0)"
    ]
    assert train_table.place(0).endswith("ids-sst-train.csv, line 2")
    assert train_table.place(sum(CLASSES)) == f"{extra}, line 2"
    assert [(each.rows, each.left_out) for each in train_table.extra] == [(9, 1)]


def test_what_is_refused(tables: Path, extra: Path, tmp_path: Path) -> None:
    splits = load_tables(str(tables), [SST])["sst"]
    with pytest.raises(
        DataError, match=r"extra\.csv, line 2: the id x0 stands in .*extra\.csv, line 2 already"
    ):
        join(splits, [read_extra(extra, SST), read_extra(extra, SST)])
    with pytest.raises(DataError, match="takes the place of a training table"):
        join(splits, [read_extra(tables / "ids-sst-train.csv", SST)])
    with pytest.raises(DataError, match=r"so do 10 of 10 rows of this table: it must not be trained on"):
        join(splits, [read_extra(tables / "ids-sst-dev.csv", SST)])
    with pytest.raises(DataError, match="no column 'sentence1'"):
        load_tables(str(tables), [get_task("sts")], extra=[f"sts={extra}"])
    with pytest.raises(DataError, match="no such file"):
        load_tables(str(tables), [SST], extra=[f"sst={tmp_path / 'absent.csv'}"])
    for value, message in (
        ("extra.csv", "expected TASK=FILE"),
        ("=extra.csv", "expected TASK=FILE"),
        ("ssst=extra.csv", "Did you mean sst"),
        ("para=extra.csv", "would have no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_train(["--data=sample", "--tasks=[sst]", "--extra-data", value])
    with pytest.raises(ConfigError, match="named twice"):
        parse_train(["--data=sample", "--extra-data=sst=a.csv", "--extra-data=sst=./a.csv"])
    for value in ("[a", "[{a: b}]", "[1]"):
        with pytest.raises(ConfigError, match="expected TASK=FILE or a list"):
            parse_train(["--data=sample", "--extra-data", value])
    with pytest.raises(ConfigError, match="nothing behind it"):
        parse_train(["--data=sample", "--extra-data"])


def test_the_command_line_and_a_file_say_the_same(tmp_path: Path) -> None:
    wanted = ["sst=a b.csv", "sts=c.csv"]
    for arguments in (
        ["--extra-data", wanted[0], "--extra_data", wanted[1]],
        [f"--extra-data={wanted[0]}", f"--extra_data=[{wanted[1]}]"],
    ):
        assert parse_train(["--data=sample", *arguments]).extra_data == wanted
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({"data": "sample", "extra_data": wanted}))
    assert parse_train(["--config", str(file)]).extra_data == wanted
    assert parse_train(["--config", str(file), "--extra-data", "sst=d.csv"]).extra_data == ["sst=d.csv"]
    assert joined_extra_data(["--seed", "1"]) == ["--seed", "1"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_trains_on_them_and_says_so(tables: Path, extra: Path, tiny_bert: Path, tmp_path: Path) -> None:
    arguments = options(
        tables, tiny_bert, tmp_path, "--extra-data", f"sst={extra}", "--sst.sampling=class-balanced"
    )
    train.main([*arguments, "--epochs=1"])
    run = tmp_path / "run"
    info = json.loads((run / "run.json").read_text())["data"]["sst"]["train"]
    assert (info["rows"], info["problem_count"], info["labels"]["counts"]) == (42, 1, [12, 6, 12, 8, 4])
    assert info["own_labels"]["counts"] == list(CLASSES)
    [described] = info["extra"]
    assert (described["file"], described["rows"], described["left_out"]) == (str(extra), 9, 1)
    assert "also stands in dev" in (run / "problems.txt").read_text()
    assert "of train: extra" in (run / "report.md").read_text()
    assert f"9 rows of {extra} join the training table, 1 left out" in (run / "log.txt").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["extra_data"] == [f"sst={extra}"]
    assert run_baselines(read_run(run), TASKS)["sst"].majority == pytest.approx(0.2)
    # The epoch is as long as the joined table, and a resumed run must find the same rows.
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in steps) == -(-42 // 4)
    assert parse_train(["--config", str(run / "config.yaml")]).extra_data == [f"sst={extra}"]
    (run / "report.md").unlink()
    text = extra.read_text()
    extra.write_text(text.replace("In year", "All along"))
    assert extra.read_text() != text
    with pytest.raises(CheckpointError, match="the training data is not what the run began with"):
        train.main(["--resume", str(run)])


def test_a_part_of_the_examples_is_drawn_from_the_joined_table(tables: Path, extra: Path) -> None:
    config = parse_train([f"--data={tables}", "--tasks=[sst]", "--extra-data", f"sst={extra}"])
    assert len(training_tables(config)["sst"]) == 42
    config.task["sst"].train_fraction = 0.5
    part = training_tables(config)["sst"]
    assert len(part) == 21
    assert any(row_id.startswith("x") for row_id in part.ids), "masked words are learned from extra rows, too"
    assert part.place(len(part) - 1).startswith(str(extra))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_augment_makes_is_what_training_reads(
    augment: Augment, tables: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    assert augment("sst", "--equalise", "--offline=case,word-dropout") == 0
    # A task that only a stage before the run trains may have extra rows as well.
    before = ("--tasks=[sts]", "--pretraining.task=sst", "--pretraining.task_epochs=0.2", "--epochs=0.2")
    train.main([*options(tables, tiny_bert, tmp_path, f"--extra-data=sst={tmp_path / 'new.csv'}"), *before])
    assert (tmp_path / "run" / "report.md").is_file()
    stage = tmp_path / "run" / "pretraining" / "sst"
    info = json.loads((stage / "run.json").read_text())["data"]["sst"]["train"]
    assert info["labels"]["counts"] == [12] * 5
    assert info["problem_count"] == 0
    # A cleaned table takes the place of the training table in a folder of tables.
    table = read_table(tmp_path / "new.csv", "sst", "train", SST.layout)
    assert table.labels is not None
    folder = tmp_path / "cleaned"
    shutil.copytree(tables, folder)
    shutil.copy(tmp_path / "new.csv", folder / "ids-sst-train.csv")
    again = load_tables(str(folder), [SST])["sst"]["train"]
    assert again.texts == table.texts
    assert again.labels is not None
    assert np.array_equal(again.labels, table.labels)
