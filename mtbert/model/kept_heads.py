"""Heads to go on with: a file beside an exported encoder, read where a task of the same name has the same head."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mtbert.errors import ModelFileError
from mtbert.model.multitask import MultiTaskModel

HEADS_FILE = "heads.safetensors"


def save_heads(model: MultiTaskModel, folder: Path) -> None:
    """Write the parameters of all heads as `TASK.PARAMETER`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.heads.state_dict().items()}
    save_file(tensors, folder / HEADS_FILE)


def load_heads(model: MultiTaskModel, folder: Path) -> list[str]:
    """Fill the heads of `model` that `folder` has under the same name and in the same shape; returns their tasks.

    A folder without heads, as models from elsewhere are, gives none.
    """
    path = folder / HEADS_FILE
    if not path.is_file():
        return []
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: is damaged ({error})") from None
    loaded = []
    for task, head in model.heads.items():
        own = head.state_dict()
        found = {
            name.removeprefix(f"{task}."): value
            for name, value in stored.items()
            if name.startswith(f"{task}.")
        }
        if own and {n: v.shape for n, v in own.items()} == {n: v.shape for n, v in found.items()}:
            head.load_state_dict(found)
            loaded.append(task)
    return loaded
