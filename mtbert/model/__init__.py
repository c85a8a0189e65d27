"""The model: BERT on packed tokens, LoRA, pretrained files and task heads. Knows tensors, no task and no
file of texts."""

from __future__ import annotations

from mtbert.model.bert import BertConfig, BertEncoder
from mtbert.model.dropout import DropoutRates, DropoutStream
from mtbert.model.heads import Head, HeadConfig, HeadSpec
from mtbert.model.lora import LoraConfig, add_lora, merge, unmerge
from mtbert.model.multitask import MultiTaskModel, ParameterCount, build_heads
from mtbert.model.pretrained import load_config, load_encoder, resolve, save_encoder

__all__ = [
    "BertConfig",
    "BertEncoder",
    "DropoutRates",
    "DropoutStream",
    "Head",
    "HeadConfig",
    "HeadSpec",
    "LoraConfig",
    "MultiTaskModel",
    "ParameterCount",
    "add_lora",
    "build_heads",
    "load_config",
    "load_encoder",
    "merge",
    "resolve",
    "save_encoder",
    "unmerge",
]
