"""`python -m mtbert.export RUN`: the best checkpoint's encoder in the Hugging Face layout, in RUN/encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtbert.cli import config_from_file, run_main
from mtbert.engine.export import export_encoder
from mtbert.engine.load_run import load_run
from mtbert.engine.run_folder import RunFolder
from mtbert.engine.run_log import logging_to


def main(arguments: list[str]) -> None:
    """Write the encoder; another run starts from it with `--model.pretrained RUN`."""
    parser = argparse.ArgumentParser(
        prog="python -m mtbert.export",
        description="Write the encoder of a run's best checkpoint, without its heads, to RUN/encoder: a model that"
        " transformers reads, and that another run starts from with --model.pretrained RUN.",
        epilog="--debug shows the traceback of an error.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    options = parser.parse_args(arguments)
    with logging_to(None):
        run = RunFolder.open(options.run)
        config = config_from_file(run.config_path)
        loaded = load_run(run, config, device="cpu")
        folder = export_encoder(loaded.model.encoder, run.path, pretrained=loaded.config.model.pretrained)
    print(f"step {loaded.step}: {folder}")


if __name__ == "__main__":
    run_main(main)
