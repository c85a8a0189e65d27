"""Whole runs under torch's profiler: what they leave, that it adds up, and that nothing else changes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtbert import pretrain, train
from mtbert.engine.step import update
from mtbert.engine.step_result import StepResult
from mtbert.engine.trainer import Trainer
from mtbert.errors import ConfigError, Interrupted, NonFiniteError

TIMES = ("seconds", "input_wait_seconds", "tokens_per_second")


def options(bert: Path, folder: Path, *more: str) -> list[str]:
    """Six steps in one epoch, of several passes each."""
    sizes = [
        f"--{name}.{option}"
        for name in ("sst", "para", "sts")
        for option in ("batch_size=6", "max_length=64")
    ]
    return [
        f"--model.pretrained={bert}",
        f"--cache={folder / 'cache'}",
        "--epochs=1",
        "--curriculum.epoch_length=6",
        "--evaluation.train_examples=0",
        "--evaluation.resamples=10",
        "--run.log_every=1",
        "--run.tensorboard=false",
        "--max_tokens=256",
        "--precision=float32",
        "--threads=1",
        *sizes,
        *more,
    ]


TORCH = ("--profile=torch", "--profiling.skip_steps=2", "--profiling.active_steps=3")


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtbert.engine.peaks._SECONDS", 0.01)
    monkeypatch.setattr("mtbert.engine.peaks._COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("mtbert.engine.peaks.limit_shapes", lambda *_: [(128, 128, 128)])


@pytest.fixture
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plots take longer than all the rest."""
    monkeypatch.setattr("mtbert.train.write_report", lambda *arguments, **options: None)


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "model.safetensors")


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "profile" / "profile.json").read_text())
    return found


