"""From rows to the table: what they cost, how runs are read, and the numbers beside the published ones."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mtbert.cli import parse_train
from mtbert.config import TrainConfig
from mtbert.engine.reproduction_cost import STEP_TOKENS, Cost, CostModel, faster, shortened
from mtbert.errors import ConfigError
from mtbert.evaluation.bootstrap import Interval
from mtbert.evaluation.plots.reproduction import reproduction_plot
from mtbert.evaluation.plots.style import Source
from mtbert.evaluation.predictions import Predictions, write_prediction_files
from mtbert.evaluation.published import PaperRow, Published, read_published
from mtbert.evaluation.reproduction import RowResult, SeedResult, Verdict, judge, read_row
from mtbert.evaluation.reproduction_page import CSV, PAGE, PLOT, Reproduction, _lengths, write_reproduction
from mtbert.evaluation.reproduction_table import condition_rows, csv_text, score_rows
from mtbert.reproduce import main
from mtbert.reproduction_plan import make_plans
from mtbert.tasks.registry import TASKS

# ---- the table ----

SIZES = {"sst": 100, "para": 400, "sts": 101, "cfimdb": 50}
PAPER = Published({}, {"chan": "Chan 2023"}, {"sst": 200, "para": 1000, "sts": 100, "cfimdb": 80}, SIZES)


def seed(
    values: dict[str, float],
    *,
    width: float = 0.02,
    para_rows: int = 1000,
    like: str = "chan-r4",
    **changes: Any,
) -> SeedResult:
    """A run of the length of row `like`, but for the changes."""
    sst, para, sts = values["sst"], values["para"], values["sts"]
    joint = {"mean": (sst + para + sts) / 3, "overall": (sst + para + (sts + 1) / 2) / 3}
    return SeedResult(
        folder=Path("run"),
        scores={k: Interval(v, v - width, v + width) for k, v in (values | joint).items()},
        encoder="minilm",
        schedule=dataclasses.replace(read_published().rows[like].schedule, **changes),
        train_rows={"sst": 200, "para": para_rows, "sts": 100},
        steps=100,
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


UNKNOWN = " (one seed: the noise of training is not counted)"


@pytest.mark.parametrize(
    ("published", "verdict"),
    [
        (0.4940, "higher" + UNKNOWN),
        (0.4950, "within noise"),
        (0.6250, "within noise"),
        (0.6260, "lower" + UNKNOWN),
    ],
)
def test_within_noise_joins_the_standard_errors_of_both_dev_sets(published: float, verdict: str) -> None:
    """Ours .56, interval .54 to .58. A score alone takes our columns for its standard error: .04996, .02193 and .07884
    are .09588 in quadrature, a third of it .03196. sqrt(.02^2 + (1.96 x .03196)^2) = .06576."""
    found = judge(RowResult(row(figures={}, score=published), (seed(OURS),)), PAPER)
    assert found is not None
    assert found.half_width == pytest.approx(0.06576, abs=2e-5)
    assert found.difference == pytest.approx(0.56 - published)
    assert found.text == verdict


def test_the_deviation_over_seeds_widens_the_interval() -> None:
    """Two seeds: t(.975, 1) = 12.706 and sqrt(1 + 1/2)."""
    two = RowResult(row(), (seed(OURS), seed({"sst": 0.54, "para": 0.74, "sts": 0.46})))
    found = judge(two, PAPER)
    assert found is not None
    examples = math.hypot(0.02, 1.96 * row().standard_error(SIZES, {}))
    training = 12.7062 * (0.02 / math.sqrt(2)) * math.sqrt(1.5)
    assert found.half_width == pytest.approx(math.hypot(examples, training), rel=1e-4)
    assert found.text == "within noise"


def test_false_alarms_are_rare_even_with_few_seeds() -> None:
    """Both figures drawn alike, with much training noise: one in twenty differs by more than the half width."""
    draws, alarms, count = np.random.default_rng(0), 0, 200
    error = row(figures={}, score=0.56).standard_error(SIZES, OURS)
    for _ in range(count):
        theirs = 0.56 + draws.normal(0, error) + draws.normal(0, 0.05)
        shift = draws.normal(0, 0.02 / 1.96)  # of our dev set, which the seeds share
        runs = tuple(
            seed({name: value + shift + noise for name, value in OURS.items()})
            for noise in draws.normal(0, 0.05, 3)
        )
        found = judge(RowResult(row(figures={}, score=theirs), runs), PAPER)
        assert found is not None
        alarms += not found.within_noise
    assert 0.01 * count < alarms < 0.1 * count


def test_transfer_warns_of_runs_of_other_lengths() -> None:
    published = read_published()
    names = ("chan-r4", "chan-r4-sst", "chan-r4-sts")
    results = {name: RowResult(published.rows[name], (seed(OURS),)) for name in names}
    found = Reproduction(published, [], results, {})
    assert _lengths(found, "chan-r4") == ""
    longer = dataclasses.replace(results["chan-r4-sts"].seeds[0], steps=250)
    results["chan-r4-sts"] = dataclasses.replace(results["chan-r4-sts"], seeds=(longer,))
    assert "chan-r4 took 100 steps, chan-r4-sts 250" in _lengths(found, "chan-r4")


def verdict(name: str, one: SeedResult) -> Verdict:
    found = judge(RowResult(row(name=name), (one,)), dataclasses.replace(PAPER, train=read_published().train))
    assert found is not None
    return found


def test_rows_that_see_fewer_quora_pairs_than_the_paper_are_not_comparable() -> None:
    """At full length chan-r4 draws 10 x 378 x 16 = 60,480 pairs: 60,000 of them are enough, 22,757 are repeated."""
    tables = dict(read_published().train)
    for rows, enough in ((22_757, False), (59_800, False), (60_000, True), (141_498, True)):
        one = dataclasses.replace(seed(OURS), train_rows=tables | {"para": rows})
        found = verdict("chan-r4", one)
        assert found.conclusive == enough
        assert found.text == (
            "within noise"
            if enough
            else f"not comparable: trained on {rows:,} different Quora pairs, the paper's schedule has 60,480"
        )


def test_a_shortened_run_of_the_whole_table_is_not_comparable_either() -> None:
    one = dataclasses.replace(seed(OURS, like="luo-simcse", epochs=2.0), train_rows=read_published().train)
    found = verdict("luo-simcse", one)
    assert found.text == (
        "not comparable: trained on 32,000 different Quora pairs, the paper's schedule has 141,498;"
        " shortened (epochs: 2 of 100)"
    )


def test_a_shortened_run_gets_no_verdict_on_its_row() -> None:
    """50 of Luo's 100 epochs see all of Quora five times."""
    tables = read_published().train
    low = {name: value - 0.2 for name, value in OURS.items()}
    for values, word in ((OURS, "within noise"), (low, "lower" + UNKNOWN)):
        one = dataclasses.replace(seed(values, like="luo-simcse", epochs=50.0), train_rows=tables)
        found = verdict("luo-simcse", one)
        assert not found.conclusive
        assert found.reasons == ()
        assert (
            found.text == f"shortened (epochs: 50 of 100), so no verdict on the row; this run alone: {word}"
        )


