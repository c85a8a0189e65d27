"""Captured steps are the steps that they stand for, bit for bit; what cannot be captured is named, and taken all the
same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config
from support.steps import CASES, configured
from support.tape import TapeRecorder

from mtbert.curriculum import Plan
from mtbert.data.padding import measure_budgets
from mtbert.engine.build import curriculum_of
from mtbert.engine.capture import CudaRecorder, Recorded
from mtbert.engine.frozen_prefix import FrozenCacheConfig, PrefixForward
from mtbert.engine.graphs import StepGraphs, enable, inference_obstacles, make_capturable, use_graphs
from mtbert.engine.prepared_step import PreparedStep
from mtbert.engine.step_result import StepResult
from mtbert.errors import ConfigError, NonFiniteError
from mtbert.model.multitask import MultiTaskModel
from mtbert.optim.schedule import set_learning_rate
from mtbert.optim.surgery import Surgery, SurgeryConfig


def plans(assembly: Assembly, count: int) -> list[Plan]:
    """Batches of the tasks, some of them smaller."""
    found = []
    for step in range(count):
        plan = {name: batches.batch(step) for name, batches in assembly.batches.items()}
        found.append(plan | {"sts": plan["sts"][: 3 + step % 4]})
    return found


def captured(assembly: Assembly, recorder: Any, **options: Any) -> StepGraphs:
    """Have the assembly's steps recorded."""
    enable(assembly.step, curriculum_of(assembly.config, assembly.batches), recorder)
    assembly.step.graphs = StepGraphs(assembly.step, recorder, **options)
    return assembly.step.graphs


def padded(assembly: Assembly) -> None:
    """The twin: the same shapes and the same optimizer, one operation after the other."""
    make_capturable(assembly.step.optimizer, torch.device("cpu"))
    words = assembly.model.encoder.embeddings.word.shape[0] if assembly.step.wants_words else 0
    assembly.step.budgets = measure_budgets(assembly.batches, assembly.step.data, vocabulary=words)


def train(assembly: Assembly, steps: int) -> list[StepResult]:
    results = []
    for step, plan in enumerate(plans(assembly, steps)):
        set_learning_rate(assembly.step.optimizer, 1.0 - step / 10)
        results.append(assembly.step(plan, step, step / steps))
    return results


def numbers(result: StepResult) -> dict[str, torch.Tensor]:
    found = {f"loss {n}": v for n, v in result.losses.items()}
    found |= {f"weight {n}": v for n, v in result.weights.items()}
    found |= {f"examples {s.stream} {s.ids}": v for s, v in result.examples}
    found |= {"total": result.total, "norm": result.grad_norm, "finite": result.finite}
    if result.gradients is not None:
        found |= {"gram": result.gradients.gram, **vars(result.gradients.combined)}
    return {name: value.double() for name, value in found.items()}


def state(assembly: Assembly) -> dict[str, torch.Tensor]:
    found = dict(assembly.model.state_dict())
    for number, moments in assembly.step.optimizer.state_dict()["state"].items():
        found |= {f"{number} {name}": value for name, value in moments.items()}
    return found | assembly.step.state()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


@pytest.mark.parametrize("case", [case for case in CASES if case != "summed"])
def test_replayed_steps_are_the_steps_of_the_twin(tiny_bert: Path, tmp_path: Path, case: str) -> None:
    mine, twin = configured(tiny_bert, tmp_path, case), configured(tiny_bert, tmp_path, case)
    recorder = TapeRecorder()
    graphs = captured(mine, recorder, warm_up=1)
    padded(twin)
    for found, expected in zip(train(mine, 5), train(twin, 5), strict=True):
        assert found.step == expected.step
        assert found.tokens == expected.tokens
        assert_same(numbers(found), numbers(expected))
        if expected.gradients is not None:
            assert found.gradients is not None
            assert found.gradients.to_json() == expected.gradients.to_json()
    assert_same(state(mine), state(twin))
    assert graphs.counts["replayed"] + graphs.counts["warm-up"] == 5
    assert len(recorder.tapes) + 2 <= graphs.counts["replayed"], "recording does the work once"


