"""The command line: presets, precedence, unknown keys, and messages that name the option."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from mtbert.cli import config_from_file, load_plugins, parse_train, presets, resume_options, run_main
from mtbert.config import to_yaml
from mtbert.errors import ConfigError, Interrupted
from mtbert.tasks.registry import TASKS


def test_preset_best_is_the_training_of_minilm_with_a_protocol() -> None:
    best, minilm = (yaml.safe_load(presets()[name].read_text()) for name in ("best", "minilm"))
    assert best.pop("seeds") == 3
    assert best.pop("evaluation") == {"selection": "half"}
    assert best == minilm


def test_without_arguments_the_quickstart_preset_on_the_sample() -> None:
    config = parse_train([])
    quickstart = yaml.safe_load(presets()["quickstart"].read_text())
    assert config.data == "sample"
    assert config.tasks == ["sst", "para", "sts"]
    assert config.epochs == quickstart["epochs"]
    assert config.task["sst"].batch_size == quickstart["sst"]["batch_size"]


def test_options_win_over_files_and_files_over_presets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nsst: {batch_size: 9}\noptim: {lr: 0.5}\n")
    config = parse_train(["--preset", "minilm", "--config", str(file), "--sst.batch_size", "5"])
    assert (config.epochs, config.task["sst"].batch_size, config.optim.lr) == (7, 5, 0.5)
    minilm = yaml.safe_load(presets()["minilm"].read_text())
    assert config.task["para"].batch_size == minilm["para"]["batch_size"]


@pytest.mark.parametrize("preset", sorted(presets(papers=False)))
def test_every_preset_parses_and_its_resolved_file_gives_the_same(preset: str, tmp_path: Path) -> None:
    config = parse_train(
        ["--preset", preset, "--output", "runs/x", "--para.head.pair", "[concat,difference]"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert config_from_file(file) == config


@pytest.mark.parametrize(
    ("alias", "mode"), [("finetune", "full"), ("full-model", "full"), ("pretrain", "last-linear-layer")]
)
def test_the_names_of_the_course_are_aliases(alias: str, mode: str) -> None:
    assert parse_train(["--mode", alias]).mode == mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sst.batchsize", "3"], r"unknown option sst\.batchsize\. Did you mean sst\.batch_size\?"),
        (["--lr", "3"], r"unknown option lr\. Did you mean optim\.lr\?"),
        (["--tasks", "[sst,pra]"], r"tasks: unknown task 'pra'\. Did you mean para\?"),
        (["--sst.head.pooling", "first"], r"sst\.head\.pooling: expected cls, pooler, mean, found first"),
        (["--optim.lr", "fast"], r"optim\.lr: expected float, found fast"),
        (["--evaluation.every", "year"], r"evaluation\.every: expected epoch, phase or int, found year"),
        (["--para.max_length", "9999"], r"para\.max_length: expected 8 to 4096 tokens, found 9999"),
        (["--sts.head.hidden_layers", "9"], r"sts\.head\.hidden_layers: expected 0 to 4, found 9"),
        (
            ["--sts.head.activation", "gelo"],
            r"sts\.head\.activation: unknown activation 'gelo'; did you mean 'gelu'",
        ),
        (["--max_tokens", "64"], r"max_tokens: an example of task sst may take 128 tokens"),
        (["--preset", "quick"], r"no such preset\. Did you mean quickstart\?"),
        (["--sst.head.pair", "[cosine]"], r"sst\.head\.pair: task sst has single sentences"),
        (["--model.dropout.hidden", "1.5"], r"model\.dropout\.hidden: expected a probability"),
        (["--tasks", "[sst,sst]"], r"sst is named more than once"),
        (["--config", "absent.yaml"], r"absent\.yaml"),
    ],
)
def test_mistakes_name_the_option_and_what_is_possible(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_train(arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sst: {batchsize: 3}", r"sst\.batchsize\. Did you mean sst\.batch_size"),
        ("epohcs: 3", r"epohcs\. Did you mean epochs"),
        ("sst: [3", "not a YAML file"),
        ("tasks: sst,para", r"tasks: expected a list in brackets, \[sst,para\], found sst,para"),
        ("smart: {tasks: sst}", r"smart\.tasks: expected a list in brackets, \[sst\], found sst"),
        ("mixout: 0.1", r"mixout: expected a group of fields \(p\), found 0\.1"),
        ("surgery: pcgrad", r"surgery: expected a group of fields \(.*method.*\), found pcgrad"),
        ("sts: 5", r"sts: expected a group of fields \(batch_size, .*\), found 5"),
    ],
)
def test_mistakes_in_a_file(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_train(["--config", str(file)])


def test_a_plugin_registers_a_task_with_its_own_options(tmp_path: Path) -> None:
    plugin = tmp_path / "my_task_plugin.py"
    plugin.write_text(
        "from mtbert.data.tables import ClassLabels, TableLayout\n"
        "from mtbert.tasks import Task, register\n"
        "register(Task(name='cola_plugin', title='CoLA', kind='classification',\n"
        "    layout=TableLayout(('sentence',), 'label', ClassLabels(2)),\n"
        "    files={'train': 'cola-train.csv', 'dev': 'cola-dev.csv'}))\n"
    )
    try:
        config = parse_train(
            ["--plugins", f"[{plugin}]", "--tasks", "[cola_plugin,sst]", "--cola_plugin.batch_size", "3"]
        )
        assert config.task["cola_plugin"].batch_size == 3
        assert list(config.task) == ["cola_plugin", "sst"]
    finally:
        TASKS.pop("cola_plugin", None)
        sys.modules.pop("my_task_plugin", None)


def test_a_broken_plugin_is_named(tmp_path: Path) -> None:
    plugin = tmp_path / "broken_plugin.py"
    plugin.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"broken_plugin\.py cannot be imported \(ZeroDivisionError"):
        parse_train(["--plugins", f"[{plugin}]"])


def test_a_missing_plugin_is_named() -> None:
    with pytest.raises(ConfigError, match=r"plugins: there is no file absent_plugin\.py"):
        load_plugins(["absent_plugin.py"])


def test_user_errors_end_with_a_message_and_their_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: list[str]) -> None:
        raise ConfigError("a field is wrong")

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as exit_info:
        run_main(fail)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: a field is wrong\n"
    monkeypatch.setattr(sys, "argv", ["prog", "--debug"])
    with pytest.raises(SystemExit):
        run_main(fail)
    assert "Traceback" in capsys.readouterr().err

    def stop(arguments: list[str]) -> None:
        raise Interrupted("stopped after step 3")

    with pytest.raises(SystemExit) as exit_info:
        run_main(stop)
    assert exit_info.value.code == 130


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--resume", "runs/a"], []),
        (["--resume=runs/a"], []),
        (["--resume", "runs/a", "--profile", "nvtx"], ["--profile", "nvtx"]),
        (
            ["--profile=torch", "--profiling.skip_steps", "3", "--resume", "runs/a"],
            ["--profile=torch", "--profiling.skip_steps", "3"],
        ),
    ],
)
def test_a_resumption_takes_a_profile_beside_it(arguments: list[str], options: list[str]) -> None:
    assert resume_options(arguments) == options


@pytest.mark.parametrize("other", ["--seed", "--profiler=x", "runs/b", "--epochs=3"])
def test_a_resumption_takes_nothing_else(other: str) -> None:
    with pytest.raises(
        ConfigError, match=f"--resume takes everything.*found {other} beside it; possible: --profile"
    ):
        resume_options(["--resume", "runs/a", other])


def test_a_profile_is_chosen_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(parse_train(["--profile", "torch", "--profiling.active_steps", "7"])))
    assert config_from_file(file).profiling.active_steps == 7
    found = config_from_file(file, ["--profile", "none", "--profiling.active_steps=5"])
    assert (found.profile, found.profiling.active_steps) == ("none", 5)
    with pytest.raises(ConfigError, match="profile: expected none, nvtx, torch, found cupti"):
        config_from_file(file, ["--profile", "cupti"])


def test_help_says_what_a_profile_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--profile {none,nvtx,torch}" in shown
    assert "ranges for NVIDIA Nsight Systems" in shown
    assert "--profiling.active_steps" in shown
    assert "Steps before the first recorded one" in shown