def test_a_lost_start_makes_a_row_incomparable() -> None:
    one = seed(OURS, like="peng-run-292", start={})
    found = verdict("peng-run-292", dataclasses.replace(one, train_rows=read_published().train))
    assert found.text.startswith(
        "not comparable: sst joined too early; shortened (epochs: 25 of 25, sst takes"
    )


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
            row(name="chan-r5", figures={"sst": 0.3, "para": 0.6, "sts": 0.0}, score=0.3),
            (seed(OURS | {"sst": 0.4}),),
        ),
        RowResult(
            row(name="chan-r6", figures={"sst": 0.9}, score=None, formula="sst"), (seed(OURS | {"sst": 0.8}),)
        ),
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


def test_rows_of_one_run_count_once_in_the_columns() -> None:
    """Published .5 and .7 belong to one run of ours: .6 against its .48, beside .3 against .40."""
    one, two = seed(OURS), seed(OURS | {"sst": 0.4})
    results = [
        RowResult(row(), (one,)),
        RowResult(row(name="chan-r11", same_as="chan-r4", figures={"sst": 0.7}, score=0.6), (one,)),
        RowResult(row(name="chan-r8", figures={"sst": 0.3}, score=0.2), (two,)),
    ]
    headers, rows = score_rows(results, PAPER)
    mean, deviation = (dict(zip(headers, cells, strict=True)) for cells in rows[-2:])
    assert (mean["published SST"], mean["our SST"]) == ("0.450", "0.440")
    assert deviation["our SST"] == f"{0.08 / math.sqrt(2):.3f}"
    assert mean["published para"] == "0.700"
    assert mean["published score"] == f"{((0.533 + 0.6) / 2 + 0.2) / 2:.3f}"


def test_the_conditions_say_what_was_run() -> None:
    real = read_published()
    one = seed(OURS, para_rows=22757, like="delacruz-full", epochs=1.0, epoch_length=100)
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
    short = shortened(config, scale, steps, Cost(1000, 100, 0.0, 0.0, 0.0))
    assert (short.epochs, short.curriculum.epoch_length, short.curriculum.start) == expected


