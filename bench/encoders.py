"""Encoders by name: what mtbert knows, and BERTs of published sizes with random weights, which compute as fast."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch

from mtbert.engine.flops import EncoderSizes
from mtbert.model.bert import BertConfig, BertEncoder
from mtbert.model.pretrained import MINILM, load_config, resolve, save_encoder

SIZES = {
    "bert-tiny": EncoderSizes(2, 128, 512),
    "bert-mini": EncoderSizes(4, 256, 1024),
    "bert-small": EncoderSizes(4, 512, 2048),
    "bert-medium": EncoderSizes(8, 512, 2048),
    "bert-base": EncoderSizes(12, 768, 3072),
    "bert-large": EncoderSizes(24, 1024, 4096),
}
"""Sizes of Devlin et al. 2019 and Turc et al. 2019, in heads of 64."""
_HEAD = 64
_POSITIONS = 512


def encoder_path(name: str) -> Path:
    """The folder of `minilm`, of a folder or hub id, or of a random BERT of these SIZES (with MiniLM's vocabulary).

    Raises ModelFileError.
    """
    return _random_encoder(name) if name in SIZES else resolve(name)


def is_random(name: str) -> bool:
    """Whether the encoder of this name has random weights."""
    return name in SIZES


@cache
def _random_encoder(name: str) -> Path:
    sizes, vocabulary = SIZES[name], resolve(MINILM)
    config = BertConfig(
        vocab_size=load_config(vocabulary).vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // _HEAD,
        intermediate_size=sizes.inner,
        max_position_embeddings=_POSITIONS,
    )
    encoder = BertEncoder(config, generator=torch.Generator().manual_seed(0))
    folder = Path(_folder().name) / name
    save_encoder(encoder, folder, tokeniser_folder=vocabulary)
    return folder


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="mtbert-bench-")
