"""Useful tokens a second against the tokens of a step, the length of sentences, the encoder's size, and ranks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench import records
from bench.comparison import Goal, to_text
from bench.harness import RECORDED_REPEATS, Bench, Candidate, encoder_sizes
from bench.peers import BATCH
from bench.ranks import compare_ranks
from bench.test_train_step import DTYPES, fast, own, peer
from bench.workload import Workload, build_workload
from mtbert.engine.flops import projection_shapes
from mtbert.engine.precision import Precision

__all__ = ["fast"]

pytestmark = pytest.mark.usefixtures("full")

TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
LENGTHS = (16, 32, 64, 128, 256, 512)
ENCODERS = {
    "cpu": ("bert-tiny", "bert-mini", "bert-small", "bert-medium", "bert-base"),
    "cuda": ("bert-mini", "bert-small", "bert-medium", "bert-base", "bert-large"),
}
_ENCODER_TOKENS = {"cpu": 2048, "cuda": 16384}
_STEPS = 5
_TASKS = 3


def scale(
    bench: Bench,
    benchmark: Any,
    fast: Precision,
    name: str,
    points: Sequence[tuple[float, str, Workload, int]],
) -> None:
    """mtbert and the bucketed loop at each point: where it lies, its name, its sentences, the loop's batch."""
    candidates: list[Candidate] = []
    goals = []
    for _, label, workload, batch in points:
        mtbert, loop = f"mtbert @ {label}", f"transformers bucketed @ {label}"
        candidates.append(own(bench, mtbert, fast, workload=workload))
        candidates.append(peer(bench, loop, fast, bucketed=True, batch=batch, workload=workload))
        goals.append(Goal(mtbert, loop))
    comparison = bench.compare(
        f"scaling: {name}",
        [_placed(candidate, points[place // 2][0]) for place, candidate in enumerate(candidates)],
        benchmark,
        baseline=candidates[0].name,
        goals=goals,
        repeats=RECORDED_REPEATS,
    )
    assert len(comparison.cases) >= len(points)


def _placed(candidate: Candidate, at: float) -> Candidate:
    """The candidate, with its place on the axis among its figures."""
    build = candidate.build

    def built() -> Any:
        side = build()
        side.figures["at"] = at
        return side

    return dataclasses.replace(candidate, build=built)


def test_tokens_of_a_step(bench: Bench, benchmark: Any, fast: Precision) -> None:
    points = []
    for tokens in TOKENS:
        # A loop's batch of 32 holds more tokens than the smallest steps.
        batch = max(4, min(BATCH, tokens // 64))
        steps = max(_STEPS, 4096 // tokens)
        workload = build_workload(bench.workload.encoder_name, tokens_per_step=tokens, steps=steps)
        points.append((tokens, f"{tokens} tokens", workload, batch))
    scale(bench, benchmark, fast, "tokens of a step", points)


def test_lengths_of_sentences(bench: Bench, benchmark: Any, fast: Precision) -> None:
    """All rows of one length: what padding costs is left out."""
    tokens = bench.workload.wanted_tokens
    points = []
    for length in LENGTHS:
        batch = max(1, min(BATCH, tokens // (length * _TASKS)))
        workload = build_workload(
            bench.workload.encoder_name, tokens_per_step=tokens, steps=_STEPS, row_tokens=length
        )
        points.append((length, f"{length} a row", workload, batch))
    scale(bench, benchmark, fast, "tokens of a row", points)


def test_sizes_of_the_encoder(bench: Bench, benchmark: Any, fast: Precision) -> None:
    points = []
    for name in ENCODERS[bench.device.type]:
        tokens = _ENCODER_TOKENS[bench.device.type]
        workload = build_workload(name, tokens_per_step=tokens, steps=_STEPS)
        sizes = encoder_sizes(workload)
        weights = sizes.layers * sum(k * n for k, n in projection_shapes(sizes).values())
        points.append((weights / 1e6, name, workload, BATCH))
    scale(bench, benchmark, fast, "weights of the encoder", points)


def test_ranks(bench: Bench, fast: Precision) -> None:
    """torchrun with 1, 2, ... processes: a GPU each, or the cores divided among them."""
    most = torch.cuda.device_count() if bench.device.type == "cuda" else min(4, os.cpu_count() or 1)
    counts = [ranks for ranks in (1, 2, 4, 8) if ranks <= most]
    if len(counts) < 2:
        pytest.skip(f"there is room for {most} rank here")
    comparison = compare_ranks(bench, counts, rounds=3)
    bench.comparisons.append(comparison)
    print(to_text(comparison))
    if bench.results is not None and bench.repeats >= RECORDED_REPEATS:
        facts = bench.facts(DTYPES[fast]) | {"tokens_per_step": None}
        records.write(bench.results, facts.pop("device"), comparison.name, comparison.to_record(), facts)