def test_rows_that_differ_in_the_method_get_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    published = read_published()
    names = ("chan-r4-sst", "chan-r4", "chan-r6", "chan-r8", "crichton-final", "chan-r3")
    rows = [published.rows[name] for name in names]
    given = {"data": "sample", "model": str(tiny_bert), "scale": 1.0}
    plans = make_plans(rows, **given, max_steps=None, max_tokens=100_000)  # type: ignore[arg-type]
    costs = {name: plan.cost for name, plan in plans.items()}
    # Features of a frozen encoder cost the same however long the heads train.
    assert costs["chan-r3"].tokens == 0
    assert all(90_000 < costs[name].tokens <= 101_000 for name in ("chan-r4", "chan-r6", "crichton-final"))
    assert costs["chan-r4"].steps == costs["chan-r6"].steps == costs["chan-r8"].steps
    assert costs["chan-r6"].training > 1.4 * costs["chan-r4"].training  # SMART's passes
    assert costs["crichton-final"].steps > costs["chan-r4"].steps  # batches of 8, not of 16
    # A task alone for as long as together with the others, though it reads a third of their tokens.
    assert costs["chan-r4-sst"].steps == costs["chan-r4"].steps
    fewer = make_plans(rows[:2], **given, max_steps=3, max_tokens=100_000)  # type: ignore[arg-type]
    assert {plan.cost.steps for plan in fewer.values()} == {3}


def test_faster_rates_are_for_trained_encoders() -> None:
    config = config_from_preset("chan-r4")
    assert faster(config, 10.0).optim.lr == pytest.approx(1e-4)
    frozen = config_from_preset("chan-r3")
    assert faster(frozen, 10.0) == frozen


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
    assert surgery.training - fixed == pytest.approx(1.05 * (plain.training - fixed))
    every = config_from_preset("chan-r6")
    every.smart.tasks = list(every.tasks)
    smart = costs.cost(shortened(every, 0.1))
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
    sizes = "".join(f"{name}: {{batch_size: 16}}\n" for name in names)
    (folder / "config.yaml").write_text(
        f"tasks: [{', '.join(names)}]\nepochs: {epochs}\noptim: {{lr: 1.0e-5}}\n"
        f"curriculum: {{epoch_length: smallest}}\n{sizes}"
    )
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
    assert "trained on 100 different Quora pairs, the paper's schedule has 60,480; shortened" in page
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
    results = [RowResult(row(), (seed(OURS),)), RowResult(row(), (seed(OURS, epochs=1.0),))]
    figure = reproduction_plot(results, PAPER, Source("x", "abc"))
    panel = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()][
        -1
    ] == "ours, shortened or not comparable"
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


def test_selections_of_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"--rows: luo-cosine is a row of luo, and --paper selects chan alone"
    ):
        main(["--paper", "chan", "--rows", "chan-r4,luo-cosine", "--output", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"nothing selected can be run \(peng-heads-36: 36 divides neither"):
        main(["--rows", "peng-heads-36", "--data", "sample", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    for option, value, words in (
        ("--seeds", "x", "expected a whole number, at least 1, found 'x'"),
        ("--scale", "fast", "expected a number above 0, found 'fast'"),
        ("--scale", "nan", "expected a number above 0, found 'nan'"),
        ("--rows", ",", "expected names with commas between them, found ','"),
    ):
        with pytest.raises(SystemExit):
            main([option, value])
        assert f"argument {option}: {words}" in capsys.readouterr().err


def test_the_table_alone_is_written_from_finished_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "chan-r4" / "seed-0", {"sst": 0.5, "para": 0.75})
    main(["--table", "--rows", "chan-r4,chan-r6", "--output", str(tmp_path)])
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "2 of 3 rows have a finished run" in page  # chan-r11 reads the run of chan-r4
    assert "- chan-r6: not run yet" in page


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
    command += ["--output", str(tmp_path / "out"), "--threads", "1", "--lr-factor", "10"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    main(command)
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "2 of 2 rows have a finished run" in page
    assert "synthetic data" in page
    assert "the run of chan-r4" in page
    assert "learning rate 0.0001 (paper: 1e-05)" in page
    settings = yaml.safe_load((tmp_path / "out" / "chan-r4" / "seed-0" / "config.yaml").read_text())
    assert settings["optim"]["lr"] == pytest.approx(1e-4)
    assert [entry.name for entry in (tmp_path / "out").glob("chan-*")] == ["chan-r4"]
    assert "chan-r4 seed 0: done" in capsys.readouterr().out
    main(command)
    assert "done" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"chan-r4/seed-0 was run with epochs .* give another --output"):
        main([*command, "--max-steps", "3"])
    with pytest.raises(ConfigError, match=r"was run with optim\.lr 0\.0001"):
        main([*command, "--lr-factor", "1"])
