"""A run of masked-language modelling on the tasks' own sentences: from the tables to an exported encoder."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mtbert.curriculum import Curriculum, CurriculumConfig, build_curriculum
from mtbert.data.batching import TaskBatches
from mtbert.data.dataset import TaskData
from mtbert.data.masking import hold_out, masking, sentences, take_rows
from mtbert.data.tables import Table
from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.engine.build import (
    Machine,
    check_ranks,
    loss_scaler,
    prepare_machine,
    resolved,
    run_facts,
    tasks_of,
    token_cache,
)
from mtbert.engine.checkpoint import CheckpointStore
from mtbert.engine.compiled import CompiledParts
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.export import export_encoder
from mtbert.engine.finish import load_best_weights
from mtbert.engine.interruptions import memory_errors
from mtbert.engine.metrics_log import MetricsLog
from mtbert.engine.mlm import NAME, MlmData, MlmEvaluation, MlmEvaluator, MlmForward, MlmStep, word_losses
from mtbert.engine.precision import product_settings
from mtbert.engine.profiling import check_profile, profiling
from mtbert.engine.run_folder import MLM_RUN, RunFolder
from mtbert.engine.run_log import logging_to
from mtbert.engine.tensorboard import tensorboard_listeners
from mtbert.engine.trainer import Trainer
from mtbert.errors import ConfigError
from mtbert.evaluation.history import epoch_text, read_history
from mtbert.evaluation.markdown import escape
from mtbert.evaluation.plots.profile_plot import profile_plot
from mtbert.evaluation.plots.style import Source, save
from mtbert.evaluation.profile import profile_section, read_profile
from mtbert.evaluation.table import Cell, markdown_table
from mtbert.model.build import sizes_of
from mtbert.model.mlm_head import MlmHead, MlmModel, load_mlm_head
from mtbert.model.pretrained import load_config, load_encoder, resolve
from mtbert.optim.adamw import build_optimizer
from mtbert.optim.schedule import ScheduleConfig
from mtbert.tasks.loading import load_tables

if TYPE_CHECKING:
    from mtbert.config import TrainConfig

logger = logging.getLogger(__name__)

HELD_OUT = 0.02
"""Share of the sentences that are not trained on but scored."""


def training_tables(config: TrainConfig) -> dict[str, Table]:
    """The training tables of the tasks, without what `train_fraction` leaves out. No other file is opened.

    Unless there are extra tables: their rows must not stand in dev and test.
    """
    used = list(tasks_of(config).values())
    if not config.extra_data:
        used = [
            replace(task, files={split: name for split, name in task.files.items() if split == "train"})
            for task in used
        ]
    tables = {}
    for name, splits in load_tables(config.data, used, required=("train",), extra=config.extra_data).items():
        table, fraction = splits["train"], config.task[name].train_fraction
        if fraction < 1:
            batches = TaskBatches(
                np.ones(len(table)), 1, config.seed, name, labels=table.labels, fraction=fraction
            )
            table = take_rows(table, batches.examples, "train")
        tables[name] = table
    return tables


def mlm_data(config: TrainConfig, folder: Path) -> MlmData:
    """The tasks' sentences in the tokens of the model in `folder`. Raises ConfigError and DataError."""
    tokeniser = Tokeniser.from_folder(folder)
    masks = masking(tokeniser, probability=config.pretraining.mlm_probability, seed=config.seed)
    if masks is None:
        raise ConfigError(
            f"pretraining.mlm_epochs: the vocabulary of {config.model.pretrained} has no [MASK] token, so that"
            " masked-language modelling is not possible with it; possible: 0"
        )
    longest = max(config.task[name].max_length for name in config.tasks)
    length = min(longest, load_config(folder).max_position_embeddings)

    def tokenised(table: Table) -> TaskData:
        return TaskData(
            NAME, tokenise(table, tokeniser, token_cache(config)), form="single", max_length=length
        )

    train, held_out = hold_out(sentences(training_tables(config)), HELD_OUT, config.seed)
    return MlmData(tokenised(train), tokenised(held_out), masks)


def build_mlm_model(config: TrainConfig, folder: Path, data: MlmData) -> MlmModel:
    """The encoder in `folder` with its own head for masked words, or a fresh one."""
    sizes = sizes_of(load_config(folder), config.model)
    generator = torch.Generator().manual_seed(config.seed)
    encoder = load_encoder(folder, config=sizes, dropouts=config.model.dropout, generator=generator)
    encoder.set_checkpointing(config.checkpointing)
    head = MlmHead(sizes)
    if load_mlm_head(folder, head):
        logger.info("the head that guesses masked words is the pretrained one")
    else:
        counts = np.bincount(data.train.tokens, minlength=sizes.vocab_size)
        head.set_frequencies(torch.from_numpy(counts[: sizes.vocab_size]))
        logger.info(
            "%s has no head that guesses masked words: it starts from the identity and the words' frequencies",
            config.model.pretrained,
        )
    return MlmModel(encoder, head)


