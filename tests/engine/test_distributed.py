"""Several ranks against one: the same gradients, steps, scores and messages, whatever the ranks have of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import rank_cases
from support.assembly import tiny_config
from support.ranks import RankGroup, environment_of, rank_group

from mtbert.config import TrainConfig
from mtbert.engine.distributed import ALONE, refuse_ranks, signs
from mtbert.errors import ConfigError
from mtbert.losses.bregman import BregmanConfig
from mtbert.losses.cosine_embedding import CosineEmbeddingConfig
from mtbert.losses.mnrl import MnrlConfig
from mtbert.losses.simcse import SimCseConfig
from mtbert.losses.smart import SmartConfig
from mtbert.losses.triplet import TripletConfig
from mtbert.model.heads import HeadConfig
from mtbert.optim.mixout import MixoutConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.tasks.config import TaskConfig


@pytest.fixture(scope="module")
def groups() -> Iterator[list[RankGroup]]:
    with rank_group(2) as two, rank_group(3) as three:
        yield [two, three]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


def configured(bert: Path, cache: Path, **changes: object) -> TrainConfig:
    """One task of each kind of rows; dropout everywhere."""
    heads = {
        "sst": HeadConfig(dropout=0.2, pooling="pooler"),
        "para": HeadConfig(dropout=0.2, pooling="mean", pair=["concat", "difference"]),
        "sts": HeadConfig(dropout=0.2, pooling="pooler"),
    }
    tasks = {
        name: TaskConfig(batch_size=size, max_length=64, head=heads[name])
        for name, size in (("sst", 7), ("para", 8), ("sts", 5))
    }
    return tiny_config(bert, cache, **({"task": tasks, "max_tokens": 4096} | changes))


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    pairs = [(found[name].ravel(), expected[name].ravel()) for name in expected]
    mine, theirs = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    if not np.allclose(mine, theirs, rtol=1e-9, atol=1e-11):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-11, err_msg=name)


def surgery(method: str, **options: str) -> SurgeryConfig:
    return SurgeryConfig(method=method, **options)  # type: ignore[arg-type]


OBJECTIVES: dict[str, Any] = {
    "simcse": SimCseConfig(tasks=["sst"], weight=0.5),
    "mnrl": MnrlConfig(tasks=["para"]),
    "cosine_embedding": CosineEmbeddingConfig(tasks=["sts"], threshold=2.5),
    "triplet": TripletConfig(tasks=["para"]),
    "smart": SmartConfig(tasks=["sst", "sts"], noise_std=1e-2, epsilon=1e-1, step_size=1e-2),
    "bregman": BregmanConfig(tasks=["sts"], momentum=0.5),
}
AGAINST = {"para": -2.5}
"""Makes para contradict whom it agreed with, so that surgery has something to do."""
ONE_OF_EACH = [{"sst": np.array([4]), "para": np.array([2]), "sts": np.array([7])}] * 2
"""Fewer examples of a task than ranks."""

CASES: dict[str, tuple[dict[str, Any], dict[str, float], Any]] = {
    "full": ({}, {}, None),
    "several passes": ({"max_tokens": 150}, {}, None),
    "lora": ({"mode": "lora", "max_tokens": 150}, {}, None),
    "bitfit": ({"mode": "bitfit"}, {}, None),
    "last-linear-layer": ({"mode": "last-linear-layer"}, {}, None),
    "a task on some ranks alone": ({}, {}, ONE_OF_EACH),
    "a step of one example": ({}, {}, [{"sts": np.array([1])}]),
    "pcgrad": ({"surgery": surgery("pcgrad")}, AGAINST, None),
    "pcgrad in several passes": ({"surgery": surgery("pcgrad"), "max_tokens": 150}, AGAINST, None),
    "pcgrad with lora": ({"surgery": surgery("pcgrad"), "mode": "lora"}, AGAINST, None),
    "pcgrad with bitfit": ({"surgery": surgery("pcgrad"), "mode": "bitfit"}, AGAINST, None),
    "pcgrad of the reference": ({"surgery": surgery("pcgrad", variant="reference")}, AGAINST, None),
    "pcgrad by a pass a task": ({"surgery": surgery("pcgrad", gradients="per-task")}, AGAINST, None),
    "pcgrad, a task on some ranks alone": ({"surgery": surgery("pcgrad")}, AGAINST, ONE_OF_EACH),
    "pcgrad by a pass a task on some ranks": (
        {"surgery": surgery("pcgrad", gradients="per-task"), "mode": "lora"},
        AGAINST,
        ONE_OF_EACH,
    ),
    "gradvac": ({"surgery": surgery("gradvac")}, AGAINST, None),
    "cagrad with mixout": ({"surgery": surgery("cagrad"), "mixout": MixoutConfig(0.3)}, {}, None),
    "learned weights with mixout": (
        {"surgery": surgery("uncertainty"), "mixout": MixoutConfig(0.3)},
        {},
        None,
    ),
    "objectives": (OBJECTIVES, {}, None),
    "objectives with pcgrad": (OBJECTIVES | {"surgery": surgery("pcgrad")}, {}, None),
    "supervised objectives on some ranks alone": (
        {
            "simcse": SimCseConfig(tasks=["para"], supervised=True),
            "mnrl": MnrlConfig(tasks=["sts"], threshold=2.0, symmetric=True),
            "surgery": surgery("pcgrad", gradients="per-task"),
        },
        {},
        [{"sst": np.arange(5), "para": np.arange(3), "sts": np.arange(3)}],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_take_the_steps_of_one_rank(
    groups: list[RankGroup], tiny_bert: Path, cache: Path, name: str
) -> None:
    changes, losses, plans = CASES[name]
    config = configured(tiny_bert, cache, **changes)
    if config.mode == "full":
        config.optim.pretrained_decay = 0.1
    expected, tokens, reports = rank_cases.steps(ALONE, config, plans, losses)
    assert sum(name.startswith("0 gradient") for name in expected) > 1
    # Three ranks where it matters that there are more of them than rows, or a rank between two others.
    for group in (
        groups if plans is not None or "several passes" in name or "objectives" in name else groups[:1]
    ):
        answers = group.run(rank_cases.steps, config, plans, losses)
        for found, found_tokens, found_reports in answers:
            assert found_tokens == tokens
            assert_close(found, expected)
            for mine, theirs in zip(found_reports, reports, strict=True):
                if theirs is not None:
                    assert mine["altered"] == theirs["altered"]
                    assert mine["cosine"] == pytest.approx(theirs["cosine"], rel=1e-8, abs=1e-10)
        first = answers[0][0]
        for other, _, _ in answers[1:]:  # bit for bit, or the ranks would drift apart
            assert all(np.array_equal(value, other[name]) for name, value in first.items())
    altered = [r["altered"].values() for r in reports if r is not None]
    if losses and config.surgery.method == "pcgrad":
        assert any(any(values) for values in altered), "nothing was in conflict"


def test_ranks_score_and_predict_exactly_as_one(
    groups: list[RankGroup], tiny_bert: Path, cache: Path
) -> None:
    config = configured(tiny_bert, cache, max_tokens=128)
    expected, outputs = rank_cases.scores(ALONE, config)
    for group in groups:
        for found, theirs in group.run(rank_cases.scores, config):
            assert found == expected
            assert all(np.array_equal(theirs[task], mine) for task, mine in outputs.items())


def test_masked_words(groups: list[RankGroup], tiny_bert: Path, cache: Path) -> None:
    config = replace(configured(tiny_bert, cache, max_tokens=128), tasks=["sst", "para"])
    expected, tokens, evaluation = rank_cases.masked_words(ALONE, config)
    for group in groups:
        for found, found_tokens, found_evaluation in group.run(rank_cases.masked_words, config):
            assert found_tokens == tokens
            assert found_evaluation == evaluation
            assert_close(found, expected)


def test_all_ranks_name_the_culprit_of_one(groups: list[RankGroup], tiny_bert: Path, cache: Path) -> None:
    config = configured(tiny_bert, cache)
    for group in groups:
        answers = group.run(rank_cases.spoiled, config, "sts")
        message, same, culprit = answers[0]
        assert all(answer == answers[0] for answer in answers)
        assert same
        assert message.startswith(f"step 1: the loss is not finite. task sts: examples {culprit}. ")


def test_a_run_goes_on_with_another_number_of_ranks(
    groups: list[RankGroup], tiny_bert: Path, cache: Path, tmp_path: Path
) -> None:
    """Stopped by a signal that one rank of two gets, and resumed on one and on three."""
    config = configured(tiny_bert, cache, epochs=7 / 12, surgery=surgery("gradvac"))
    config.evaluation.every, config.evaluation.train_examples = 6, 0
    config.run.log_every = 3
    folders = {name: tmp_path / name for name in ("straight", "alone", "three")}
    for folder in folders.values():
        folder.mkdir()
    expected, end, step, best = rank_cases.trained(ALONE, config, folders["straight"])
    assert (end, step) == ("finished", 7)
    two, three = groups
    for name in ("alone", "three"):
        ends = [end for _, end, _, _ in two.run(rank_cases.trained, config, folders[name], 4)]
        assert (
            ends[0] == f"stopped after step 4; the checkpoint is {folders[name] / 'checkpoints' / 'step-4'}"
        )
        assert ends[1].startswith("stopped after step 4")
    found = [rank_cases.trained(ALONE, config, folders["alone"])]
    found += three.run(rank_cases.trained, config, folders["three"])
    for weights, end, last, score in found:
        assert (end, last) == ("finished", 7)
        assert score == pytest.approx(best, abs=1e-6)
        assert_close(weights, expected)
    lines = [(folder / "metrics.jsonl").read_text().count("\n") for folder in folders.values()]
    assert lines == [lines[0]] * 3


def test_what_ranks_tell_each_other(groups: list[RankGroup]) -> None:
    for group in groups:
        for found in group.run(rank_cases.messages):
            assert found == {
                "told": {"text": "é", "from": 0},
                "gathered": [list(range(rank)) for rank in range(group.size)],
                "any": [True, False],
                "shares": list(range(7)),
                "odd": "the ranks must begin alike, but the tables of rank 1 differ from those of rank 0",
            }


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (environment_of(0, 2, 1), "runs in one process: start it without torchrun"),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "MASTER_ADDR, MASTER_PORT are not set: start the ranks with torchrun",
        ),
    ],
)
def test_programs_for_one_process_refuse_several(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        refuse_ranks("this program")


class SilentStore:
    """A store that outlives rank 0, which was killed before it could say anything."""

    def __init__(self, beats: int) -> None:
        self.beats = beats

    def check(self, keys: list[str]) -> bool:
        return False

    def add(self, key: str, amount: int) -> int:
        self.beats = max(0, self.beats - 1)
        return -self.beats


def test_the_end_of_a_dead_rank_0_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "_SILENCE_SECONDS", 0.3)
    others = signs.Signs(SilentStore(beats=4), rank=1, size=2)  # type: ignore[arg-type]
    begin = time.monotonic()
    with pytest.raises(signs.ConnectionLost, match=r"rank 0 gave no sign of life for 0\.3 s"):
        others.wait_until_done()
    assert 0.5 < time.monotonic() - begin < 10  # four beats, then silence
