"""Which sentences are read, and which of their tokens are hidden: shares, purity, and what is never touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from mtbert.data.dataset import TaskData
from mtbert.data.masking import HELD_OUT_SITE, TRAINING_SITE, Masking, hold_out, masking, sentences
from mtbert.data.packing import PackedBatch, pack, plan_passes
from mtbert.data.tables import Table
from mtbert.data.tokenisation import TokenisedTable, Tokeniser
from mtbert.errors import DataError

MASK, VOCABULARY = 4, 1000
ONES = 0xFFFFFFFF


def table(task: str, texts: list[tuple[str, ...]]) -> Table:
    ids = [f"{task}{number}" for number in range(len(texts))]
    return Table(task, "train", Path(f"{task}.csv"), ids, texts, None, list(range(2, len(texts) + 2)))


def random_data(rows: int, seed: int = 0) -> TaskData:
    """Rows of 1 to 40 ordinary tokens."""
    chance = np.random.default_rng(seed)
    sizes = chance.integers(1, 41, rows)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = chance.integers(5, VOCABULARY, int(offsets[-1])).astype(np.int32)
    texts = table("mlm", [(f"{number}",) for number in range(rows)])
    return TaskData("mlm", TokenisedTable(texts, tokens, offsets, 1, 2, 3), form="single", max_length=50)


def packed(data: TaskData, rows: np.ndarray | None = None, *, max_tokens: int = 10**6) -> list[PackedBatch]:
    plan = {"mlm": np.arange(len(data)) if rows is None else rows}
    return [pack(requests) for requests in plan_passes(plan, {"mlm": data}, max_tokens)]


def masks(probability: float = 0.15, seed: int = 1) -> Masking:
    ordinary = torch.arange(VOCABULARY) > MASK
    return Masking(probability=probability, seed=seed, mask_id=MASK, ordinary=ordinary)


# ---- sentences ----


def test_every_text_once_and_both_of_a_pair() -> None:
    tables = {
        "sst": table("sst", [("a b",), ("c",), ("a b",)]),
        "para": table("para", [("c", "d"), ("e", "e")]),
    }
    found = sentences(tables)
    assert found.texts == [("a b",), ("c",), ("d",), ("e",)]
    assert found.ids == ["sst:sst0", "sst:sst1", "para:para0:2", "para:para1:1"]
    assert found.labels is None


def test_some_sentences_are_held_out() -> None:
    whole = table("mlm", [(f"{number}",) for number in range(500)])
    train, apart = hold_out(whole, 0.02, seed=3)
    assert (len(train), len(apart)) == (490, 10)
    assert sorted(train.texts + apart.texts) == sorted(whole.texts)
    assert hold_out(whole, 0.02, seed=3)[1].ids == apart.ids
    assert hold_out(whole, 0.02, seed=4)[1].ids != apart.ids
    assert [len(part) for part in hold_out(table("mlm", [("a",), ("b",)]), 0.02, seed=0)] == [1, 1]


@pytest.mark.parametrize("texts", [[], [("a",)]])
def test_too_few_sentences(texts: list[tuple[str, ...]]) -> None:
    with pytest.raises(DataError, match=r"mlm\.csv: \d different sentences are too few"):
        hold_out(table("mlm", texts), 0.02, seed=0)


# ---- masks ----


def plain(seed: int, counter: list[int]) -> list[int]:
    """Philox4x32-10 with Python's integers."""
    c, k = counter, [seed & ONES, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return c


@pytest.mark.parametrize("seed", [7, 2**40 + 11])
def test_token_by_token(seed: int) -> None:
    (batch,) = packed(random_data(12))
    masked = masks(0.3, seed)(batch, step=5)
    expected, places = batch.input_ids.tolist(), []
    for place, (token, row) in enumerate(
        zip(batch.input_ids.tolist(), batch.dropout_row.tolist(), strict=True)
    ):
        chance, kind, word, _ = plain(seed, [0, row, TRAINING_SITE, 5])
        if token <= MASK or chance / 2**32 >= 0.3:
            continue
        places.append(place)
        if kind / 2**32 < 0.8:
            expected[place] = MASK
        elif kind / 2**32 < 0.9:
            expected[place] = 5 + word * (VOCABULARY - 5) // 2**32
    assert masked.batch.input_ids.tolist() == expected
    assert masked.places.tolist() == places
    assert masked.targets.tolist() == [batch.input_ids[place].item() for place in places]


def test_shares() -> None:
    """15 % of the ordinary tokens; of them 80 % masks, 10 % random words, 10 % as they were: within 4 deviations."""
    (batch,) = packed(random_data(4000))
    masked = masks()(batch, step=0)
    before, after = batch.input_ids.long(), masked.batch.input_ids.long()
    special, hidden = before <= MASK, torch.zeros_like(before, dtype=torch.bool)
    hidden[masked.places] = True
    assert not bool(hidden[special].any())
    assert torch.equal(after[~hidden], before[~hidden])
    assert masked.batch.input_ids.dtype == batch.input_ids.dtype

    def close(count: int, of: int, share: float) -> bool:
        return abs(count - of * share) < 4 * (of * share * (1 - share)) ** 0.5

    chosen = int(hidden.sum())
    written = after[masked.places]
    words = written[(written != MASK) & (written != masked.targets)]
    assert close(chosen, int((~special).sum()), 0.15)
    assert close(int((written == MASK).sum()), chosen, 0.8)
    assert close(int((written == masked.targets).sum()), chosen, 0.1)
    assert close(len(words), chosen, 0.1)
    assert int(words.min()) > MASK
    assert abs(float(words.double().mean()) - 502) < 4 * 288 / len(words) ** 0.5, "not drawn evenly"


def test_fates_depend_on_row_and_position_alone() -> None:
    """However a step is split into passes, and whatever stands in the other rows."""
    data = random_data(60)
    (whole,) = (masks()(batch, 3) for batch in packed(data))
    parts = [masks()(batch, 3) for batch in packed(data, max_tokens=200)]
    assert len(parts) > 3
    assert torch.equal(torch.cat([part.batch.input_ids for part in parts]), whole.batch.input_ids)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)

    other = masks()(packed(random_data(60, seed=1))[0], 3)
    rows = {int(row) for row in whole.batch.dropout_row[whole.places]}
    same = {int(row) for row in other.batch.dropout_row[other.places]}
    ordinary = {
        int(r) for r, t in zip(whole.batch.dropout_row, packed(data)[0].input_ids, strict=True) if t > MASK
    }
    assert same & ordinary <= rows
    assert len(same & rows) > 50


