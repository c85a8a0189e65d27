"""The head that guesses hidden words, against transformers and in its own start; heads that a run goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packed import Packed, attention_mask, padded, random_batch

from mtbert.errors import ModelFileError
from mtbert.model import (
    BertConfig,
    DropoutRates,
    HeadConfig,
    HeadSpec,
    MultiTaskModel,
    build_heads,
    load_encoder,
)
from mtbert.model.kept_heads import HEADS_FILE, load_heads, save_heads
from mtbert.model.mlm_head import MlmHead, MlmModel, load_mlm_head

WORDS = 60
PLACES = torch.tensor([0, 3, 4, 9, 14])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertForMaskedLM as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> MlmModel:
    generator = torch.Generator().manual_seed(0)  # draws the pooler, which the file has not
    dropouts = DropoutRates(0.0, 0.0, 0.0)
    encoder = load_encoder(folder, dropouts=dropouts, dtype=torch.float64, generator=generator)
    head = MlmHead(encoder.config).double()
    assert load_mlm_head(folder, head)
    return MlmModel(encoder, head)


def oracle(folder: Path, batch: Packed) -> torch.Tensor:
    import transformers

    model = transformers.BertForMaskedLM.from_pretrained(folder).double().eval()
    mask = attention_mask(batch)
    scores: torch.Tensor = model(
        padded(batch, batch.input_ids).long(),
        attention_mask=mask.long(),
        token_type_ids=padded(batch, batch.token_type_ids).long(),
    ).logits[mask]
    return scores


def test_scores_are_those_of_transformers(published: Path) -> None:
    batch = random_batch({"mlm": [5, 9, 1]}, WORDS)
    with torch.no_grad():
        found = loaded(published)(batch, PLACES, dtype=torch.float64)
        torch.testing.assert_close(found, oracle(published, batch)[PLACES], rtol=1e-10, atol=1e-10)


OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def renamed(source: Path, target: Path, names: dict[str, str]) -> Path:
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = value
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("names", [OLD, {"cls.predictions.bias": "cls.predictions.decoder.bias"}])
def test_names_of_other_versions(published: Path, tmp_path: Path, names: dict[str, str]) -> None:
    expected, found = loaded(published), loaded(renamed(published, tmp_path / "old", names))
    for name, parameter in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], parameter), name


def test_an_incomplete_head(published: Path, tmp_path: Path) -> None:
    folder = renamed(published, tmp_path / "model", {"cls.predictions.transform.dense.bias": "cls.other"})
    with pytest.raises(ModelFileError, match=r"cls\.predictions\.transform\.dense\.bias is missing"):
        load_mlm_head(folder, MlmHead(BertConfig(vocab_size=WORDS, hidden_size=32)))


def test_a_head_of_another_size(published: Path) -> None:
    with pytest.raises(ModelFileError, match=r"has shape \[32, 32\], expected \[16, 16\]"):
        load_mlm_head(published, MlmHead(BertConfig(vocab_size=WORDS, hidden_size=16)))


def test_a_fresh_head(tiny_bert: Path) -> None:
    head = MlmHead(BertConfig(vocab_size=4, hidden_size=32))
    assert not load_mlm_head(tiny_bert, head)
    head.set_frequencies(torch.tensor([3, 0, 4, 1]))
    assert head.bias.exp().tolist() == pytest.approx([4 / 12, 1 / 12, 5 / 12, 2 / 12])
    hidden, words = torch.randn(6, 32).double(), torch.zeros(4, 32).double()
    scores = head.double()(hidden, words)
    torch.testing.assert_close(scores, head.bias.expand(6, 4))
    norm = torch.nn.functional.layer_norm(torch.nn.functional.gelu(hidden + 1), (32,), eps=1e-12)
    torch.testing.assert_close(head(hidden, torch.eye(32).double()[:4]) - head.bias, norm[:, :4])


def test_the_pooler_is_not_trained(tiny_bert: Path) -> None:
    encoder = load_encoder(tiny_bert).requires_grad_(False)
    model = MlmModel(encoder, MlmHead(encoder.config))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.pooler.weight", "encoder.pooler.bias"}


# ---- heads to go on with ----


def with_heads(folder: Path, **layers: int) -> MultiTaskModel:
    specs = [HeadSpec(name=task, outputs=3, pair=False, score_range=None) for task in layers]
    configs = {task: HeadConfig(hidden_layers=count) for task, count in layers.items()}
    return MultiTaskModel(load_encoder(folder), build_heads(specs, configs, 32))


def test_heads_of_the_same_name_and_shape_are_kept(tiny_bert: Path, tmp_path: Path) -> None:
    first = with_heads(tiny_bert, sst=0, para=1, cfimdb=0)
    save_heads(first, tmp_path)
    second = with_heads(tiny_bert, sts=0, para=0, sst=0)
    before = {name: value.clone() for name, value in second.heads.state_dict().items()}
    assert load_heads(second, tmp_path) == ["sst"]
    for name, value in second.heads.state_dict().items():
        expected = first.heads.state_dict()[name] if name.startswith("sst.") else before[name]
        assert torch.equal(value, expected), name


def test_a_folder_without_heads(tiny_bert: Path) -> None:
    assert load_heads(with_heads(tiny_bert, sst=0), tiny_bert) == []


def test_a_damaged_file_of_heads(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / HEADS_FILE).write_bytes(b"nothing")
    with pytest.raises(ModelFileError, match=r"heads\.safetensors: is truncated or not a safetensors file"):
        load_heads(with_heads(tiny_bert, sst=0), tmp_path)
