"""Evaluations: which examples are scored, and what chooses the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.assembly import Assembly, assemble, tiny_config

from mtbert.data.packing import Request
from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.engine.evaluator import EvaluationConfig, Evaluator
from mtbert.engine.inference import infer
from mtbert.engine.metrics_log import plain
from mtbert.engine.sentence_quality import SentenceQuality
from mtbert.errors import ConfigError
from mtbert.evaluation.halves import selection_half
from mtbert.evaluation.metrics import overall, score
from mtbert.model.heads import HeadConfig
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.registry import TASKS

TRIO = ("sst", "para", "sts")


@pytest.fixture(scope="module")
def assembly(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    config = tiny_config(tiny_bert, tmp_path_factory.mktemp("cache"))
    head = HeadConfig(pooling="mean", pair=["cosine"])
    config.task["sts"] = TaskConfig(batch_size=6, max_length=64, head=head)
    return assemble(config)


def evaluator(assembly: Assembly, **options: object) -> Evaluator:
    return Evaluator(
        assembly.forward,
        {name: TASKS[name] for name in TRIO},
        assembly.data,
        assembly.losses,
        EvaluationConfig(train_examples=7, **options),  # type: ignore[arg-type]
        max_tokens=256,
        seed=3,
    )


def test_the_half_that_chooses_is_scored_alone(assembly: Assembly) -> None:
    assembly.model.eval()
    found, whole = evaluator(assembly, selection="half").evaluate(), evaluator(assembly).evaluate()
    held = {}
    for name in TRIO:
        data = assembly.data[name]["dev"]
        assert data.labels is not None
        outputs = infer(assembly.forward, data, max_tokens=256)
        inside = selection_half(data.ids, data.labels)
        held[name] = score(TASKS[name], data.labels[inside], outputs[inside])
        assert found.dev[name].examples == inside.sum() == len(data) // 2
        assert found.dev[name].headline == pytest.approx(held[name].headline, abs=1e-6)
        assert whole.dev[name].headline == pytest.approx(
            score(TASKS[name], data.labels, outputs).headline, abs=1e-6
        )
        losses = assembly.losses[name].per_example(
            torch.from_numpy(outputs[inside]), torch.from_numpy(data.labels[inside])
        )
        assert found.dev_loss[name] == pytest.approx(float(losses.mean()), abs=1e-6)
        assert found.train[name].examples == 7
    assert found.score == pytest.approx(overall(held), abs=1e-6)
    assert found.score != whole.score
    line = json.loads(json.dumps(plain(found.to_json())))
    assert line["score"] == found.score
    assert line["dev"]["sst"]["examples"] == found.dev["sst"].examples
    assert "embedding" not in line


def test_the_same_half_for_every_seed_and_order_of_rows(assembly: Assembly) -> None:
    config = EvaluationConfig(selection="half")
    arguments = (assembly.forward, {"sst": TASKS["sst"]}, assembly.data, assembly.losses, config)
    first, second = (Evaluator(*arguments, max_tokens=256, seed=seed) for seed in (0, 1))
    assert (first.examples["sst"]["dev"] == second.examples["sst"]["dev"]).all()
    assert (first.examples["sst"]["dev"] == np.sort(first.examples["sst"]["dev"])).all()


def test_a_dev_table_too_small_to_halve_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    small = assemble(tiny_config(tiny_bert, tmp_path, tasks=["sst"]), rows=1)
    options = {"max_tokens": 256, "seed": 0}
    tasks = {"sst": TASKS["sst"]}
    with pytest.raises(
        ConfigError, match=r"evaluation\.selection: half needs at least 2 dev examples of sst, found 1"
    ):
        Evaluator(
            small.forward, tasks, small.data, small.losses, EvaluationConfig(selection="half"), **options
        )
    Evaluator(small.forward, tasks, small.data, small.losses, EvaluationConfig(), **options)


def test_sentence_quality_is_that_of_the_pooled_sentences(assembly: Assembly) -> None:
    data, task = assembly.data["sts"]["dev"], TASKS["sts"]
    examples = np.flatnonzero(selection_half(data.ids, data.labels))
    tokeniser = Tokeniser.from_folder(Path(assembly.config.model.pretrained))
    quality = SentenceQuality(
        assembly.forward,
        task,
        tokenise(data.table, tokeniser),
        examples,
        pooling="mean",
        max_length=64,
        max_tokens=256,
    )
    assembly.model.eval()
    # The head of sts pools the two sentences of a pair into two rows of their own, in the same way.
    with torch.inference_mode():
        request = Request(data, examples, first_row_id=0, weight=1.0)
        rows = assembly.forward([request], None).rows["sts"].double()
    np.testing.assert_allclose(quality.embeddings(), rows.numpy(), rtol=1e-9, atol=1e-12)
    unit = F.normalize(rows, dim=1)
    assert data.labels is not None
    positive = torch.from_numpy(data.labels[examples] >= 4.0)
    found = quality()
    assert found.pairs == int(positive.sum()) > 0
    distances = (unit[0::2] - unit[1::2]).square().sum(1)
    assert found.alignment == pytest.approx(float(distances[positive].mean()), rel=1e-9)
    assert found.uniformity == pytest.approx(
        float(torch.pdist(unit).square().mul(-2).exp().mean().log()), rel=1e-9
    )

    measuring = Evaluator(
        assembly.forward,
        {"sts": task},
        assembly.data,
        assembly.losses,
        EvaluationConfig(train_examples=0),
        max_tokens=256,
        seed=0,
        quality=quality,
    )
    line = measuring.evaluate().to_json()
    assert line["embedding"] == dataclasses.asdict(found)
