"""Format onnx: the plain reference model with a run's weights, exported by `torch.onnx` and checked with onnxruntime.

The graph takes any number of rows of any length up to the encoder's positions. Without a task it gives the encoder's
`last_hidden_state` and `pooler_output`; with one, the task's `logits` or `score` (in label units). A head that joins
two rows has two inputs, one for the first texts and one for the second.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtbert import reference
from mtbert.errors import ExportError
from mtbert.evaluation.metrics import class_names
from mtbert.exporting.run import ExportedRun, write_json
from mtbert.model.activations import activation
from mtbert.model.heads import Head
from mtbert.reference import MinBert, Rows

MODEL_FILE = "model.onnx"
OPSET = 18
_TOLERANCE = 1e-4  # of the check, relative to the largest value: float32 in another order of summation
_NEEDED = ("onnx", "onnxscript", "onnxruntime")

_logger = logging.getLogger(__name__)


class EncoderGraph(nn.Module):
    """Rows to last hidden states [B, L, C] and BERT's pooler of the first tokens [B, C]."""

    def __init__(self, bert: MinBert) -> None:
        super().__init__()
        self.bert = bert

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All int64 [B, L]; attention_mask is 1 for tokens and 0 for padding."""
        rows = Rows(input_ids, token_type_ids, attention_mask != 0)
        hidden = self.bert(rows)
        return hidden, self.bert.pool(hidden, rows, "pooler")


class RowGraph(nn.Module):
    """Rows (sentences, or cross-encoded pairs) to a head's outputs [B, outputs]."""

    def __init__(self, bert: MinBert, head: reference.Head) -> None:
        super().__init__()
        self.model = reference.MultitaskBert(bert, {"task": head}).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Inputs as in `EncoderGraph`."""
        outputs: Tensor = self.model("task", Rows(input_ids, token_type_ids, attention_mask != 0))
        return outputs


class PairGraph(RowGraph):
    """Two rows an example, each padded to its own length, to a head's outputs [B, outputs]."""

    def forward(  # type: ignore[override]
        self, first_ids: Tensor, first_mask: Tensor, second_ids: Tensor, second_mask: Tensor
    ) -> Tensor:
        """All int64, the first two [B, L], the others [B, M]."""
        first = Rows(first_ids, torch.zeros_like(first_ids), first_mask != 0)
        second = Rows(second_ids, torch.zeros_like(second_ids), second_mask != 0)
        outputs: Tensor = self.model("task", first, second)
        return outputs


