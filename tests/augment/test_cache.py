"""The file of answers survives what ends a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.small_disk import small_disk

from mtbert.augmentation.cache import AnswerCache, request_key
from mtbert.errors import DataError, UserError


def test_answers_and_notes_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answers.jsonl"
    with AnswerCache(path) as cache:
        cache.put("a", {"text": "eins\n„zwei“"})
        cache.put_note("server", False)
        with pytest.raises(UserError, match=r"answers\.jsonl: another process"):
            AnswerCache(path)
    with AnswerCache(path) as cache:
        assert (cache.get("a"), cache.get("b"), cache.note("server")) == (
            {"text": "eins\n„zwei“"},
            None,
            False,
        )


@pytest.mark.parametrize("cut", [1, 20, 39])
def test_an_incomplete_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerCache(path) as cache:
        cache.put("a", {"text": "one"})
        cache.put("b", {"text": "two"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.warns(UserWarning, match="incomplete"):
        cache = AnswerCache(path)
    assert (cache.get("a"), cache.get("b")) == ({"text": "one"}, None)
    cache.put("b", {"text": "two"})
    cache.close()
    assert path.read_bytes() == whole


def test_a_damaged_line_is_passed_over_and_a_foreign_file_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    good = json.dumps({"key": "a", "answer": {"text": "one"}})
    path.write_text(f'{good}\n{{"key": "b", "answer"\n[]\n{{"key": "c", "answer": {{"text": 3}}}}\n')
    with pytest.warns(UserWarning, match=r"answers\.jsonl, line [234]") as warned, AnswerCache(path) as cache:
        assert len(cache) == 1
    assert len(warned) == 3
    for foreign in ("id,sentence\n1,a\n", "a note without an end", "{}"):
        path.write_text(foreign)
        with pytest.raises(DataError, match="holds no answer of this program"):
            AnswerCache(path)
        assert path.read_text() == foreign


def test_a_full_disk_names_the_file_and_keeps_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="32k") as disk:
        path = disk / "answers.jsonl"
        kept = 0
        cache = AnswerCache(path)
        with pytest.raises(UserError, match=r"answers\.jsonl: an answer cannot be kept: No space left"):  # noqa: PT012
            for kept in range(100):
                cache.put(str(kept), {"text": "x" * 1000})
        cache.close()
        assert kept > 5
        with AnswerCache(path) as again:
            assert len(again) == kept


def test_a_key_depends_on_all_of_a_request() -> None:
    one = {"model": "m", "messages": [{"role": "user", "content": "a"}], "seed": 1}
    assert request_key(one) == request_key(dict(reversed(one.items())))
    assert (
        len({request_key(one | change) for change in ({}, {"seed": 2}, {"model": "n"}, {"temperature": 1})})
        == 4
    )
