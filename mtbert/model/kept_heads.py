"""Heads to go on with: a file beside an exported encoder, read where a task of the same name has the same head."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mtbert.errors import ModelFileError
from mtbert.model.multitask import MultiTaskModel
from mtbert.outside_files import own_file, tensor_facts

HEADS_FILE = "heads.safetensors"


def save_heads(model: MultiTaskModel, folder: Path) -> None:
    """Write the parameters of all heads as `TASK.PARAMETER`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.heads.state_dict().items()}
    save_file(tensors, folder / HEADS_FILE)


def load_heads(model: MultiTaskModel, folder: Path) -> list[str]:
    """Fill the heads of `model` that `folder` has under the same name and in the same shape; returns their tasks.

    A folder without heads, as models from elsewhere are, gives none.
    """
    path = own_file(folder, HEADS_FILE, ModelFileError)
    if not path.is_file():
        return []
    facts = tensor_facts(path, ModelFileError)
    loaded = []
    try:
        with safe_open(path, framework="pt") as file:
            for task, head in model.heads.items():
                own = {f"{task}.{name}": value for name, value in head.state_dict().items()}
                found = {name: entry.shape for name, entry in facts.items() if name.startswith(f"{task}.")}
                if not own or {name: tuple(value.shape) for name, value in own.items()} != found:
                    continue
                strange = [name for name in found if facts[name].dtype not in ("F64", "F32", "F16", "BF16")]
                if strange:
                    raise ModelFileError(
                        f"{path}: {strange[0]} has dtype {facts[strange[0]].dtype:.20}, expected floats"
                    )
                with torch.no_grad():
                    for name, value in own.items():
                        value.copy_(file.get_tensor(name))
                loaded.append(task)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: is damaged ({error!s:.300})") from None
    return loaded
