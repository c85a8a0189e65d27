"""What stands before a run: its stages, what they leave, and what the run makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.assembly import tiny_config
from support.tiny_bert import write_tiny_bert

from mtbert import evaluate, export, pretrain
from mtbert.cli import config_from_file
from mtbert.config import TrainConfig
from mtbert.engine import pretraining
from mtbert.engine.assembly import assemble
from mtbert.engine.build import Machine, load_model
from mtbert.engine.checkpoint import Checkpoint, CheckpointStore
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.load_run import load_run
from mtbert.engine.pretraining import (
    PretrainingConfig,
    check_stages,
    describe_stages,
    run_pretraining,
    stages,
)
from mtbert.engine.run_folder import RunFolder
from mtbert.errors import ConfigError, DataError, Interrupted, ModelFileError
from mtbert.model.heads import HeadConfig
from mtbert.model.pretrained import (
    hugging_face_views,
    load_config,
    load_encoder,
    origin,
    resolve,
    save_encoder,
)
from mtbert.tasks.config import TaskConfig
from mtbert.train import main, train

BOTH = PretrainingConfig(mlm_epochs=1, mlm_lr=1e-3, mlm_batch_tokens=2048, task="para", task_epochs=0.2)


@pytest.fixture(autouse=True)
def _without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their plots take longer than all the rest."""
    monkeypatch.setattr("mtbert.train.write_report", lambda *arguments, **options: None)


@pytest.fixture
def config(tiny_bert: Path, tmp_path: Path) -> TrainConfig:
    config = tiny_config(tiny_bert, tmp_path / "cache", tasks=["para", "sst"], precision="float32", threads=1)
    config.task = {name: TaskConfig(batch_size=32, max_length=48) for name in config.tasks}
    config.task["para"].head = HeadConfig(hidden_layers=1)
    config.evaluation = dataclasses.replace(config.evaluation, resamples=10, train_examples=20)
    config.run = dataclasses.replace(config.run, tensorboard=False)
    return dataclasses.replace(config, epochs=0.2, pretraining=BOTH)


def pretrained_for(config: TrainConfig, folder: Path, trained: Any = train) -> TrainConfig:
    with RunFolder(folder) as run, contextlib.redirect_stdout(io.StringIO()):
        return run_pretraining(config, run, trained)


def best(folder: Path) -> Checkpoint:
    found = CheckpointStore(folder / "checkpoints").load_best(print)
    assert found is not None
    return found