def write_graph(exported: ExportedRun, folder: Path) -> None:
    """Write model.onnx, the tokeniser, and what the outputs mean. Raises ExportError."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--format onnx needs {', '.join(missing)}: pip install -e '.[export]'")
    bert = reference_encoder(exported)
    ids, mask, types = (torch.ones(2, 7, dtype=torch.int64) for _ in range(3))
    longest = bert.config.max_position_embeddings
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=longest)
    row = {0: batch, 1: sequence}
    names = ["input_ids", "attention_mask", "token_type_ids"]
    graph: nn.Module
    inputs: tuple[Tensor, ...] = (ids, mask, types)
    shapes: tuple[dict[int, Any], ...] = (row, row, row)
    if exported.name is None:
        graph, outputs = EncoderGraph(bert), ["last_hidden_state", "pooler_output"]
    else:
        head = reference_head(exported.head, bert.config.hidden_size)
        outputs = ["score" if exported.task.kind == "similarity" else "logits"]
        if exported.head.features:
            other = {0: batch, 1: torch.export.Dim("second_sequence", max=longest)}
            graph, inputs, shapes = (
                PairGraph(bert, head),
                (ids, mask, ids[:, :5], mask[:, :5]),
                (row, row, other, other),
            )
            names = [
                f"{place}_{kind}" for place in ("first", "second") for kind in ("input_ids", "attention_mask")
            ]
        else:
            graph = RowGraph(bert, head)
    graph = graph.eval().requires_grad_(False)
    path = folder / MODEL_FILE
    with _quiet():
        program = torch.onnx.export(
            graph,
            inputs,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)
    _check(graph, path, names, longest)
    exported.loaded.tokeniser.write(folder, max_length=exported.max_length)
    write_json(folder / "graph.json", _description(exported, names, outputs))


def reference_encoder(exported: ExportedRun) -> MinBert:
    """The reference's BERT with the run's weights, float32."""
    encoder = exported.encoder
    known = {field.name for field in fields(reference.BertConfig)}
    sizes = {name: value for name, value in asdict(encoder.config).items() if name in known}
    bert = MinBert(reference.BertConfig(**sizes))
    bert.load_state_dict({_reference_name(name): value.float() for name, value in exported.tensors.items()})
    return bert


_RENAMED = (
    ("embeddings.word_embeddings.", "embeddings.word."),
    ("embeddings.position_embeddings.", "embeddings.position."),
    ("embeddings.token_type_embeddings.", "embeddings.token_type."),
    ("embeddings.LayerNorm.", "embeddings.norm."),
    ("encoder.layer.", "layers."),
    (".attention.self.", ".attention."),
    (".attention.output.dense.", ".attention_output."),
    (".attention.output.LayerNorm.", ".attention_norm."),
    (".intermediate.dense.", ".intermediate."),
    (".output.dense.", ".output."),
    (".output.LayerNorm.", ".output_norm."),
    ("pooler.dense.", "pooler."),
)


def _reference_name(name: str) -> str:
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name


def reference_head(head: Head, width: int) -> reference.Head:
    """The reference's head of the same shape with the same weights, float32."""
    config, spec = head.config, head.spec
    plain = reference.Head(
        spec.name,
        width,
        spec.outputs,
        pooling=config.pooling,
        pair_features=head.features,
        tower_layers=config.tower_layers,
        hidden_layers=config.hidden_layers,
        hidden_size=config.hidden_size,
        activation=None if config.activation == "none" else activation(config.activation),
        dropout=config.dropout,
        score_range=spec.score_range,
    )
    renamed = {}
    for name, value in head.state_dict().items():
        owner, kind = name.rsplit(".", 1)
        renamed[f"{owner}.linear.{kind}"] = value.float()
    plain.load_state_dict(renamed)
    return plain


def _description(exported: ExportedRun, names: list[str], outputs: list[str]) -> dict[str, Any]:
    described: dict[str, Any] = {"inputs": names, "outputs": outputs, "max_length": exported.max_length}
    if exported.name is not None:
        task = exported.task
        described |= {"task": task.name, "kind": task.kind, "classes": list(class_names(task))}
        described |= {"score_range": list(task.score_range) if task.score_range else None}
    return described


@torch.no_grad()
def _check(graph: nn.Module, path: Path, names: list[str], longest: int) -> None:
    """Compare the file with the module it is of, on odd shapes and with padding. Raises ExportError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for rows, length, second in ((1, 3, 3), (3, 17, 5), (1, longest, 3), (2, 9, longest)):
        inputs: dict[str, Tensor] = {}
        for name in names:
            size = second if name.startswith("second") else length
            if name.endswith("input_ids"):
                inputs[name] = torch.randint(0, _words(graph), (rows, size), generator=generator)
            elif name.endswith("mask"):
                kept = torch.randint(1, size + 1, (rows, 1), generator=generator)
                inputs[name] = (torch.arange(size) < kept).long()
            else:
                inputs[name] = torch.zeros(rows, size, dtype=torch.int64)
        expected = graph(*inputs.values())
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        for ours, theirs in zip(expected if isinstance(expected, tuple) else (expected,), found, strict=True):
            off = (ours - torch.from_numpy(theirs)).abs().max().item()
            if not off <= _TOLERANCE * max(1.0, ours.abs().max().item()):
                raise ExportError(
                    f"the graph is off by {off:.3g} on {rows} rows of {length} tokens; nothing is written"
                )


def _words(graph: nn.Module) -> int:
    bert = next(module for module in graph.modules() if isinstance(module, MinBert))
    return bert.config.vocab_size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and its libraries' deprecations from the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
