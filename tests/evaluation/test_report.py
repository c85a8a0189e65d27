"""report.md from a run's folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mtbert.errors import ConfigError, DataError, UserError
from mtbert.evaluation.metrics import score
from mtbert.evaluation.predictions import Predictions, read_outputs
from mtbert.evaluation.report import write_report
from mtbert.evaluation.results import results, results_table
from mtbert.evaluation.run import read_run
from mtbert.tasks.registry import TASKS


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out where the text alone is looked at: drawing takes the longest."""
    monkeypatch.setattr("mtbert.evaluation.report.write_plots", lambda *arguments: {})


def rows_of(report: str, header: str) -> dict[str, list[str]]:
    """The rows of the Markdown table whose header line begins with `header`, by their first cell."""
    lines = report.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(header))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        rows[cells[0]] = cells[1:]
    return rows


@pytest.mark.usefixtures("no_plots")
def test_a_whole_report(make_run) -> None:
    folder = make_run("first_run", info={"contamination": "Quora pairs were seen in pretraining."})
    path = write_report(folder, TASKS)
    report = path.read_text(encoding="utf-8")
    assert path == folder / "report.md"
    assert report.startswith("# Run first\\_run\n")
    for fact in (
        "0123456789ab-dirty",
        "minilm",
        "22,713,216 trainable of 22,713,216",
        "python 3.11, torch 2.13.0",
    ):
        assert fact in report
    table = rows_of(report, "| task | metric | dev |")
    for name in ("sst", "para", "sts"):
        task = TASKS[name]
        entry = read_outputs(folder / "predictions" / f"{name}-dev.jsonl", task, "dev")
        assert entry.labels is not None
        value = score(task, entry.labels, entry.outputs).headline
        cells = table[task.title]
        assert cells[1] == f"{value:.3f}"
        low, high = map(float, cells[2].split(" to "))
        assert low < value < high
    headlines = [float(table[TASKS[name].title][1]) for name in ("sst", "para", "sts")]
    expected = (headlines[0] + headlines[1] + (headlines[2] + 1) / 2) / 3
    assert float(table["overall"][1]) == pytest.approx(expected, abs=1.5e-3)
    assert "**Contamination.** Quora pairs" in report
    assert "Synthetic" not in report
    assert "| class | precision | recall | F1 | support | predicted |" in report
    assert rows_of(report, "| epoch | step | seconds |")["1"][2] == "100,000"
    assert "lr: 5.0e-05" in report
    assert "Worst errors" not in report


def test_every_figure_of_the_report_is_there(make_run) -> None:
    folder = make_run("run", names=("sst", "para", "sts", "cfimdb"))
    report = write_report(folder, TASKS).read_text(encoding="utf-8")
    linked = re.findall(r"!\[[^]]*\]\(([^)]*)\)", report)
    assert len(linked) == len(set(linked)) == 12
    assert all((folder / link).is_file() for link in linked)
    assert {Path(link).name for link in linked} == {file.name for file in (folder / "plots").iterdir()}


@pytest.mark.usefixtures("no_plots")
def test_worst_errors_carry_their_sentences(make_run) -> None:
    outputs = np.full((4, 1), -2.0)
    outputs[2] = -7.0
    entry = Predictions("para", "dev", ("a", "b", "c", "d"), np.array([0, 1, 1, 0]), outputs)
    folder = make_run("run", names=("para",), predictions={"para": entry})
    texts = [("x", "y"), ("first | b", "second<br />b"), ("long " * 200, "[math]c[/math]"), ("x", "y")]
    # The tables' order is not that of the predictions.
    examples = {"para": (["d", "c", "b", "a"], texts[::-1], entry.labels)}
    report = write_report(folder, TASKS, examples).read_text(encoding="utf-8")
    table = rows_of(report, "| text | label | prediction |")
    first, second = table.items()
    assert first[0].startswith("long long")
    assert first[0].endswith("… <br> &#91;math&#93;c&#91;/math&#93;")
    assert first[1] == ["paraphrase", "different", "0.999", "c"]
    assert second[0] == "first \\| b <br> second&lt;br /&gt;b"
    assert len(table) == 2


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("same_order", [True, False])
def test_worst_errors_of_repeated_ids_never_show_another_sentence(make_run, same_order: bool) -> None:
    outputs = np.array([[-3.0], [-9.0], [-6.0]])
    entry = Predictions("para", "dev", ("twice", "twice", "once"), np.array([0, 1, 1]), outputs)
    folder = make_run("run", names=("para",), predictions={"para": entry})
    ids, texts = list(entry.ids), [("first", "pair"), ("second", "pair"), ("third", "pair")]
    step = 1 if same_order else -1
    examples = {"para": (ids[::step], texts[::step], None)}
    report = write_report(folder, TASKS, examples).read_text(encoding="utf-8")
    shown = list(rows_of(report, "| text | label | prediction |"))
    assert shown == ["second <br> pair" if same_order else "(not given)", "third <br> pair"]


