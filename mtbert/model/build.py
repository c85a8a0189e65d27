"""A pretrained encoder with its variants, adapters and fresh heads, from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mtbert.errors import ConfigError
from mtbert.model.bert import BertConfig
from mtbert.model.dropout import DropoutRates
from mtbert.model.extra_hidden import ExtraHiddenConfig, add_extra_hidden
from mtbert.model.heads import HeadConfig, HeadSpec
from mtbert.model.lora import LoraConfig, add_lora
from mtbert.model.multitask import MODE_ALIASES, MultiTaskModel, build_heads
from mtbert.model.pals import PalConfig, add_pals
from mtbert.model.peft_files import load_adapters
from mtbert.model.pretrained import load_config, load_encoder, open_weights


@dataclass
class ModelConfig:
    """The encoder: where its weights come from, its dropout, its adapters and variants."""

    pretrained: str = "minilm"
    """minilm (bundled, extra `offline`), a folder in the Hugging Face layout, or a hub id (bert-base-uncased)."""
    dropout: DropoutRates = field(default_factory=DropoutRates)
    """Dropout of the encoder."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters of mode lora."""
    adapter: str | None = None
    """Mode lora starts from these adapters: a folder that peft has saved (adapter_config.json and
    adapter_model.safetensors), or one with such a folder for each task. model.lora must describe them."""
    attention_heads: int | None = None
    """Attention heads over the same weights, a divisor of the encoder's width; by default as pretrained."""
    pool_layer: int | None = None
    """The layer, from 1, whose output the heads read; by default the last. Those above are left out of the model."""
    trained_layers: int | None = None
    """Modes full and bitfit: train so many encoder layers from the top (4: the last four) and leave the layers below
    them and the embeddings as pretrained; by default all train. Mode lora has model.lora.layers instead."""
    frozen_dropout: bool = True
    """Whether frozen layers below the lowest trained one, and the embeddings, drop as the others do. With false their
    outputs are constants, which frozen_cache computes once; it is another regularisation, with other results."""
    extra_hidden: ExtraHiddenConfig = field(default_factory=ExtraHiddenConfig)
    """Hidden layers behind every attention head."""
    pals: PalConfig = field(default_factory=PalConfig)
    """Projected attention layers, one set for each task."""


def build_model(
    folder: Path,
    config: ModelConfig,
    *,
    mode: str,
    specs: Sequence[HeadSpec],
    heads: Mapping[str, HeadConfig],
    max_lengths: Mapping[str, int],
    seed: int,
    opened: Callable[[Path], Any] = open_weights,
) -> MultiTaskModel:
    """The model in `mode`; heads, variants and adapters are drawn from `seed`. Float32 parameters on the CPU.

    max_lengths: the longest row of each task, in tokens; a ConfigError when the encoder has fewer positions. opened: as
    in `load_encoder`.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes_of(load_config(folder), config)
    positions = sizes.max_position_embeddings
    for name, length in max_lengths.items():
        if length > positions:
            raise ConfigError(
                f"{name}.max_length: found {length}, but the encoder {config.pretrained} has {positions} positions"
            )
    if MODE_ALIASES.get(mode, mode) == "last-linear-layer":
        _check_frozen(config)
    encoder = load_encoder(folder, config=sizes, dropouts=config.dropout, generator=generator, opened=opened)
    built = build_heads(specs, heads, sizes.hidden_size, generator)
    tasks = [spec.name for spec in specs]
    if config.extra_hidden.depth:
        add_extra_hidden(encoder, config.extra_hidden, generator)
    if config.pals.size:
        add_pals(encoder, config.pals, tasks, generator)
    if mode == "lora":
        add_lora(encoder, config.lora, generator, tasks=tasks)
        if config.adapter is not None:
            load_adapters(encoder, config.lora, Path(config.adapter), tasks if config.lora.per_task else ())
    model = MultiTaskModel(
        encoder, built, trained_layers=config.trained_layers, frozen_dropout=config.frozen_dropout
    )
    model.set_mode(mode)
    return model


def sizes_of(pretrained: BertConfig, config: ModelConfig) -> BertConfig:
    """The sizes of the encoder that is built from a pretrained one. Raises ConfigError for impossible ones."""
    width, layers = pretrained.hidden_size, pretrained.num_hidden_layers
    heads = pretrained.num_attention_heads if config.attention_heads is None else config.attention_heads
    if heads < 1 or width % heads:
        divisors = ", ".join(str(number) for number in range(1, width + 1) if width % number == 0)
        raise ConfigError(
            f"model.attention_heads: {heads} does not divide the width {width} of {config.pretrained}; "
            f"possible: {divisors}"
        )
    last = layers if config.pool_layer is None else config.pool_layer
    if not 1 <= last <= layers:
        raise ConfigError(
            f"model.pool_layer: expected 1 to {layers}, the layers of {config.pretrained}, found {last}"
        )
    trained = config.trained_layers
    if trained is not None and not 1 <= trained <= last:
        raise ConfigError(
            f"model.trained_layers: expected 1 to {last}, the layers of {config.pretrained}"
            f"{'' if config.pool_layer is None else ' up to model.pool_layer'}, found {trained}; mode"
            " last-linear-layer trains none"
        )
    return replace(pretrained, num_attention_heads=heads, num_hidden_layers=last)


def _check_frozen(config: ModelConfig) -> None:
    """Refuse what would never be trained."""
    for name, value in (
        ("extra_hidden.depth", config.extra_hidden.depth),
        ("pals.size", config.pals.size),
    ):
        if value:
            raise ConfigError(
                f"model.{name}: found {value}, but mode last-linear-layer trains the heads alone; "
                "use full, lora or bitfit"
            )
