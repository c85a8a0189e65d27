"""The model: BERT on packed tokens and its variants, LoRA, pretrained files and task heads. Knows tensors, no task
and no file of texts."""

from __future__ import annotations

from mtbert.model.bert import BertConfig, BertEncoder
from mtbert.model.build import ModelConfig, build_model
from mtbert.model.checkpointing import CheckpointingConfig
from mtbert.model.dropout import DropoutRates, DropoutStream
from mtbert.model.extra_hidden import ExtraHiddenConfig, add_extra_hidden
from mtbert.model.heads import Head, HeadConfig, HeadSpec
from mtbert.model.lora import LoraConfig, add_lora, merge, unmerge
from mtbert.model.multitask import MultiTaskModel, ParameterCount, build_heads
from mtbert.model.pals import PalConfig, add_pals
from mtbert.model.pretrained import load_config, load_encoder, resolve, save_encoder

__all__ = [
    "BertConfig",
    "BertEncoder",
    "CheckpointingConfig",
    "DropoutRates",
    "DropoutStream",
    "ExtraHiddenConfig",
    "Head",
    "HeadConfig",
    "HeadSpec",
    "LoraConfig",
    "ModelConfig",
    "MultiTaskModel",
    "PalConfig",
    "ParameterCount",
    "add_extra_hidden",
    "add_lora",
    "add_pals",
    "build_heads",
    "build_model",
    "load_config",
    "load_encoder",
    "merge",
    "resolve",
    "save_encoder",
    "unmerge",
]
