"""torch.compile of heads and losses: the same figures, one graph for any number of rows, a reason where it fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config
from torch import Tensor

from mtbert.config import TrainConfig
from mtbert.data.packing import plan_passes
from mtbert.engine.assembly import assemble as assemble_run
from mtbert.engine.build import load_model, prepare_data, prepare_machine, task_batches, tasks_of
from mtbert.engine.compiled import MOST_GRAPHS, Compiled, CompiledParts
from mtbert.engine.methods import task_losses
from mtbert.engine.mlm import word_losses
from mtbert.evaluation.history import History
from mtbert.evaluation.report import _compiled, _loss_scale
from mtbert.losses.smart import SmartConfig
from mtbert.model.heads import HeadConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.loading import load_tables

TRACED = (
    "aot_eager"  # all of torch.compile but the code that it writes, which takes a compiler seconds a part
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def configured(bert: Path, cache: Path, **changes: object) -> TrainConfig:
    """A head of every shape; several passes a step, of ever other numbers of rows."""
    heads = {
        "sst": HeadConfig(hidden_layers=1, activation="leaky_relu"),
        "para": HeadConfig(tower_layers=1, pair=["concat", "difference"]),
        "sts": HeadConfig(pair=["cosine"], pooling="mean"),
    }
    tasks = {name: TaskConfig(batch_size=6, max_length=64, head=head) for name, head in heads.items()}
    return tiny_config(bert, cache, task=tasks, max_tokens=160, **changes)


def compiled(assembly: Assembly, backend: str = TRACED) -> CompiledParts:
    parts = CompiledParts(backend)
    parts.add_tasks(assembly.model, assembly.losses)
    return parts


@pytest.mark.parametrize("surgery", [SurgeryConfig(), SurgeryConfig(method="pcgrad", gradients="per-task")])
def test_an_epoch_of_the_sample_compiles_nothing_more_and_trains_the_same(
    tiny_bert: Path, tmp_path: Path, surgery: SurgeryConfig
) -> None:
    config = configured(tiny_bert, tmp_path, surgery=surgery)
    eager, traced = (assemble(config, dtype=torch.float32, rows=40) for _ in range(2))
    parts = compiled(traced)
    for step in range(8):
        totals = []
        for each in (eager, traced):
            result = each.step({name: batches.batch(step) for name, batches in each.batches.items()}, step)
            result.check()
            totals.append(float(result.total))
        assert totals[1] == pytest.approx(totals[0], rel=1e-4)
    weights = traced.model.state_dict()
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4, msg=name)
    record = parts.to_json()
    assert record["uncompiled"] == {}
    assert record["graphs"].keys() == {
        *("sst head dense", "sst head score", "sst loss"),
        *("para head join", "para head dense", "para head score", "para loss"),
        *("sts head join", "sts head score", "sts loss"),
    }
    # sst's and para's dense layer, one each; a pass with a single row makes one more.
    assert all(1 <= count <= 2 for count in record["graphs"].values()), record


def test_a_whole_epoch_of_real_data_compiles_each_part_once(
    tiny_bert: Path, tmp_path: Path, shared_data: Path
) -> None:
    """Heads and losses see the rows of every pass of the epoch, as many as its token budget holds."""
    config = configured(tiny_bert, tmp_path, data=str(shared_data))
    config.max_tokens = 512
    for name in config.tasks:
        config.task[name].batch_size = 32
    machine = prepare_machine(config)
    model, tokeniser = load_model(config, machine)
    tables = load_tables(config.data, list(tasks_of(config).values()))
    data = prepare_data(config, tables, tokeniser)
    losses = task_losses(config, machine, data)
    parts = CompiledParts(TRACED)
    parts.add_tasks(model, losses)
    batches = task_batches(config, data)
    train = {name: splits["train"] for name, splits in data.items()}
    sizes = set()
    for step in range(len(train["sst"]) // 32):
        plan = {name: each.batch(step) for name, each in batches.items()}
        for requests in plan_passes(plan, train, config.max_tokens):
            for request in requests:
                name, examples = request.data.name, request.examples
                if len(examples) == 1 or (name, len(examples)) in sizes:
                    continue  # single examples have a graph of their own
                sizes.add((name, len(examples)))
                head = model.head(name)
                rows = torch.randn(len(examples) * head.rows_per_example, 32, requires_grad=True)
                labels = torch.from_numpy(train[name].labels[examples])
                losses[name].per_example(head(rows), labels).sum().backward()
    assert len(sizes) > 20
    assert set(parts.to_json()["graphs"].values()) == {1}


def test_inductor_s_code_computes_the_same(tiny_bert: Path) -> None:
    """The loss of masked words, forward and twice backward, as gradients of several tasks ask for it."""
    part = Compiled("masked words", word_losses)
    generator = torch.Generator().manual_seed(0)
    for rows in (5, 9):
        scores = torch.randn(rows, 37, generator=generator).bfloat16().requires_grad_()
        targets = torch.randint(0, 37, (rows,), generator=generator)
        found, expected = part(scores, targets), word_losses(scores, targets)
        torch.testing.assert_close(found, expected)
        for weight in (1.0, 3.0):
            gradients = [
                torch.autograd.grad((losses * weight).sum(), scores, retain_graph=True)[0]
                for losses in (found, expected)
            ]
            torch.testing.assert_close(gradients[0], gradients[1])
    assert part.reason is None
    assert part.graphs == 1


def test_evaluations_stay_uncompiled() -> None:
    part = Compiled("x", lambda x: x * 2, TRACED)
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        part(x)
    part(x.detach())
    assert part.graphs == 0
    part(x)
    assert part.graphs == 1


def test_what_cannot_be_compiled_goes_on_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    def reads_a_value(x: Tensor) -> Tensor:
        return x * 2 if float(x.detach().sum()) > 0 else x

    part = Compiled("strange", reads_a_value, TRACED)
    x = torch.ones(3, requires_grad=True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(part(x), x * 2)
        assert torch.equal(part(x), x * 2)
    assert part.reason
    assert [r.getMessage() for r in caplog.records] == [
        f"torch.compile: strange runs uncompiled, because {part.reason}"
    ]


def test_without_a_compiler_it_goes_on_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _: missing)
    part = Compiled("x", lambda x: x.exp(), "inductor")
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(part(x), x.exp())
    assert part.reason is not None
    assert "no C++ compiler was found" in part.reason


def test_wrong_arguments_are_no_reason_not_to_compile() -> None:
    part = Compiled("x", lambda x, y: x @ y, TRACED)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        part(torch.ones(2, 3, requires_grad=True), torch.ones(4, 2))
    assert part.reason is None


def test_compiling_again_and_again_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    part = Compiled("wide", lambda x: x.sum(1) * len(x.shape), TRACED)
    with caplog.at_level(logging.WARNING):
        for dimensions in range(2, 9):
            part(torch.ones((3,) * dimensions, requires_grad=True))
    assert part.graphs == 7
    assert [r.getMessage() for r in caplog.records] == [
        f"torch.compile: wide was compiled {MOST_GRAPHS + 1} times; if that goes on, compile false is faster"
    ]


def test_a_run_compiles_what_it_is_made_of(tiny_bert: Path, tmp_path: Path) -> None:
    """With an objective that holds the weights still, and a teacher that copied the model before."""
    config = configured(tiny_bert, tmp_path, compile=True)
    config.smart = SmartConfig(tasks=["sst"])
    config.bregman.tasks = ["para"]
    parts = assemble_run(config)
    assert parts.compiled is not None
    for part in parts.compiled.parts:
        part.backend = TRACED
    for step in range(3):
        parts.train_step(parts.curriculum.next(), step).check()
    graphs = parts.compiled.to_json()["graphs"]
    assert len(graphs) == 10
    assert all(1 <= count <= MOST_GRAPHS for count in graphs.values()), graphs
    assert assemble_run(configured(tiny_bert, tmp_path)).compiled is None


def test_the_report_says_what_was_compiled_and_what_was_skipped() -> None:
    epoch = {"compiled": {"graphs": {"sst loss": 1}, "uncompiled": {"para loss": "there is no compiler"}}}
    steps = [
        {"step": 1, "loss_scale": 65536.0, "skipped": 2},
        {"step": 2, "loss_scale": 16384.0, "skipped": 0},
    ]
    history = History(steps=steps, epochs=[{}, epoch])
    assert "graphs of each part since the last start: sst loss 1." in _compiled(history)
    assert "Not compiled: para loss, because there is no compiler." in _compiled(history)
    expected = (
        "fp16: 2 steps were skipped because their scaled gradients overflowed; the loss scale ended at 16384."
    )
    assert _loss_scale(history) == expected
    assert _compiled(History()) == _loss_scale(History()) == ""
