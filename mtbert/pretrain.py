"""`python -m mtbert.pretrain`: masked-language modelling on the tasks' own sentences, and nothing after it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mtbert.cli import TRUST, config_on_all_ranks, option_value, parse_train, resume_options, run_main
from mtbert.engine.distributed import ALONE, World, on_all_ranks
from mtbert.engine.mlm_run import run_mlm
from mtbert.engine.run_folder import begun_run, new_run
from mtbert.errors import ConfigError


def main(arguments: list[str], world: World = ALONE) -> None:
    """Train, or resume, as the command line says; the options are those of `mtbert.train`."""
    resumed = option_value(arguments, "--resume")
    if resumed is not None:
        with begun_run(world, Path(resumed)) as run:
            if world.told(lambda: run.record_path.is_file() and not run.is_mlm):
                raise ConfigError(
                    f"{resumed} trains tasks: go on with python -m mtbert.train --resume {resumed}"
                )
            config = config_on_all_ranks(
                world, run.config_path, resume_options(arguments), trust_plugins=TRUST in arguments
            )
            run_mlm(config, run, resumed=True, world=world)
        return
    config = parse_train(arguments)
    if config.pretraining.task is not None:
        raise ConfigError(
            "pretraining.task: masked-language modelling alone is done here; mtbert.train trains a task first"
        )
    if not config.pretraining.mlm_epochs:
        config = dataclasses.replace(
            config, pretraining=dataclasses.replace(config.pretraining, mlm_epochs=1.0)
        )
    with new_run(world, config.output, "mlm") as (run, begun):
        if begun:
            config = config_on_all_ranks(world, run.config_path)
        run_mlm(config, run, resumed=begun, world=world)


if __name__ == "__main__":
    run_main(on_all_ranks(main), ranks=True)
