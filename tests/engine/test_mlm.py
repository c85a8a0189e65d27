"""Masked-language modelling: the loss and its gradients, what is read, and a run that is killed and goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.assembly import shortened
from support.tiny_bert import default_vocabulary, write_tiny_bert
from torch import Tensor

from mtbert.config import TrainConfig
from mtbert.data.masking import HELD_OUT_SITE, MaskedBatch
from mtbert.data.packing import pack, plan_passes
from mtbert.data.tables import write_table
from mtbert.engine import mlm_run
from mtbert.engine.checkpoint import Checkpoint, CheckpointStore
from mtbert.engine.input_pipeline import InputConfig
from mtbert.engine.mlm import NAME, MlmData, MlmEvaluator, MlmForward, MlmStep
from mtbert.engine.mlm_run import build_mlm_model, mlm_data, run_mlm, training_tables
from mtbert.engine.pretraining import PretrainingConfig
from mtbert.engine.run_folder import RunFolder
from mtbert.errors import ConfigError, DataError, NonFiniteError, UserError
from mtbert.model.dropout import DropoutRates
from mtbert.model.mlm_head import MlmModel
from mtbert.model.pretrained import hugging_face_views, load_encoder, resolve
from mtbert.optim.adamw import build_optimizer
from mtbert.pretrain import main
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.loading import load_tables
from mtbert.tasks.registry import get_task

TASKS = ("sst", "para")
TIMES = ("seconds", "input_wait_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training tables of 60 rows; what stands for dev and test would not survive being read."""
    folder = tmp_path_factory.mktemp("tables")
    for name in TASKS:
        task = get_task(name)
        table = load_tables("sample", [task])[name]["train"]
        write_table(folder / task.files["train"], shortened(table, 60), task.layout)
        for split in ("dev", "test"):
            (folder / task.files[split]).write_bytes(b"\xff\xfe no table \x00")
    return folder


@pytest.fixture
def config(tables: Path, tiny_bert: Path, tmp_path: Path) -> TrainConfig:
    config = TrainConfig(
        data=str(tables),
        tasks=list(TASKS),
        task={name: TaskConfig(max_length=64) for name in TASKS},
        precision="float32",
        threads=1,
        max_tokens=512,
        cache=str(tmp_path / "cache"),
        pretraining=PretrainingConfig(mlm_epochs=2, mlm_lr=1e-3, mlm_batch_tokens=256),
    )
    config.model.pretrained = str(tiny_bert)
    config.run = dataclasses.replace(config.run, tensorboard=False, log_every=2, checkpoint_every=4)
    return config


@dataclasses.dataclass
class Parts:
    data: MlmData
    model: MlmModel
    step: MlmStep
    forward: MlmForward


def assemble(config: TrainConfig, dtype: torch.dtype = torch.float64, max_tokens: int = 10**6) -> Parts:
    folder = resolve(config.model.pretrained)
    data = mlm_data(config, folder)
    model = build_mlm_model(config, folder, data).to(dtype)
    forward = MlmForward(model, torch.device("cpu"), dtype)
    optimizer = build_optimizer(model, config.optim)
    step = MlmStep(forward, optimizer, data, max_tokens=max_tokens, clip_norm=1.0, seed=config.seed)
    return Parts(data, model, step, forward)


def gradients(model: MlmModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense_scores(model: MlmModel, masked: MaskedBatch) -> Tensor:
    """Scores [T, V] of every token, from the formulas; the tied table is one tensor used twice."""
    hidden = model.encoder(masked.batch, dtype=torch.float64)
    x = hidden @ model.head.dense.weight.T + model.head.dense.bias
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-12).sqrt()
    x = x * model.head.norm.weight + model.head.norm.bias
    return x @ model.encoder.embeddings.word.T + model.head.bias


def dense_loss(model: MlmModel, masked: MaskedBatch) -> Tensor:
    labels = torch.full((masked.batch.tokens,), -100)
    labels[masked.places] = masked.targets
    return F.cross_entropy(dense_scores(model, masked), labels)


# ---- loss, gradients, evaluation ----


