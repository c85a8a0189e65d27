"""The reference is BERT: the same numbers as the library of its authors' successors."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from support.packed import attention_mask, padded, random_batch
from support.tiny_bert import write_tiny_bert
from support.twins import encoder_pairs, reference_encoder
from torch import Tensor

from mtbert import reference
from mtbert.model import load_encoder
from mtbert.reference import MinBert, Rows


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "intermediate"), [(2, 32, 2, 64), (3, 48, 4, 40), (1, 8, 1, 8)]
)
def test_hidden_states_and_pooler_are_those_of_transformers(
    tmp_path: Path, layers, hidden, heads, intermediate
):
    transformers = pytest.importorskip("transformers")
    folder = write_tiny_bert(
        tmp_path, layers=layers, hidden=hidden, heads=heads, intermediate=intermediate, seed=hidden
    )
    theirs = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    encoder = load_encoder(folder, dtype=torch.float64)
    bert = filled(encoder)
    batch = random_batch({"any": [1, 5, 2, 17, 9]}, encoder.config.vocab_size)
    rows = Rows(
        padded(batch, batch.input_ids).long(),
        padded(batch, batch.token_type_ids).long(),
        attention_mask(batch),
    )
    with torch.no_grad():
        expected = theirs(
            input_ids=rows.input_ids,
            token_type_ids=rows.token_type_ids,
            attention_mask=rows.attention_mask.long(),
        )
        hidden_states = bert.eval()(rows)
        pooled = bert.pool(hidden_states, rows, "pooler")
    mask = rows.attention_mask
    assert_equal(hidden_states[mask], expected.last_hidden_state[mask], 1e-12)
    assert_equal(pooled, expected.pooler_output, 1e-12)


def filled(encoder) -> MinBert:
    bert = reference_encoder(encoder)
    with torch.no_grad():
        for _, ours, theirs in encoder_pairs(encoder, bert):
            theirs().copy_(ours())
    return bert


def test_padding_changes_nothing(tiny_bert: Path):
    bert = filled(load_encoder(tiny_bert, dtype=torch.float64)).eval()
    ids = torch.randint(5, 100, (1, 7))
    alone = Rows(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
    wide = torch.full((2, 12), 3)
    wide[0, :7] = ids
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, :7] = mask[1] = True
    with torch.no_grad():
        hidden, expected = bert(Rows(wide, torch.zeros_like(wide), mask)), bert(alone)
    assert_equal(hidden[:1, :7], expected, 1e-13)
    for pooling in ("cls", "mean", "pooler"):
        pooled = bert.pool(hidden, Rows(wide, wide, mask), pooling)[:1]
        assert_equal(pooled, bert.pool(expected, alone, pooling), 1e-13)


def test_dropout_draws_its_own_mask_or_takes_one():
    dropout = reference.Dropout(0.25, "here")
    x = torch.ones(200, 200)
    drawn = dropout(x, None)
    assert drawn.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert drawn.mean().item() == pytest.approx(1, abs=0.02)
    asked = []

    def masks(place: str, p: float, shape: torch.Size) -> Tensor:
        asked.append((place, p, tuple(shape)))
        return torch.full(shape, 3.0)

    assert dropout(x, masks).eq(3).all()
    assert asked == [("here", 0.25, (200, 200))]
    assert dropout.eval()(x, masks) is x


def test_the_reference_imports_torch_alone():
    folder = Path(reference.__file__).parent
    files = list(folder.glob("*.py"))
    assert len(files) >= 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.split(".")[0]
                allowed = (
                    top == "torch" or top in sys.stdlib_module_names or name.startswith("mtbert.reference")
                )
                assert allowed, f"{file.name} imports {name}"


def assert_equal(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= tolerance
