"""A trained encoder in the Hugging Face layout, in a run's folder: what another run may start from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from mtbert.engine.durable import sync_file, sync_folder
from mtbert.errors import UserError
from mtbert.model.bert import BertEncoder
from mtbert.model.kept_heads import save_heads
from mtbert.model.multitask import MultiTaskModel
from mtbert.model.pretrained import ENCODER_FOLDER, origin, resolve, save_encoder


def export_encoder(
    encoder: BertEncoder, run: Path, *, pretrained: str, heads_of: MultiTaskModel | None = None
) -> Path:
    """Write RUN/encoder with the tokeniser's files, as a whole or not at all; returns it.

    pretrained: what the encoder began from. heads_of: also keep the heads of this model. Raises UserError when the disk
    refuses, ModelFileError for an encoder that has no such layout.
    """
    target, partial = run / ENCODER_FOLDER, run / f".{ENCODER_FOLDER}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        save_encoder(encoder, partial, tokeniser_folder=resolve(pretrained), origin=origin(pretrained))
        if heads_of is not None:
            save_heads(heads_of, partial)
        for path in partial.iterdir():
            with path.open("rb") as file:
                sync_file(file.fileno())
        sync_folder(partial)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        sync_folder(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{target} cannot be written: {reason}") from error
    return target


def is_exported(run: Path) -> bool:
    """Whether RUN/encoder is there; it is never there in part."""
    return (run / ENCODER_FOLDER / "config.json").is_file()
