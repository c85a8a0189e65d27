"""`python -m mtbert.train`: fine-tune one BERT on several tasks at once.

Reads from top to bottom: parse, read the tables, build the model, train, and report on the best checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from mtbert.cli import config_from_file, option_value, parse_train, run_main
from mtbert.config import TrainConfig, to_yaml
from mtbert.curriculum import build_curriculum
from mtbert.engine.build import (
    Machine,
    TaskSplits,
    build_forward,
    data_fingerprint,
    load_model,
    prepare_data,
    prepare_machine,
    resolved,
    run_facts,
    task_batches,
    tasks_of,
)
from mtbert.engine.checkpoint import CheckpointStore
from mtbert.engine.evaluator import Evaluator
from mtbert.engine.finish import dev_examples, load_best_weights, predict_all
from mtbert.engine.methods import build_train_step, sentence_quality, task_losses
from mtbert.engine.metrics_log import MetricsLog
from mtbert.engine.record import describe_run, write_problems
from mtbert.engine.run_folder import RunFolder
from mtbert.engine.run_log import logging_to
from mtbert.engine.tensorboard import tensorboard_listeners
from mtbert.engine.trainer import Trainer, memory_errors
from mtbert.errors import ConfigError
from mtbert.evaluation.report import run_results, write_report
from mtbert.evaluation.results import results_table
from mtbert.evaluation.run import read_run
from mtbert.evaluation.seeds import write_seeds
from mtbert.model.multitask import MultiTaskModel
from mtbert.optim.unfreezing import Unfreezing
from mtbert.tasks.loading import SAMPLE, load_tables

logger = logging.getLogger("mtbert.train")  # __name__ is __main__ when it is run


def main(arguments: list[str]) -> None:
    """Train, or resume, as the command line says."""
    resumed = option_value(arguments, "--resume")
    if resumed is not None:
        if len(arguments) > (1 if "=" in arguments[0] else 2):
            raise ConfigError(
                "--resume takes everything from the run's config.yaml: give no other option with it"
            )
        resume(Path(resumed))
        return
    config = parse_train(arguments)
    with RunFolder.create(config.output, name_hint="-".join(config.tasks)) as run:
        if config.seeds == 1:
            train(config, run)
        else:
            train_seeds(config, run)


def resume(folder: Path) -> None:
    """Go on with an interrupted run, or with the runs of several seeds."""
    with RunFolder.open(folder) as run:
        config = config_from_file(run.config_path)
        run.lock()
        if config.seeds == 1:
            train(config, run, resumed=True)
        else:
            train_seeds(config, run)


def train_seeds(config: TrainConfig, parent: RunFolder) -> None:
    """One run a seed in folders of their own, finished ones skipped, then mean and deviation."""
    parent.write_text(parent.config_path, to_yaml(config))
    runs = [parent.path / f"seed-{config.seed + number}" for number in range(config.seeds)]
    for number, folder in enumerate(runs):
        one = dataclasses.replace(config, seed=config.seed + number, seeds=1, output=str(folder))
        if (folder / "report.md").is_file():
            print(f"{folder}: finished before")
        elif (folder / "config.yaml").is_file():
            resume(folder)
        else:
            with RunFolder.create(folder, name_hint="") as run:
                train(one, run)
    summary = write_seeds(parent.path, runs)
    print(f"\n{summary.to_text()}\n\nruns of {config.seeds} seeds: {parent.path}")


def train(config: TrainConfig, run: RunFolder, *, resumed: bool = False) -> None:
    """One training run in `run`, from its start or from its newest checkpoint."""
    with logging_to(run.log_path), memory_errors(config.max_tokens):
        machine = prepare_machine(config)
        tasks = tasks_of(config)
        tables = load_tables(config.data, list(tasks.values()))
        model, tokeniser = load_model(config, machine)
        data = prepare_data(config, tables, tokeniser)
        announce(config, machine, model, data)

        forward = build_forward(config, model, machine)
        losses = task_losses(config, machine, data)
        train_step = build_train_step(config, machine, model, forward, losses, tables, data, tokeniser)
        batches = task_batches(config, data)
        curriculum = build_curriculum(
            batches,
            config.curriculum,
            sizes={name: len(b.examples) for name, b in batches.items()},
            seed=config.seed,
            epochs=config.epochs,
        )
        evaluator = Evaluator(
            forward,
            tasks,
            data,
            losses,
            config.evaluation,
            max_tokens=config.max_tokens,
            seed=config.seed,
            trained_on={name: b.examples for name, b in batches.items()},
            quality=sentence_quality(config, forward, tables, data, tokeniser),
        )
        unfreezing = Unfreezing(model, config.unfreezing) if config.unfreezing.active else None
        facts = run_facts(machine)
        # From here on the folder holds a run: whatever is wrong with the configuration has failed before.
        if not resumed:
            run.write_text(run.config_path, to_yaml(resolved(config, machine)))
        if not run.record_path.is_file():  # a run killed between the two files resumes, too
            run.write_json(run.record_path, describe_run(config, facts, run.name, model, data))
            write_problems(run, data)
        with MetricsLog(run.metrics_path) as log:
            trainer = Trainer(
                model,
                train_step,
                curriculum,
                evaluator,
                CheckpointStore(run.checkpoints),
                log,
                schedule=config.schedule,
                evaluation=config.evaluation,
                run=config.run,
                fingerprint={"data": data_fingerprint(data), "environment": facts},
                unfreezing=unfreezing,
                listeners=tensorboard_listeners(run.path) if config.run.tensorboard else [],
            )
            if resumed:
                trainer.resume()
            trainer.fit()

        load_best_weights(model, run.checkpoints)
        predictions = predict_all(
            forward, tasks, data, max_tokens=config.max_tokens, folder=run.path, mode=config.mode
        )
        resamples = config.evaluation.resamples
        write_report(run.path, tasks, dev_examples(data), resamples=resamples)
    print(f"\n{results_table(run_results(read_run(run.path), tasks, predictions, resamples))}")
    if config.data == SAMPLE:
        print("\nThe sample is synthetic: these scores say that training works, not how good the model is.")
    print(f"\nrun: {run.path}\nreport: {run.report_path}")


def announce(config: TrainConfig, machine: Machine, model: MultiTaskModel, data: TaskSplits) -> None:
    """Say what is about to be trained, on what."""
    total = model.parameter_counts()[-1]
    logger.info(
        "%s, mode %s: %s trainable of %s parameters; %s, %s",
        config.model.pretrained,
        config.mode,
        f"{total.trainable:,}",
        f"{total.total:,}",
        machine.device,
        str(machine.dtype).removeprefix("torch."),
    )
    for name, splits in data.items():
        sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in splits.items())
        logger.info("%s: %s", name, sizes)


if __name__ == "__main__":
    run_main(main)
