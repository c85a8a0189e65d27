from __future__ import annotations

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mtbert.data.sample import synthetic_tables
from mtbert.data.tables import Table
from mtbert.data.tokenisation import TokenisedTable, Tokeniser, tokenise
from mtbert.errors import DataError, ModelFileError


@pytest.fixture(scope="module")
def table() -> Table:
    return synthetic_tables("sts")["test"]


@pytest.fixture(scope="module")
def expected(table: Table, tokeniser: Tokeniser) -> TokenisedTable:
    return tokenise(table, tokeniser)


def cache_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def assert_same(found: TokenisedTable, expected: TokenisedTable) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    assert found.tokens.dtype == np.int32
    assert found.offsets.dtype == np.int64
    assert (found.texts_per_example, found.cls_id, found.sep_id) == (2, expected.cls_id, expected.sep_id)


def test_tokens_without_special_tokens(tokeniser: Tokeniser, tiny_bert: Path) -> None:
    plain = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    texts = ["A good film!", "", "x" * 300, "word " * 1000]
    assert tokeniser.encode(texts) == [plain.encode(t, add_special_tokens=False).ids for t in texts]
    assert tokeniser.encode([""]) == [[]]
    assert (tokeniser.cls_id, tokeniser.sep_id, tokeniser.pad_id) == tuple(
        plain.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]")
    )
    assert tokeniser.vocabulary_size == plain.get_vocab_size()


def test_truncation_and_padding_of_the_file_are_off(tiny_bert: Path) -> None:
    plain = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    plain.enable_truncation(8)
    plain.enable_padding(length=16)
    tokeniser = Tokeniser(plain)
    assert [len(ids) for ids in tokeniser.encode(["a " * 20, "a"])] == [20, 1]


def test_special_tokens_in_a_text_stay_text(tokeniser: Tokeniser) -> None:
    (ids,) = tokeniser.encode(["a [SEP] b [CLS]"])
    assert tokeniser.sep_id not in ids
    assert tokeniser.cls_id not in ids


def test_vocabulary_file_gives_the_same_tokens(tiny_bert: Path, tmp_path: Path, tokeniser: Tokeniser) -> None:
    shutil.copy(tiny_bert / "vocab.txt", tmp_path)
    from_vocabulary = Tokeniser.from_folder(tmp_path)
    texts = ["A GOOD Film, running fast!", "Café 漢字 naïve\u200b", "x" * 101]
    assert from_vocabulary.encode(texts) == tokeniser.encode(texts)
    assert from_vocabulary.cls_id == tokeniser.cls_id


def test_case_is_taken_from_the_configuration_or_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nbig\nBig\n", encoding="utf-8")
    assert Tokeniser.from_folder(tmp_path).encode(["Big"]) == [[5]]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert Tokeniser.from_folder(tmp_path).encode(["Big"]) == [[4]]


def test_special_tokens_of_another_spelling(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("<pad>\n[UNK]\n<s>\n</s>\nbig\n", encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"vocab\.txt: the vocabulary has no \[CLS\]"):
        Tokeniser.from_folder(tmp_path)
    config = {"pad_token": "<pad>", "cls_token": {"content": "<s>"}, "sep_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokeniser = Tokeniser.from_folder(tmp_path)
    assert (tokeniser.cls_id, tokeniser.sep_id, tokeniser.pad_id) == (2, 3, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", "", "found neither tokenizer.json nor vocab.txt"),
        ("tokenizer.json", "{}", r"tokenizer\.json: cannot be read as a tokeniser"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object, found list"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: is not JSON"),
        ("vocab.txt", "a\nb\n", r"vocab\.txt: the vocabulary has no \[UNK\]"),
        ("vocab.txt", b"\xff\n", r"vocab\.txt: is not UTF-8 text"),
    ],
)
def test_broken_tokeniser_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ModelFileError, match=message):
        Tokeniser.from_folder(tmp_path)


