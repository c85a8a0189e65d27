"""Every format, loaded by the library that it is for: the same outputs as mtbert's own, padded on the other side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_runs import TEXTS, loaded, make_run, own_hidden, own_outputs
from support.tiny_bert import write_tiny_bert
from torch import Tensor

from mtbert.errors import ExportError, ModelFileError
from mtbert.exporting.run import ExportedRun
from mtbert.exporting.write import write_export
from mtbert.model.heads import PAIR_FEATURES

CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-5}
FIRST = [row[0] for row in TEXTS]
SECOND = [row[1] for row in TEXTS]
TASKS = {
    "tasks": ["sst", "para", "sts"],
    "sst": {"max_length": 40},
    "para": {"max_length": 40},
    "sts": {"max_length": 40},
}


def head(task: str, **values: Any) -> dict[str, Any]:
    return {"max_length": 40, "head": values}


def export(run: Any, format_name: str, target: Path, task: str | None = None) -> Path:
    found, config = loaded(run)
    return write_export(ExportedRun(found, config, task), format_name, target)


def by_transformers(folder: Path, *texts: list[str]) -> tuple[Any, Tensor, Any]:
    """The model's output, its attention mask, and the tokeniser's answer."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**inputs), inputs["attention_mask"], tokenizer


def check_hidden(found: Tensor, mask: Tensor, expected: list[Tensor]) -> None:
    for row, kept, own in zip(found, mask.bool(), expected, strict=True):
        torch.testing.assert_close(row[kept], own, **CLOSE)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_encoder_is_transformers_bert_model(tmp_path: Path, tiny_bert: Path, mode: str) -> None:
    run = make_run(tmp_path / "run", tiny_bert, {**TASKS, "mode": mode})
    folder = export(run, "hf", tmp_path / "out")
    own, _ = loaded(run)
    output, mask, tokenizer = by_transformers(folder, FIRST)
    assert tokenizer.model_max_length == 40
    check_hidden(output.last_hidden_state, mask, own_hidden(own, "sst"))
    # Encoder and heads are all that mtbert needs to compute the same: nothing of the model is lost.
    again = make_run(tmp_path / "again", folder, {**TASKS, "mode": "full"}, seed=9)
    import dataclasses

    from mtbert.engine.build import load_model

    model, _ = load_model(dataclasses.replace(loaded(again)[1], mode="full"), own.machine)
    for task in own.tasks:
        torch.testing.assert_close(
            own_outputs(dataclasses.replace(own, model=model.eval()), task), own_outputs(own, task), **CLOSE
        )


EXPRESSIBLE = {
    "cls, linear": {"pooling": "cls"},
    "pooler, linear": {"pooling": "pooler"},
    "cls, tanh": {"pooling": "cls", "hidden_layers": 1, "activation": "tanh"},
    "cls, narrow tanh": {"pooling": "cls", "tower_layers": 1, "hidden_size": 9, "activation": "Tanh"},
    "pooler, two linear layers": {"pooling": "pooler", "hidden_layers": 2, "hidden_size": 50, "activation": "none"},
}  # fmt: skip


