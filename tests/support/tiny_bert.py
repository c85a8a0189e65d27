"""A BERT small enough for unit tests, written to disk as a user would have it: Hugging Face layout, random
weights."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

WORDS = (
    "a an and are as at be best big bad boring but by can cat child city dog do drink eat fast film "
    "for from fun funny good great happy has have he her his how i in is it its just like long man "
    "me more most movie much my no not of on one or people play plays playing plot quick really red "
    "run running sad see she short slow small so story some that the their there they this time to "
    "two very was watch way we well were what when where which who why will with woman wonderful "
    "work worst would you your "
)
SUFFIXES = ("##s", "##ed", "##er", "##est", "##ing", "##ly", "##ness", "##ful")


def default_vocabulary() -> list[str]:
    """Special tokens, every printable ASCII character (letters in lower case), its '##' piece, and common
    words."""
    characters = string.ascii_lowercase + string.digits
    pieces = [
        *SPECIAL_TOKENS,
        *string.punctuation,
        *characters,
        *("##" + c for c in characters),
        *SUFFIXES,
        *WORDS.split(),
    ]
    return list(dict.fromkeys(pieces))


def write_tiny_bert(
    folder: str | Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    heads: int = 2,
    intermediate: int = 64,
    vocab: Sequence[str] | None = None,
    seed: int = 0,
    max_positions: int = 512,
) -> Path:
    """Write config.json, model.safetensors, vocab.txt and tokenizer.json of a random BERT into `folder`;
    returns it.

    The weights are float32 and larger than BERT's initialisation (0.02), so that attention is far from
    uniform and a mistake anywhere in the network shows. The same arguments give the same files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = list(vocab) if vocab is not None else default_vocabulary()
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": max_positions,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tiny_bert_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    _tokeniser(vocabulary).save(str(folder / "tokenizer.json"))
    return folder


def tiny_bert_tensors(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors under the names that Hugging Face's BertModel gives them."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        tensors[f"{name}.weight"] = normal(outputs, inputs, scale=inputs**-0.5)
        tensors[f"{name}.bias"] = normal(outputs, scale=0.1)

    def layer_norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + normal(width, scale=0.1)
        tensors[f"{name}.bias"] = normal(width, scale=0.1)

    tensors["embeddings.word_embeddings.weight"] = normal(config["vocab_size"], width, scale=0.5)
    tensors["embeddings.position_embeddings.weight"] = normal(
        config["max_position_embeddings"], width, scale=0.1
    )
    tensors["embeddings.token_type_embeddings.weight"] = normal(config["type_vocab_size"], width, scale=0.1)
    layer_norm("embeddings.LayerNorm")
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{name}", width, width)
        linear(f"{layer}.attention.output.dense", width, width)
        layer_norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, width)
        linear(f"{layer}.output.dense", width, inner)
        layer_norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", width, width)
    return tensors


def _tokeniser(vocabulary: Sequence[str]) -> Tokenizer:
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokeniser = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokeniser.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokeniser.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokeniser.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokeniser.decoder = decoders.WordPiece(prefix="##")
    tokeniser.add_special_tokens([token for token in SPECIAL_TOKENS if token in ids])
    return tokeniser