@pytest.mark.parametrize("max_tokens", [10**6, 150])
def test_the_step_is_the_mean_over_all_hidden_tokens(config: TrainConfig, max_tokens: int) -> None:
    config.model.dropout = DropoutRates(0.0, 0.0, 0.0)
    parts = assemble(config, max_tokens=max_tokens)
    rows = np.arange(40)
    result = parts.step.accumulate({NAME: rows}, 7)
    found = gradients(parts.model)

    parts.model.zero_grad(set_to_none=True)
    (requests,) = plan_passes({NAME: rows}, {NAME: parts.data.train}, 10**6)
    masked = parts.data.masking(pack(requests), 7)
    assert len(masked.targets) > 20
    loss = dense_loss(parts.model, masked)
    loss.backward()
    expected = gradients(parts.model)
    assert float(result.losses[NAME]) == pytest.approx(loss.item(), rel=1e-10)
    assert float(result.total) == float(result.losses[NAME])
    assert result.tokens == masked.batch.tokens
    assert found.keys() == expected.keys() >= {"encoder.embeddings.word", "head.bias", "head.dense.weight"}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-10)


def test_passes_agree_with_dropout_on(config: TrainConfig) -> None:
    whole, split = assemble(config), assemble(config, max_tokens=100)
    for parts in (whole, split):
        parts.step.accumulate({NAME: np.arange(30)}, 3)
    expected = gradients(whole.model)
    for name, gradient in gradients(split.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    whole.step.accumulate({NAME: np.arange(30)}, 4)
    assert not torch.equal(whole.model.head.bias.grad, expected["head.bias"])


def test_accuracy_and_perplexity(config: TrainConfig) -> None:
    parts = assemble(config)
    data = dataclasses.replace(parts.data, held_out=parts.data.train)
    found = MlmEvaluator(parts.forward, data, max_tokens=200).evaluate()
    order = np.argsort(-data.held_out.lengths, kind="stable")  # row ids count from the longest
    (requests,) = plan_passes({NAME: order}, {NAME: data.held_out}, 10**6)
    masked = parts.data.masking(pack(requests), 0, HELD_OUT_SITE)
    with torch.no_grad():
        scores = dense_scores(parts.model, masked)[masked.places]
        loss = dense_loss(parts.model, masked)
    assert found.accuracy == pytest.approx(float((scores.argmax(1) == masked.targets).double().mean()))
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-9)
    assert found.score == pytest.approx(-float(loss), rel=1e-9)
    line = found.to_json()
    assert line["score"] == found.score
    assert line["perplexity"] == found.perplexity
    assert line["dev"][NAME]["examples"] == len(masked.targets)


def test_a_step_without_a_hidden_token_changes_nothing(config: TrainConfig) -> None:
    config.pretraining.mlm_probability = 1e-9
    parts = assemble(config)
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    result = parts.step({NAME: np.arange(3)}, 0)
    result.check()
    assert float(result.total) == 0.0
    assert all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
    assert MlmEvaluator(parts.forward, parts.data, max_tokens=512).evaluate().to_json()["perplexity"] == 1.0


def test_the_sentence_of_a_loss_that_is_not_finite_is_named(config: TrainConfig) -> None:
    parts = assemble(config, max_tokens=100)
    rows = np.arange(20)
    masked = parts.data.masking(pack(plan_passes({NAME: rows}, {NAME: parts.data.train}, 10**6)[0]), 0)
    place = int(masked.places[5])
    row = int((masked.batch.cu_seqlens <= place).sum()) - 1
    with torch.no_grad():
        parts.model.head.bias[masked.targets[5]] = -torch.inf
    before = parts.model.encoder.embeddings.word.detach().clone()
    with pytest.raises(NonFiniteError, match=rf"task mlm: examples .*\b{parts.data.train.ids[row]}\b"):
        parts.step({NAME: rows}, 0).check()
    assert torch.equal(parts.model.encoder.embeddings.word, before)


# ---- what is read ----


def test_training_tables_alone_are_read(config: TrainConfig, tables: Path) -> None:
    found = training_tables(config)
    assert {name: len(table) for name, table in found.items()} == {"sst": 60, "para": 60}
    with pytest.raises(DataError):
        load_tables(str(tables), [get_task("sst")])
    data = mlm_data(config, resolve(config.model.pretrained))
    texts = {text for table in found.values() for example in table.texts for text in example}
    read = [text for table in (data.train.table, data.held_out.table) for (text,) in table.texts]
    assert sorted(read) == sorted(texts)


def test_what_a_fraction_leaves_out_is_not_read(config: TrainConfig) -> None:
    whole = training_tables(config)
    config.task["para"].train_fraction = 0.5
    part = training_tables(config)
    assert part["sst"].ids == whole["sst"].ids
    assert len(part["para"]) == 30
    assert set(part["para"].texts) < set(whole["para"].texts)


# ---- a run ----


def train(config: TrainConfig, path: Path, *, resumed: bool = False) -> None:
    with RunFolder.open(path) if resumed else RunFolder.create(path, "") as run, io.StringIO() as out:
        run.lock()
        with contextlib.redirect_stdout(out):
            run_mlm(config, run, resumed=resumed)