def run_mlm(config: TrainConfig, run: RunFolder, *, resumed: bool = False, world: World = ALONE) -> None:
    """Train in `run`, from its start or from its newest checkpoint, and leave the best encoder in RUN/encoder.

    The ranks of `world` train together, and rank 0 writes.
    """
    from mtbert.config import to_yaml  # joins all groups of fields, those of this package among them

    settings = config.pretraining
    with (
        logging_to(run.log_path, rank=world.rank),
        memory_errors(config.max_tokens),
        product_settings(config.precision),
    ):
        check_profile(config)
        if config.graphs == "always":
            raise ConfigError(
                "graphs: always is not possible: masked-language modelling hides another number of tokens in every"
                " step; possible: auto, never"
            )
        machine = prepare_machine(config, world)
        folder = resolve(config.model.pretrained)
        data = mlm_data(config, folder)
        model = build_mlm_model(config, folder, data).to(machine.device)
        compiled = CompiledParts() if config.compile else None
        losses = word_losses if compiled is None else compiled.add("masked words", word_losses)
        forward = MlmForward(model, machine.device, machine.dtype, losses)
        optim = replace(
            config.optim,
            lr=settings.mlm_lr,
            head_lr=None,
            layer_decay=1.0,
            lora_plus_ratio=1.0,
        )
        train_step = MlmStep(
            forward,
            build_optimizer(model, optim),
            data,
            max_tokens=config.max_tokens,
            clip_norm=optim.clip_norm,
            seed=config.seed,
            scaler=loss_scaler(machine),
            world=world,
        )
        evaluator = MlmEvaluator(forward, data, max_tokens=config.max_tokens, world=world)
        facts = run_facts(machine)
        check_ranks(world, config, facts, model, (data.train, data.held_out))
        if not resumed and world.is_main:
            run.write_text(run.config_path, to_yaml(resolved(config, machine)))
        if not world.told(run.record_path.is_file):
            before = evaluator.evaluate()
            if world.is_main:
                run.write_json(run.record_path, facts | _describe(config, run, data, before))
        _announce(config, machine, data)
        with MetricsLog(run.metrics_path) if world.is_main else contextlib.nullcontext() as log:
            trainer = Trainer(
                model,
                train_step,
                _curriculum(config, data),
                evaluator,
                CheckpointStore(run.checkpoints),
                log,
                schedule=ScheduleConfig(),
                evaluation=config.evaluation,
                run=config.run,
                inputs=config.input,
                device=machine.device,
                fingerprint={"data": data.fingerprint(), "environment": facts},
                listeners=tensorboard_listeners(run.path) if config.run.tensorboard and world.is_main else [],
                compiled=compiled,
                world=world,
            )
            if resumed:
                trainer.resume()
            with profiling(config, run.path, machine, model, model.encoder.config):
                trainer.fit()
        if world.is_main:
            load_best_weights(model, run.checkpoints)
            report = _report(config, run)
            run.write_text(run.report_path, report)
            encoder = export_encoder(model.encoder, run.path, pretrained=config.model.pretrained)
            print(f"\n{report}\nencoder: {encoder}")
        world.told(lambda: None)  # whoever goes on from the encoder finds it


def _curriculum(config: TrainConfig, data: MlmData) -> Curriculum:
    lengths = data.train.lengths
    batch = max(1, int(config.pretraining.mlm_batch_tokens / lengths.mean()))
    return build_curriculum(
        {NAME: TaskBatches(lengths, batch, config.seed, NAME)},
        CurriculumConfig(),
        sizes={NAME: len(lengths)},
        seed=config.seed,
        epochs=config.pretraining.mlm_epochs,
    )


def _describe(config: TrainConfig, run: RunFolder, data: MlmData, before: MlmEvaluation) -> dict[str, Any]:
    return {
        "kind": MLM_RUN,
        "name": run.name,
        "encoder": config.model.pretrained,
        "seed": config.seed,
        "sentences": {"train": len(data.train), "held_out": len(data.held_out)},
        "tokens": int(data.train.lengths.sum()),
        "before": {"accuracy": before.accuracy, "perplexity": before.perplexity},
    }


def _announce(config: TrainConfig, machine: Machine, data: MlmData) -> None:
    logger.info(
        "%s, masked-language modelling: %s sentences of %s, %s held out; %s, %s",
        config.model.pretrained,
        f"{len(data.train):,}",
        ", ".join(config.tasks),
        f"{len(data.held_out):,}",
        machine.device,
        machine.arithmetic,
    )


def _report(config: TrainConfig, run: RunFolder) -> str:
    """How well hidden words were guessed, before the training and after each part of it."""
    record = json.loads(run.record_path.read_text(encoding="utf-8"))
    before, counts = record["before"], record["sentences"]
    rows: list[list[Cell]] = [["0", 0, before["accuracy"], before["perplexity"]]]
    rows += [
        [epoch_text(line["epoch"]), line["step"], line["dev"][NAME]["accuracy"], line["perplexity"]]
        for line in read_history(run.metrics_path).evaluations
    ]
    table = markdown_table(["epoch", "step", "accuracy", "perplexity"], rows)
    return (
        f"# Masked-language modelling: {escape(run.name)}\n\n"
        f"{escape(config.model.pretrained)}, trained on {counts['train']:,} sentences of"
        f" {', '.join(config.tasks)}; scored on {counts['held_out']:,} others of the same training tables, where"
        f" {config.pretraining.mlm_probability:g} of the tokens are hidden.\n\n{table}\n"
        + _profile(run, str(record["git"]))
    )


def _profile(run: RunFolder, git: str) -> str:
    found = read_profile(run.path)
    if found is None:
        return ""
    plot = save(profile_plot(found, Source(run.name, git)), run.plots / "profile.png")
    return f"\n{profile_section(found, {'profile': plot}, run.path)}\n"