def trace_names(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


@pytest.fixture(scope="module")
def plain(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    train.main([*options(tiny_bert, folder), f"--output={folder / 'run'}"])
    return folder / "run"


def test_a_profiled_run(
    tiny_bert: Path, tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.main([*options(tiny_bert, tmp_path, *TORCH), f"--output={run}"])

    # It is the same run, bit for bit.
    assert lines(run) == lines(plain)
    expected, found = weights(plain), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (run / "predictions" / "sst-dev-output.csv").read_bytes() == (
        plain / "predictions" / "sst-dev-output.csv"
    ).read_bytes()

    names = trace_names(run / "profile" / "trace-steps-3-5.json.gz")
    assert [name for name in names if name.startswith("step ")] == ["step 3", "step 4", "step 5"]
    assert {"forward layer 0 attention", "backward layer 0 attention", "backward embedding"} <= set(names)

    facts = summary(run)
    whole = sum(phase["seconds"] for phase in facts["phases"].values()) + facts["unexplained_seconds"]
    assert whole == pytest.approx(facts["step_seconds"], rel=1e-6)
    assert set(facts["phases"]) == {"data", "forward", "loss", "backward", "optimizer", "synchronize"}
    inside = sum(sum(each["seconds"].values()) for each in facts["operations"].values())
    outside = sum(phase["outside_operations"] for phase in facts["phases"].values())
    assert inside + outside + facts["unexplained_seconds"] == pytest.approx(facts["step_seconds"], rel=1e-6)
    assert {"linear", "attention", "add_layer_norm", "bias_gelu", "embedding", "dropout"} <= set(
        facts["operations"]
    )
    assert set(facts["operations"]["attention"]["seconds"]) == {"forward", "backward"}
    assert facts["operations"]["linear"]["flops"] > facts["operations"]["attention"]["flops"] > 0
    assert facts["peaks"]["flops"] > 0
    assert facts["peaks"]["bytes"] > 0
    assert facts["other_steps"]["count"] == 2  # the second and the sixth: the first is slow for other reasons
    assert {name: each["count"] for name, each in facts["apart"].items()} == {
        **{"evaluation": 1, "checkpoint": 1, "prediction": 1}
    }

    report = (run / "report.md").read_text()
    assert "## Profile" in report
    assert "plots/profile.png" in report
    assert (run / "plots" / "profile.png").is_file()
    shown = capsys.readouterr().out
    assert f"profile: steps 3 to 5 are in {run / 'profile' / 'trace-steps-3-5.json.gz'}" in shown
    assert "is unexplained" in shown
    assert not list((run / "profile").glob(".partial*"))


@pytest.mark.usefixtures("_no_report")
def test_a_resumed_run_may_be_profiled_otherwise(
    tiny_bert: Path, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    whole = Trainer._after_step

    def stop(self: Trainer, lr: float, bar: Any) -> None:
        whole(self, lr, bar)
        if self.progress.step == 2:
            self._collect()
            self.checkpoint()
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after_step", stop)
        with pytest.raises(Interrupted):
            train.main([*options(tiny_bert, tmp_path), f"--output={run}"])
    with pytest.raises(ConfigError, match=r"--resume takes everything.*found --epochs.*possible: --profile"):
        train.main(["--resume", str(run), "--epochs", "3"])
    more = ["--profile", "torch", "--profiling.skip_steps=1", "--profiling.active_steps", "1"]
    train.main(["--resume", str(run), *more])
    assert lines(run) == lines(plain)
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(plain).items())
    assert summary(run)["first_step"] == summary(run)["last_step"] == 4
    assert "profile: none" in (run / "config.yaml").read_text()


@pytest.mark.usefixtures("_no_report")
def test_a_run_that_ends_while_it_is_recorded_keeps_what_there_is(tiny_bert: Path, tmp_path: Path) -> None:
    run, many = (
        tmp_path / "run",
        ("--profile=torch", "--profiling.skip_steps=4", "--profiling.active_steps=50"),
    )
    train.main([*options(tiny_bert, tmp_path, *many), f"--output={run}"])
    assert (summary(run)["first_step"], summary(run)["last_step"]) == (5, 6)
    names = trace_names(run / "profile" / "trace-steps-5-6.json.gz")
    assert [name for name in names if name.startswith("step ")] == ["step 5", "step 6"]
    assert not [name for name in names if name.startswith("evaluation")]
    assert summary(run)["apart"]["evaluation"]["count"] == 1


@pytest.mark.usefixtures("_no_report")
def test_an_evaluation_ends_a_recording(tiny_bert: Path, tmp_path: Path) -> None:
    run, every = tmp_path / "run", ("--evaluation.every=2", "--profile=torch", "--profiling.skip_steps=2")
    train.main([*options(tiny_bert, tmp_path, *every), f"--output={run}"])
    # The evaluation after step 2 is left out, the one after step 4 ends it.
    assert (summary(run)["first_step"], summary(run)["last_step"]) == (3, 4)
    names = trace_names(run / "profile" / "trace-steps-3-4.json.gz")
    assert {name for name in names if name.startswith(("step", "Profiler"))} == {
        *("step 3", "step 4", "ProfilerStep#2", "ProfilerStep#3")
    }
    assert names.count("forward") == names.count("backward")
    assert summary(run)["apart"]["evaluation"]["count"] == 3


@pytest.mark.usefixtures("_no_report")
def test_a_failed_step_is_not_counted(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(optimizer: torch.optim.Optimizer, result: StepResult, clip_norm: float, scaler: None) -> None:
        if result.step == 4:
            raise NonFiniteError("a fault")
        update(optimizer, result, clip_norm, scaler)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mtbert.engine.step.update", fail)
        with pytest.raises(NonFiniteError):
            train.main([*options(tiny_bert, tmp_path, *TORCH), f"--output={run}"])
    facts = summary(run)
    assert (facts["first_step"], facts["last_step"]) == (3, 4)
    names = trace_names(run / "profile" / "trace-steps-3-4.json.gz")
    whole = tmp_path / "whole"
    two = ("--profile=torch", "--profiling.skip_steps=2", "--profiling.active_steps=2")
    train.main([*options(tiny_bert, tmp_path, *two), f"--output={whole}"])
    assert "step 5" in names  # it is in the trace, but not in the sums
    for name, entry in summary(whole)["operations"].items():
        assert facts["operations"][name]["flops"] == entry["flops"], name
    assert facts["step_seconds"] > 0


def test_more_skipped_steps_than_there_are(tiny_bert: Path, tmp_path: Path) -> None:
    few = options(tiny_bert, tmp_path, "--profile=torch", "--profiling.skip_steps=6")
    with pytest.raises(ConfigError, match=r"profiling.skip_steps: 6 steps.*takes 6; possible: .*below 6"):
        train.main([*few, f"--output={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_settings_without_effect_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profiling.skip_steps: 2 would have no effect.*profile is none"):
        train.main(
            [*options(tiny_bert, tmp_path, "--profiling.skip_steps=2"), f"--output={tmp_path / 'run'}"]
        )
    with pytest.raises(ConfigError, match=r"profiling.active_steps: expected at least 1, found 0"):
        train.main(options(tiny_bert, tmp_path, "--profile=torch", "--profiling.active_steps=0"))


def test_a_disk_that_is_full_ends_no_training(
    tiny_bert: Path, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", full)
    monkeypatch.setattr("mtbert.engine.profile_summary.replace_file", full)
    run = tmp_path / "run"
    train.main([*options(tiny_bert, tmp_path, *TORCH), f"--output={run}"])
    log = (run / "log.txt").read_text()
    assert "profile.json cannot be written: No space left on device" in log
    assert "trace-steps-3-5.json.gz cannot be written" in log
    assert lines(run) == lines(plain)
    assert "## Profile" not in (run / "report.md").read_text()


def test_stages_before_the_run_have_profiles_of_their_own(tiny_bert: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages = ("--pretraining.mlm_epochs=1", "--pretraining.task=sst", "--pretraining.mlm_batch_tokens=2048")
    short = ("--profile=torch", "--profiling.skip_steps=1", "--profiling.active_steps=1")
    train.main([*options(tiny_bert, tmp_path, *stages, *short), f"--output={run}"])
    for folder in (run, run / "pretraining" / "mlm", run / "pretraining" / "sst"):
        assert (summary(folder)["first_step"], summary(folder)["last_step"]) == (2, 2)
        assert "## Profile" in (folder / "report.md").read_text()
        assert (folder / "plots" / "profile.png").is_file()
    names = trace_names(run / "pretraining" / "mlm" / "profile" / "trace-steps-2-2.json.gz")
    assert {"forward head linear", "backward head linear", "loss mlm", "backward loss mlm"} <= set(names)


def test_too_few_steps_of_masked_words_are_said(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--pretraining.mlm_epochs=0.05", "--profile=torch", "--profiling.skip_steps=500")
    pretrain.main([*options(tiny_bert, tmp_path, *few), f"--output={tmp_path / 'run'}"])
    assert "profile: nothing was recorded" in capsys.readouterr().out
    assert not (tmp_path / "run" / "profile").exists()