@pytest.mark.parametrize("shape", EXPRESSIBLE)
def test_heads_are_transformers_sequence_classifiers(tmp_path: Path, tiny_bert: Path, shape: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    each = {task: head(task, **EXPRESSIBLE[shape]) for task in ("sst", "para", "sts")}
    run = make_run(tmp_path / "run", tiny_bert, {**TASKS, **each})
    own, _ = loaded(run)
    for task in each:
        folder = export(run, "hf", tmp_path / task, task)
        expected = own_outputs(own, task)
        tokenizer, model = (
            AutoTokenizer.from_pretrained(folder),
            AutoModelForSequenceClassification.from_pretrained(folder),
        )
        inputs = tokenizer(
            FIRST, *([SECOND] if task != "sst" else []), padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        if task == "para":  # (0, z)
            assert (logits[:, 0] == 0).all()
            logits = logits[:, 1:]
        torch.testing.assert_close(logits, expected, **CLOSE)
        if shape == "cls, linear":
            given = [{"text": a, "text_pair": b} for a, b in TEXTS] if task != "sst" else FIRST
            answers = pipeline("text-classification", model=str(folder), top_k=None)(
                given, truncation=True, batch_size=3
            )
            by_name = [{entry["label"]: entry["score"] for entry in answer} for answer in answers]
            if task == "sst":
                assert model.config.id2label[0] == "very negative"
                wanted = expected.softmax(-1)[:, 3].tolist()
                assert [row["positive"] for row in by_name] == pytest.approx(wanted, abs=1e-5)
            elif task == "para":
                wanted = expected.sigmoid()[:, 0].tolist()
                assert [row["paraphrase"] for row in by_name] == pytest.approx(wanted, abs=1e-5)
            else:
                assert model.config.problem_type == "regression"
                assert [row["similarity"] for row in by_name] == pytest.approx(
                    expected[:, 0].tolist(), abs=1e-5
                )


REFUSED = {
    "pooling mean": ({"pooling": "mean"}, "head.pooling mean"),
    "gelu": ({"hidden_layers": 1}, "head.activation gelu"),
    "two layers": ({"hidden_layers": 2, "activation": "tanh"}, "2 layers with an activation"),
    "too wide": ({"hidden_layers": 1, "activation": "tanh", "hidden_size": 33}, "head.hidden_size 33"),
    "two rows": ({"pair": ["difference"]}, "joins two rows"),
}


def test_heads_of_other_shapes_are_refused_by_name(tmp_path: Path, tiny_bert: Path) -> None:
    for name, (values, message) in REFUSED.items():
        run = make_run(tmp_path / name, tiny_bert, {**TASKS, "para": head("para", **values)})
        with pytest.raises(ExportError, match=f"para.*{message}.*onnx"):
            export(run, "hf", tmp_path / "out", "para")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_what_a_bert_has_no_place_for_is_refused_by_name(tmp_path: Path, tiny_bert: Path) -> None:
    values = {**TASKS, "model": {"extra_hidden": {"depth": 1}, "pals": {"size": 8, "heads": 2}}}
    run = make_run(tmp_path / "run", tiny_bert, values)
    for format_name in ("hf", "onnx", "sentence-transformers"):
        with pytest.raises(ModelFileError, match=r"model\.extra_hidden, model\.pals"):
            export(run, format_name, tmp_path / "out", "para")
    with pytest.raises(ExportError, match="mode full, which trains none"):
        export(run, "peft", tmp_path / "out")


LORA = {
    "all": {"projections": ["query", "key", "value", "attention_output", "intermediate", "output"], "rank": 3},
    "one layer": {"projections": ["query", "value"], "layers": [1], "rank": 5, "alpha": 3.5, "rank_stabilised": True},
    "output alone": {"projections": ["query", "output"], "layers": [0]},
    "per task": {"per_task": True, "rank": 2, "projections": ["key", "intermediate"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", LORA)
def test_adapters_are_peft_adapters_and_come_back(tmp_path: Path, tiny_bert: Path, kind: str) -> None:
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    values = {**TASKS, "mode": "lora", "model": {"lora": LORA[kind]}}
    run = make_run(tmp_path / "run", tiny_bert, values)
    folder = export(run, "peft", tmp_path / "out")
    own, _ = loaded(run)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(FIRST, padding=True, truncation=True, return_tensors="pt")
    task = "para" if kind == "per task" else "sst"
    place = folder / task if kind == "per task" else folder
    base = AutoModel.from_pretrained(folder / "base").eval()
    with torch.no_grad():
        plain = base(**inputs).last_hidden_state
        model = PeftModel.from_pretrained(base, place).eval()
        hidden = model(**inputs).last_hidden_state
    assert (hidden - plain).abs().max() > 0.01
    if kind == "per task":  # para's rows are pairs; its adapter is the one under test
        with torch.no_grad():
            pairs = tokenizer(FIRST, SECOND, padding=True, truncation=True, return_tensors="pt")
            hidden, inputs = model(**pairs).last_hidden_state, pairs
    check_hidden(hidden, inputs["attention_mask"], own_hidden(own, task))
    # PEFT writes it in its own way, and a run starts from that.
    model.save_pretrained(tmp_path / "by-peft")
    source = folder if kind == "per task" else tmp_path / "by-peft"
    started = make_start(
        tmp_path / "again", folder / "base", {**values, "model": {**values["model"], "adapter": str(source)}}
    )
    ours, theirs = started.encoder.state_dict(), own.model.encoder.state_dict()
    assert [name for name in ours if "lora" in name]
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    if kind == "per task":  # with --task its adapter is folded into an encoder
        output, mask, _ = by_transformers(export(run, "hf", tmp_path / "folded", "para"), FIRST, SECOND)
        check_hidden(output.last_hidden_state, mask, own_hidden(own, "para"))


def make_start(folder: Path, bert: Path, values: dict[str, Any]) -> Any:
    """The model that a run begins with."""
    from support.configs import config_of

    from mtbert.engine.build import Machine, load_model

    config = config_of({**values, "model": {**values["model"], "pretrained": str(bert)}})
    return load_model(config, Machine(torch.device("cpu"), torch.float32))[0]


def test_adapters_of_other_kinds_are_refused_by_name(tmp_path: Path, tiny_bert: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    def saved(name: str, **values: Any) -> dict[str, Any]:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **values}
        model = get_peft_model(AutoModel.from_pretrained(tiny_bert), LoraConfig(**settings))
        model.save_pretrained(tmp_path / name)
        return {"lora": {"rank": 4, "alpha": 8.0}, "adapter": str(tmp_path / name)}

    def start(model: dict[str, Any]) -> Any:
        return make_start(tmp_path, tiny_bert, {**TASKS, "mode": "lora", "model": model})

    start(saved("plain"))
    for name, values, message in (
        ("dora", {"use_dora": True}, "use_dora True"),
        ("bias", {"bias": "lora_only"}, "bias lora_only"),
        ("modules", {"modules_to_save": ["pooler"]}, r"modules_to_save \['pooler'\]"),
        ("pattern", {"rank_pattern": {"query": 2}}, "rank_pattern"),
        (
            "base",
            {"init_lora_weights": "olora"},
            "init_lora_weights 'olora' is not served: it changes the weights",
        ),
        ("embeddings", {"target_modules": ["word_embeddings"]}, "is not a LoRA matrix"),
        ("pooler", {"target_modules": ["query", "pooler.dense"]}, "is not a LoRA matrix"),
    ):
        with pytest.raises(ModelFileError, match=message):
            start(saved(name, **values))
    differing = saved("differing", r=7, use_rslora=True, layers_to_transform=[1], layers_pattern="layer")
    wanted = r"--model\.lora\.rank 7 --model\.lora\.rank_stabilised true --model\.lora\.layers '\[1\]'"
    with pytest.raises(ModelFileError, match=wanted):
        start(differing)
    (tmp_path / "plain" / "adapter_model.safetensors").rename(tmp_path / "plain" / "adapter_model.bin")
    with pytest.raises(ModelFileError, match=r"pickled"):
        start({"lora": {"rank": 4, "alpha": 8.0}, "adapter": str(tmp_path / "plain")})


BI_ENCODERS = {
    "cosine of means": {"pooling": "mean", "pair": ["cosine"]},
    "cosine of first tokens behind towers": {"pooling": "cls", "pair": ["cosine"], "tower_layers": 2, "hidden_size": 7},
    "dot of poolers behind a tower": {
        "pooling": "pooler", "pair": ["dot"], "tower_layers": 1, "activation": "leaky_relu",
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", BI_ENCODERS)
def test_two_rows_are_a_sentence_transformer(tmp_path: Path, tiny_bert: Path, shape: str) -> None:
    from sentence_transformers import SentenceTransformer

    values = {**TASKS, "para": head("para", **BI_ENCODERS[shape]), "sts": head("sts", **BI_ENCODERS[shape])}
    run = make_run(tmp_path / "run", tiny_bert, values)
    own, _ = loaded(run)
    for task in ("para", "sts"):
        folder = export(run, "sentence-transformers", tmp_path / task, task)
        model = SentenceTransformer(str(folder), device="cpu")
        assert model.max_seq_length == 40
        u, v = (model.encode(texts, convert_to_tensor=True) for texts in (FIRST, SECOND))
        similarity = model.similarity_pairwise(u, v)[:, None]
        output = own.model.head(task).output
        if output is not None:
            similarity = similarity * output.weight.item() + output.bias.item()
        outputs = 5 * similarity if task == "sts" else similarity
        expected = own_outputs(own, task)
        torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-5)


def test_one_row_a_pair_is_a_cross_encoder(tmp_path: Path, tiny_bert: Path) -> None:
    from sentence_transformers import CrossEncoder

    run = make_run(tmp_path / "run", tiny_bert, {**TASKS, "para": head("para", pooling="pooler")})
    own, _ = loaded(run)
    for task, wanted in (("para", own_outputs(own, "para").sigmoid()), ("sts", own_outputs(own, "sts"))):
        model = CrossEncoder(str(export(run, "sentence-transformers", tmp_path / task, task)), device="cpu")
        found = model.predict(list(zip(FIRST, SECOND, strict=True)))
        np.testing.assert_allclose(found, wanted[:, 0].numpy(), **CLOSE)
    with pytest.raises(ExportError, match="name one of para, sts"):
        export(run, "sentence-transformers", tmp_path / "out")
    with pytest.raises(ExportError, match="sst: its examples are single sentences"):
        export(run, "sentence-transformers", tmp_path / "out", "sst")


GRAPHS = {
    "encoder": ("sst", None, {}),
    "cross-encoder": ("para", "para", {"pooling": "mean", "hidden_layers": 1, "activation": "mish"}),
    "features": ("para", "para", {"pair": list(PAIR_FEATURES), "tower_layers": 1, "hidden_layers": 1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs_compute_the_same_at_every_shape(tmp_path: Path, tiny_bert: Path, kind: str) -> None:
    import onnxruntime
    from transformers import AutoTokenizer

    pytest.importorskip("onnxscript")
    task, exported, shape = GRAPHS[kind]
    mode = "lora" if kind == "encoder" else "full"
    bert = write_tiny_bert(tmp_path / "bert", layers=1)
    run = make_run(tmp_path / "run", bert, {**TASKS, "mode": mode, task: {"max_length": 512, "head": shape}})
    folder = export(run, "onnx", tmp_path / "out", exported)
    own, _ = loaded(run)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    described = json.loads((folder / "graph.json").read_text())
    assert [entry.name for entry in session.get_inputs()] == described["inputs"]
    long = "the film was great " * 200
    for texts in ([("a", "b")], [(long, "no")], [("good", long)], [*TEXTS, (long, long)]):
        first, second = [a for a, _ in texts], [b for _, b in texts]
        if kind == "features":
            answers = [
                tokenizer(each, padding=True, truncation=True, return_tensors="np")
                for each in (first, second)
            ]
            inputs = {
                f"{place}_{name}": answer[name]
                for place, answer in zip(("first", "second"), answers, strict=True)
                for name in ("input_ids", "attention_mask")
            }
        else:
            pair = [second] if kind == "cross-encoder" else []
            inputs = dict(tokenizer(first, *pair, padding=True, truncation=True, return_tensors="np"))
        found = torch.from_numpy(session.run(None, inputs)[0])
        if kind == "encoder":
            check_hidden(found, torch.from_numpy(inputs["attention_mask"]), own_hidden(own, task, texts))
        else:
            torch.testing.assert_close(found, own_outputs(own, task, texts), rtol=1e-5, atol=1e-5)
