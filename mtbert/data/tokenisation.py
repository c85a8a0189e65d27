"""WordPiece tokenisation of whole tables, done once and cached in memory-mapped files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from mtbert.data.tables import Table
from mtbert.errors import DataError, ModelFileError, UserError
from mtbert.outside_files import MOST_JSON_BYTES, own_file, read_json_object, read_text

_MAGIC = b"mtbert-tokens-1\n"
# magic, texts, sha256 of what follows: offsets int64 [texts + 1] (aligned to 8 bytes) and tokens int32
_HEADER = struct.Struct("<16sq32s8x")
_TEXTS_PER_CALL = 8192
_MOST_TOKENS = 4_000_000  # the largest vocabularies have a million


class Tokeniser:
    """A pretrained model's own WordPiece tokeniser; adds no special tokens and never truncates.

    A text that spells a special token (`[SEP]`) is tokenised as the ordinary characters it is made of.
    `cls_id`, `sep_id`, `pad_id` are the ids of the special tokens, `vocabulary_size` the number of
    ids, `largest_id` the last of them, and `fingerprint` changes with everything that can change an id: vocabulary,
    normaliser, version of the library.
    """

    def __init__(
        self, tokenizer: Tokenizer, special_tokens: dict[str, str] | None = None, source: str = "tokenizer"
    ) -> None:
        """Takes over `tokenizer`; `special_tokens` says how its cls, sep and pad token are spelt."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"} | (special_tokens or {})
        ids: dict[str, int] = {}
        for name, token in names.items():
            token_id = tokenizer.token_to_id(token)
            if token_id is None:
                raise ModelFileError(f"{source}: the vocabulary has no {token}; expected a BERT vocabulary")
            ids[name] = token_id
        self._tokenizer = tokenizer
        self.cls_id = ids["cls_token"]
        self.sep_id = ids["sep_token"]
        self.pad_id = ids["pad_token"]
        known = tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary_size = len(known)
        self.largest_id = max(known.values())
        description = json.dumps([tokenizer.to_str(), ids, tokenizers.__version__])
        self.fingerprint = hashlib.sha256(description.encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokeniser:
        """Reads `tokenizer.json`, or else `vocab.txt` with the settings of `tokenizer_config.json`."""
        folder = Path(folder)
        described = own_file(folder, "tokenizer_config.json", ModelFileError)
        config = read_json_object(described, ModelFileError) if described.is_file() else {}
        special = {
            name: _token(described, name, config[name])
            for name in ("cls_token", "sep_token", "pad_token")
            if config.get(name)
        }
        complete, vocabulary = (
            own_file(folder, name, ModelFileError) for name in ("tokenizer.json", "vocab.txt")
        )
        if complete.is_file():
            # Parsed here first: it bounds what the library gets to see.
            parsed = read_json_object(complete, ModelFileError)
            _check_ids(complete, parsed)
            try:
                return cls(Tokenizer.from_str(json.dumps(parsed, ensure_ascii=False)), special, str(complete))
            except (UserError, KeyboardInterrupt, SystemExit):
                raise
            except (
                BaseException
            ) as error:  # the library raises bare Exception, and BaseException where it panics
                raise ModelFileError(f"{complete}: cannot be read as a tokeniser: {error!s:.300}") from None
        if vocabulary.is_file():
            return cls(_word_piece(vocabulary, described, config), special, str(vocabulary))
        raise ModelFileError(
            f"{folder}: found neither tokenizer.json nor vocab.txt; expected the folder of a BERT model"
        )

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, special ones included; None when there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def write(self, folder: Path, *, max_length: int) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' `AutoTokenizer` reads them.

        They frame rows as `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]`, and take a text that spells a special token as
        the characters it is made of, as everything here does. max_length: where a reader who is told to truncate does.
        """
        cls, sep, pad = (self._tokenizer.id_to_token(i) for i in (self.cls_id, self.sep_id, self.pad_id))
        written = Tokenizer.from_str(self._tokenizer.to_str())
        written.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, self.cls_id), (sep, self.sep_id)],
        )
        known = [token for token in ("[UNK]", "[MASK]") if written.token_to_id(token) is not None]
        written.add_special_tokens(list(dict.fromkeys([cls, sep, pad, *known])))
        written.save(str(folder / "tokenizer.json"))
        names = {"cls_token": cls, "sep_token": sep, "pad_token": pad}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            **names,
            **{f"{token[1:-1].lower()}_token": token for token in known},
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "padding_side": "right",
            "truncation_side": "right",
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, without special tokens."""
        try:
            return [
                encoding.ids
                for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ]
        except (TypeError, UnicodeEncodeError):
            for number, text in enumerate(texts):
                if not isinstance(text, str) or not _is_unicode(text):
                    raise DataError(f"text {number} ({text!r:.80}) is not valid Unicode") from None
            raise
        except BaseException as error:
            # The library gives up on a regular expression of tokenizer.json that takes too long, by panicking.
            if type(error).__name__ != "PanicException":
                raise
            raise ModelFileError(f"the tokeniser cannot read these texts ({error!s:.200})") from None


@dataclass(frozen=True, eq=False)
class TokenisedTable:
    """A table with its tokens: the texts of example i are the texts i * k to i * k + k - 1, k per example.

    `tokens` int32 [tokens] is the stream of all texts without special tokens, `offsets` int64 [texts + 1]
    says where each begins. Both may be read-only memory maps.
    """

    table: Table
    tokens: np.ndarray
    offsets: np.ndarray
    texts_per_example: int
    cls_id: int
    sep_id: int

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.table)


