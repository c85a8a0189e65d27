"""Format sentence-transformers: a `SentenceTransformer` of a pair task's two rows, or a `CrossEncoder`.

The files name the library's modules as its versions 2 to 5 do; later ones read those names, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mtbert.exporting.classifier import obstacle
from mtbert.exporting.hugging_face import write_sequence_classification
from mtbert.exporting.run import ExportedRun, write_bert, write_json, write_tensors
from mtbert.model.activations import ACTIVATIONS
from mtbert.model.heads import CROSS_ENCODER, HeadConfig
from mtbert.tasks.registry import Task

_MODULES = "sentence_transformers.models"
_CLASSES = {
    "celu": "CELU", "elu": "ELU", "gelu": "GELU", "hardshrink": "Hardshrink", "hardsigmoid": "Hardsigmoid",
    "hardswish": "Hardswish", "hardtanh": "Hardtanh", "leaky_relu": "LeakyReLU", "logsigmoid": "LogSigmoid",
    "mish": "Mish", "relu": "ReLU", "relu6": "ReLU6", "rrelu": "RReLU", "selu": "SELU", "sigmoid": "Sigmoid",
    "silu": "SiLU", "softplus": "Softplus", "softshrink": "Softshrink", "softsign": "Softsign", "tanh": "Tanh",
    "tanhshrink": "Tanhshrink",
}  # fmt: skip
_IDENTITY = "torch.nn.modules.linear.Identity"


def is_cross_encoder(head: HeadConfig) -> bool:
    """Whether the head reads a pair as one row."""
    return head.pair == CROSS_ENCODER


def no_place(task: Task, head: HeadConfig, width: int) -> str | None:
    """What keeps a task from either class, and what to do; None when nothing does."""
    if not task.is_pair:
        return "its examples are single sentences, not pairs (--format hf has a place for them)"
    if is_cross_encoder(head):
        return obstacle(task, head, width)
    if list(head.pair) not in (["cosine"], ["dot"]):
        return (
            f"head.pair {list(head.pair)}: two embeddings are compared by cosine alone or dot alone there;"
            " --format onnx carries every head"
        )
    return None


def write_model(exported: ExportedRun, folder: Path) -> ExportedRun:
    """Write the model of the task, which is returned. Raises ExportError for one that has no place there."""
    width = exported.encoder.config.hidden_size
    exported = exported.chosen(lambda task, head: no_place(task, head, width), "sentence-transformers")
    if is_cross_encoder(exported.settings.head):
        sigmoid = exported.task.kind == "binary"
        function = "torch.nn.modules.activation.Sigmoid" if sigmoid else _IDENTITY
        extra = {"sentence_transformers": {"activation_fn": function, "version": "4.0.0"}}
        write_sequence_classification(exported, folder, two_logits=False, extra=extra)
    else:
        _write_bi_encoder(exported, folder)
    return exported


def _write_bi_encoder(exported: ExportedRun, folder: Path) -> None:
    """Transformer, pooling, and a dense layer for BERT's pooler and for every tower."""
    head = exported.head
    width = exported.encoder.config.hidden_size
    write_bert(exported, folder, tensors=exported.tensors, extra={"architectures": ["BertModel"]})
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": exported.max_length, "do_lower_case": False}
    )
    mean = head.config.pooling == "mean"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (folder / "1_Pooling").mkdir()
    pooling = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": not mean,
        "pooling_mode_mean_tokens": mean,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    dense: list[tuple[Tensor, Tensor, str]] = []
    if head.config.pooling == "pooler":
        pooler = exported.encoder.pooler
        dense.append((pooler.weight, pooler.bias, "torch.nn.modules.activation.Tanh"))
    function = _activation_class(head.config.activation)
    dense += [(layer.weight, layer.bias, function) for layer in head.towers if isinstance(layer, nn.Linear)]
    for number, (weight, bias, name) in enumerate(dense, start=2):
        place = f"{number}_Dense"
        (folder / place).mkdir()
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": True}
        write_json(folder / place / "config.json", {**sizes, "activation_function": name})
        write_tensors(folder / place / "model.safetensors", {"linear.weight": weight, "linear.bias": bias})
        modules.append((place, "Dense"))
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_MODULES}.{kind}"}
        for number, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listed)
    settings: dict[str, Any] = {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": head.features[0],
    }
    write_json(
        folder / "config_sentence_transformers.json", {"model_type": "SentenceTransformer", **settings}
    )


def _activation_class(name: str) -> str:
    """The module of torch that is called as the activation is."""
    if name == "none":
        return _IDENTITY
    key = name.lower().replace("_", "")
    [found] = [entry for entry in ACTIVATIONS if entry.replace("_", "") == key]
    return f"torch.nn.modules.activation.{_CLASSES[found]}"
