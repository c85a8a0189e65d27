"""From a configuration to data, model and forward pass: what training, evaluation and prediction share."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mtbert.curriculum import Curriculum, build_curriculum
from mtbert.data.batching import TaskBatches
from mtbert.data.dataset import Form, TaskData
from mtbert.data.tables import Table
from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.environment import environment
from mtbert.engine.features import FrozenForward
from mtbert.engine.forward import Forward, PackedForward
from mtbert.engine.frozen_prefix import build_prefix_forward
from mtbert.engine.host_memory import keep_freed_memory
from mtbert.engine.loss_scale import LossScaler
from mtbert.engine.precision import DTYPES, Precision, resolve_device, resolve_precision
from mtbert.errors import ModelFileError
from mtbert.kernels.dispatch import serving, set_backend
from mtbert.kernels.extension import instruction_set
from mtbert.model.build import build_model
from mtbert.model.heads import HeadSpec
from mtbert.model.kept_heads import load_heads
from mtbert.model.multitask import MultiTaskModel
from mtbert.model.pretrained import open_weights, resolve
from mtbert.optim.surgery import UncertaintyWeights
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.extra_data import extra_files
from mtbert.tasks.loading import HUB, SAMPLE
from mtbert.tasks.registry import Task, get_task

if TYPE_CHECKING:
    from mtbert.config import TrainConfig
    from mtbert.engine.shared import SharedParts

logger = logging.getLogger(__name__)

TaskTables = Mapping[str, Mapping[str, Table]]
"""Tables by task and split."""

TaskSplits = dict[str, dict[str, TaskData]]
"""Tokenised examples by task and split."""


def default_cache() -> Path:
    """Where tokenised tables are kept unless the configuration says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mtbert"


@dataclass(frozen=True)
class Machine:
    """What a run computes on."""

    device: torch.device
    dtype: torch.dtype
    """Of the encoder's activations."""
    tf32: bool = False
    """Whether float32 is multiplied as TF32."""
    world: World = ALONE
    """The processes that compute together."""

    @property
    def arithmetic(self) -> str:
        """What the encoder multiplies, as records name it: float32, tf32, bfloat16, float16."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")


def prepare_machine(config: TrainConfig, world: World = ALONE) -> Machine:
    """Set threads and kernels, and choose device and compute type."""
    if config.threads:
        torch.set_num_threads(config.threads)
    elif world.size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun sets it to 1 where nobody else did; the ranks of a machine share its cores.
        torch.set_num_threads(max(1, _cores() // world.local_size))
    # `auto` leaves the choice to the environment variable MTBERT_KERNELS, and that to the table.
    set_backend(None if config.kernels == "auto" else config.kernels)
    device = resolve_device(config.device, world)
    if device.type == "cuda" and world.size > 1:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return machine_of(device, config.precision, world)


def machine_of(device: torch.device, precision: Precision, world: World = ALONE) -> Machine:
    """The device and its compute type. Raises ConfigError for a precision that the device does not have."""
    precision = resolve_precision(precision, device)
    return Machine(device, DTYPES[precision], tf32=precision == "tf32", world=world)


def loss_scaler(machine: Machine) -> LossScaler | None:
    """The loss scale that training in fp16 needs; other precisions have the exponents of float32."""
    return LossScaler(machine.device) if machine.dtype == torch.float16 else None


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_facts(machine: Machine) -> dict[str, Any]:
    """What a run computes on and with: the record of run.json, and what a bit-for-bit resumption depends on."""
    served = serving(machine.device.type, machine.dtype)
    return environment(machine.device) | {
        "ranks": machine.world.size,
        "precision": machine.arithmetic,
        "kernels": ", ".join(f"{operation} {implementation}" for operation, implementation in served.items()),
        "instruction_set": instruction_set(),
    }


def resolved(config: TrainConfig, machine: Machine) -> TrainConfig:
    """The configuration with nothing left to the machine or to the working directory, to rerun it anywhere."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path

    kept = config.data == SAMPLE or config.data.split(":")[0] == HUB
    return dataclasses.replace(
        config,
        data=config.data if kept else absolute(config.data),
        extra_data=[
            f"{name}={path.expanduser().resolve()}"
            for name, paths in extra_files(config.extra_data).items()
            for path in paths
        ],
        output=None,
        precision=resolve_precision(config.precision, machine.device),
        device=str(machine.device) if machine.world.size == 1 else machine.device.type,
        threads=torch.get_num_threads(),
        plugins=[absolute(plugin) if plugin.endswith(".py") else plugin for plugin in config.plugins],
        model=dataclasses.replace(
            config.model,
            pretrained=config.model.pretrained
            if config.model.pretrained == "minilm"
            else absolute(config.model.pretrained),
            adapter=None if config.model.adapter is None else absolute(config.model.adapter),
        ),
    )


def tasks_of(config: TrainConfig) -> dict[str, Task]:
    """The configured tasks, in their order."""
    return {name: get_task(name) for name in config.tasks}


def form_of(task: Task, config: TaskConfig) -> Form:
    """How the examples of a task become rows: a choice of its head."""
    if not task.is_pair:
        return "single"
    return "cross" if config.head.pair == "cross-encoder" else "pair-rows"


def task_data(
    task: Task, config: TaskConfig, table: Table, tokeniser: Tokeniser, cache: Path | None
) -> TaskData:
    """A table, tokenised (or read from the cache), in the form that the task's head reads."""
    return TaskData(
        task.name,
        tokenise(table, tokeniser, cache),
        form=form_of(task, config),
        max_length=config.max_length,
        truncate=config.truncate,
    )