@pytest.mark.usefixtures("no_plots")
def test_every_evaluation_has_its_row(make_run) -> None:
    folder = make_run("run")
    report = write_report(folder, TASKS).read_text(encoding="utf-8")
    run = read_run(folder)
    table = rows_of(report, "| epoch | step | sst accuracy | sst macro F1 | sst dev loss | para accuracy |")
    best = run.history.best_evaluation()
    assert len(table) == len(run.history.evaluations) == 4
    for line in run.history.evaluations:
        cells = table[f"{line['epoch']:.0f}" + (" (best)" if line is best else "")]
        expected = [f"{line['step']:,}"]
        for task, first, second in (
            ("sst", "accuracy", "macro_f1"),
            ("para", "accuracy", "macro_f1"),
            ("sts", "pearson", "spearman"),
        ):
            train, dev = line["train"][task], line["dev"][task]
            expected += [f"{train[name]:.3f} / {dev[name]:.3f}" for name in (first, second)]
            expected.append(f"{line['dev_loss'][task]:.3f}")
        assert cells == [*expected, f"{line['overall']:.3f}", f"{line['mean']:.3f}"]


@pytest.mark.usefixtures("no_plots")
def test_evaluations_without_train_scores_or_joint_scores(make_run) -> None:
    folder = make_run("run", names=("para", "cfimdb"), history=False)
    scores = {"para": {"kind": "binary", "examples": 9, "accuracy": 0.75, "macro_f1": 0.5}}
    line = {"kind": "evaluation", "step": 53, "epoch": 2.366071, "train": {}, "dev": scores, "score": 0.75}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    report = write_report(folder, TASKS).read_text(encoding="utf-8")
    table = rows_of(report, "| epoch | step | para accuracy |")
    row = ["53", "- / 0.750", "- / 0.500", "-", "- / -", "- / -", "-"]
    assert table == {"2.37 (best)": row}
    assert "The best evaluation was at step 53, epoch 2.37." in report


@pytest.mark.usefixtures("no_plots")
def test_train_scores_say_on_how_many_examples_they_rest(make_run) -> None:
    folder = make_run("run", names=("cfimdb",))
    sampled = "`train` is of that moment, on a seeded sample of the training examples (cfimdb 245 of 1,707)."
    assert sampled in write_report(folder, TASKS).read_text(encoding="utf-8")
    info = json.loads((folder / "run.json").read_text())
    info["data"]["cfimdb"]["train"]["rows"] = 245
    (folder / "run.json").write_text(json.dumps(info))
    assert "moment, on all training examples." in write_report(folder, TASKS).read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_plots")