def test_a_bad_step_spares_the_weights_and_names_its_own_examples(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = configured(tiny_bert, tmp_path, "one pass")
    graphs = captured(assembly, TapeRecorder(), warm_up=1)
    train(assembly, 4)
    replayed = graphs.counts["replayed"]
    weight = dict(assembly.model.named_parameters())["heads.para.output.weight"]
    with torch.no_grad():
        weight.view(-1)[0] = float("nan")
    before = {name: value.clone() for name, value in state(assembly).items()}
    plan = plans(assembly, 4)[3]
    result = assembly.step(plan, 7)
    assert graphs.counts["replayed"] == replayed + 1
    for name, value in state(assembly).items():
        assert torch.equal(value.nan_to_num(9.0), before[name].nan_to_num(9.0)), name
    with pytest.raises(NonFiniteError, match=r"step 8: .*task para") as caught:
        result.check()
    ids = assembly.data["para"]["train"].ids
    assert all(ids[example] in str(caught.value) for example in plan["para"])


def test_gradual_unfreezing_makes_other_graphs_and_keeps_none_of_those_before(
    tiny_bert: Path, tmp_path: Path
) -> None:
    assembly = configured(tiny_bert, tmp_path, "one pass")
    graphs = captured(assembly, TapeRecorder(), warm_up=1, most=2)
    thawed = list(assembly.model.encoder.layers[0].parameters())
    for phase in range(4):
        for number, parameter in enumerate(thawed):
            parameter.requires_grad_(number < phase)
        before, warm = [p.detach().clone() for p in thawed], graphs.counts["warm-up"]
        train(assembly, 4)
        moved = [not torch.equal(p, held) for p, held in zip(thawed, before, strict=True)]
        assert moved == [number < phase for number in range(len(thawed))]
        assert graphs.counts["warm-up"] > warm
        assert len(graphs._works) <= 2
    assert graphs.counts.keys() == {"warm-up", "replayed"}


@pytest.mark.parametrize("method", ["pcgrad", "gradvac", "cagrad", "nash", "upgrad"])
def test_every_surgery_is_solved_without_the_host(method: str) -> None:
    names, generator = ("a", "b", "c"), torch.Generator().manual_seed(0)
    config = SurgeryConfig(method=method)  # type: ignore[arg-type]
    mine, twin = Surgery(config, names, 0), Surgery(config, names, 0)
    gram, orders = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.int64)
    recorded: Recorded | None = None
    for step in range(4):
        gradients = torch.randn(3, 4, dtype=torch.float64, generator=generator)
        gram.copy_(gradients @ gradients.T)
        orders.copy_(mine.orders(3, step))
        expected = twin.combine(gram.clone(), names, orders.clone())
        if step == 0:
            found = mine.combine(gram, names, orders)
        elif recorded is None:
            recorded = TapeRecorder().record(lambda: mine.combine(gram, names, orders))
            found = recorded.result
        else:
            recorded.replay()
        assert torch.equal(found.shared, expected.shared)
        assert torch.equal(found.altered, expected.altered)


# ---- what cannot be captured ----


