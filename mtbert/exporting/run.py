"""What the writers get: a loaded run and the task that the export is of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mtbert.config import TrainConfig
from mtbert.engine.load_run import LoadedRun
from mtbert.errors import ExportError
from mtbert.model.bert import BertEncoder
from mtbert.model.heads import Head, HeadConfig
from mtbert.model.pretrained import MINILM, hugging_face_config, origin, plain_tensors
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.registry import Task

MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
"""Where the bundled weights come from, byte for byte."""


@dataclass(frozen=True)
class ExportedRun:
    """A run and one of its tasks, or all of them."""

    loaded: LoadedRun
    config: TrainConfig
    """The run's own configuration (what is loaded may have been read from elsewhere)."""
    name: str | None
    """The task; None: the encoder, and all heads where the format has a place for them."""

    @property
    def encoder(self) -> BertEncoder:
        """The trained encoder."""
        return self.loaded.model.encoder

    @property
    def task(self) -> Task:
        """The task that is exported."""
        assert self.name is not None
        return self.loaded.tasks[self.name]

    @property
    def settings(self) -> TaskConfig:
        """The task's settings."""
        assert self.name is not None
        return self.config.task[self.name]

    @property
    def head(self) -> Head:
        """The task's head."""
        assert self.name is not None
        return self.loaded.model.head(self.name)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The encoder under Hugging Face's names, adapters folded in; see `plain_tensors`."""
        return plain_tensors(self.encoder, task=self.name)

    @property
    def max_length(self) -> int:
        """The longest row in tokens that the model was trained for."""
        tasks = self.config.task
        longest = [tasks[name].max_length for name in ([self.name] if self.name else self.loaded.tasks)]
        return min(max(longest), self.encoder.config.max_position_embeddings)

    @property
    def base_model(self) -> str | None:
        """The hub id of what the weights began from; None for a folder of this machine."""
        name = origin(self.config.model.pretrained)
        if name == MINILM:
            return MINILM_HUB_ID
        return None if Path(name).expanduser().exists() or Path(name).is_absolute() else name

    def chosen(self, fits: Callable[[Task, HeadConfig], str | None], format_name: str) -> ExportedRun:
        """The run with a task that `fits` finds nothing against: the one that was named, or the only one.

        Raises ExportError that says what stands against the named one, or against each.
        """
        tasks, settings = self.loaded.tasks, self.config.task
        names = [self.name] if self.name is not None else list(tasks)
        reasons = {name: fits(tasks[name], settings[name].head) for name in names}
        fitting = [name for name, reason in reasons.items() if reason is None]
        if len(fitting) > 1:
            raise ExportError(f"--task: {format_name} carries one task; name one of {', '.join(fitting)}")
        if not fitting:
            listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise ExportError(f"--format {format_name} cannot carry {listed}")
        return dataclasses.replace(self, name=fitting[0])


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write JSON (UTF-8), indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as transformers reads it, in float32."""
    save_file(
        {name: value.detach().float().contiguous().clone() for name, value in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def write_bert(
    exported: ExportedRun, folder: Path, *, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]
) -> None:
    """config.json (with `extra`), model.safetensors and the tokeniser of a model over this encoder."""
    config = {**hugging_face_config(exported.encoder), "dtype": "float32", **extra}
    if exported.base_model == MINILM_HUB_ID:
        config["_name_or_path"] = (
            MINILM  # by which a run that starts from here knows what the encoder has seen
        )
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", tensors)
    exported.loaded.tokeniser.write(folder, max_length=exported.max_length)
