"""What a new row must be, one reason at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtbert.augmentation import validation as v
from mtbert.augmentation.answer import EMPTY, Answer, RejectedError
from mtbert.data.held_out import HeldOut
from mtbert.data.tables import Table
from mtbert.tasks.registry import get_task

ORIGINAL = "The film is n't slow , and its quiet ending stays with you for days ."
DEV = "A lovely film with lovely performances by two great actors in their prime ."


def table(task: str, split: str, texts: list[tuple[str, ...]], labels: list[float]) -> Table:
    dtype = get_task(task).layout.labels.dtype
    return Table(
        task,
        split,
        Path(f"{split}.csv"),
        [f"{split}{n}" for n in range(len(texts))],
        texts,
        np.array(labels, dtype),
        [],
    )


@pytest.fixture(scope="module")
def language() -> v.Language:
    return v.load_language()


def validator(
    language: v.Language | None = None, *, repairs: bool = False, compare: v.Compare = "letters"
) -> v.Validator:
    train = table(
        "sst",
        "train",
        [
            (ORIGINAL,),
            ("Another row of the table .",),
            ("Le film est un grand bonheur pour toute la famille .",),
        ],
        [3, 1, 4],
    )
    held_out = HeldOut({"train": train, "dev": table("sst", "dev", [(DEV,), ("Hm .",)], [3, 1])})
    return v.Validator(
        get_task("sst"),
        train,
        held_out,
        bounds=v.Bounds(),
        compare=compare,
        language=language,
        repairs=repairs,
    )


@pytest.mark.parametrize(
    ("text", "label", "reason"),
    [
        ("The picture never drags , and you keep its soft ending in mind for days .", 3, None),
        ("The picture never drags , and you keep its soft ending in mind for days .", 4, v.ANOTHER_LABEL),
        ("the film isn't slow; and its quiet ending stays with you for days", 3, v.COPY),
        ("ANOTHER row of the table!", None, v.SHORT),
        ("The quiet film .", None, v.SHORT),
        ("word " * 60, None, v.LONG),
        ("w" * 3000, None, v.SHORT),
        ("The picture never drags ,\nand you keep its soft ending in mind .", None, v.CONTROL),
        ("The picture never drags ,\tand you keep its soft ending in mind .", None, v.CONTROL),
        ("The picture never drags ,\u200b and you keep its soft ending in mind .", None, v.CONTROL),
        ("The picture never drags , and you keep its soft \ufffd in mind .", None, v.CONTROL),
        ("", None, EMPTY),
        ("A lovely film, with lovely performances by two great actors in their prime!", None, v.LEAK),
        ("A lovely film with lovely performances by two great stars in their prime .", None, v.NEAR_LEAK),
        (
            "El drama no aburre nunca y su final tranquilo se queda contigo durante muchos días .",
            None,
            v.LANGUAGE,
        ),
        (
            "Das Drama ist nie langweilig und sein leises Ende bleibt einem noch lange im Kopf .",
            None,
            v.LANGUAGE,
        ),
    ],
)
def test_sentences(language: v.Language, text: str, label: float | None, reason: str | None) -> None:
    checked = validator(language)
    if reason is None:
        checked.accept(0, Answer((text,), label))
        with pytest.raises(RejectedError, match=v.MADE_BEFORE):
            checked.accept(0, Answer((text.upper(),), label))
    else:
        with pytest.raises(RejectedError, match=f"^{reason}$"):
            checked.accept(0, Answer((text,), label))


def test_a_row_in_another_language_may_stay_in_it(language: v.Language) -> None:
    validator(language).accept(2, Answer(("Un film qui est une vraie joie pour toute la famille réunie .",)))


def test_a_duplicate_of_another_training_row() -> None:
    with pytest.raises(RejectedError, match=v.IN_TRAIN):
        validator().accept(2, Answer(("another row, of the TABLE",)))


def test_repairs_keep_the_words() -> None:
    checked = validator(repairs=True)
    checked.accept(0, Answer(("The film isn't slow, and its quiet ending stays with you for days.",), 3))
    checked.accept(0, Answer((ORIGINAL,), 3))
    with pytest.raises(RejectedError, match=v.ELSE):
        checked.accept(
            0, Answer(("The picture never drags , and you keep its soft ending in mind for days .",), 3)
        )


def test_pairs() -> None:
    pairs = [("A man eats a big red apple .", "A man is eating fruit ."), ("A dog runs .", "A cat sleeps .")]
    train = table("sts", "train", pairs, [4.0, 0.5])
    dev = table(
        "sts", "dev", [("A boy peels an orange by the blue sea in May .", "A child has fruit .")], [3.0]
    )
    held_out = HeldOut({"train": train, "dev": dev})

    def check(
        *texts: str, label: float | None = None, kept: int | None = None, compare: v.Compare = "letters"
    ) -> None:
        v.Validator(get_task("sts"), train, held_out, bounds=v.Bounds(), compare=compare).accept(
            0, Answer(texts, label), kept=kept
        )

    check("Somebody has a large apple .", "There is a man with fruit .", label=3.6)
    check("Somebody has a large apple .", pairs[0][1], kept=1)
    check(*pairs[0][::-1], compare="text")
    for texts, options, reason in (
        (("Somebody has a large apple .", "There is a man with fruit ."), {"label": 3.4}, v.ANOTHER_LABEL),
        (("Somebody has a large apple .", pairs[0][1]), {}, v.COPY),
        (("Somebody has a large apple .", "He eats ."), {"kept": 1}, v.NOT_THIS_ONE),
        (pairs[0][::-1], {}, v.COPY),
        (pairs[0], {"compare": "text"}, v.COPY),
        (("A boy peels an orange by the blue sea in May .", "There is a man with fruit ."), {}, v.LEAK),
        (("A boy peels an orange by the blue lake in May .", "There is a man with fruit ."), {}, v.NEAR_LEAK),
        (("A child has fruit .", "a boy peels an orange by the blue sea in may"), {}, v.LEAK),
    ):
        with pytest.raises(RejectedError, match=f"^{reason}$"):
            check(*texts, **options)  # type: ignore[arg-type]
