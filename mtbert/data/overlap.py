"""Examples that stand in the training table and in the development table alike."""

from __future__ import annotations

from dataclasses import dataclass

from mtbert.data.tables import Table


@dataclass(frozen=True)
class Overlap:
    """One example of the dev table whose text is also in the train table: the lines of both files."""

    train_line: int
    dev_line: int
    texts: tuple[str, ...]


def train_dev_overlap(train: Table, dev: Table) -> list[Overlap]:
    """The dev examples whose normalised text occurs in train, in the order of dev.

    Texts are compared without regard to case and white space, pairs without regard to their order; labels are
    not compared. `train_line` is the first such example of train.
    """
    seen: dict[tuple[str, ...], int] = {}
    for texts, line in zip(train.texts, train.lines, strict=True):
        seen.setdefault(normalised(texts), line)
    found = (
        (seen.get(normalised(texts)), line, texts) for texts, line in zip(dev.texts, dev.lines, strict=True)
    )
    return [Overlap(train_line, line, texts) for train_line, line, texts in found if train_line is not None]


def normalised(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The texts with case folded and runs of white space as one space, in sorted order."""
    return tuple(sorted(" ".join(text.casefold().split()) for text in texts))
