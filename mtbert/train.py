"""`python -m mtbert.train`: fine-tune one BERT on several tasks at once.

Reads from top to bottom: parse, read the tables, build the model, train, and report on the best checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from mtbert.cli import config_from_file, option_value, parse_train, resume_options, run_main
from mtbert.config import TrainConfig, to_yaml
from mtbert.engine.assembly import assemble
from mtbert.engine.build import (
    Machine,
    TaskSplits,
    data_fingerprint,
    resolved,
    run_facts,
)
from mtbert.engine.checkpoint import CheckpointStore
from mtbert.engine.finish import dev_examples, load_best_weights, predict_all
from mtbert.engine.forward import Forward
from mtbert.engine.frozen_prefix import PrefixForward, describe_frozen
from mtbert.engine.interruptions import memory_errors
from mtbert.engine.metrics_log import MetricsLog
from mtbert.engine.precision import product_settings
from mtbert.engine.pretraining import check_stages, describe_stages, run_pretraining
from mtbert.engine.profiling import profiling
from mtbert.engine.record import describe_run, write_problems
from mtbert.engine.run_folder import RunFolder
from mtbert.engine.run_log import logging_to
from mtbert.engine.tensorboard import tensorboard_listeners
from mtbert.engine.trainer import Trainer
from mtbert.errors import ConfigError
from mtbert.evaluation.profile import profile_text, read_profile
from mtbert.evaluation.report import run_results, write_report
from mtbert.evaluation.results import results_table
from mtbert.evaluation.run import frozen_layers_text, read_run
from mtbert.evaluation.seeds import write_seeds
from mtbert.ranges import span
from mtbert.tasks.loading import SAMPLE

logger = logging.getLogger("mtbert.train")  # __name__ is __main__ when it is run


def main(arguments: list[str]) -> None:
    """Train, or resume, as the command line says."""
    resumed = option_value(arguments, "--resume")
    if resumed is not None:
        resume(Path(resumed), resume_options(arguments))
        return
    config = parse_train(arguments)
    with RunFolder.create(config.output, name_hint="-".join(config.tasks)) as run:
        if config.seeds == 1:
            train(config, run)
        else:
            train_seeds(config, run)


def resume(folder: Path, options: Sequence[str] = ()) -> None:
    """Go on with an interrupted run, or with the runs of several seeds. options: of the profile."""
    with RunFolder.open(folder) as run:
        if run.is_mlm:
            raise ConfigError(
                f"{folder} is masked-language modelling: go on with python -m mtbert.pretrain --resume {folder}"
            )
        config = config_from_file(run.config_path, options)
        run.lock()
        if config.seeds == 1:
            train(config, run, resumed=True)
        else:
            train_seeds(config, run, options)


def train_seeds(config: TrainConfig, parent: RunFolder, options: Sequence[str] = ()) -> None:
    """One run a seed in folders of their own, finished ones skipped, then mean and deviation.

    options: of the profile, for those that are resumed.
    """
    parent.write_text(parent.config_path, to_yaml(config))
    runs = [parent.path / f"seed-{config.seed + number}" for number in range(config.seeds)]
    for number, folder in enumerate(runs):
        one = dataclasses.replace(config, seed=config.seed + number, seeds=1, output=str(folder))
        if (folder / "report.md").is_file():
            print(f"{folder}: finished before")
        elif (folder / "config.yaml").is_file():
            resume(folder, options)
        else:
            with RunFolder.create(folder, name_hint="") as run:
                train(one, run)
    summary = write_seeds(parent.path, runs)
    print(f"\n{summary.to_text()}\n\nruns of {config.seeds} seeds: {parent.path}")


def train(config: TrainConfig, run: RunFolder, *, resumed: bool = False) -> None:
    """One training run in `run` with what stands before it, from its start or from its newest checkpoint."""
    with logging_to(run.log_path), memory_errors(config.max_tokens), product_settings(config.precision):
        parts = assemble(config)
        check_stages(config, run.path, assemble)
        facts = run_facts(parts.machine)
        # From here on the folder holds a run: whatever is wrong with the configuration has failed before.
        if not resumed:
            run.write_text(run.config_path, to_yaml(resolved(config, parts.machine)))
    start = config
    if config.pretraining.active:
        del parts
        start = run_pretraining(config, run, train)  # its stages have logs of their own
    with logging_to(run.log_path), memory_errors(config.max_tokens), product_settings(config.precision):
        if start is not config:
            parts = assemble(start)
        machine, model, data, forward = parts.machine, parts.model, parts.data, parts.forward
        announce(start, machine, forward, data)
        if config.graphs != "off":
            logger.info("CUDA graphs: %s", parts.graphs)
        if isinstance(forward, PrefixForward):  # before the clock of the training runs
            forward.open_files()
        if not run.record_path.is_file():  # a run killed between the two files resumes, too
            run.write_json(
                run.record_path,
                describe_run(config, facts, run.name, model, data)
                | {
                    "pretraining": describe_stages(config, run.path),
                    "frozen_layers": describe_frozen(forward),
                    "graphs": parts.graphs,
                },
            )
            write_problems(run, data)
        with MetricsLog(run.metrics_path) as log:
            trainer = Trainer(
                model,
                parts.train_step,
                parts.curriculum,
                parts.evaluator,
                CheckpointStore(run.checkpoints),
                log,
                schedule=config.schedule,
                evaluation=config.evaluation,
                run=config.run,
                inputs=config.input,
                device=machine.device,
                fingerprint={"data": data_fingerprint(data), "environment": facts},
                unfreezing=parts.unfreezing,
                listeners=tensorboard_listeners(run.path) if config.run.tensorboard else [],
                compiled=parts.compiled,
            )
            if resumed:
                trainer.resume()
            with profiling(config, run.path, machine, model, model.encoder.config):
                trainer.fit()
                if parts.train_step.graphs is not None:
                    logger.info("CUDA graphs, steps: %s", parts.train_step.graphs.summary())
                load_best_weights(model, run.checkpoints)
                with span("prediction"):
                    predictions = predict_all(
                        forward,
                        parts.tasks,
                        data,
                        max_tokens=config.max_tokens,
                        folder=run.path,
                        mode=config.mode,
                    )
        resamples = config.evaluation.resamples
        write_report(run.path, parts.tasks, dev_examples(data), resamples=resamples)
    print(f"\n{results_table(run_results(read_run(run.path), parts.tasks, predictions, resamples))}")
    if config.data == SAMPLE:
        print("\nThe sample is synthetic: these scores say that training works, not how good the model is.")
    if config.profile == "torch" and (profile := read_profile(run.path)) is not None:
        print(f"\n{profile_text(profile, run.path)}")
    print(f"\nrun: {run.path}\nreport: {run.report_path}")


def announce(config: TrainConfig, machine: Machine, forward: Forward, data: TaskSplits) -> None:
    """Say what is about to be trained, on what."""
    total = forward.model.parameter_counts()[-1]
    logger.info(
        "%s, mode %s: %s trainable of %s parameters; %s, %s",
        config.model.pretrained,
        config.mode,
        f"{total.trainable:,}",
        f"{total.total:,}",
        machine.device,
        machine.arithmetic,
    )
    frozen = frozen_layers_text(describe_frozen(forward))
    if frozen is not None and config.mode != "last-linear-layer":
        logger.info("frozen: %s", frozen)
    for name, splits in data.items():
        sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in splits.items())
        logger.info("%s: %s", name, sizes)


if __name__ == "__main__":
    run_main(main)
