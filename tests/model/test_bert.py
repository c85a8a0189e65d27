"""The packed encoder computes what BERT computes, for rows of any lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.packed import Packed, attention_mask, padded, random_batch
from support.tiny_bert import write_tiny_bert
from torch import Tensor

from mtbert.model import BertConfig, BertEncoder, DropoutStream, LoraConfig, add_lora, load_encoder, resolve
from mtbert.model.context import ForwardContext

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def transformers_output(folder: Path, batch: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states [T, C] and pooled rows [N, C] of transformers.BertModel."""
    model = pytest.importorskip("transformers").BertModel.from_pretrained(folder, attn_implementation="eager")
    mask = attention_mask(batch)
    with torch.no_grad():
        output = model.to(dtype).eval()(
            input_ids=padded(batch, batch.input_ids),
            token_type_ids=padded(batch, batch.token_type_ids),
            attention_mask=mask.long(),
        )
    return output.last_hidden_state[mask], output.pooler_output


def check_against_transformers(folder: Path, batch: Packed, dtype: torch.dtype) -> None:
    encoder = load_encoder(folder, dtype=dtype)
    expected, expected_pooled = transformers_output(folder, batch, dtype)
    with torch.no_grad():
        hidden = encoder(batch, dtype=dtype)
        pooled = encoder.pool_first(hidden[batch.cu_seqlens[:-1].long()])
    assert hidden.dtype == dtype
    assert (hidden - expected).abs().max().item() <= TOLERANCE[dtype]
    assert (pooled - expected_pooled).abs().max().item() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_minilm_equals_transformers(minilm: Path, dtype: torch.dtype):
    batch = random_batch({"any": [12, 1, 2, 33, 64, 17, 7, 128]}, 30522)
    check_against_transformers(minilm, batch, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "intermediate", "lengths"),
    [
        (1, 16, 1, 8, [1]),
        (2, 32, 2, 64, [3, 1, 40, 2, 2, 16, 15, 17]),
        (3, 48, 4, 100, [31, 32, 33]),
        (2, 64, 1, 64, [512, 5]),
        (5, 24, 3, 72, [9, 70, 1, 1]),
    ],
)
def test_random_configurations_equal_transformers(
    tmp_path: Path, layers, hidden, heads, intermediate, lengths, dtype: torch.dtype
):
    folder = write_tiny_bert(
        tmp_path, layers=layers, hidden=hidden, heads=heads, intermediate=intermediate, seed=layers
    )
    check_against_transformers(folder, random_batch({"any": lengths}, 100, seed=layers), dtype)


def test_a_row_does_not_depend_on_its_neighbours(tiny_bert: Path):
    encoder = load_encoder(tiny_bert, dtype=torch.float64)
    batch = random_batch({"any": [5, 9, 3]}, 100)
    changed = random_batch({"any": [5, 9, 3]}, 100)
    changed.input_ids[5:14] = (changed.input_ids[5:14] + 1) % 100
    with torch.no_grad():
        one, two = encoder(batch, dtype=torch.float64), encoder(changed, dtype=torch.float64)
    assert torch.equal(one[:5], two[:5])
    assert torch.equal(one[14:], two[14:])
    assert not torch.equal(one[5:14], two[5:14])


def test_dropout_is_a_function_of_seed_step_and_pass(tiny_bert: Path):
    encoder = load_encoder(tiny_bert)
    batch = random_batch({"any": [5, 9, 3]}, 100)

    def run(stream: DropoutStream | None) -> Tensor:
        with torch.no_grad():
            return encoder(batch, dtype=torch.float32, dropout=stream)

    first = run(DropoutStream(1, 2))
    assert torch.equal(first, run(DropoutStream(1, 2)))
    others = [DropoutStream(1, 3), DropoutStream(2, 2), DropoutStream(1, 2, 1), None]
    assert all(not torch.equal(first, run(other)) for other in others)


def test_each_rate_drops_at_its_own_place(tiny_bert: Path):
    from mtbert.model import DropoutRates

    batch = random_batch({"any": [5, 9, 3]}, 100)
    rates = [
        DropoutRates(0.0, 0.0, 0.0),
        DropoutRates(0.3, 0.0, 0.0),
        DropoutRates(0.0, 0.3, 0.0),
        DropoutRates(0.0, 0.0, 0.3),
    ]
    outputs = []
    for rate in rates:
        encoder = load_encoder(tiny_bert, dropouts=rate)
        with torch.no_grad():
            outputs.append(encoder(batch, dtype=torch.float32, dropout=DropoutStream(0, 0)))
            plain = encoder(batch, dtype=torch.float32)
    assert torch.equal(outputs[0], plain)
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_bfloat16_keeps_float32_parameters_and_gradients(tiny_bert: Path):
    encoder = load_encoder(tiny_bert)
    batch = random_batch({"any": [5, 9, 3]}, 100)
    hidden = encoder(batch, dtype=torch.bfloat16, dropout=DropoutStream(0, 0))
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in encoder.named_parameters() if not name.startswith("pooler.")}
    assert all(
        parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in encoder.parameters()
    )
    with torch.no_grad():
        wide = encoder(batch, dtype=torch.float32)
        narrow = encoder(batch, dtype=torch.bfloat16)
    assert (wide - narrow.float()).abs().max().item() < 0.1


def test_fresh_weights_are_drawn_as_bert_draws_them():
    config = BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    encoder = BertEncoder(config, generator=torch.Generator().manual_seed(3))
    again = BertEncoder(config, generator=torch.Generator().manual_seed(3))
    for (name, parameter), other in zip(encoder.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        if name.endswith("norm.weight"):
            assert parameter.eq(1).all(), name
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.002, name


def test_the_number_of_parameters_of_minilm(minilm: Path):
    # 22,713,216 is what transformers.BertModel has for these sizes.
    assert sum(parameter.numel() for parameter in load_encoder(minilm).parameters()) == 22_713_216
    assert resolve("minilm") == minilm


def test_frozen_layers_below_the_first_adapter_record_no_graph(tiny_bert: Path):
    encoder = load_encoder(tiny_bert)
    add_lora(encoder, LoraConfig(layers=[1], dropout=0.0))
    batch = random_batch({"any": [5, 9, 3]}, 100)
    context = ForwardContext(batch, torch.float32)
    hidden = encoder.embeddings(context, 0.0)
    assert not encoder.layers[0](hidden, context, encoder.dropouts).requires_grad
    assert encoder.layers[1](hidden, context, encoder.dropouts).requires_grad
