"""Whole sweeps: what they leave, who takes which trial, kills, failures, pruning, and sharing without a difference."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtbert import compare, predict, sweep, train
from mtbert.data.tables import write_table
from mtbert.engine.shared import SharedParts
from mtbert.errors import ConfigError, Interrupted, UserError
from mtbert.evaluation import sweep_report
from mtbert.evaluation.plots.style import Source
from mtbert.evaluation.plots.sweep_plots import importance_plot, parallel_plot, slice_plot
from mtbert.evaluation.run import read_run
from mtbert.sweeps import study as study_module
from mtbert.sweeps.space_file import read_space
from mtbert.sweeps.study import Study
from mtbert.sweeps.workers import supervise

from .conftest import Sweeps, wait_until

TIMES = {"seconds", "input_wait_seconds", "tokens_per_second"}


def lines(trial: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    found = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def folders(output: Path) -> list[Path]:
    return sorted((output / "trials").iterdir())


def evaluations(trial: Path) -> int:
    return sum(line["kind"] == "evaluation" for line in lines(trial))


def weights(trial: Path) -> dict[str, torch.Tensor]:
    newest = max((trial / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    return load_file(newest / "model.safetensors")


def same(one: Sequence[Path], other: Sequence[Path]) -> None:
    assert [trial.name for trial in one] == [trial.name for trial in other]
    for a, b in zip(one, other, strict=True):
        assert lines(a) == lines(b)
        for file in sorted((a / "predictions").iterdir()):
            if "-dev-" in file.name:
                assert file.read_bytes() == (b / "predictions" / file.name).read_bytes()
        left, right = weights(a), weights(b)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8)) for n in left)


def test_sharing_changes_no_bit(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that share tables, weights and features against trials that share nothing; the features are shared."""
    computed: list[str] = []
    from mtbert.engine.features import FrozenForward

    compute = FrozenForward._compute
    monkeypatch.setattr(
        FrozenForward, "_compute", lambda self, data: computed.append(data.name) or compute(self, data)
    )
    adopted: list[int] = []
    adopt = SharedParts.adopt
    monkeypatch.setattr(SharedParts, "adopt", lambda self, *a: adopted.append(adopt(self, *a)) or adopted[-1])
    space = sweeps.space(
        {"mode": ["last-linear-layer", "lora"], "optim.lr": [1e-3, 1e-2]}, method="grid", keep="all"
    )
    together = sweeps.run(space, "together")
    assert len(computed) == 6  # train and dev of three tasks, once
    assert [shared > 0 for shared in adopted] == [False, True, True, True]
    computed.clear()
    apart = sweeps.run(space, "apart", "--separate")
    assert len(computed) == 2 * 9  # in both trials, and test, too
    same(folders(together), folders(apart))


def test_a_changed_shared_weight_is_found(tiny_bert: Path, tmp_path: Path) -> None:
    from mtbert.cli import parse_train
    from mtbert.engine.assembly import assemble

    options = [f"--model.pretrained={tiny_bert}", f"--cache={tmp_path}", "--mode=lora"]
    config = parse_train(
        ["--data=sample", *options, *(f"--{t}.max_length=64" for t in ("sst", "para", "sts"))]
    )
    shared = SharedParts()
    first, second = (assemble(config, shared=shared).model for _ in range(2))
    same_memory = [
        a.data_ptr() == b.data_ptr()
        for (name, a), b in zip(first.encoder.named_parameters(), second.encoder.parameters(), strict=True)
        if not a.requires_grad and "pooler" not in name
    ]
    assert same_memory
    assert all(same_memory)
    shared.verify()
    with torch.no_grad():
        second.encoder.embeddings.word[3, 5] += 1e-3
    with pytest.raises(RuntimeError, match=r"frozen weight embeddings\.word"):
        shared.verify()


def test_two_processes_share_a_grid(sweeps: Sweeps) -> None:
    """Every combination once, whichever of two processes takes it; both may begin the sweep."""
    space = sweeps.space({"optim.lr": [1e-3, 1e-2], "seed": [0, 1]}, method="grid")
    children = [sweeps.fork(space, "grid") for _ in range(2)]
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    trials = sweeps.trials(sweeps.folder / "grid", space)
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert len({tuple(sorted(trial.values.items())) for trial in trials}) == 4
    assert [len(folders(sweeps.folder / "grid")), sum(map(evaluations, folders(sweeps.folder / "grid")))] == [
        4,
        4,
    ]