def test_speed_of_whole_and_broken_off_epochs(make_run) -> None:
    folder = make_run("run", names=("para",), history=False)
    times = ((1.0, 40, 10.0, 4000), (2.0, 80, 20.0, 8000), (2.366071, 95, 24.0, 9400))
    lines = [
        {"kind": "epoch", "epoch": epoch, "step": step, "seconds": seconds, "tokens": tokens}
        for epoch, step, seconds, tokens in times
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = write_report(folder, TASKS).read_text(encoding="utf-8")
    table = rows_of(report, "| epoch | step | seconds | useful tokens |")
    assert list(table) == ["1", "2", "2.37"]
    assert table["2.37"] == ["95", "4.0", "1,400", "350"]
    assert "features cached" not in report
    info = json.loads((folder / "run.json").read_text()) | {"mode": "last-linear-layer"}
    (folder / "run.json").write_text(json.dumps(info))
    report = write_report(folder, TASKS).read_text(encoding="utf-8")
    assert "9,400 examples' tokens in 24 seconds: 392 a second (features cached: " in report
    assert rows_of(report, "| epoch | step | seconds | examples' tokens |") == table


@pytest.mark.usefixtures("no_plots")
def test_synthetic_data_is_plainly_called_so(make_run) -> None:
    folder = make_run("run", info={"synthetic": True})
    assert "**Synthetic data.**" in write_report(folder, TASKS).read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_plots")
def test_rows_that_could_not_be_used(make_run) -> None:
    folder = make_run("run", names=("para",))
    info = json.loads((folder / "run.json").read_text())
    listed = [f"quora-dev.csv, line {number}: no | label" for number in range(12)]
    info["data"]["para"]["dev"] |= {"problems": listed, "problem_count": 40}
    info["data"]["para"]["train"]["problems"] = [{"path": "quora-train.csv", "line": 7, "reason": "empty"}]
    (folder / "run.json").write_text(json.dumps(info))
    report = write_report(folder, TASKS).read_text(encoding="utf-8")
    assert "- quora-train.csv: line 7: empty\n" in report
    assert "- quora-dev.csv, line 8: no \\| label\n" in report
    assert "line 9:" not in report
    assert "- and 31 more (run.json lists 13)" in report
    assert "problems.txt" not in report
    (folder / "problems.txt").write_text("all of them\n")
    whole = write_report(folder, TASKS).read_text(encoding="utf-8")
    assert "Rows that could not be used (all of them are in [problems.txt](problems.txt)):" in whole
    assert "- and 31 more\n" in whole
    lines = [line for line in report.splitlines() if line.startswith("| Quora paraphrase | dev |")]
    assert lines == ["| Quora paraphrase | dev | quora-dev.csv | 2,000 | 40 | 3 | 2 |"]


def test_a_folder_with_little_in_it(make_run) -> None:
    folder = make_run("run", history=False, predicted=False)
    (folder / "config.yaml").unlink()
    report = write_report(folder, TASKS).read_text(encoding="utf-8")
    assert "no labelled predictions yet" in report
    assert "## Configuration" not in report
    assert "## Training" not in report


def test_what_is_no_run_is_refused(tmp_path: Path, make_run) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        write_report(tmp_path / "nothing", TASKS)
    with pytest.raises(ConfigError, match=r"is not a run's folder: run\.json is missing"):
        write_report(tmp_path, TASKS)
    folder = make_run("run")
    with pytest.raises(ConfigError, match="trained the task"):
        write_report(folder, {"sst": TASKS["sst"]})
    (folder / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json: is not JSON"):
        write_report(folder, TASKS)


@pytest.mark.usefixtures("no_plots")
def test_a_folder_that_cannot_be_written_is_named(make_run) -> None:
    folder = make_run("run")
    (folder / "report.md").mkdir()
    with pytest.raises(UserError, match=r"report\.md: cannot be written"):
        write_report(folder, TASKS)
    assert not [file for file in folder.iterdir() if "partial" in file.name]


def test_the_terminals_table(make_run) -> None:
    run = read_run(make_run("run", names=("sst", "para", "sts")))
    predictions = run.all_predictions(TASKS)
    lines = results_table(results(TASKS, predictions)).splitlines()
    assert lines[0].split() == [
        "task",
        "metric",
        "dev",
        "95%",
        "interval",
        "train",
        "chance",
        "majority",
        "examples",
    ]
    assert [line.split()[0] for line in lines[2:]] == ["SST-5", "Quora", "STS-B", "overall", "mean"]
    unlabelled = Predictions("sst", "dev", predictions["sst"].ids, None, predictions["sst"].outputs)
    assert results(TASKS, {"sst": unlabelled}).scores == {}