# ---- the configuration ----


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mlm_epochs", -1.0),
        ("mlm_epochs", float("inf")),
        ("mlm_lr", 0.0),
        ("mlm_batch_tokens", 0),
        ("mlm_probability", 0.0),
        ("mlm_probability", 1.0),
        ("task", "nli"),
        ("task_epochs", 0.0),
    ],
)
def test_impossible_values(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^pretraining\.{field}: .*({value!r}|{value})"):
        PretrainingConfig(**{field: value})  # type: ignore[arg-type]


def test_nothing_to_do(config: TrainConfig, tmp_path: Path) -> None:
    config.pretraining = PretrainingConfig()
    assert not config.pretraining.active
    assert pretrained_for(config, tmp_path / "run") == config
    assert not (tmp_path / "run" / "pretraining").exists()


def test_the_stages_of_a_configuration(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, mode="lora", seed=5, tasks=["sst", "sts"])
    config.simcse = dataclasses.replace(config.simcse, tasks=["sts"])
    config.optim = dataclasses.replace(config.optim, lr=3e-4, lora_plus_ratio=4.0)
    config.evaluation = dataclasses.replace(config.evaluation, patience=1, every="phase")
    config.model.attention_heads = 4
    config.model.pals = dataclasses.replace(config.model.pals, size=12)
    config.task["para"].loss.weight = 0.0
    mlm, para = stages(config, tmp_path)
    assert [mlm.name, para.name] == ["mlm", "para"]
    assert mlm.folder == tmp_path / "pretraining" / "mlm"
    assert mlm.config.model.pretrained == config.model.pretrained
    assert para.config.model.pretrained == str(mlm.encoder)
    assert mlm.config.tasks == ["sst", "sts"]
    assert mlm.config.pretraining == dataclasses.replace(BOTH, task=None)
    assert para.config.tasks == ["para"]
    assert para.config.pretraining == PretrainingConfig()
    assert para.config.epochs == BOTH.task_epochs
    assert para.config.task["para"].batch_size == 32
    assert para.config.task["para"].loss.weight == 1.0
    for stage in (mlm.config, para.config):
        assert stage.mode == "full"
        assert stage.seed == 5
        assert stage.optim.lr == 3e-4
        assert stage.evaluation.patience == 0
        assert stage.evaluation.every == "epoch"  # a stage has no phases
        assert stage.model.attention_heads == 4
        assert stage.model.pals.size == 0
        assert stage.simcse.tasks == []


def test_what_is_wrong_with_a_stage_alone_names_it(config: TrainConfig, tmp_path: Path) -> None:
    config.schedule = dataclasses.replace(config.schedule, warmup=1000)
    config.pretraining = dataclasses.replace(BOTH, mlm_epochs=0)
    message = r"^in the stage para before the run: schedule\.warmup: found 1000 steps, but the run has"
    with pytest.raises(ConfigError, match=message):
        check_stages(config, tmp_path, assemble)


# ---- both stages ----


def test_both_stages(config: TrainConfig, tmp_path: Path, tiny_bert: Path) -> None:
    run = tmp_path / "run"
    started: list[str] = []

    def trained(
        stage: TrainConfig, folder: RunFolder, *, resumed: bool = False, world: World = ALONE
    ) -> None:
        started.append(f"{folder.name} {resumed}")
        train(stage, folder, resumed=resumed, world=world)

    after = pretrained_for(config, run, trained)
    assert started == ["para False"]
    assert after.model.pretrained == str(run / "pretraining" / "para" / "encoder")
    assert after.pretraining == PretrainingConfig()
    assert dataclasses.replace(after, model=config.model, pretraining=BOTH) == config

    mlm, para = run / "pretraining" / "mlm", run / "pretraining" / "para"
    for folder in (mlm, para):
        assert [path.name for path in (folder / "checkpoints").iterdir()] == [best(folder).path.name]
        assert (folder / "config.yaml").is_file()
        assert (folder / "log.txt").is_file()
    exported = dict(hugging_face_views(load_encoder(para / "encoder")))
    own = load_run(RunFolder.open(para), config_from_file(para / "config.yaml")).model
    own.load_state_dict(best(para).model)
    assert all(torch.equal(exported[name], value) for name, value in hugging_face_views(own.encoder))
    heads = load_file(para / "encoder" / "heads.safetensors")
    assert heads.keys() == {name for name in own.heads.state_dict() if name.startswith("para.")}
    assert all(torch.equal(heads[name], value) for name, value in own.heads.state_dict().items())
    started_from, _ = load_model(after, Machine(torch.device("cpu"), torch.float32))
    assert all(torch.equal(started_from.heads.state_dict()[name], value) for name, value in heads.items())
    fresh, _ = load_model(config, Machine(torch.device("cpu"), torch.float32))
    assert not torch.equal(fresh.heads.state_dict()["para.output.weight"], heads["para.output.weight"])
    words = [
        load_encoder(folder).embeddings.word for folder in (tiny_bert, mlm / "encoder", para / "encoder")
    ]
    assert not torch.equal(words[0], words[1])
    assert not torch.equal(words[1], words[2])

    facts = describe_stages(config, run)
    assert [fact["stage"] for fact in facts] == ["mlm", "para"]
    assert all(fact["tokens"] > 0 and 0 <= fact["score"] <= 1 for fact in facts)
    assert facts[0]["perplexity"] > 1

    # Once more: nothing is trained, and what a kill between export and tidying left behind goes.
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    shutil.copytree(best(mlm).path, mlm / "checkpoints" / "step-1")
    assert pretrained_for(config, run, trained) == after
    assert started == ["para False"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == times


def test_a_stage_that_was_interrupted_goes_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage stops before its export: the first is not done again, and the second trains no step twice."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    pretrained_for(config, straight)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "export_encoder", refuse)
        with pytest.raises(Interrupted):
            pretrained_for(config, run)
    para = run / "pretraining" / "para"
    assert not (para / "encoder").exists()
    metrics = (para / "metrics.jsonl").read_bytes()
    mlm = (run / "pretraining" / "mlm" / "encoder" / "model.safetensors").stat().st_mtime_ns
    pretrained_for(config, run)
    assert (para / "metrics.jsonl").read_bytes() == metrics
    assert (run / "pretraining" / "mlm" / "encoder" / "model.safetensors").stat().st_mtime_ns == mlm
    for name in ("model.safetensors", "heads.safetensors"):
        expected = straight / "pretraining" / "para" / "encoder" / name
        assert (para / "encoder" / name).read_bytes() == expected.read_bytes()


def test_a_missing_table_of_the_task_fails_before_the_first_stage(
    config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "tables").mkdir()
    config.data = str(tmp_path / "tables")
    with pytest.raises(DataError, match=r"quora-train\.csv: no such file"):
        check_stages(config, tmp_path / "run", assemble)


# ---- the run itself ----


def arguments(config: TrainConfig, run: Path, *more: str) -> list[str]:
    options = {
        "data": "sample",
        "output": run,
        "tasks": "[para,sst]",
        "epochs": 0.3,
        "precision": "float32",
        "threads": 1,
        "cache": config.cache,
        "model.pretrained": config.model.pretrained,
        "run.tensorboard": "false",
        "evaluation.resamples": 10,
        "evaluation.train_examples": 20,
        "pretraining.mlm_epochs": 0.5,
        "pretraining.mlm_batch_tokens": 2048,
        "pretraining.task": "para",
        "pretraining.task_epochs": 0.3,
    }
    for task in ("para", "sst"):
        options |= {f"{task}.batch_size": 32, f"{task}.max_length": 48}
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def test_a_run_with_both_stages(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_bert: Path
) -> None:
    """It starts from the stages' encoder, its folder can be moved, and its configuration repeats it."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    main(arguments(config, run, "--optim.lr=1e-30", "--optim.weight_decay=0"))  # it stays where it started
    values = yaml.safe_load((run / "config.yaml").read_text())
    assert values["model"]["pretrained"] == str(tiny_bert)
    assert values["pretraining"]["task"] == "para"
    record = json.loads((run / "run.json").read_text())
    assert record["encoder"] == str(tiny_bert)
    assert [stage["stage"] for stage in record["pretraining"]] == ["mlm", "para"]
    weights = best(run).model
    word = load_encoder(run / "pretraining" / "para" / "encoder").embeddings.word
    torch.testing.assert_close(weights["encoder.embeddings.word"], word.detach(), rtol=0, atol=1e-12)

    run.rename(moved)
    for folder in (moved, moved / "pretraining" / "para"):
        capsys.readouterr()
        evaluate.main([str(folder)])
        assert "Quora paraphrase" in capsys.readouterr().out
    shutil.rmtree(moved / "checkpoints")
    main(["--resume", str(moved)])
    found = best(moved).model
    assert all(torch.equal(found[name], value) for name, value in weights.items())

    masked = moved / "pretraining" / "mlm"
    for command, folder, message in (
        (main, masked, "mtbert.pretrain --resume"),
        (pretrain.main, moved, "mtbert.train --resume"),
    ):
        with pytest.raises(ConfigError, match=message):
            command(["--resume", str(folder)])
    with pytest.raises(ConfigError, match="masked-language modelling, which trains no task"):
        evaluate.main([str(masked)])

    again = tmp_path / "again"
    main(["--config", str(moved / "config.yaml"), "--output", str(again)])
    found = best(again).model
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_mistake_in_the_run_fails_before_its_stages(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="attention_heads"):
        main(arguments(config, run, "--model.attention_heads=7"))
    with pytest.raises(ConfigError, match=r"sst\.loss\.class_weights"):
        main(arguments(config, run, "--sst.loss.class_weights=[1.0,2.0]"))
    alone = ("--tasks=[sst]", "--para.loss.class_weights=[1.0,2.0,3.0]")  # para is trained by its stage only
    with pytest.raises(ConfigError, match=r"para\.loss\.class_weights"):
        main(arguments(config, run, *alone))
    assert not (run / "pretraining").exists()
    assert not (run / "config.yaml").exists()


# ---- exported encoders ----


def test_a_finished_run_is_exported_and_started_from(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.pretraining = PretrainingConfig()
    run = tmp_path / "run"
    with RunFolder.create(run, "") as folder:
        train(dataclasses.replace(config, mode="lora"), folder)
    with pytest.raises(ModelFileError, match=rf"is a run without an exported encoder.* mtbert\.export {run}"):
        resolve(run)
    before = load_run(RunFolder.open(run), config_from_file(run / "config.yaml"))
    export.main([str(run)])
    assert str(run / "encoder") in capsys.readouterr().out
    assert resolve(run) == run / "encoder"
    assert not (run / "encoder" / "heads.safetensors").exists()
    after = load_run(RunFolder.open(run), config_from_file(run / "config.yaml"))
    assert after.config.model.pretrained == str(run / "encoder")
    assert all(torch.equal(v, after.model.state_dict()[n]) for n, v in before.model.state_dict().items())
    folded = load_encoder(resolve(run))
    with torch.no_grad():
        layer = before.model.encoder.layers[1].query_key_value
        adapter = layer.adapter("value")
        assert adapter is not None
        expected = layer.part(layer.weight, "value") + adapter.delta()
        found = folded.layers[1].query_key_value
        torch.testing.assert_close(found.part(found.weight, "value"), expected)
    export.main([str(run)])  # a second time, from itself


def test_what_an_encoder_began_from(tiny_bert: Path, tmp_path: Path) -> None:
    assert origin("minilm") == "minilm"
    assert origin("bert-base-uncased") == "bert-base-uncased"
    assert origin(tiny_bert) == str(tiny_bert)
    run = tmp_path / "run"
    save_encoder(load_encoder(tiny_bert), run / "encoder", tokeniser_folder=tiny_bert, origin="minilm")
    assert origin(run) == origin(run / "encoder") == "minilm"
    assert load_config(run / "encoder") == load_config(tiny_bert)
    (run / "other").mkdir()
    assert origin(run / "other") == str(run / "other")


def test_fewer_layers_stay_fewer(config: TrainConfig, tmp_path: Path) -> None:
    config.model.pretrained = str(write_tiny_bert(tmp_path / "bert", layers=3))
    config.model.pool_layer = 2
    config.pretraining = dataclasses.replace(BOTH, task=None, mlm_epochs=0.2)
    after = pretrained_for(config, tmp_path / "run")
    assert load_config(after.model.pretrained).num_hidden_layers == 2


def test_stages_have_the_run_s_input_and_graphs(config: TrainConfig, tmp_path: Path) -> None:
    """But masked words are another number in every step, which no graph can hold."""
    config.graphs, config.input.ahead = "always", 5
    found = {
        stage.name: (stage.config.graphs, stage.config.input.ahead) for stage in stages(config, tmp_path)
    }
    assert found == {"mlm": ("never", 5), "para": ("always", 5)}
