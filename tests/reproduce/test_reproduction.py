"""Running rows and reading them: what is skipped, resumed and noted, and the numbers of the table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mtbert.cli import parse_train
from mtbert.config import TrainConfig
from mtbert.engine.reproduction import Job, Runner, failure_reason
from mtbert.engine.reproduction_cost import STEP_TOKENS, Cost, CostModel, shortened
from mtbert.errors import ConfigError, Interrupted
from mtbert.evaluation.bootstrap import Interval
from mtbert.evaluation.plots.reproduction import reproduction_plot
from mtbert.evaluation.plots.style import Source
from mtbert.evaluation.predictions import Predictions, write_prediction_files
from mtbert.evaluation.published import PaperRow, Published, read_published
from mtbert.evaluation.reproduction import RowResult, SeedResult, judge, read_row
from mtbert.evaluation.reproduction_page import CSV, PAGE, PLOT, Reproduction, write_reproduction
from mtbert.evaluation.reproduction_table import condition_rows, csv_text, score_rows
from mtbert.reproduce import main
from mtbert.tasks.registry import TASKS

# ---- the runner, with a training that is quick ----

TRAIN = textwrap.dedent(
    """
    import os, pathlib, signal, sys, time
    arguments = sys.argv[1:]
    if arguments[0] == "--resume":
        folder, kind = pathlib.Path(arguments[1]), "resumed"
    else:
        kind, folder = arguments[0], pathlib.Path(arguments[1])
    (folder / "calls.txt").open("a").write(kind + "\\n")
    if kind == "bad":
        print("loading")
        print("error: sst.head: no such thing", file=sys.stderr)
        sys.exit(2)
    if kind == "quiet":
        sys.exit(3)
    if kind == "crash":
        print("Traceback (most recent call last):")
        raise RuntimeError("shapes differ")
    (folder / "config.yaml").write_text("epochs: 1")
    if kind == "memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "slow":
        def stop(*_):
            (folder / "calls.txt").open("a").write("stopped\\n")
            sys.exit(130)
        signal.signal(signal.SIGTERM, stop)
        (folder / "ready").touch()
        time.sleep(60)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "report.md").write_text("done")
    """
)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    return Runner((sys.executable, str(script)))


def job(folder: Path, kind: str) -> Job:
    return Job(kind, 0, folder / kind, (kind, str(folder / kind)))


def calls(job: Job) -> list[str]:
    file = job.folder / "calls.txt"
    return file.read_text().split() if file.is_file() else []


def test_done_jobs_are_skipped_and_failures_are_noted_while_the_rest_goes_on(
    runner: Runner, tmp_path: Path
) -> None:
    jobs = [job(tmp_path, kind) for kind in ("done", "bad", "crash", "memory", "good")]
    jobs[0].folder.mkdir()
    (jobs[0].folder / "report.md").write_text("long ago")
    seen: list[str] = []
    runner.run(jobs, lambda job, seconds: seen.append(job.row))
    assert seen == ["bad", "crash", "memory", "good"]
    assert calls(jobs[0]) == []
    assert [job.failure for job in jobs] == [
        None,
        "sst.head: no such thing",
        "RuntimeError: shapes differ",
        "killed by SIGKILL, as the system does when memory runs out",
        None,
    ]
    assert [job.done for job in jobs] == [True, False, False, False, True]
    assert not (jobs[4].folder / "checkpoints").exists()


def test_a_killed_job_is_resumed_and_a_failed_one_is_tried_again(runner: Runner, tmp_path: Path) -> None:
    jobs = [job(tmp_path, "memory"), job(tmp_path, "bad")]
    runner.run(jobs, lambda job, seconds: None)
    runner.run(jobs, lambda job, seconds: None)
    assert calls(jobs[0]) == ["memory", "resumed"]
    assert jobs[0].done
    assert jobs[0].failure is None
    assert calls(jobs[1]) == ["bad", "bad"]
    kept = dataclasses.replace(runner, keep_checkpoints=True)
    last = job(tmp_path, "good")
    kept.run([last], lambda job, seconds: None)
    assert (last.folder / "checkpoints").is_dir()


def test_a_run_that_is_still_on_its_way_out_is_waited_for(runner: Runner, tmp_path: Path) -> None:
    held, other = job(tmp_path, "held"), job(tmp_path, "other")
    held.folder.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from mtbert.engine.folder_lock import FolderLock;"
        " FolderLock(Path(sys.argv[1])).acquire(); print(flush=True); time.sleep(1.5)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(held.folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seen: list[str] = []
        runner.run([held, other], lambda job, seconds: seen.append(job.row))
    assert seen == ["other", "held"]


def test_only_the_last_attempt_is_blamed(runner: Runner, tmp_path: Path) -> None:
    first = job(tmp_path, "bad")
    runner.run([first], lambda job, seconds: None)
    again = dataclasses.replace(first, arguments=("quiet", str(first.folder)))
    runner.run([again], lambda job, seconds: None)
    assert again.failure == "ended with exit code 3 and said nothing"


def test_the_reason_of_a_failure() -> None:
    assert failure_reason(1, "") == "ended with exit code 1 and said nothing"
    assert failure_reason(-15, "error: old") == "killed by SIGTERM"
    assert failure_reason(2, "error: a\nerror: b\nlast") == "b"


def test_two_jobs_run_at_a_time(runner: Runner, tmp_path: Path) -> None:
    both = dataclasses.replace(runner, at_once=2)
    jobs = [Job(name, 0, tmp_path / name, ("slow", str(tmp_path / name))) for name in ("one", "two", "three")]
    with (
        _interrupt_when(lambda: all((job.folder / "ready").exists() for job in jobs[:2])),
        pytest.raises(Interrupted, match="stopped during one seed 0, two seed 0"),
    ):
        both.run(jobs, lambda job, seconds: None)
    assert [calls(job) for job in jobs] == [["slow", "stopped"], ["slow", "stopped"], []]
    assert [job.failure for job in jobs] == [None, None, None]
    runner.run(jobs[:2], lambda job, seconds: None)
    assert calls(jobs[0]) == ["slow", "stopped", "resumed"]


class _interrupt_when:
    """SIGINT for this process, as Ctrl-C, once a condition holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition

    def __enter__(self) -> None:
        def check(*_: object) -> None:
            if self.condition():
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise KeyboardInterrupt
            signal.setitimer(signal.ITIMER_REAL, 0.05)

        self.before = signal.signal(signal.SIGALRM, check)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def test_a_training_stops_when_its_parent_is_killed(tmp_path: Path) -> None:
    """The watcher of `train_row`, with a training that only waits."""
    child = (
        "import sys, time; import mtbert.reproduce as r;"
        f" r.train.main = lambda a: (open({str(tmp_path / 'up')!r}, 'w').close(), time.sleep(60));"
        " r.train_row(int(sys.argv.pop(1)))"
    )
    parent = (
        "import os, subprocess, sys, time;"
        f" p = subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], start_new_session=True);"
        f" open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        _wait(lambda: (tmp_path / "up").exists(), 60)
        pid = int((tmp_path / "pid").read_text())
        process.kill()
        process.wait()
        _wait(lambda: not _alive(pid), 15)
    finally:
        process.kill()
        process.wait()


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# ---- the table ----

SIZES = {"sst": 100, "para": 400, "sts": 101, "cfimdb": 50}
PAPER = Published({}, {"chan": "Chan 2023"}, {"sst": 200, "para": 1000, "sts": 100, "cfimdb": 80}, SIZES)


def seed(values: dict[str, float], *, width: float = 0.02, para_rows: int = 1000) -> SeedResult:
    sst, para, sts = values["sst"], values["para"], values["sts"]
    joint = {"mean": (sst + para + sts) / 3, "overall": (sst + para + (sts + 1) / 2) / 3}
    return SeedResult(
        folder=Path("run"),
        scores={k: Interval(v, v - width, v + width) for k, v in (values | joint).items()},
        encoder="minilm",
        epochs=1.0,
        epoch_length="smallest",
        train_rows={"sst": 200, "para": para_rows, "sts": 100},
        seconds=120.0,
        tokens=240_000,
        synthetic=False,
        features_cached=False,
    )


def row(**changes: object) -> PaperRow:
    values: dict[str, object] = {
        "name": "chan-r4",
        "paper": "chan",
        "title": "R4",
        "formula": "mean",
        "figures": {"sst": 0.5, "para": 0.7, "sts": 0.4},
        "score": 0.533,
        "quora": "cut",
    }
    return PaperRow(**(values | changes))  # type: ignore[arg-type]


OURS = {"sst": 0.48, "para": 0.74, "sts": 0.46}  # mean 0.56, overall 0.65


def test_the_score_is_under_the_rows_own_formula() -> None:
    one = seed(OURS)
    by_mean = RowResult(row(), (one,)).score
    by_overall = RowResult(row(formula="overall"), (one,)).score
    by_task = RowResult(row(formula="sts", figures={"sts": 0.4}, score=None), (one,)).score
    assert by_mean is not None
    assert by_overall is not None
    assert by_task is not None
    assert (by_mean.mean, by_overall.mean, by_task.mean) == pytest.approx((0.56, 0.65, 0.46))


def test_mean_deviation_and_interval_over_seeds() -> None:
    two = (seed(OURS), seed({"sst": 0.54, "para": 0.74, "sts": 0.46}))
    found = RowResult(row(), two).score
    assert found is not None
    assert found.mean == pytest.approx(0.57)  # 0.56 and 0.58
    assert found.deviation == pytest.approx(0.02 / math.sqrt(2))
    assert (found.low, found.high) == pytest.approx((0.55, 0.59))


def test_the_standard_error_of_a_published_score() -> None:
    """By hand: sqrt(.5 .5 / 100) = .05, sqrt(.7 .3 / 400) = .022913, (1 - .16) / sqrt(100) = .084."""
    parts = (0.05, math.sqrt(0.21 / 400), 0.084)
    assert row().standard_error(SIZES, {}) == pytest.approx(math.sqrt(sum(p**2 for p in parts)) / 3)
    halved = (*parts[:2], 0.042)
    found = row(formula="overall").standard_error(SIZES, {})
    assert found == pytest.approx(math.sqrt(sum(p**2 for p in halved)) / 3)
    assert row(formula="sst", score=None).standard_error(SIZES, {}) == pytest.approx(0.05)
    # A score alone: our columns stand in for those that were not published.
    assert row(figures={}).standard_error(SIZES, row().figures) == row().standard_error(SIZES, {})


@pytest.mark.parametrize(
    ("published", "verdict"),
    [(0.507, "higher"), (0.509, "within noise"), (0.611, "within noise"), (0.613, "lower")],
)
def test_within_noise_is_our_interval_widened_by_their_standard_error(published: float, verdict: str) -> None:
    """Ours .56, interval .54 to .58. A score alone takes our columns for its standard error: .04996, .02193 and .07884
    are .09588 in quadrature, a third of it .03196: the limits are .50804 and .61196."""
    found = judge(RowResult(row(figures={}, score=published), (seed(OURS),)), PAPER)
    assert found is not None
    assert found.margin == pytest.approx(0.03196, abs=1e-5)
    assert found.difference == pytest.approx(0.56 - published)
    assert found.text == verdict


def test_the_deviation_over_seeds_widens_the_margin() -> None:
    two = RowResult(row(), (seed(OURS), seed({"sst": 0.54, "para": 0.74, "sts": 0.46})))
    found = judge(two, PAPER)
    assert found is not None
    assert found.margin == pytest.approx(math.hypot(row().standard_error(SIZES, {}), 0.02 / math.sqrt(2)))


def test_rows_without_all_of_quora_are_not_comparable() -> None:
    short = (seed(OURS, para_rows=160),)
    whole = judge(RowResult(row(quora="all"), short), PAPER)
    cut = judge(RowResult(row(quora="cut"), short), PAPER)
    full = judge(RowResult(row(quora="all"), (seed(OURS),)), PAPER)
    assert whole is not None
    assert whole.text == "not comparable: 160 of 1,000 Quora pairs"
    assert cut is not None
    assert full is not None
    assert cut.text == full.text == "within noise"


def test_a_score_that_fits_neither_formula_is_marked_and_its_columns_are_compared() -> None:
    odd = row(score=0.61)
    assert odd.matches_neither
    assert not row(score=0.633).matches_neither  # their overall: (.5 + .7 + .7) / 3
    result = RowResult(odd, (seed(OURS),))
    found = judge(result, PAPER)
    assert found is not None
    assert found.difference == pytest.approx(0.56 - 1.6 / 3)
    headers, rows = score_rows([result], PAPER)
    assert rows[0][headers.index("published score")] == "0.610*"
    assert rows[0][headers.index("our score")] == "0.560"


def test_mean_and_deviation_of_the_columns() -> None:
    """Published SST .5 and .3, ours .48 and .40; the deviations are |a - b| / sqrt(2)."""
    results = [
        RowResult(row(), (seed(OURS),)),
        RowResult(
            row(figures={"sst": 0.3, "para": 0.6, "sts": 0.0}, score=0.3), (seed(OURS | {"sst": 0.4}),)
        ),
        RowResult(row(figures={"sst": 0.9}, score=None, formula="sst"), (seed(OURS | {"sst": 0.8}),)),
    ]
    headers, rows = score_rows(results, PAPER)
    mean, deviation = (dict(zip(headers, cells, strict=True)) for cells in rows[-2:])
    assert mean["published SST"] == f"{(0.5 + 0.3 + 0.9) / 3:.3f}"
    assert mean["our SST"] == f"{(0.48 + 0.40 + 0.80) / 3:.3f}"
    assert mean["published para"] == "0.650"
    assert deviation["published para"] == f"{0.1 / math.sqrt(2):.3f}"
    assert (mean["published score"], mean["our score"]) == (
        f"{(0.533 + 0.3) / 2:.3f}",
        f"{(0.56 + 1.6 / 3) / 2:.3f}",
    )


def test_the_conditions_say_what_was_run() -> None:
    real = read_published()
    one = dataclasses.replace(seed(OURS, para_rows=22757), epoch_length=100)
    result = RowResult(real.rows["delacruz-full"], (one,))
    headers, rows = condition_rows([result], real)
    cells = dict(zip(headers, rows[0], strict=True))
    assert cells["epochs"] == "1 of 10, each cut to 100 batches a task"
    assert "para 22,757 of 141,498" in str(cells["training rows"])
    assert (cells["minutes"], cells["tokens per second"]) == ("2.0", "2,000")


def test_the_csv_has_a_line_for_every_row() -> None:
    real = read_published()
    rows = [real.rows[name] for name in ("chan-r4", "peng-heads-36", "luo-cosine")]
    results = {"chan-r4": RowResult(rows[0], (seed(OURS), seed(OURS)))}
    text = csv_text(rows, results, {"luo-cosine": "seed 0: out of memory"}, real)
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["row"] for line in lines] == [row.name for row in rows]
    assert (lines[0]["published_score"], lines[0]["score"], lines[0]["difference"]) == (
        "0.563",
        "0.56",
        "-0.003",
    )
    assert (lines[0]["seeds"], lines[0]["score_deviation"], lines[0]["paper_epochs"]) == ("2", "0.0", "10.0")
    assert lines[1]["problem"] == "36 divides neither the width 768 nor 384"
    assert lines[2]["problem"] == "seed 0: out of memory"
    assert lines[2]["score"] == ""