def newest(path: Path) -> Checkpoint:
    found = CheckpointStore(path / "checkpoints").load_newest(print)
    assert found is not None
    return found


TIMES = ("seconds", "input_wait_seconds", "tokens_per_second")


def lines(path: Path) -> list[dict[str, Any]]:
    if not (path / "metrics.jsonl").exists():
        return []
    whole = [
        line for line in (path / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")
    ]
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in whole]


@pytest.fixture
def finished(config: TrainConfig, tmp_path: Path) -> Path:
    train(config, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_learns_and_leaves_its_encoder(config: TrainConfig, finished: Path, tiny_bert: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    evaluations = [line for line in lines(finished) if line["kind"] == "evaluation"]
    assert len(evaluations) == 2
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"] < record["before"]["perplexity"]
    report = (finished / "report.md").read_text()
    assert f"| 2 | {newest(finished).step} | {evaluations[-1]['dev'][NAME]['accuracy']:.3f} |" in report

    assert resolve(finished) == finished / "encoder"
    exported = dict(hugging_face_views(load_encoder(resolve(finished))))
    checkpoint = build_mlm_model(config, tiny_bert, mlm_data(config, tiny_bert))
    checkpoint.load_state_dict(newest(finished).model)
    for name, value in hugging_face_views(checkpoint.encoder):
        assert torch.equal(exported[name], value), name
    start = dict(hugging_face_views(load_encoder(tiny_bert)))
    changed = {name for name, value in exported.items() if not torch.equal(value, start[name])}
    assert set(exported) - changed == {"pooler.dense.weight", "pooler.dense.bias"}
    assert (finished / "encoder" / "vocab.txt").read_bytes() == (tiny_bert / "vocab.txt").read_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the training is started by fork")
def test_killed_and_resumed_it_ends_in_the_same_weights(
    config: TrainConfig, finished: Path, tmp_path: Path
) -> None:
    """The killed run has its input made ready on a thread, the other one has not."""
    killed, config = tmp_path / "killed", dataclasses.replace(config, input=InputConfig(ahead=3))
    process = multiprocessing.get_context("fork").Process(target=train, args=(config, killed))
    process.start()
    while not any(line["step"] >= 6 for line in lines(killed)) and process.is_alive():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -9, "the kill came too late to prove anything"
    last = newest(finished).step
    assert 4 <= newest(killed).step < last
    train(config, killed, resumed=True)
    found, expected = newest(killed), newest(finished)
    assert found.step == expected.step == last
    for mine, theirs in ((found.model, expected.model), (found.optimizer, expected.optimizer)):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert lines(killed) == lines(finished)
    for name in ("model.safetensors", "config.json"):
        assert (killed / "encoder" / name).read_bytes() == (finished / "encoder" / name).read_bytes()


def test_from_the_command_line(config: TrainConfig, tables: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {
        "data": tables,
        "output": run,
        "tasks": "[sst,para]",
        "model.pretrained": config.model.pretrained,
        "cache": config.cache,
        "threads": 1,
        "run.tensorboard": "false",
        "pretraining.mlm_batch_tokens": 1024,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    main(arguments)
    epochs = [line["epoch"] for line in lines(run) if line["kind"] == "evaluation"]
    assert epochs == [1.0], "one epoch unless another number is given"
    before = (run / "encoder" / "model.safetensors").read_bytes()
    main(["--resume", str(run)])
    assert (run / "encoder" / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="already holds a run"):
        main(arguments)
    with pytest.raises(ConfigError, match=r"pretraining\.task: masked-language modelling alone"):
        main([*arguments, "--pretraining.task=para"])


# ---- bad input ----


def test_a_vocabulary_without_a_mask(config: TrainConfig, tmp_path: Path) -> None:
    words = [word for word in default_vocabulary() if word != "[MASK]"]
    config.model.pretrained = str(write_tiny_bert(tmp_path / "bert", vocab=words))
    with pytest.raises(
        ConfigError, match=r"pretraining\.mlm_epochs: the vocabulary of .* has no \[MASK\] token"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists(), "the folder may be used again"


def test_no_sentence_to_train_on(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(*arguments: object) -> dict[str, Any]:
        return {"sst": shortened(training_tables(config)["sst"], 1)}

    monkeypatch.setattr(mlm_run, "training_tables", one)
    with pytest.raises(DataError, match=r"1 different sentences are too few"):
        train(config, tmp_path / "run")