class Unwilling:
    """A recorder on which no capture succeeds."""

    def run(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any]) -> Recorded:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_capture_costs_no_step(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, twin = configured(tiny_bert, tmp_path, "one pass"), configured(tiny_bert, tmp_path, "one pass")
    graphs = captured(mine, Unwilling())
    padded(twin)
    with caplog.at_level(logging.WARNING):
        for found, expected in zip(train(mine, 7), train(twin, 7), strict=True):
            assert_same(numbers(found), numbers(expected))
    assert_same(state(mine), state(twin))
    assert "operation not permitted when stream is capturing" in graphs.summary()
    assert 0 < len(caplog.records) <= len(graphs._works)


class BrokenCapture:
    """A CUDA graph whose capture ends with an error, as after an operation that breaks it; knows its pool."""

    pools: ClassVar[list[object]] = []
    breaks = True

    def capture_begin(self, pool: object, **options: Any) -> None:
        self.pools.append(pool)

    def capture_end(self) -> None:
        if self.breaks:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        """Nothing."""


def test_a_broken_capture_names_its_reason_and_leaves_the_stream_and_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current = ["the training's"]

    class Entered:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before = current[-1]
            current.append(self.stream)

        def __exit__(self, *error: object) -> None:
            current.append(self.before)

    pools = iter(range(9))
    fakes = {
        "CUDAGraph": BrokenCapture,
        "Stream": lambda device: "the graphs'",
        "stream": Entered,
        "current_stream": lambda device: current[-1],
        "set_stream": current.append,
        "graph_pool_handle": lambda: next(pools),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(BrokenCapture, "pools", [])
    recorder = CudaRecorder(torch.device("cuda"))

    def work(error: BaseException | None) -> str:
        assert current[-1] == "the graphs'"
        if error is not None:
            raise error
        return "done"

    errors = [RuntimeError("the reason"), TypeError("the reason"), KeyboardInterrupt("the reason"), None]
    for breaks in (True, False):
        monkeypatch.setattr(BrokenCapture, "breaks", breaks)
        for error in errors[: 4 if breaks else 3]:
            expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RuntimeError
            with pytest.raises(expected, match="the reason" if error else "previous error during capture"):
                recorder.record(partial(work, error))
            assert current[-1] == "the training's"
    assert BrokenCapture.pools == list(range(7)), "what is broken shares no pool"
    kept = [recorder.record(partial(work, None)), recorder.record(partial(work, None))]
    assert [each.result for each in kept] == ["done", "done"]
    assert BrokenCapture.pools[7:] == [7, 7]
    kept.clear()
    recorder.record(partial(work, None))
    assert BrokenCapture.pools[9:] == [8], "a pool ends with its last graph"


def test_shapes_beyond_the_bound_and_steps_without_one_are_counted(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = configured(tiny_bert, tmp_path, "summed")
    graphs = captured(assembly, TapeRecorder(), most=1, warm_up=0)
    sst, whole = {"sst": assembly.batches["sst"].batch(0)}, plans(assembly, 2)
    for step, plan in enumerate([sst, *whole, {"sst": np.arange(7)}, sst]):
        assembly.step(plan, step).check()
    assert graphs.counts == {
        "replayed": 2,
        "eager (more than 1 shapes)": 2,
        "eager (more examples of sst than its budget)": 1,
    }
    graphs.forget()
    assembly.step(whole[0], 9)
    assert graphs.counts["replayed"] == 3


@pytest.mark.parametrize(
    "leak", ["reads a value", "reads an array", "takes a number from the host", "keeps the step's number"]
)
def test_the_tape_sees_what_a_graph_could_not_hold(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    mine, twin = configured(tiny_bert, tmp_path, "summed"), configured(tiny_bert, tmp_path, "summed")
    captured(mine, TapeRecorder(), warm_up=0)
    padded(twin)
    if leak == "keeps the step's number":
        eager = mine.step.eager

        def forgetful(ready: PreparedStep, progress: float = 0.0) -> StepResult:
            return eager(replace(ready, counter=None), progress)

        monkeypatch.setattr(mine.step, "eager", forgetful)
        found, expected = train(mine, 4), train(twin, 4)
        assert not torch.equal(found[-1].total.double(), expected[-1].total.double())
        return
    acts = {
        "reads a value": lambda rows: float(rows.detach().sum()),
        "reads an array": lambda rows: rows.detach().tolist(),
        "takes a number from the host": lambda rows: torch.tensor([1.0, 2.0]),
    }
    plain = MultiTaskModel.outputs_from_features

    def leaking(self: MultiTaskModel, features: Any, **options: Any) -> Any:
        acts[leak](next(iter(features.values())))
        return plain(self, features, **options)

    monkeypatch.setattr(MultiTaskModel, "outputs_from_features", leaking)
    train(mine, 1)
    assert mine.step.graphs is not None
    assert "cannot be captured" in mine.step.graphs.summary()


def test_why_a_run_has_no_graphs(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = configured(tiny_bert, tmp_path, "summed")
    curriculum = curriculum_of(assembly.config, assembly.batches)
    for graphs, expected in (
        ("never", "off"),
        ("auto", "off: the device is cpu, and CUDA graphs need a GPU"),
    ):
        config = replace(assembly.config, graphs=graphs)
        assert use_graphs(config, assembly.step, curriculum) == expected
    assert assembly.step.graphs is None
    assert assembly.step.budgets is None
    config = replace(assembly.config, graphs="always", profile="nvtx")
    with pytest.raises(ConfigError, match=r"graphs: always is not possible: the device is cpu.*profile nvtx"):
        use_graphs(config, assembly.step, curriculum)


@pytest.mark.parametrize(("most_gib", "served"), [(1.0, True), (1e-9, False)])
def test_files_of_frozen_layers_stand_in_the_way_only_while_they_are_read(
    tiny_bert: Path, tmp_path: Path, most_gib: float, served: bool
) -> None:
    config = tiny_config(tiny_bert, tmp_path, mode="full", frozen_cache=FrozenCacheConfig("auto", most_gib))
    config.model = replace(config.model, trained_layers=1, frozen_dropout=False)
    assembly = assemble(config)
    assert isinstance(assembly.forward, PrefixForward)
    found = inference_obstacles(config, assembly.forward, assembly.step.world)
    assert any("frozen_cache" in reason for reason in found) == served