# ---- shortened rows ----


@pytest.mark.parametrize(
    ("preset", "scale", "steps", "expected"),
    [
        ("chan-r4", 0.1, None, (1.0, "smallest", {})),
        ("chan-r4", 0.1, 50, (0.5, "smallest", {})),
        ("peng-run-292", 0.1, None, (2.0, "largest", {"sst": 1})),  # whole epochs, sst from the second on
        ("peng-run-292", 0.1, 150, (1.0, "largest", {"sst": 0})),
        ("peng-best", 0.1, 60, (1.0, 20, {})),  # every task has its phase
    ],
)
def test_scale_and_steps_shorten_a_row(
    preset: str, scale: float, steps: int | None, expected: tuple[float, str | int, dict[str, int]]
) -> None:
    config = config_from_preset(preset)
    short = shortened(config, scale, steps, Cost(1000, 100, 0.0, 0.0))
    assert (short.epochs, short.curriculum.epoch_length, short.curriculum.start) == expected


def test_further_pretraining_is_shortened_alike() -> None:
    short = shortened(config_from_preset("chan-r5"), 0.25)
    assert (short.epochs, short.pretraining.task, short.pretraining.task_epochs) == (2.5, "para", 0.25)


def test_costs_count_steps_tokens_and_passes(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    costs = CostModel("sample", str(tiny_bert))
    config = shortened(config_from_preset("chan-r4"), 0.1)
    plain = costs.cost(config)
    assert plain.steps == plain.steps_per_epoch == 38  # 600 STS pairs in batches of 16
    twice = costs.cost(shortened(config_from_preset("chan-r4"), 0.2))
    assert twice.training == pytest.approx(2 * plain.training, rel=0.01)
    surgery = costs.cost(shortened(config_from_preset("chan-r8"), 0.1))
    fixed = STEP_TOKENS["full"] * 38
    assert surgery.training - fixed == pytest.approx(1.25 * (plain.training - fixed))
    smart = costs.cost(shortened(config_from_preset("chan-r6"), 0.1))
    assert smart.training - fixed == pytest.approx(3 * (plain.training - fixed))
    frozen = costs.cost(shortened(config_from_preset("chan-r3"), 0.1))
    assert frozen.training == 0.0
    assert frozen.seconds(1e9) == pytest.approx(10, abs=0.1)


def config_from_preset(name: str) -> TrainConfig:
    return parse_train(["--preset", name])


# ---- from folders to the page ----


def write_run(
    folder: Path,
    hits: dict[str, float],
    epochs: float = 1.0,
    names: Sequence[str] = ("sst", "para", "sts"),
    evaluations: Sequence[dict[str, object]] = (),
) -> Path:
    """A finished run whose accuracies are exactly `hits`; its STS predictions are the labels."""
    data = {}
    for name in names:
        task = TASKS[name]
        count = 200
        generator = np.random.default_rng(len(name))
        if task.kind == "similarity":
            labels = generator.uniform(0, 5, count)
            outputs = labels[:, None] * 0.5
        else:
            labels = generator.integers(0, task.classes, count)
            right = np.arange(count) < round(hits[name] * count)
            said = np.where(right, labels, (labels + 1) % task.classes)
            outputs = np.eye(task.classes)[said] if name == "sst" else (said * 2.0 - 1)[:, None]
        ids = tuple(str(number) for number in range(count))
        write_prediction_files(folder, task, Predictions(name, "dev", ids, labels, outputs))
        data[name] = {"train": {"rows": 100}, "dev": {"rows": count}}
    facts = {
        "name": folder.name,
        "git": "abc",
        "tasks": list(data),
        "encoder": "minilm",
        "mode": "full",
        "data": data,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(f"epochs: {epochs}\ncurriculum: {{epoch_length: smallest}}\n")
    line = {
        "kind": "epoch",
        "epoch": epochs,
        "step": 9,
        "seconds": 60.0,
        "tokens": 6000,
        "tokens_per_second": 100.0,
    }
    lines = [{"kind": "evaluation", **entry} for entry in evaluations]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*lines, line]))
    (folder / "report.md").write_text("done\n")
    return folder


