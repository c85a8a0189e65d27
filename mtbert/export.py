"""`python -m mtbert.export RUN`: the best checkpoint's encoder for another run, or a model for another library."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtbert.cli import add_trust, config_from_file, run_main
from mtbert.engine.export import export_encoder
from mtbert.engine.load_run import load_run
from mtbert.engine.run_folder import RunFolder
from mtbert.engine.run_log import logging_to
from mtbert.errors import ConfigError
from mtbert.exporting import FORMATS
from mtbert.exporting.run import ExportedRun
from mtbert.exporting.write import write_export


def main(arguments: list[str]) -> None:
    """Write the encoder into the run's folder, or a model folder of another library."""
    parser = argparse.ArgumentParser(
        prog="python -m mtbert.export",
        description="Without --format: write the encoder of a run's best checkpoint, without its heads, to RUN/encoder,"
        " which another run starts from with --model.pretrained RUN. With --format: write a new folder DIR for another"
        " library, with the tokeniser and a model card.",
        epilog="--debug shows the traceback of an error. docs/export.md says what each format carries.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--format", choices=FORMATS, help="the library that will load the model")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder for the model")
    parser.add_argument(
        "--task",
        metavar="T",
        help="the task whose head goes with the encoder (default: hf and onnx have the encoder alone, peft has every"
        " task's adapter, sentence-transformers takes the only task that fits)",
    )
    add_trust(parser)
    options = parser.parse_args(arguments)
    if options.format is None and (options.output is not None or options.task is not None):
        given = "--output" if options.output is not None else "--task"
        raise ConfigError(f"{given} belongs to a format: add --format {'|'.join(FORMATS)}")
    if options.format is not None and options.output is None:
        raise ConfigError("--output: name a new folder for the model")
    with logging_to(None):
        run = RunFolder.open(options.run)
        config = config_from_file(run.config_path, trust_plugins=options.trust_plugins)
        if options.task is not None and options.task not in config.tasks:
            raise ConfigError(
                f"--task: {run.path} was trained on {', '.join(config.tasks)}, not on {options.task}"
            )
        loaded = load_run(run, config, device="cpu")
        if options.format is None:
            folder = export_encoder(loaded.model.encoder, run.path, pretrained=loaded.config.model.pretrained)
        else:
            folder = write_export(ExportedRun(loaded, config, options.task), options.format, options.output)
    print(f"step {loaded.step}: {folder}")


if __name__ == "__main__":
    run_main(main)
