"""Format hf: a folder for `transformers`, the encoder alone or with one task's head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtbert.evaluation.metrics import class_names
from mtbert.exporting.classifier import fold, obstacle
from mtbert.exporting.run import ExportedRun, write_bert
from mtbert.model.kept_heads import save_heads


def write_encoder(exported: ExportedRun, folder: Path) -> None:
    """A `BertModel`, and beside it every head in a file of mtbert's own, from which a run goes on."""
    write_bert(exported, folder, tensors=exported.tensors, extra={"architectures": ["BertModel"]})
    save_heads(exported.loaded.model, folder)


def write_classifier(exported: ExportedRun, folder: Path) -> None:
    """A `BertForSequenceClassification` of one task. Raises ExportError for a head that is none."""
    width = exported.encoder.config.hidden_size
    exported = exported.chosen(lambda task, head: obstacle(task, head, width), "hf")
    write_sequence_classification(exported, folder, two_logits=True, extra={})


def write_sequence_classification(
    exported: ExportedRun, folder: Path, *, two_logits: bool, extra: Mapping[str, Any]
) -> None:
    """The model of `write_classifier`; a binary head has two logits or its own one. extra: for config.json."""
    task = exported.task
    classifier = fold(exported.head, task, exported.encoder.pooler, two_logits=two_logits)
    names = list(class_names(task))
    if task.kind == "similarity":
        names = [task.layout.label_column]
    elif task.kind == "binary" and not two_logits:
        names = names[1:]
    problem = "regression" if task.kind == "similarity" else "single_label_classification"
    tensors = {f"bert.{name}": value for name, value in exported.tensors.items()} | classifier.tensors()
    config = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        # transformers has no name for the problem of a single logit.
        "problem_type": None if task.kind == "binary" and not two_logits else problem,
        "classifier_dropout": exported.settings.head.dropout,
    }
    write_bert(exported, folder, tensors=tensors, extra=config | dict(extra))