def test_a_row_is_read_from_its_folders(tmp_path: Path) -> None:
    entry = read_published().rows["chan-r4"]
    found = read_row(entry, [write_run(tmp_path / "seed-0", {"sst": 0.5, "para": 0.75})], resamples=50)
    assert found is not None
    assert found.score is not None
    assert found.score.mean == pytest.approx((0.5 + 0.75 + 1.0) / 3)
    assert found.score.low < found.score.mean < found.score.high
    assert (found.minutes, found.tokens_per_second) == (1.0, 100.0)
    assert read_row(entry, []) is None


def test_the_page_has_tables_figure_and_failures(tmp_path: Path) -> None:
    real = read_published()
    done = real.rows["chan-r4"]
    result = read_row(
        done, [write_run(tmp_path / "chan-r4" / "seed-0", {"sst": 0.5, "para": 0.75})], resamples=50
    )
    assert result is not None
    rows = [done, real.rows["chan-r6"], real.rows["chan-r8"], real.rows["peng-heads-36"]]
    found = Reproduction(real, rows, {"chan-r4": result}, {"chan-r6": "seed 0: out of memory | really"})
    page = write_reproduction(found, tmp_path).read_text(encoding="utf-8")
    assert "1 of 4 rows have a finished run" in page
    assert "| chan-r4 | 0.489 | 0.714 | 0.486 | 0.563 | mean | 0.500 | 0.750 | 1.000 | 0.750 |" in page
    assert "| 1 of 10 |" in page
    assert "- chan-r6: failed: seed 0: out of memory \\| really" in page
    assert "- chan-r8: not run yet" in page
    assert "- peng-heads-36: not reproducible: 36 divides neither the width 768 nor 384" in page
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / CSV).is_file()