def test_masks_change_with_step_seed_and_site() -> None:
    (batch,) = packed(random_data(60))
    chosen = {
        name: masked.places.tolist()
        for name, masked in {
            "first": masks()(batch, 0),
            "again": masks()(batch, 0),
            "next step": masks()(batch, 1),
            "other seed": masks(seed=2)(batch, 0),
            "high half of the seed": masks(seed=1 + 2**32)(batch, 0),
            "held out": masks()(batch, 0, HELD_OUT_SITE),
        }.items()
    }
    first = chosen.pop("first")
    assert chosen.pop("again") == first
    assert all(places != first for places in chosen.values())
    assert len({tuple(places) for places in chosen.values()}) == len(chosen)


# ---- the vocabulary ----


def test_the_vocabulary_of_a_model(tokeniser: Tokeniser) -> None:
    found = masking(tokeniser, probability=0.2, seed=9)
    assert found is not None
    assert (found.mask_id, found.probability, found.seed) == (4, 0.2, 9)
    assert found.ordinary.logical_not().nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert len(found.ordinary) == tokeniser.vocabulary_size


def test_a_vocabulary_without_the_mask() -> None:
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"])}
    assert (
        masking(Tokeniser(Tokenizer(WordPiece(words, unk_token="[UNK]"))), probability=0.15, seed=0) is None
    )


def test_nothing_else_of_a_batch_changes() -> None:
    (batch,) = packed(random_data(5))
    masked = masks(0.9)(batch, 0).batch
    assert replace(masked, input_ids=batch.input_ids).segments == batch.segments
    for name in ("token_type_ids", "position_ids", "dropout_row", "cu_seqlens"):
        assert getattr(masked, name) is getattr(batch, name)