def tokenise(table: Table, tokeniser: Tokeniser, cache_dir: Path | str | None = None) -> TokenisedTable:
    """Tokenises a table, or takes its tokens from `cache_dir`.

    The cache's file is named by the sha256 of the texts and of the tokeniser, so that it never needs to be
    invalidated; it is written beside and renamed, so that several processes may share the folder. A damaged
    file is rebuilt. When the folder cannot be written the tokens stay in memory, with a warning. None: no
    cache.
    """
    texts = list(chain.from_iterable(table.texts))
    per_example = len(table.texts[0]) if table.texts else 1
    if cache_dir is None:
        tokens, offsets = _encode(texts, tokeniser)
    else:
        path = Path(cache_dir) / f"{_key(texts, tokeniser)}.tokens"
        cached = _load(path, len(texts))
        if cached is None:
            tokens, offsets = _encode(texts, tokeniser)
            if _store(path, tokens, offsets):
                tokens, offsets = _load(path, len(texts)) or (tokens, offsets)
        else:
            tokens, offsets = cached
    return TokenisedTable(table, tokens, offsets, per_example, tokeniser.cls_id, tokeniser.sep_id)


def _encode(texts: Sequence[str], tokeniser: Tokeniser) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.zeros(len(texts), dtype=np.int64)
    parts = [np.zeros(0, dtype=np.int32)]
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        encoded = tokeniser.encode(texts[start : start + _TEXTS_PER_CALL])
        lengths[start : start + len(encoded)] = [len(ids) for ids in encoded]
        parts.append(np.fromiter(chain.from_iterable(encoded), dtype=np.int32))
    return np.concatenate(parts), np.concatenate([[0], np.cumsum(lengths)])


def _key(texts: Iterable[str], tokeniser: Tokeniser) -> str:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    digest = hashlib.sha256(_MAGIC + tokeniser.fingerprint.encode())
    digest.update(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)).tobytes())
    digest.update(b"".join(encoded))
    return digest.hexdigest()


def _store(path: Path, tokens: np.ndarray, offsets: np.ndarray) -> bool:
    payload = offsets.astype("<i8").tobytes() + tokens.astype("<i4").tobytes()
    header = _HEADER.pack(_MAGIC, len(offsets) - 1, hashlib.sha256(payload).digest())
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(
            prefix=path.stem[:16] + "-", suffix=".partial", dir=path.parent
        )
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            file.write(payload)
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        warnings.warn(
            f"{path.parent}: the token cache cannot be written ({error.strerror or error}); "
            "tokens stay in memory",
            stacklevel=3,
        )
        return False
    return True


def _load(path: Path, texts: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The cached (tokens, offsets) as read-only memory maps; None when there is no intact file."""
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError):  # ValueError: an empty file cannot be mapped
        return None
    if len(data) < _HEADER.size:
        return None
    magic, found_texts, digest = _HEADER.unpack(data[: _HEADER.size].tobytes())
    # A plain array over the same pages: indexing np.memmap itself is several times as slow.
    payload = np.asarray(data[_HEADER.size :])
    if magic != _MAGIC or found_texts != texts or hashlib.sha256(payload.data).digest() != digest:
        return None
    return payload[8 * (texts + 1) :].view("<i4"), payload[: 8 * (texts + 1)].view("<i8")


def _check_ids(path: Path, parsed: dict[str, Any]) -> None:
    """Raise ModelFileError for token ids that no vocabulary has: the library makes room for all below them."""
    model, added = parsed.get("model"), parsed.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    wrong = next((found for found in ids if type(found) is not int or not 0 <= found < _MOST_TOKENS), None)
    if wrong is not None:
        raise ModelFileError(f"{path}: expected token ids below {_MOST_TOKENS:,}, found {wrong!r:.40}")


def _token(path: Path, name: str, value: Any) -> str:
    """A special token stands as a string, or as an object with its content."""
    token = value.get("content") if isinstance(value, dict) else value
    if not isinstance(token, str) or len(token) > 200:
        raise ModelFileError(f"{path}: {name}: expected a token, found {value!r:.80}")
    return token


def _word_piece(path: Path, described: Path, config: dict[str, Any]) -> Tokenizer:
    text = read_text(path, ModelFileError, MOST_JSON_BYTES)
    vocabulary = {
        line.removesuffix("\r"): number for number, line in enumerate(text.removesuffix("\n").split("\n"))
    }
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if not isinstance(config.get(name), bool | None):
            raise ModelFileError(f"{described}: {name}: expected true or false, found {config[name]!r:.80}")
    unknown = _token(described, "unk_token", config.get("unk_token") or "[UNK]")
    if unknown not in vocabulary:
        raise ModelFileError(
            f"{path}: the vocabulary has no {unknown}; expected a BERT vocabulary, one token a line"
        )
    lowercase = config.get("do_lower_case")
    if lowercase is None:  # an uncased vocabulary has no capital outside its special tokens
        lowercase = not any(token != token.lower() for token in vocabulary if not token.startswith("["))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    chinese = config.get("tokenize_chinese_chars")
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True if chinese is None else chinese,
        strip_accents=config.get("strip_accents"),
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
