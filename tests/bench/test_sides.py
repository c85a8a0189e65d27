"""The sides of a comparison do the same work: sentences, gradients, trained parameters."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.first_result import STEPS, write_small_tables
from bench.memory import peak_bytes
from bench.own import build_step, frozen_side, own_side
from bench.papers_peer import PapersLoop, papers_side
from bench.peers import PlainLoop, loop_side, padding_share
from bench.trainer_peer import NEEDS, TrainerLoop, trainer_side
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


def test_the_step_of_the_papers_has_the_gradient_of_mtbert(tiny_bert: Path) -> None:
    workload = small_workload(tiny_bert, steps=1)
    ours = build_step(workload, CPU, precision="float32", dropout=0.0)
    loop = PapersLoop(workload, CPU, dropout=0.0)
    model = ours.forward.model
    for name, head in loop.model.heads.items():
        output = model.head(name).output
        assert output is not None
        head.output.linear.load_state_dict(output.state_dict())  # type: ignore[union-attr, operator]
    loop.clip_norm = ours.clip_norm = 1e9
    ours.accumulate(workload.steps[0], 0)
    side = papers_side("papers", loop)
    assert side.run(0) == workload.tokens
    assert 0 < side.figures["padding_share"] < 1
    layer, twin = model.encoder.layers[0], loop.model.bert.layers[0]
    for parameter, theirs in (
        (model.encoder.embeddings.word, loop.model.bert.embeddings.word.weight),
        (layer.attention_output.weight, twin.attention_output.weight),  # type: ignore[union-attr]
        (layer.output.bias, twin.output.bias),  # type: ignore[union-attr]
    ):
        torch.testing.assert_close(theirs.grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_trainer_of_sentence_transformers_goes_on_step_by_step_and_ends(tiny_bert: Path) -> None:
    for package in NEEDS:
        pytest.importorskip(package)
    workload = build_workload(str(tiny_bert), tokens_per_step=1500, steps=2, folder=None, pairs="cosine")
    loop = TrainerLoop(workload, CPU, dtype=torch.float32, dropout=0.0)
    side = trainer_side("theirs", loop)
    weight = next(loop.trainer.model.parameters())
    seen, read, steps = [weight.detach().clone()], 0.0, 0
    while loop.trainer.state.epoch is None or loop.trainer.state.epoch < 1:
        read += side.run(steps)
        seen.append(weight.detach().clone())
        steps += 1
    assert read == workload.tokens  # an epoch of theirs is the pool, and its tokens are counted as ours
    assert all(not torch.equal(before, after) for before, after in itertools.pairwise(seen))
    assert side.activations is not None
    tokens, held = side.activations()
    assert tokens > 0
    assert held > 0
    assert torch.equal(weight, seen[-1])  # measuring trains nothing
    side.close()
    assert not loop._thread.is_alive()


def test_an_error_of_the_trainer_is_not_waited_for(tiny_bert: Path) -> None:
    for package in NEEDS:
        pytest.importorskip(package)
    workload = build_workload(str(tiny_bert), tokens_per_step=1000, steps=1, folder=None, pairs="cosine")
    loop = TrainerLoop(workload, CPU, dtype=torch.float32)
    loop.trainer.loss["sst"] = None
    with pytest.raises(RuntimeError, match="sentence-transformers has failed"):
        sum(loop(step) for step in range(10))
    loop.close()


def test_rows_of_one_length(tiny_bert: Path) -> None:
    workload = build_workload(str(tiny_bert), tokens_per_step=1000, steps=2, folder=None, row_tokens=24)
    assert set(workload.row_lengths().tolist()) == {24}
    assert abs(workload.tokens - 2000) < 200
    step = own_side("mtbert", workload, build_step(workload, CPU, precision="float32"))
    assert step.run(0) + step.run(1) == workload.tokens


def test_rows_of_pairs_that_are_read_apart_are_counted_one_by_one(tiny_bert: Path) -> None:
    workload = build_workload(str(tiny_bert), tokens_per_step=1000, steps=1, folder=None, pairs="cosine")
    examples = sum(len(pool) for pool in workload.pool.values())
    assert len(workload.row_lengths()) == 2 * examples - len(workload.pool["sst"])
    assert workload.row_lengths().sum() == workload.tokens


def test_peak_memory_counts_what_is_there_at_once() -> None:
    def work() -> None:
        first = torch.ones(1000)
        second = torch.ones(3000)
        del first, second
        torch.ones(2000)

    assert 16_000 <= peak_bytes(work, CPU) < 17_000


def test_activations_of_a_loop_are_those_of_its_batches_one_by_one(tiny_bert: Path) -> None:
    pytest.importorskip("transformers")
    workload = small_workload(tiny_bert, steps=1)
    by_batch = {}
    for batch in (8, 32):
        loop = PlainLoop(workload, CPU, dtype=torch.float32, bucketed=True, batch=batch)
        side = loop_side("loop", loop)
        assert side.activations is not None
        tokens, held = side.activations()
        assert tokens == workload.tokens
        by_batch[batch] = held / tokens
    # So what a token takes does not depend on how many go through together.
    assert 0.7 < by_batch[8] / by_batch[32] < 1.4


def test_small_tables_hold_the_first_steps(tiny_bert: Path, tmp_path: Path) -> None:
    from bench.first_result_peer import TASKS, read

    workload = small_workload(tiny_bert, steps=5)
    small = write_small_tables(workload, tmp_path / "data")
    assert small.tokens == sum(
        int(workload.data[name].lengths[examples].sum())
        for step in workload.steps[:STEPS]
        for name, examples in step.items()
    )
    for name in TASKS:
        texts, labels = read(small.folder, name, "train")
        assert len(texts) == len(labels) == small.sizes[name]
        first = workload.data[name].table.texts[int(workload.steps[0][name][0])]
        assert texts[0] == tuple(first)


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