def test_jobs_are_workers_of_one_sweep(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--jobs 2`, its workers forked instead of started anew, which takes seconds: every combination once."""

    def forked(command: Sequence[str], study: Study, *, jobs: int, threads: int, total: int) -> None:
        assert command[:3] == (sys.executable, "-c", sweep._WORKER)
        assert (jobs, threads, total) == (2, 1, 4)
        children = []
        for _ in range(jobs):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    sys.argv = ["-c", *command[4:]]
                    sweep.worker(os.getppid())
                    code = 0
                finally:
                    os._exit(code)
            children.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]

    monkeypatch.setattr(sweep, "supervise", forked)
    space = sweeps.space({"seed": [0, 1, 2, 3]}, method="grid")
    output = sweeps.run(space, "jobs", "--jobs", 2, "--threads", 1)
    trials = sweeps.trials(output, space)
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert len({tuple(trial.values.items()) for trial in trials}) == 4
    assert [evaluations(folder) for folder in folders(output)] == [1] * 4
    assert "trials: 4 (4 complete)" in (output / "report.md").read_text()


WORKER = """
import pathlib, signal, sys, time
folder, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
def stop(*_):
    (folder / f"stopped-{time.monotonic_ns()}").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
number = len(list(folder.glob("begun-*")))
(folder / f"begun-{time.monotonic_ns()}").touch()
if kind == "killed" and number == 0:
    signal.raise_signal(signal.SIGKILL)
if kind == "error" and number == 1:
    sys.exit(2)
if kind in ("error", "waits"):
    time.sleep(60)
"""


def supervised(folder: Path, kind: str) -> tuple[int, int]:
    """How many workers began, and how many were asked to stop."""
    study: Any = types.SimpleNamespace(trials=lambda: [types.SimpleNamespace(state="waiting")])
    try:
        supervise([sys.executable, "-c", WORKER, str(folder), kind], study, jobs=2, threads=1, total=9)
    finally:
        counts = [len(list(folder.glob(f"{name}-*"))) for name in ("begun", "stopped")]
    return counts[0], counts[1]


def test_workers_that_are_killed_are_replaced_and_errors_end_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("killed", "error"):
        (tmp_path / kind).mkdir()
    # One after the other, so that each knows its number.
    start = subprocess.Popen

    def slowly(*arguments: Any, **options: Any) -> Any:
        folder = Path(arguments[0][3])
        before = len(list(folder.glob("begun-*")))
        process = start(*arguments, **options)
        wait_until(lambda: len(list(folder.glob("begun-*"))) > before)
        return process

    monkeypatch.setattr(subprocess, "Popen", slowly)
    assert supervised(tmp_path / "killed", "killed") == (3, 0)
    assert "a worker was killed by SIGKILL" in capsys.readouterr().err
    with pytest.raises(UserError, match="a worker ended with an error"):
        supervised(tmp_path / "error", "error")
    assert len(list((tmp_path / "error").glob("stopped-*"))) == 1


def test_ctrl_c_asks_the_workers_to_stop(tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_until(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(Interrupted, match="the same command goes on"):
            supervised(tmp_path, "waits")
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(list(tmp_path.glob("stopped-*"))) == 2


def test_a_killed_sweep_goes_on(sweeps: Sweeps) -> None:
    """SIGKILL within a trial, between two checkpoints: it is gone on with, and the outcome is that of no kill."""
    parameters = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "mode": ["full", "lora"]}
    space = sweeps.space(
        parameters, trials=2, steps=32, evaluations=4, keep="all", pruner="none", tpe_startup=1
    )
    pid = sweeps.fork(space, "killed")
    output = sweeps.folder / "killed"
    wait_until(lambda: any((output / "trials").glob("0001*/checkpoints/step-8/COMPLETE")))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    before = [trial.state for trial in sweeps.trials(output, space)]
    assert before == ["complete", "running"]
    sweeps.run(space, "killed")
    whole = sweeps.run(space, "whole")
    found, wanted = sweeps.trials(output, space), sweeps.trials(whole, space)
    assert [trial.score for trial in found] == [trial.score for trial in wanted]
    assert [trial.curve for trial in found] == [trial.curve for trial in wanted]
    assert "resumed from step" in (folders(output)[1] / "log.txt").read_text()
    same(folders(output), folders(whole))  # and the search is the same for the same seed


def test_failures_are_recorded_and_poor_trials_stopped(sweeps: Sweeps) -> None:
    """A loss that overflows, a combination that is refused, and a trial far below the others, in one sweep."""
    parameters = {
        "case": {
            "choices": {
                "good": {"optim.lr": 1e-9, "surgery.gradvac_decay": 0.01},
                "better": {"optim.lr": 0.5, "surgery.gradvac_decay": 0.01},
                "nan": {"optim.lr": 900.0, "surgery.gradvac_decay": 0.01},
                "refused": {"optim.lr": 3e-3, "surgery.gradvac_decay": 0.5},
                "poor": {"optim.lr": 3e-3, "surgery.gradvac_decay": 0.01},  # at its first evaluation
            }
        }
    }
    space = sweeps.space(
        parameters, method="grid", steps=48, evaluations=3, pruner="median", pruner_startup=2, keep=1
    )
    output = sweeps.run(space, "cases")
    trials = {str(trial.values["case"]): trial for trial in sweeps.trials(output, space)}
    assert {name: trial.state for name, trial in trials.items()} == {
        "good": "complete",
        "better": "complete",
        "nan": "failed",
        "refused": "failed",
        "poor": "pruned",
    }
    assert "sst" in trials["nan"].facts["reason"] or "loss" in trials["nan"].facts["reason"]
    assert "surgery.gradvac_decay: 0.5 would have no effect" in trials["refused"].facts["reason"]
    poor = output / "trials" / trials["poor"].name
    assert (evaluations(poor), (poor / "report.md").exists()) == (1, False)
    assert lines(poor)[-1]["step"] == 16
    kept = [folder.name for folder in folders(output) if (folder / "checkpoints").is_dir()]
    best = max((trials["good"], trials["better"]), key=lambda trial: trial.score or 0.0)
    assert kept == [best.name]
    report = (output / "report.md").read_text()
    assert "trials: 5 (2 complete, 1 pruned, 2 failed)" in report
    assert "surgery.gradvac\\_decay: 0.5 would have no effect" in report


def test_a_sweep_in_which_everything_fails_stops(sweeps: Sweeps) -> None:
    space = sweeps.space({"seed": [0, 1, 2, 3, 4]}, method="grid", fixed={"surgery.cagrad_c": 0.9})
    with pytest.raises(
        UserError, match=r"every trial has failed for the same reason: surgery.cagrad_c: 0.9 would"
    ):
        sweeps.run(space, "all")
    assert [t.state for t in sweeps.trials(sweeps.folder / "all", space)] == ["failed"] * 3 + ["waiting"] * 2
    assert "## Failed trials" in (sweeps.folder / "all" / "report.md").read_text()


def test_the_report_and_the_tools_that_read_trials(
    sweeps: Sweeps,
    drawn_plots: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """best.yaml reruns to the same score; compare and predict read trials; the page holds every trial."""
    parameters = {
        "optim.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "mode": ["full", "last-linear-layer"],
        "dropout": {"fields": ["sst.head.dropout", "para.head.dropout"], "low": 0.01, "high": 0.6},
    }
    space = sweeps.space(parameters, trials=4, evaluations=2, pruner="none", tpe_startup=2)
    output = sweeps.run(space, "report")
    printed = capsys.readouterr().out.splitlines()
    trials = sweeps.trials(output, space)
    assert [line.split("]")[0] for line in printed if line.startswith("[")] == [
        f"[{n}/4" for n in range(1, 5)
    ]
    assert "left" in printed[0]
    best = max(trials, key=lambda trial: trial.score or 0.0)
    rows = list(csv.DictReader((output / "trials.csv").open()))
    assert rows[0]["trial"] == str(best.number)
    assert {row["name"] for row in rows} == {trial.name for trial in trials}
    page = (output / "trials.html").read_text()
    assert page.count("<tr class=") == 4
    assert "onclick" in page
    report = (output / "report.md").read_text()
    assert f"The best is trial {best.number} with {best.score:.4f}" in report
    for name in ("history", "curves", "parallel", "slices", "importance"):
        assert f"plots/{name}.png" in report
        assert (output / "plots" / f"{name}.png").stat().st_size > 5000
    again = sweeps.folder / "again"
    train.main(["--config", str(output / "best.yaml"), "--output", str(again)])
    score = max(line["score"] for line in lines(again) if line["kind"] == "evaluation")
    assert score == best.score
    names = [output / "trials" / trial.name for trial in trials[:2]]
    monkeypatch.chdir(sweeps.folder)
    compare.main([*map(str, names), "--resamples", "20"])
    predict.main([str(output / "trials" / best.name), "--task", "sst", "a fine film"])
    # More trials go on; other settings don't.
    assert len(sweeps.trials(sweeps.run(space, "report", "--trials", 5), space)) == 5
    with pytest.raises(ConfigError, match=r"was begun with epochs 1\.0, now it is 2\.0"):
        sweeps.run(
            sweeps.space(parameters, trials=5, evaluations=2, pruner="none", fixed={"epochs": 2}), "report"
        )
    with pytest.raises(ConfigError, match="was begun with other parameters"):
        sweeps.run(sweeps.space(parameters, trials=5, evaluations=3, pruner="none"), "report")


def test_a_database_serves_processes_with_folders_of_their_own(sweeps: Sweeps) -> None:
    """As on two machines: the study in a database, each process with its own folder; the second takes what is left."""
    pytest.importorskip("sqlalchemy")
    space = sweeps.space({"seed": [0, 1, 2, 3]}, method="grid", keep="all")
    storage = f"sqlite:///{sweeps.folder}/study.db"

    class Enough(Exception):
        pass

    real = train.train
    calls: list[str] = []

    def twice(config: Any, run: Any, **more: Any) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(run.name)
        real(config, run, **more)

    train.train = twice
    try:
        with pytest.raises(Interrupted, match="stopped during trial 0002"):
            sweeps.run(space, "one", "--storage", storage)
    finally:
        train.train = real
    two = sweeps.run(space, "two", "--storage", storage)
    states = [trial.state for trial in sweeps.trials(two, space, storage)]
    assert states == ["complete", "complete", "running", "complete"]  # the third is the first machine's
    assert len(folders(two)) == 1
    one = sweeps.run(space, "one", "--storage", storage)
    assert [trial.state for trial in sweeps.trials(one, space, storage)] == ["complete"] * 4
    assert len(folders(one)) == 3


def test_a_trial_begun_by_another_machine_a_moment_ago_is_its_own(
    sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken the trial from the database and not said yet who it is."""
    pytest.importorskip("sqlalchemy")
    space = read_space(sweeps.space({"seed": [0, 1]}, method="grid"))
    one, two = (
        Study(sweeps.folder / name, space, storage=f"sqlite:///{sweeps.folder}/study.db")
        for name in ("one", "two")
    )
    one.prepare("the same")
    two.study.ask()
    claim = one.claim()
    assert claim is not None
    assert claim.number == 1
    assert one.claim() is None
    monkeypatch.setattr(study_module, "_LONGEST_WAIT", 0.0)  # long after
    claim = one.claim()
    assert claim is not None
    assert claim.number == 0


def test_two_machines_may_fill_the_queue_at_once(sweeps: Sweeps) -> None:
    """Neither saw the other's entries: every combination is run once, and counted once."""
    pytest.importorskip("sqlalchemy")
    space = read_space(sweeps.space({"seed": [0, 1]}, method="grid"))
    one, two = (
        Study(sweeps.folder / name, space, storage=f"sqlite:///{sweeps.folder}/study.db")
        for name in ("one", "two")
    )
    one.prepare("the same")
    for slot, values in enumerate(space.grid()):
        two.study.enqueue_trial(values, user_attrs={"slot": slot})
    claims = [study.claim() for study in (one, two, one, two)]
    assert [None if claim is None else claim.values["seed"] for claim in claims] == [0, 1, None, None]
    assert [trial.state for trial in one.trials()] == ["running"] * 2


def test_what_a_study_says_and_protects(sweeps: Sweeps) -> None:
    """No password in a message; pruner_warmup evaluations pass unpruned."""
    space = read_space(sweeps.space({"seed": [0]}, method="grid", pruner="median", pruner_warmup=1))
    with pytest.raises(UserError, match=r"nobase://me:\*\*\*@host/db cannot be opened") as caught:
        Study(sweeps.folder / "x", space, storage="nobase://me:pa:ss@w@host/db")
    assert "pa:ss" not in str(caught.value)
    space = dataclasses.replace(space, pruner_startup=1)
    study = Study(sweeps.folder / "y", space).study
    for score in (1.0, 0.0):
        trial = study.ask()
        trial.report(score, 1)
        assert not trial.should_prune()
        trial.report(score, 2)
        assert trial.should_prune() == (score == 0.0)
        study.tell(trial, score)


def test_evaluations_are_counted_over_the_joined_table(sweeps: Sweeps) -> None:
    """Twice as many steps, twice as far from one evaluation to the next; a model of a trial's own is let go."""
    from mtbert.cli import parse_train
    from mtbert.engine.build import load_model, prepare_machine
    from mtbert.sweeps.trial import Workshop
    from mtbert.tasks.loading import load_tables
    from mtbert.tasks.registry import get_task

    sst = get_task("sst")
    table = load_tables("sample", [sst])["sst"]["train"]
    ids = [f"new-{row_id}" for row_id in table.ids]
    texts = [(f"{text} indeed",) for (text,) in table.texts]
    extra = sweeps.folder / "extra.csv"
    write_table(extra, dataclasses.replace(table, ids=ids, texts=texts), sst.layout)
    space = read_space(sweeps.space({"seed": [0]}, method="grid", evaluations=2))
    shared = SharedParts(splits=("train", "dev"))
    shop: Any = Workshop(sweeps.folder, space, None, None, train.train, shared)  # type: ignore[arg-type]
    options = ["--data=sample", "--tasks=[sst]", f"--model.pretrained={sweeps.bert}", "--sst.max_length=64"]
    options.append(f"--cache={sweeps.folder}")
    alone, joined = (parse_train([*options, *more]) for more in ([], [f"--extra-data=sst={extra}"]))
    every = [int(shop._with_evaluations(config).evaluation.every) for config in (alone, joined)]
    assert every[1] == pytest.approx(2 * every[0], abs=1)
    load_model(dataclasses.replace(alone, mode="lora"), prepare_machine(alone), shared)
    kept = ("_folders", "_tokenisers", "_files", "_frozen", "_digests")
    shared.forget(sweeps.folder / "trials")
    assert all(getattr(shared, name) for name in kept)
    shared.forget(sweeps.bert)
    assert not any(getattr(shared, name) for name in kept)


def test_startup_trials_differ_and_depend_on_the_seed_alone(sweeps: Sweeps) -> None:
    """Two processes that draw at once, before either has a result."""
    from mtbert.cli import train_reader
    from mtbert.sweeps.space_check import checked

    path = sweeps.space({"optim.lr": {"low": 1e-6, "high": 1e-2, "log": True}}, trials=4)
    space = read_space(path)
    space = checked(space, train_reader(space.fixed))

    def drawn(name: str) -> list[object]:
        studies = [Study(sweeps.folder / name, space) for _ in range(2)]
        for study in studies:
            study.prepare("the same")
        claims = [study.claim() for study in (*studies, *studies)]
        assert studies[0].claim() is None
        values = [claim.values["optim.lr"] for claim in claims if claim is not None]
        # Their locks are held: nobody takes them over. Freed ones are, with the same values.
        assert claims[1] is not None
        claims[1].release()
        taken = studies[0].claim()
        assert taken is not None
        assert (taken.number, taken.values["optim.lr"]) == (1, values[1])
        return values

    first = drawn("first")
    assert len(set(first)) == 4
    assert drawn("second") == first
    space = dataclasses.replace(space, seed=1)
    assert not set(drawn("third")) & set(first)


def test_weights_and_biases_get_every_trial(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a module in its place that records what it is told."""
    told: list[Any] = []

    class Run:
        def __init__(self, **options: Any) -> None:
            self.summary: dict[str, Any] = {}
            told.append(("init", options["project"], options["group"], options["name"], options["config"]))

        def log(self, values: dict[str, float], step: int) -> None:
            told.append(("log", step, set(values)))

        def finish(self, exit_code: int) -> None:
            told.append(("finish", exit_code, dict(self.summary)))

    module = types.ModuleType("wandb")
    module.init = lambda **options: Run(**options)  # type: ignore[attr-defined]
    module.util = types.SimpleNamespace(generate_id=lambda: "abc")  # type: ignore[attr-defined]
    space = sweeps.space({"optim.lr": [1e-3, 900.0]}, method="grid", wandb="mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        sweeps.run(space, "logged")
    monkeypatch.setitem(sys.modules, "wandb", module)
    output = sweeps.run(space, "logged")
    names = [folder.name for folder in folders(output)]
    starts = [entry for entry in told if entry[0] == "init"]
    assert starts == [
        ("init", "mine", "logged", names[0], {"optim.lr": 1e-3}),
        ("init", "mine", "logged", names[1], {"optim.lr": 900.0}),
    ]
    assert any("dev/overall" in entry[2] for entry in told if entry[0] == "log")
    assert [entry[1:] for entry in told if entry[0] == "finish"] == [
        (0, {}),
        (1, {"ended": "nonfiniteerror"}),
    ]


def test_a_start_has_its_own_threads_and_cache(sweeps: Sweeps) -> None:
    """What may differ between two machines is neither kept in the folder nor passed over."""
    space = sweeps.space({"seed": [0, 1]}, trials=1, method="random")
    output = sweeps.run(space, "own", "--threads", 1)
    other = sweeps.folder / "other"
    threads = torch.get_num_threads()
    try:
        sweeps.run(space, "own", "--trials", 2, "--threads", 2, "--cache", other)
    finally:
        torch.set_num_threads(threads)
    found = [read_run(folder).config() for folder in folders(output)]
    assert [config["threads"] for config in found] == [1, 2]
    assert [config["cache"] == str(other) for config in found] == [False, True]
    with pytest.raises(ConfigError, match=r"was begun with epochs 1\.0, now it is 2\.0"):
        sweeps.run(space, "own", "--trials", 2, "--epochs", 2)


def test_words_in_plots_are_no_formulas() -> None:
    name = r"$\frac{$"
    importance_plot({name: 0.7}, {}, "fANOVA", Source("x", "y")).canvas.draw()
    trial = sweep_report.SweepTrial(
        0, "0000", "complete", 0.5, {name: name}, {1: 0.5}, [], {}, 1.0, "", Path()
    )
    for plot in (slice_plot, parallel_plot):
        figure = plot([trial], [name], [], Source("x", "y"))
        assert figure is not None
        figure.canvas.draw()


@pytest.mark.filterwarnings("ignore:.*abbrev")
def test_the_command_line_says_what_it_needs(sweeps: Sweeps, capsys: pytest.CaptureFixture[str]) -> None:
    space = sweeps.space({"mode": ["full", "lora"], "model.lora.rank": [4, 8]}, method="grid")
    with pytest.raises(ConfigError, match="--output: expected the folder of the sweep"):
        sweep.main([str(space)])
    sweep.main([str(space), "--list"])
    listed = capsys.readouterr().out
    assert "4 trials, every combination once" in listed
    assert "1 of 4 combinations that were tried would be refused" in listed
    assert "model.lora.rank: 4 would have no effect" in listed
    assert not (sweeps.folder / "x").exists()
    with pytest.raises(ConfigError, match="mode is given in the fixed part or on the command line, too"):
        sweep.main([str(space), "--output", str(sweeps.folder / "x"), "--mode=full"])
    epochs = sweeps.space({"epochs": [1, 2]}, method="grid", name="epochs")
    with pytest.raises(ConfigError, match="epochs"):
        sweep.main([str(epochs), "--list", "--epoch", "3"])  # the parser takes it, too
    with pytest.raises(UserError, match="holds no sweep"):
        sweep.main([str(space), "--output", str(sweeps.folder / "x"), "--report"])
