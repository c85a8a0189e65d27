"""`python -m mtbert.train`: fine-tune one BERT on several tasks at once.

Reads from top to bottom: parse, read the tables, build the model, train, and report on the best checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from mtbert.cli import TRUST, config_on_all_ranks, option_value, parse_train, resume_options, run_main
from mtbert.config import TrainConfig, to_yaml
from mtbert.data.dataset import TaskData
from mtbert.engine.assembly import assemble
from mtbert.engine.build import (
    Machine,
    TaskSplits,
    check_ranks,
    data_fingerprint,
    resolved,
    run_facts,
)
from mtbert.engine.checkpoint import CheckpointStore
from mtbert.engine.distributed import ALONE, World, on_all_ranks
from mtbert.engine.finish import dev_examples, load_best_weights, predict_all, swap_pairs
from mtbert.engine.forward import Forward, PackedForward
from mtbert.engine.frozen_prefix import PrefixForward, describe_frozen
from mtbert.engine.interruptions import memory_errors
from mtbert.engine.metrics_log import MetricsLog
from mtbert.engine.precision import product_settings
from mtbert.engine.predictor import Predictor
from mtbert.engine.pretraining import check_stages, describe_stages, run_pretraining
from mtbert.engine.profiling import profiling
from mtbert.engine.record import describe_run, write_problems
from mtbert.engine.run_folder import RunFolder, begun_run, new_run
from mtbert.engine.run_log import logging_to
from mtbert.engine.shared import SharedParts
from mtbert.engine.tensorboard import Listener, tensorboard_listeners
from mtbert.engine.trainer import Trainer
from mtbert.errors import ConfigError
from mtbert.evaluation.profile import profile_text, read_profile
from mtbert.evaluation.report import run_results, write_report
from mtbert.evaluation.results import results_table
from mtbert.evaluation.run import frozen_layers_text, read_run
from mtbert.evaluation.seeds import write_seeds
from mtbert.evaluation.swaps import write_swaps
from mtbert.ranges import span
from mtbert.tasks.loading import SAMPLE

logger = logging.getLogger("mtbert.train")  # __name__ is __main__ when it is run


def main(arguments: list[str], world: World = ALONE) -> None:
    """Train, or resume, as the command line says. world: the processes that train together."""
    resumed = option_value(arguments, "--resume")
    if resumed is not None:
        resume(Path(resumed), resume_options(arguments), world, trust_plugins=TRUST in arguments)
        return
    config = parse_train(arguments)
    with new_run(world, config.output, "-".join(config.tasks)) as (run, begun):
        if begun:  # torchrun has started the ranks anew
            config = config_on_all_ranks(world, run.config_path)
        if config.seeds == 1:
            train(config, run, resumed=begun, world=world)
        else:
            train_seeds(config, run, world=world)


def resume(
    folder: Path, options: Sequence[str] = (), world: World = ALONE, *, trust_plugins: bool = False
) -> None:
    """Go on with an interrupted run, or with the runs of several seeds. options: of the profile."""
    with begun_run(world, folder) as run:
        if world.told(lambda: run.is_mlm):
            raise ConfigError(
                f"{folder} is masked-language modelling: go on with python -m mtbert.pretrain --resume {folder}"
            )
        config = config_on_all_ranks(world, run.config_path, options, trust_plugins=trust_plugins)
        if config.seeds == 1:
            train(config, run, resumed=True, world=world)
        else:
            train_seeds(config, run, options, world)


def train_seeds(
    config: TrainConfig, parent: RunFolder, options: Sequence[str] = (), world: World = ALONE
) -> None:
    """One run a seed in folders of their own, finished ones skipped, then mean and deviation.

    options: of the profile, for those that are resumed.
    """
    if world.is_main:
        parent.write_text(parent.config_path, to_yaml(config))
    runs = [parent.path / f"seed-{config.seed + number}" for number in range(config.seeds)]
    for number, folder in enumerate(runs):
        one = dataclasses.replace(config, seed=config.seed + number, seeds=1, output=str(folder))
        found = world.told(functools.partial(_state_of, folder))
        if found == "finished":
            if world.is_main:
                print(f"{folder}: finished before")
        elif found == "begun":
            resume(folder, options, world)
        else:
            with new_run(world, folder, "") as (run, _):
                train(one, run, world=world)
    if world.is_main:
        summary = write_seeds(parent.path, runs)
        print(f"\n{summary.to_text()}\n\nruns of {config.seeds} seeds: {parent.path}")


def _state_of(folder: Path) -> str:
    if (folder / "report.md").is_file():
        return "finished"
    return "begun" if (folder / "config.yaml").is_file() else "absent"


def train(
    config: TrainConfig,
    run: RunFolder,
    *,
    resumed: bool = False,
    world: World = ALONE,
    shared: SharedParts | None = None,
    listeners: Sequence[Listener] = (),
) -> None:
    """One training run in `run` with what stands before it, from its start or from its newest checkpoint.

    The ranks of `world` train together, and rank 0 writes. shared: what it has in common with other runs of this
    process. listeners: get every line of metrics.jsonl; what one of them raises ends the run.
    """
    with (
        logging_to(run.log_path, rank=world.rank),
        memory_errors(config.max_tokens),
        product_settings(config.precision),
    ):
        parts = assemble(config, world, shared)
        check_stages(config, run.path, lambda stage: assemble(stage, world))
        facts = run_facts(parts.machine)
        check_ranks(world, config, facts, parts.model, _tables_of(parts.data))
        # From here on the folder holds a run: whatever is wrong with the configuration has failed before.
        if not resumed and world.is_main:
            run.write_text(run.config_path, to_yaml(resolved(config, parts.machine)))
    start = config
    if config.pretraining.active:
        del parts
        start = run_pretraining(config, run, train, world)  # its stages have logs of their own
    with (
        logging_to(run.log_path, rank=world.rank),
        memory_errors(config.max_tokens),
        product_settings(config.precision),
    ):
        if start is not config:
            parts = assemble(start, world, shared)
            check_ranks(world, start, facts, parts.model, ())
        machine, model, data, forward = parts.machine, parts.model, parts.data, parts.forward
        announce(start, machine, forward, data)
        if config.graphs != "never":
            logger.info("CUDA graphs: %s", parts.graphs)
        if isinstance(forward, PrefixForward):  # before the clock of the training runs
            forward.open_files()
        if world.is_main and not run.record_path.is_file():  # a run killed between the two files resumes, too
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
        with MetricsLog(run.metrics_path) if world.is_main else contextlib.nullcontext() as log:
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
                listeners=[
                    *(tensorboard_listeners(run.path) if config.run.tensorboard and world.is_main else ()),
                    *listeners,
                ],
                compiled=parts.compiled,
                world=world,
            )
            if resumed:
                trainer.resume()
            with profiling(config, run.path, machine, model, model.encoder.config):
                trainer.fit()
                if parts.train_step.graphs is not None:
                    logger.info("CUDA graphs, steps: %s", parts.train_step.graphs.summary())
                load_best_weights(model, run.checkpoints, world)
                with span("prediction"):
                    predictions = predict_all(
                        forward,
                        parts.tasks,
                        data,
                        max_tokens=config.max_tokens,
                        folder=run.path,
                        mode=config.mode,
                        world=world,
                    )
                if isinstance(forward, PackedForward) and forward.graphs is not None:
                    logger.info("CUDA graphs, passes without training: %s", forward.graphs.summary())
        if not world.is_main:
            return
        predictor = Predictor(
            model, parts.tokeniser, machine, parts.tasks, config.task, max_tokens=config.max_tokens
        )
        pairs = {name: task for name, task in parts.tasks.items() if task.is_pair}
        swaps = {name: swap_pairs(predictor, task, data[name]["dev"].table) for name, task in pairs.items()}
        write_swaps(run.path, swaps)
        resamples = config.evaluation.resamples
        write_report(run.path, parts.tasks, dev_examples(data), resamples=resamples)
    print(f"\n{results_table(run_results(read_run(run.path), parts.tasks, predictions, resamples))}")
    if config.data == SAMPLE:
        print("\nThe sample is synthetic: these scores say that training works, not how good the model is.")
    if config.profile == "torch" and (profile := read_profile(run.path)) is not None:
        print(f"\n{profile_text(profile, run.path)}")
    print(f"\nrun: {run.path}\nreport: {run.report_path}")


def _tables_of(data: TaskSplits) -> list[TaskData]:
    return [examples for splits in data.values() for examples in splits.values()]


def announce(config: TrainConfig, machine: Machine, forward: Forward, data: TaskSplits) -> None:
    """Say what is about to be trained, on what."""
    total = forward.model.parameter_counts()[-1]
    logger.info(
        "%s, mode %s: %s trainable of %s parameters; %s, %s%s",
        config.model.pretrained,
        config.mode,
        f"{total.trainable:,}",
        f"{total.total:,}",
        machine.device,
        machine.arithmetic,
        f", {machine.world.size} ranks" if machine.world.size > 1 else "",
    )
    frozen = frozen_layers_text(describe_frozen(forward))
    if frozen is not None and config.mode != "last-linear-layer":
        logger.info("frozen: %s", frozen)
    for name, splits in data.items():
        sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in splits.items())
        logger.info("%s: %s", name, sizes)


if __name__ == "__main__":
    run_main(on_all_ranks(main), ranks=True)
