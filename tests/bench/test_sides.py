"""The sides of a comparison do the same work: sentences, gradients, trained parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.own import build_step, frozen_side, own_side
from bench.peers import PlainLoop, padding_share
from bench.workload import Workload, build_workload
from mtbert.engine.features import FrozenForward
from mtbert.engine.forward import PackedForward
from mtbert.model.lora import LoraConfig

CPU = torch.device("cpu")


def small_workload(tiny_bert: Path, steps: int) -> Workload:
    """The built-in sample in steps of about 4,000 tokens."""
    return build_workload(str(tiny_bert), tokens_per_step=4000, steps=steps, folder=None)


def test_every_step_of_the_workload_has_nearly_the_same_tokens(tiny_bert: Path) -> None:
    workload = small_workload(tiny_bert, steps=5)
    tokens = [
        sum(int(workload.data[name].lengths[examples].sum()) for name, examples in step.items())
        for step in workload.steps
    ]
    assert sum(tokens) == workload.tokens
    assert max(tokens) < 1.1 * min(tokens)
    assert 3500 < np.mean(tokens) < 4500
    for name, pool in workload.pool.items():
        read = np.concatenate([step[name] for step in workload.steps])
        assert sorted(read.tolist()) == sorted(pool.tolist())


@pytest.mark.parametrize(("bucketed", "step_every_batch"), [(True, False), (True, True), (False, False)])
def test_a_plain_loop_reads_the_same_sentences(
    tiny_bert: Path, bucketed: bool, step_every_batch: bool
) -> None:
    pytest.importorskip("transformers")
    workload = small_workload(tiny_bert, steps=2)
    loop = PlainLoop(workload, CPU, dtype=torch.float32, bucketed=bucketed, step_every_batch=step_every_batch)
    for name, pool in workload.pool.items():
        read = [e for step in loop.steps for b in step if b.task == name for e in b.examples.tolist()]
        assert sorted(read) == sorted(pool.tolist())
    step = own_side("mtbert", workload, build_step(workload, CPU, precision="float32"))
    assert sum(loop(k) for k in range(2)) == sum(step.run(k) for k in range(2)) == workload.tokens


def test_bucketing_leaves_less_padding(tiny_bert: Path) -> None:
    pytest.importorskip("transformers")
    workload = small_workload(tiny_bert, steps=5)
    bucketed, stock = (PlainLoop(workload, CPU, dtype=torch.float32, bucketed=b) for b in (True, False))
    assert 0 <= padding_share(bucketed) < 0.1 < padding_share(stock)


def test_a_plain_loop_has_the_gradient_of_mtbert(tiny_bert: Path) -> None:
    pytest.importorskip("transformers")
    workload = small_workload(tiny_bert, steps=1)
    ours = build_step(workload, CPU, precision="float32", dropout=0.0)
    assert isinstance(ours.forward, PackedForward)
    model = ours.forward.model
    loop = PlainLoop(workload, CPU, dtype=torch.float32, bucketed=True, dropout=0.0)
    for name, head in loop.model.heads.items():
        output = model.head(name).output
        assert output is not None
        head.load_state_dict(output.state_dict())

    ours.accumulate(workload.steps[0], 0)
    loop.accumulate(loop.steps[0])
    theirs = dict(loop.model.named_parameters())
    for parameter, name in (
        (model.encoder.embeddings.word, "encoder.embeddings.word_embeddings.weight"),
        (model.encoder.layers[0].intermediate.weight, "encoder.encoder.layer.0.intermediate.dense.weight"),
        (model.head("sst").output.weight, "heads.sst.weight"),  # type: ignore[union-attr]
        (model.head("para").output.weight, "heads.para.weight"),  # type: ignore[union-attr]
        (model.head("sts").output.weight, "heads.sts.weight"),  # type: ignore[union-attr]
    ):
        torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_peft_trains_the_same_adapters(tiny_bert: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    workload = small_workload(tiny_bert, steps=1)
    lora = LoraConfig(rank=2, projections=["query", "attention_output", "output"])
    ours = build_step(workload, CPU, mode="lora", precision="float32", lora=lora)
    loop = PlainLoop(workload, CPU, dtype=torch.float32, bucketed=True, lora=lora)
    trained = [p for p in loop.model.parameters() if p.requires_grad]
    assert sorted(p.numel() for p in trained) == sorted(p.numel() for p in ours.parameters)
    assert loop(0) == workload.tokens


def test_the_frozen_side_reads_the_whole_pool_from_cached_features(tiny_bert: Path) -> None:
    workload = small_workload(tiny_bert, steps=3)
    step = build_step(workload, CPU, mode="last-linear-layer", precision="float32")
    assert isinstance(step.forward, FrozenForward)
    side = frozen_side("frozen", workload, step)
    assert side.figures["features_tokens_per_second"] > 0
    assert side.run(0) == workload.tokens
