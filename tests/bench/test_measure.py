"""The bench's own arithmetic: a wrong one would make every figure wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.oracles import oracle
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # bench is not installed
    sys.path.insert(0, str(ROOT))

from bench import records  # noqa: E402
from bench.comparison import Goal, summarise, to_text  # noqa: E402
from bench.flops import EncoderSizes, training_flops  # noqa: E402
from bench.measure import Alternation, Side, Spread  # noqa: E402
from bench.own import build_step, frozen_side, own_side  # noqa: E402
from bench.peers import PlainLoop, padding_share  # noqa: E402
from bench.workload import Workload, build_workload  # noqa: E402
from mtbert.engine.features import FrozenForward  # noqa: E402
from mtbert.engine.forward import PackedForward  # noqa: E402
from mtbert.kernels.dispatch import use_backend  # noqa: E402
from mtbert.model.bert import BertConfig, BertEncoder  # noqa: E402
from mtbert.model.dropout import DropoutRates  # noqa: E402
from mtbert.model.lora import LoraConfig, add_lora  # noqa: E402


class Clock:
    """A clock that only sides move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def alternation_of(seconds: dict[str, list[float]]) -> tuple[Alternation, list[str]]:
    """Sides that take the given seconds in their repeats for 100 tokens each, and the order of all runs."""
    clock, order = Clock(), list[str]()

    def side(name: str) -> Side:
        def run(repeat: int) -> float:
            order.append(f"{name}{repeat}")
            clock.now += seconds[name][repeat]
            return 100.0

        return Side(name, run)

    return Alternation([side(name) for name in seconds], clock=clock), order


def test_every_round_runs_every_side_once_and_the_first_side_moves_on() -> None:
    alternation, order = alternation_of({"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3})
    for _ in range(3):
        alternation.round()
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]
    assert alternation.work == {"a": 300.0, "b": 300.0, "c": 300.0}


def test_warm_up_is_not_measured() -> None:
    alternation, order = alternation_of({"a": [1.0, 9.0], "b": [2.0, 9.0]})
    alternation.warm_up(1)
    alternation.round()
    assert order == ["a1", "b1", "a0", "b0"]
    assert alternation.rates == {"a": [100.0], "b": [50.0]}


def test_a_ratio_pairs_the_runs_of_a_round() -> None:
    # The machine slows down fourfold on the way; b takes twice as long as a throughout.
    alternation, _ = alternation_of({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]})
    for _ in range(3):
        alternation.round()
    assert alternation.rate("a") == Spread(50.0, 37.5, 75.0, 3)
    assert alternation.ratio("a", "b") == Spread(2.0, 2.0, 2.0, 3)
    assert alternation.ratio("a", "b", factor=3.0).median == 6.0


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0, 5)
    with pytest.raises(ValueError, match="nothing"):
        Spread.of([])


def test_sides_need_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="one name"):
        Alternation([Side("a", lambda _: 1.0), Side("a", lambda _: 1.0)])


def test_summary_of_shares_and_goals() -> None:
    alternation, _ = alternation_of({"mine": [1.0, 1.0], "theirs": [2.0, 4.0], "limit": [0.1, 0.1]})
    for _ in range(2):
        alternation.round()
    goals = [Goal("mine", "theirs", 3.0), Goal("mine", "theirs", 3.1), Goal("mine", "absent", 1.0)]
    result = summarise(
        "case",
        alternation,
        baseline="theirs",
        limits=["limit"],
        limit_of={"mine": ("limit", 2.0)},
        goals=goals,
        left_out=["absent"],
    )
    mine, theirs = result.cases
    assert mine.ratio.median == 3.0
    assert mine.limit_share is not None
    assert mine.limit_share.median == pytest.approx(0.2)  # 100 tokens of 2 FLOPs in 1 s, 1000 FLOP/s possible
    assert theirs.limit_share is None
    assert [outcome.met for outcome in result.goals] == [True, False]
    text = to_text(result)
    assert "goal reached: mine / theirs = 3.00" in text
    assert "goal MISSED" in text
    assert "left out: absent" in text


# ---- FLOPs ----

CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=96,
    max_position_embeddings=32,
)
SIZES = EncoderSizes(layers=3, width=32, inner=96)


def test_flops_by_hand() -> None:
    sizes = EncoderSizes(layers=2, width=4, inner=8)
    lengths = np.array([3, 2])  # T = 5, sum of squares 13
    projections = 2 * 5 * (4 * 4 * 4 + 2 * 4 * 8)  # 1280
    product = 2 * 13 * 4  # 104
    assert training_flops(sizes, lengths, "features") == 2 * (projections + 2 * product)
    assert training_flops(sizes, lengths, "full") == 2 * (3 * projections + 6 * product)
    adapters = 2 * 3 * 2 * 5 * 2 * (8 + 8)  # two layers, three products, r = 2, query and value
    unneeded = 2 * 5 * 3 * 4 * 4 + 2 * (2 * 5 * 2 * 4)
    lora = training_flops(sizes, lengths, "lora", rank=2, adapted=["query", "value"])
    assert lora == 2 * (2 * projections + 6 * product) + adapters - unneeded


@pytest.mark.parametrize(
    "adapted", [None, ["query", "value"], ["query", "key", "value", "attention_output", "intermediate", "output"]]
)
def test_flops_equal_those_that_torch_counts(adapted: list[str] | None) -> None:
    length, rows = 8, 3
    encoder = BertEncoder(CONFIG, DropoutRates(0.0, 0.0, 0.0))
    if adapted is not None:
        add_lora(encoder, LoraConfig(rank=4, dropout=0.0, projections=adapted))  # type: ignore[arg-type]
    batch = one_batch(rows, length)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        encoder(batch, dtype=torch.float32).sum().backward()
    mode = "full" if adapted is None else "lora"
    expected = training_flops(SIZES, np.full(rows, length), mode, rank=4, adapted=adapted or ())  # type: ignore[arg-type]
    assert counter.get_total_flops() == expected
