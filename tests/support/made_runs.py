"""Runs' folders for the tests of what is done with a run: a model with weights that tell, and no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from support.configs import config_of
from torch import Tensor

from mtbert.config import TrainConfig, to_yaml
from mtbert.data.dataset import TaskData
from mtbert.data.packing import PackedBatch, Request, pack
from mtbert.data.tables import Table
from mtbert.data.tokenisation import tokenise
from mtbert.engine.build import Machine, form_of, load_model, tasks_of
from mtbert.engine.checkpoint import CheckpointStore
from mtbert.engine.load_run import LoadedRun, load_run
from mtbert.engine.run_folder import RunFolder
from mtbert.model.lora import LoraAdapter

TEXTS = (
    ("a good movie", "the film was great fun"),
    ("no", "why would the dog not play with a child for so long, and what does she drink?!"),
    ("[SEP] is spelt", "x"),
    ("two quick red words 123 " * 9, "boring"),
)


def make_run(folder: Path, bert: Path | str, values: dict[str, Any], *, seed: int = 3) -> RunFolder:
    """A run's folder with one checkpoint, of a model whose heads and adapters are random and large.

    values: as in a configuration's YAML.
    """
    model = {"pretrained": str(bert), **values.get("model", {})}
    config: TrainConfig = config_of({"precision": "float32", "device": "cpu", **values, "model": model})
    built, _ = load_model(config, Machine(torch.device("cpu"), torch.float32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.startswith("heads.") or ".extra_hidden." in name or "pals" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
        for module in built.modules():
            if isinstance(module, LoraAdapter):
                module.lora_b.normal_(0.0, 0.1, generator=generator)
    run = RunFolder(folder)
    run.write_text(run.config_path, to_yaml(config))
    run.write_json(
        run.record_path, {"name": folder.name, "tasks": config.tasks, "mode": config.mode, "data": {}}
    )
    CheckpointStore(run.checkpoints).save(4, model=built.state_dict(), optimizer={}, state={}, best_step=4)
    return run


def loaded(run: RunFolder) -> tuple[LoadedRun, TrainConfig]:
    """The run's model for inference in float32, and its configuration."""
    config = config_of(yaml.safe_load(run.config_path.read_text(encoding="utf-8")))
    return load_run(run, config, device="cpu"), config


@torch.no_grad()
def own_outputs(run: LoadedRun, task: str, texts: Any = TEXTS) -> Tensor:
    """What mtbert itself computes in float32 for these examples [n, outputs]."""
    batch = _packed(run, task, texts)
    return run.model(batch, dtype=torch.float32)[task]


@torch.no_grad()
def own_hidden(run: LoadedRun, task: str, texts: Any = TEXTS) -> list[Tensor]:
    """Last hidden states of every row, without padding."""
    batch = _packed(run, task, texts)
    hidden = run.model.encoder(batch, dtype=torch.float32)
    return list(hidden.split(batch.cu_seqlens.diff().tolist()))


def _packed(run: LoadedRun, task: str, texts: Any) -> PackedBatch:
    return pack([Request(_data(run, task, texts), np.arange(len(texts)), 0, 1.0)])


def _data(run: LoadedRun, name: str, texts: Any) -> TaskData:
    task = tasks_of(run.config)[name]
    rows = [tuple(row[: len(task.layout.text_columns)]) for row in texts]
    ids = [str(number) for number in range(len(rows))]
    table = Table(
        task=name,
        split="dev",
        path=Path("made"),
        ids=ids,
        texts=rows,
        labels=None,
        lines=list(range(len(rows))),
    )
    settings = run.config.task[name]
    return TaskData(
        name, tokenise(table, run.tokeniser), form=form_of(task, settings), max_length=settings.max_length
    )