def test_text_that_is_not_unicode(tokeniser: Tokeniser) -> None:
    with pytest.raises(DataError, match=r"text 1 .* is not valid Unicode"):
        tokeniser.encode(["fine", "broken \udcff"])


def test_stream_and_offsets(table: Table, tokeniser: Tokeniser, expected: TokenisedTable) -> None:
    texts = [text for pair in table.texts for text in pair]
    assert len(expected.offsets) == len(texts) + 1
    for number, ids in enumerate(tokeniser.encode(texts)):
        begin, end = expected.offsets[number : number + 2]
        assert expected.tokens[begin:end].tolist() == ids


def test_second_time_comes_from_the_cache(
    table: Table,
    tokeniser: Tokeniser,
    expected: TokenisedTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "deep" / "cache"
    assert_same(tokenise(table, tokeniser, cache), expected)
    monkeypatch.setattr(tokeniser, "encode", lambda texts: pytest.fail("tokenised again"))
    again = tokenise(table, tokeniser, cache)
    assert_same(again, expected)
    assert not again.tokens.flags.writeable
    assert isinstance(again.tokens.base, np.ndarray)  # mapped, not copied


def test_the_cache_depends_on_texts_and_on_the_tokeniser(
    table: Table, tiny_bert: Path, tmp_path: Path
) -> None:
    def files_after(table: Table, tokeniser: Tokeniser) -> int:
        tokenise(table, tokeniser, tmp_path)
        return len(list(tmp_path.iterdir()))

    plain = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    assert files_after(table, Tokeniser.from_folder(tiny_bert)) == 1
    assert files_after(table, Tokeniser.from_folder(tiny_bert)) == 1
    plain.add_tokens(["zebra"])
    assert files_after(table, Tokeniser(plain)) == 2
    moved = Table(table.task, table.split, table.path, ["a", "b"], [("ab", "c"), ("d", "e")], None, [2, 3])
    shifted = Table(table.task, table.split, table.path, ["a", "b"], [("a", "bc"), ("d", "e")], None, [2, 3])
    assert files_after(moved, Tokeniser(plain)) == 3
    assert files_after(shifted, Tokeniser(plain)) == 4


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "header", "magic", "longer"])
def test_a_damaged_cache_is_rebuilt(
    table: Table, tokeniser: Tokeniser, expected: TokenisedTable, tmp_path: Path, damage: str
) -> None:
    tokenise(table, tokeniser, tmp_path)
    path = cache_file(tmp_path)
    good = path.read_bytes()
    middle = len(good) // 2
    path.write_bytes(
        {
            "truncate": good[:-7],
            "flip": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "empty": b"",
            "header": good[:20],
            "magic": b"another-format-9" + good[16:],
            "longer": good + b"\0\0\0\0",
        }[damage]
    )
    assert_same(tokenise(table, tokeniser, tmp_path), expected)
    assert cache_file(tmp_path).read_bytes() == good


def test_racing_writers_agree(
    table: Table, tokeniser: Tokeniser, expected: TokenisedTable, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: tokenise(table, tokeniser, tmp_path), range(24)))
    for result in results:
        assert_same(result, expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_unwritable_cache_falls_back_to_memory(
    table: Table,
    tokeniser: Tokeniser,
    expected: TokenisedTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(
        UserWarning, match=r"file.*the token cache cannot be written .*; tokens stay in memory"
    ):
        assert_same(tokenise(table, tokeniser, tmp_path / "file" / "cache"), expected)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert_same(tokenise(table, tokeniser, tmp_path / "cache"), expected)
    assert list((tmp_path / "cache").iterdir()) == []


def test_texts_without_any_token(tokeniser: Tokeniser, tmp_path: Path) -> None:
    table = Table("task", "train", Path("t"), ["a"], [("\u200b",)], None, [2])
    for _ in range(2):
        tokenised = tokenise(table, tokeniser, tmp_path)
        assert tokenised.offsets.tolist() == [0, 0]
        assert len(tokenised.tokens) == 0
