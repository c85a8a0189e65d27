"""A pretrained encoder with adapters and fresh heads, from its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mtbert.errors import ConfigError
from mtbert.model.dropout import DropoutRates
from mtbert.model.heads import HeadConfig, HeadSpec
from mtbert.model.lora import LoraConfig, add_lora
from mtbert.model.multitask import MultiTaskModel, build_heads
from mtbert.model.pretrained import load_encoder


@dataclass
class ModelConfig:
    """The encoder: where its weights come from, its dropout, its adapters."""

    pretrained: str = "minilm"
    """minilm (bundled, extra `offline`), a folder in the Hugging Face layout, or a hub id (bert-base-uncased)."""
    dropout: DropoutRates = field(default_factory=DropoutRates)
    """Dropout of the encoder."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters of mode lora."""


def build_model(
    folder: Path,
    config: ModelConfig,
    *,
    mode: str,
    specs: Sequence[HeadSpec],
    heads: Mapping[str, HeadConfig],
    max_lengths: Mapping[str, int],
    seed: int,
) -> MultiTaskModel:
    """The model in `mode`; heads and adapters are drawn from `seed`. Float32 parameters on the CPU.

    max_lengths: the longest row of each task, in tokens; a ConfigError when the encoder has fewer positions.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = load_encoder(folder, dropouts=config.dropout, generator=generator)
    positions = encoder.config.max_position_embeddings
    for name, length in max_lengths.items():
        if length > positions:
            raise ConfigError(
                f"{name}.max_length: found {length}, but the encoder {config.pretrained} has {positions} positions"
            )
    built = build_heads(specs, heads, encoder.config.hidden_size, generator)
    if mode == "lora":
        add_lora(encoder, config.lora, generator)
    model = MultiTaskModel(encoder, built)
    model.set_mode(mode)
    return model
