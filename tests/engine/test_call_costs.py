"""What the calls of a step cost together is what the step costs by its own formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config
from support.ranges import RecordedRanges

from mtbert import kernels
from mtbert.data.packing import plan_passes
from mtbert.engine.call_costs import PRODUCTS, Later, cost_of
from mtbert.engine.costs import Cost, total
from mtbert.engine.flops import EncoderSizes, training_flops
from mtbert.kernels import Dropout
from mtbert.model.heads import HeadConfig
from mtbert.model.lora import LoraConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.ranges import listening
from mtbert.tasks.config import TaskConfig


class Counted(RecordedRanges):
    """Keeps the cost of every call, by operation and direction."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, Later]] = []

    def _cost(
        self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[str], None] | None:
        later = cost_of(operation, args, kwargs)
        return None if later is None else lambda direction: self.found.append((operation, direction, later))

    def flops(self, *operations: str) -> float:
        return sum(
            later().backward_flops if direction == "backward" else later().forward_flops
            for operation, direction, later in self.found
            if operation in operations
        )


LORA = LoraConfig(rank=3, projections=["query", "value", "intermediate"])
SIZES = EncoderSizes(2, 32, 64)


def step_of(
    bert: Path, cache: Path, pooling: Any, **changes: Any
) -> tuple[Counted, dict[str, np.ndarray], Assembly]:
    """The calls of a step of `mode`, every head with that pooling; the rows' lengths by task."""
    heads = {
        name: TaskConfig(batch_size=6, max_length=64, head=HeadConfig(pooling=pooling))
        for name in ("sst", "para", "sts")
    }
    config = tiny_config(bert, cache, task=heads, **changes)
    if config.mode == "lora":
        config.model = replace(config.model, lora=LORA)
    assembly = assemble(config, dtype=torch.float32)
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    with listening(counted := Counted()):
        assembly.step.accumulate(plan, 0)
    return counted, plan, assembly


def lengths_of(plan: dict[str, np.ndarray], assembly: Assembly) -> np.ndarray:
    return np.concatenate([assembly.data[name]["train"].lengths[rows] for name, rows in plan.items()])


@pytest.mark.parametrize("surgery", ["sum", "pcgrad"])
@pytest.mark.parametrize("max_tokens", [4096, 128])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_products_of_a_step_are_those_of_its_formula(
    tiny_bert: Path, tmp_path: Path, mode: Any, max_tokens: int, surgery: Any
) -> None:
    """The formula's is the plain algorithm: with heads that read every token."""
    changes = {"mode": mode, "max_tokens": max_tokens, "surgery": SurgeryConfig(method=surgery)}
    counted, plan, assembly = step_of(tiny_bert, tmp_path, "mean", **changes)
    lengths = lengths_of(plan, assembly)
    expected = training_flops(SIZES, lengths, mode, rank=3, adapted=LORA.projections)
    softmax = 2 * 2 * 5 * float((lengths.astype(np.float64) ** 2).sum()) * 2  # layers, passes, heads
    assert counted.flops(*PRODUCTS) - softmax == pytest.approx(expected, rel=1e-12)
    passes = len(plan_passes(plan, {n: s["train"] for n, s in assembly.data.items()}, max_tokens))
    calls = [direction for operation, direction, _ in counted.found if operation == "add_layer_norm"]
    assert calls.count("forward") == calls.count("backward") == 4 * passes


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_last_layer_at_first_tokens_alone_costs_less(tiny_bert: Path, tmp_path: Path, mode: Any) -> None:
    """In it all but keys and values, and attention's products, falls to one token a row."""
    counted, plan, assembly = step_of(tiny_bert, tmp_path, "cls", mode=mode)
    lengths = lengths_of(plan, assembly).astype(np.float64)
    tokens, squares, left_out = lengths.sum(), (lengths**2).sum(), lengths.sum() - len(lengths)
    width, inner, heads = SIZES.width, SIZES.inner, 2
    weights = 2 * width**2 + 2 * width * inner  # of query, attention_output, intermediate and output
    adapters = 3 * (2 * width + width + inner) if mode == "lora" else 0  # of query and intermediate
    spared = 2 * left_out * ((2 if mode == "lora" else 3) * weights + 3 * adapters)
    spared += 6 * 2 * width * (squares - tokens)
    softmax = 2 * 5 * heads * (squares + tokens)
    whole = training_flops(SIZES, lengths, mode, rank=3, adapted=LORA.projections)
    assert counted.flops(*PRODUCTS) - softmax == pytest.approx(whole - spared, rel=1e-12)
    assert counted.flops("first_token_attention") == 12 * tokens * width + 10 * tokens * heads


