"""Masked-language modelling (Devlin et al. 2019, section 3.1): the tasks' sentences, and which tokens are hidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtbert.data.batching import counter_generator
from mtbert.data.packing import PackedBatch
from mtbert.data.tables import Table
from mtbert.data.tokenisation import Tokeniser
from mtbert.errors import DataError
from mtbert.kernels.philox import WORD, philox4x32

TRAINING_SITE = 2**32 - 1
"""Sites tell the masks from those of dropout, which has lower ones."""
HELD_OUT_SITE = 2**32 - 2

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_NAME = "mlm"


def sentences(tables: Mapping[str, Table]) -> Table:
    """Every text of the tables by task, both of a pair, once: a table of single sentences without labels.

    An id is `task:id` of the first example that has the sentence, with `:1` or `:2` for one of a pair.
    """
    places: dict[str, tuple[str, int]] = {}
    for task, table in tables.items():
        for example, line, texts in zip(table.ids, table.lines, table.texts, strict=True):
            for number, text in enumerate(texts, start=1):
                part = f":{number}" if len(texts) > 1 else ""
                places.setdefault(text, (f"{task}:{example}{part}", line))
    path = next((table.path for table in tables.values()), Path(_NAME))
    return Table(
        task=_NAME,
        split="train",
        path=path,
        ids=[name for name, _ in places.values()],
        texts=[(text,) for text in places],
        labels=None,
        lines=[line for _, line in places.values()],
    )


def hold_out(table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """A table without a random `share` of its rows, and those rows: at least one each. A function of its arguments.

    Raises DataError for a table of fewer than two rows.
    """
    if len(table) < 2:
        raise DataError(
            f"{table.path}: {len(table)} different sentences are too few for masked-language modelling; expected at"
            " least 2, one to train on and one to score"
        )
    count = max(1, round(share * len(table)))
    keys = counter_generator(seed, _NAME, "held out").random_raw(len(table))
    apart = np.sort(np.argsort(keys, kind="stable")[:count])
    kept = np.delete(np.arange(len(table)), apart)
    return take_rows(table, kept, "train"), take_rows(table, apart, "dev")


def take_rows(table: Table, rows: np.ndarray, split: str) -> Table:
    """Those rows of a table, without labels."""
    return replace(
        table,
        split=split,
        ids=[table.ids[row] for row in rows],
        texts=[table.texts[row] for row in rows],
        labels=None,
        lines=[table.lines[row] for row in rows],
        files=table.files_of(rows.tolist()),
    )


@dataclass(frozen=True)
class MaskedBatch:
    """A batch with hidden tokens: `places` int64 [M] in the stream of tokens, `targets` int64 [M], what stood there."""

    batch: PackedBatch
    places: Tensor
    targets: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MaskedBatch:
        """The same with its tensors on `device`."""
        return MaskedBatch(
            self.batch.to(device, non_blocking),
            self.places.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
        )

    def pinned(self) -> MaskedBatch:
        """The same in page-locked memory."""
        return MaskedBatch(self.batch.pinned(), self.places.pin_memory(), self.targets.pin_memory())


class Masking:
    """Hides tokens: each with `probability`, of which 80 % become the mask, 10 % a random word, 10 % stay.

    Special tokens are never hidden, nor drawn. A token's fate is a function of (seed, step, site, row, position) alone,
    by the generator of the dropout masks: a sentence is masked anew whenever it comes again (dynamic masking, Liu et
    al. 2019), and a resumed run masks as the uninterrupted one. The tensors are on the CPU, where places can be counted
    without a wait.
    """

    def __init__(self, *, probability: float, seed: int, mask_id: int, ordinary: Tensor) -> None:
        """ordinary: bool [V], which words of the vocabulary are not special."""
        self.probability = probability
        self.seed = seed
        self.mask_id = mask_id
        self.ordinary = ordinary
        self._words = ordinary.nonzero().flatten()

    def __call__(self, batch: PackedBatch, step: int, site: int = TRAINING_SITE) -> MaskedBatch:
        """`batch` with hidden tokens; its `dropout_row` names rows and positions."""
        ids = batch.input_ids.long()
        key = (self.seed & WORD, self.seed >> 32)
        chance, kind, word, _ = philox4x32(key, (0, batch.dropout_row.long() & WORD, site, step))
        places = ((chance < round(self.probability * 2**32)) & self.ordinary[ids]).nonzero().flatten()
        targets, kind, word = ids[places], kind[places], word[places]
        drawn = self._words[(word * len(self._words)) >> 32]
        written = torch.where(kind < round(0.9 * 2**32), drawn, targets)
        written = torch.where(kind < round(0.8 * 2**32), self.mask_id, written)
        hidden = ids.index_copy(0, places, written).to(batch.input_ids.dtype)
        return MaskedBatch(replace(batch, input_ids=hidden), places, targets)


def masking(tokeniser: Tokeniser, *, probability: float, seed: int) -> Masking | None:
    """The masking of a model's vocabulary; None when it has no mask token."""
    token_to_id = tokeniser.token_id
    mask_id = token_to_id("[MASK]")
    if mask_id is None:
        return None
    special = {token_to_id(token) for token in SPECIAL_TOKENS} - {None}
    ordinary = torch.ones(tokeniser.vocabulary_size, dtype=torch.bool)
    ordinary[sorted({*special, tokeniser.cls_id, tokeniser.sep_id, tokeniser.pad_id})] = False
    return Masking(probability=probability, seed=seed, mask_id=mask_id, ordinary=ordinary)