def evaluation(
    epoch: float, sst: float, para: float, sts: float, phase: str | None = None
) -> dict[str, object]:
    dev = {"sst": {"accuracy": sst}, "para": {"accuracy": para}, "sts": {"pearson": sts}}
    overall = (sst + para + (sts + 1) / 2) / 3
    return {"step": int(10 * epoch), "epoch": epoch, "phase": phase, "dev": dev, "overall": overall}


def test_the_page_compares_epochs_phases_and_single_tasks(tmp_path: Path) -> None:
    real = read_published()
    hits = {"sst": 0.5, "para": 0.75}
    by_epoch = [evaluation(0.5, 0.1, 0.1, 0.1), evaluation(1, 0.4, 0.8, 0.7), evaluation(2, 0.5, 0.8, 0.8)]
    by_phase = [evaluation(0.3, 0.5, 0.6, 0.1, "sst"), evaluation(1, 0.3, 0.8, 0.2, "para")]
    folders = {
        "delacruz-full": write_run(tmp_path / "a", hits, evaluations=by_epoch),
        "crichton-sequential": write_run(tmp_path / "b", hits, evaluations=by_phase),
        "chan-r4": write_run(tmp_path / "c", hits),
        "chan-r4-sst": write_run(tmp_path / "d", {"sst": 0.4}, names=["sst"]),
    }
    results = {}
    for name, folder in folders.items():
        result = read_row(real.rows[name], [folder], resamples=20)
        assert result is not None
        results[name] = result
    found = Reproduction(real, [real.rows[name] for name in folders], results, {})
    page = write_reproduction(found, tmp_path).read_text(encoding="utf-8")
    assert "| 1 | 0.421 | 0.816 | 0.757 | 0.705 | 0.400 | 0.800 | 0.700 | 0.683 |" in page
    assert "| 2 | 0.499 | 0.828 | 0.827 | 0.747 | 0.500 | 0.800 | 0.800 | 0.733 |" in page
    assert "| 3 | 0.483 | 0.846 | 0.831 | 0.748 | - | - | - | - |" in page
    assert "| 1 | para | 0.300 (-0.200) | 0.800 (own) | 0.200 |" in page
    assert "each task's own last phase: -0.200" in page
    assert "0.400 | 0.500 | +0.100 |" in page  # SST alone, with the others, and what it gained


