"""The FLOP count, by hand and against torch's own counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.packed import random_batch
from torch.utils.flop_counter import FlopCounterMode

from mtbert.engine.flops import EncoderSizes, training_flops
from mtbert.kernels.dispatch import use_backend
from mtbert.model.bert import BertConfig, BertEncoder
from mtbert.model.dropout import DropoutRates
from mtbert.model.lora import LoraConfig, add_lora

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=96,
    max_position_embeddings=32,
)
SIZES = EncoderSizes(layers=3, width=32, inner=96)


def test_flops_by_hand() -> None:
    sizes = EncoderSizes(layers=2, width=4, inner=8)
    lengths = np.array([3, 2])  # T = 5, sum of squares 13
    projections = 2 * 5 * (4 * 4 * 4 + 2 * 4 * 8)  # 1280
    product = 2 * 13 * 4  # 104
    assert training_flops(sizes, lengths, "features") == 2 * (projections + 2 * product)
    assert training_flops(sizes, lengths, "full") == 2 * (3 * projections + 6 * product)
    adapters = 2 * 3 * 2 * 5 * 2 * (8 + 8)  # two layers, three products, r = 2, query and value
    unneeded = 2 * 5 * 3 * 4 * 4 + 2 * (2 * 5 * 2 * 4)
    lora = training_flops(sizes, lengths, "lora", rank=2, adapted=["query", "value"])
    assert lora == 2 * (2 * projections + 6 * product) + adapters - unneeded


@pytest.mark.parametrize(
    "adapted",
    [None, ["query", "value"], ["query", "key", "value", "attention_output", "intermediate", "output"]],
)
def test_flops_equal_those_that_torch_counts(adapted: list[str] | None) -> None:
    length, rows = 32, 3
    encoder = BertEncoder(CONFIG, DropoutRates(0.0, 0.0, 0.0))
    if adapted is not None:
        add_lora(encoder, LoraConfig(rank=4, dropout=0.0, projections=adapted))  # type: ignore[arg-type]
    batch = random_batch({"task": [length] * rows}, CONFIG.vocab_size)
    assert batch.max_seqlen == length  # no padding, so that every counted product is a needed one
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        encoder(batch, dtype=torch.float32).sum().backward()
    mode = "full" if adapted is None else "lora"
    expected = training_flops(SIZES, np.full(rows, length), mode, rank=4, adapted=adapted or ())  # type: ignore[arg-type]
    assert counter.get_total_flops() == expected