def cost(operation: str, *args: Any, **kwargs: Any) -> Cost:
    later = cost_of(operation, args, kwargs)
    assert later is not None
    return later()


def test_what_needs_no_gradient_costs_no_backward_pass() -> None:
    x, weight = torch.ones(10, 8), torch.ones(6, 8)
    forward = 2.0 * 10 * 8 * 6
    assert cost("linear", x, weight, None).backward_flops == 0
    assert cost("linear", x, weight, None).backward_bytes == 0
    weight.requires_grad_()
    assert cost("linear", x, weight, None).backward_flops == forward
    x.requires_grad_()
    found = cost("linear", x, weight, None)
    assert (found.forward_flops, found.backward_flops) == (forward, 2 * forward)
    # x, weight, out; then the gradient of out and both factors in, both gradients out
    assert (found.forward_bytes, found.backward_bytes) == (4 * (80 + 48 + 60), 4 * (60 + 2 * (80 + 48)))
    with torch.no_grad():
        assert cost("linear", x, weight, None).backward_flops == 0


def test_lengths_and_words_are_read_when_the_cost_is_asked_for() -> None:
    bounds = torch.tensor([0, 3, 3], dtype=torch.int32)
    later = cost_of("attention", (torch.ones(5, 3, 2, 4), bounds, 16), {"scale": 1.0})
    assert later is not None
    bounds[2] = 5
    assert later().forward_flops == 2 * 2 * 13 * 8 + 5 * 13 * 2
    ids, positions = torch.tensor([1, 1, 7], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    tables = tuple(torch.ones(rows, 8) for rows in (10, 6, 2))
    one, options = torch.ones(8), {"eps": 1e-12, "dtype": torch.bfloat16}
    found = cost("embedding", ids, ids, positions, tables, one, one, **options)
    assert found.forward_bytes == (2 + 3 + 2 + 2) * 8 * 4 + 3 * 4 * 3 + 3 * 8 * 2


def test_a_linear_map_for_each_head() -> None:
    x, weight = torch.ones(10, 2, 4), torch.ones(2, 4, 4)
    found = cost("head_linear", x, weight, None)
    assert found.forward_flops == 2 * 10 * 2 * 4 * 4
    assert found.forward_bytes == 4 * (80 + 32 + 80)


def test_every_operation_with_a_range_is_counted_or_known_not_to_be() -> None:
    x, mask = torch.ones(4, 8), torch.zeros(4, dtype=torch.int32)
    assert cost("dropout", x, mask, Dropout(0.1, 0, 0, 0)).bytes == 2 * (2 * 4 * 8 * 4 + 4 * 4)
    unknown = [name for name in kernels.__all__ if name.islower() and name not in _counted()]
    assert unknown == ["softmax"]  # of the padded path, which no run takes


def _counted() -> set[str]:
    from mtbert.engine import call_costs

    return set(call_costs._FORMULAS)


def test_a_total_adds_up_both_passes() -> None:
    assert total([Cost(1, 2, 3, 4), Cost(10, 20, 30, 40)]) == Cost(11, 22, 33, 44)
    assert total([]) == Cost(0, 0, 0, 0)