def test_the_figure_shows_both_scores_of_every_row() -> None:
    results = [RowResult(row(), (seed(OURS),)), RowResult(row(quora="all"), (seed(OURS, para_rows=3),))]
    figure = reproduction_plot(results, PAPER, Source("x", "abc"))
    panel = figure.axes[0]
    dots = [line.get_xdata()[0] for line in panel.lines if len(line.get_xdata()) == 1]
    assert dots == pytest.approx([0.56, 0.533] * 2)
    assert len(panel.get_yticklabels()) == 2


# ---- the command ----


def test_unknown_rows_and_missing_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--rows: unknown 'chan-r44'\. Did you mean chan-r4\?"):
        main(["--rows", "chan-r44", "--list"])
    with pytest.raises(ConfigError, match=r"--paper: unknown 'smith'\..* Possible: chan, crichton, delacruz"):
        main(["--paper", "smith"])
    with pytest.raises(ConfigError, match="--data: expected a folder"):
        main(["--rows", "chan-r4", "--output", str(tmp_path)])


def test_the_list_needs_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--paper", "luo,peng", "--list"])
    text = capsys.readouterr().out
    assert "luo-simcse-lora" in text
    assert "not reproducible: 36 divides" in text
    assert "chan-r4" not in text


def test_two_rows_from_start_to_table(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One real training serves two rows; the second command finds it done; other settings are refused."""
    command = [
        "--rows",
        "chan-r4,chan-r11",
        "--data",
        "sample",
        "--model",
        str(tiny_bert),
        "--max-steps",
        "2",
    ]
    command += ["--output", str(tmp_path / "out"), "--threads", "1"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    main(command)
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "2 of 2 rows have a finished run" in page
    assert "synthetic data" in page
    assert "the run of chan-r4" in page
    assert [entry.name for entry in (tmp_path / "out").glob("chan-*")] == ["chan-r4"]
    assert "chan-r4 seed 0: done" in capsys.readouterr().out
    main(command)
    assert "done" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"chan-r4/seed-0 was run with epochs .* give another --output"):
        main([*command, "--max-steps", "3"])