def token_cache(config: TrainConfig) -> Path:
    """Where the tokenised tables of a run are kept."""
    return Path(config.cache) if config.cache else default_cache()


def prepare_data(
    config: TrainConfig, tables: TaskTables, tokeniser: Tokeniser, shared: SharedParts | None = None
) -> TaskSplits:
    """TaskData by task and split."""
    cache = token_cache(config)

    def data(name: str, table: Table) -> TaskData:
        task, settings = get_task(name), config.task[name]
        make = functools.partial(task_data, task, settings, table, tokeniser, cache)
        if shared is None:
            return make()
        form = (form_of(task, settings), settings.max_length, settings.truncate)
        return shared.task_data((name, *form, tokeniser.fingerprint, cache), table, make)

    return {
        name: {split: data(name, table) for split, table in splits.items()} for name, splits in tables.items()
    }


def task_batches(config: TrainConfig, data: TaskSplits) -> dict[str, TaskBatches]:
    """The endless batches of each task's training examples."""
    return {
        name: TaskBatches(
            data[name]["train"].lengths,
            config.task[name].batch_size,
            config.seed,
            name,
            sampling=config.task[name].sampling,
            labels=data[name]["train"].labels,
            fraction=config.task[name].train_fraction,
        )
        for name in config.tasks
    }


def curriculum_of(config: TrainConfig, batches: Mapping[str, TaskBatches]) -> Curriculum:
    """Which examples come next, over these batches."""
    return build_curriculum(
        batches,
        config.curriculum,
        sizes={name: len(each.examples) for name, each in batches.items()},
        seed=config.seed,
        epochs=config.epochs,
    )


def head_specs(config: TrainConfig) -> list[HeadSpec]:
    """What each task asks of its head."""
    return [
        HeadSpec(name=name, outputs=task.outputs, pair=task.is_pair, score_range=task.score_range)
        for name, task in tasks_of(config).items()
    ]


def load_model(
    config: TrainConfig, machine: Machine, shared: SharedParts | None = None
) -> tuple[MultiTaskModel, Tokeniser]:
    """The pretrained encoder with fresh heads (and adapters) on the device, and its tokeniser."""
    folder = resolve(config.model.pretrained) if shared is None else shared.folder(config.model.pretrained)
    model = build_model(
        folder,
        config.model,
        mode=config.mode,
        specs=head_specs(config),
        heads={name: config.task[name].head for name in config.tasks},
        max_lengths={name: config.task[name].max_length for name in config.tasks},
        seed=config.seed,
        opened=open_weights if shared is None else shared.opened,
    )
    model.encoder.set_checkpointing(config.checkpointing)
    if config.surgery.method == "uncertainty":
        model.uncertainty = UncertaintyWeights(
            {name: task.kind == "similarity" for name, task in tasks_of(config).items()}
        )
    for name in load_heads(model, folder):
        logger.info("%s: the head goes on from the one in %s", name, folder)
    model.to(machine.device)
    tokeniser = Tokeniser.from_folder(folder) if shared is None else shared.tokeniser(folder)
    check_vocabulary(folder, tokeniser, model)
    if shared is not None and not config.unfreezing.active:  # what is frozen now stays so
        shared.adopt(model, folder)
    return model, tokeniser


def check_vocabulary(folder: Path, tokeniser: Tokeniser, model: MultiTaskModel) -> None:
    """Raise ModelFileError where the tokeniser has ids that the encoder has no words for: kernels do not ask."""
    words = model.encoder.config.vocab_size
    if tokeniser.largest_id >= words:
        raise ModelFileError(
            f"{folder}: the tokeniser has ids up to {tokeniser.largest_id}, but the encoder's vocab_size is {words}"
        )


def build_forward(
    config: TrainConfig, model: MultiTaskModel, machine: Machine, shared: SharedParts | None = None
) -> Forward:
    """The packed pass; with a frozen encoder its cached features, with frozen first layers their outputs from files."""
    packed = PackedForward(model, machine.device, machine.dtype)
    if config.mode == "last-linear-layer":
        return FrozenForward(packed, max_tokens=config.max_tokens, shared=shared)
    return build_prefix_forward(config, packed, token_cache(config))


def check_ranks(
    world: World, config: TrainConfig, facts: Mapping[str, Any], model: nn.Module, data: Iterable[TaskData]
) -> None:
    """Raise ConfigError unless all ranks have the same settings, versions, weights and tables."""
    if world.size == 1:
        return
    from mtbert.config import to_yaml  # joins all groups of fields, those of this package among them

    weights, tables = hashlib.sha256(), hashlib.sha256()
    for tensor in model.state_dict().values():
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for each in data:
        tables.update(each.name.encode())
        for array in (each.tokens, each.starts, each.lengths, each.labels):
            tables.update(np.ascontiguousarray([] if array is None else array).tobytes())
    versions = {name: facts[name] for name in ("git", "versions", "precision")}
    world.check_same(
        {
            "the settings": hashlib.sha256(to_yaml(config).encode()).hexdigest(),
            "the versions of code and libraries": json.dumps(versions),
            "the weights to begin with": weights.hexdigest(),
            "the tables": tables.hexdigest(),
        }
    )


def data_fingerprint(data: TaskSplits) -> str:
    """A digest of the training examples: their tokens and labels."""
    digest = hashlib.sha256()
    for name in sorted(data):
        train = data[name]["train"]
        digest.update(name.encode())
        for array in (train.tokens, train.lengths, train.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
