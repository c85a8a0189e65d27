"""Predicting and encoding beside sentence-transformers and transformers' pipelines, and all pairs of many sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.comparison import Goal
from bench.harness import Bench, Candidate
from bench.inference import Sides, pairs_by_reading, pairs_by_vectors, texts_of
from bench.test_train_step import DTYPES, fast
from mtbert.engine.flops import Pass
from mtbert.engine.precision import Precision

__all__ = ["fast"]

TEXTS = 512
FORWARD: Pass = "features"
"""What the products of a forward pass are counted as."""
ENCODE_GOAL = 2.0
READ = 100
"""Sentences whose pairs a cross-encoder reads, all of them."""


@pytest.fixture(scope="module")
def sides(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    return Sides(bench.workload, bench.device, tmp_path_factory.mktemp("models"))


@pytest.fixture(params=["float32", "fast"])
def precision(request: pytest.FixtureRequest, fast: Precision) -> Precision:
    chosen: Precision = "float32" if request.param == "float32" else fast
    if request.param == "fast" and fast == "float32":
        pytest.skip("the device multiplies nothing faster than float32")
    return chosen


def test_encode(bench: Bench, benchmark: Any, sides: Sides, precision: Precision) -> None:
    texts = texts_of(bench.workload, "encode", TEXTS)
    own, peer = f"mtbert encode {precision}", f"sentence-transformers encode {precision}"
    bench.compare(
        f"encode sentences, {precision}",
        [
            Candidate(
                own, lambda: sides.own_side(own, "encode", precision, texts), DTYPES[precision], FORWARD
            ),
            Candidate(
                peer,
                lambda: sides.sentence_transformers_side(peer, "encode", precision, texts),
                DTYPES[precision],
                FORWARD,
                needs=("sentence_transformers",),
            ),
        ],
        benchmark,
        baseline=peer,
        goals=[Goal(own, peer, at_least=bench.aim(two_cores=ENCODE_GOAL))],
    )


@pytest.mark.usefixtures("full")
def test_classify(bench: Bench, benchmark: Any, sides: Sides, precision: Precision) -> None:
    texts = texts_of(bench.workload, "sst", TEXTS)
    own, peer = f"mtbert predict {precision}", f"transformers pipeline {precision}"
    ordered = f"{peer}, sorted by its user"
    dtype = DTYPES[precision]
    bench.compare(
        f"classify sentences, {precision}",
        [
            Candidate(own, lambda: sides.own_side(own, "sst", precision, texts), dtype, FORWARD),
            *(
                Candidate(
                    name,
                    lambda name=name: sides.pipeline_side(name, precision, texts, ordered=name == ordered),  # type: ignore[misc]
                    dtype,
                    FORWARD,
                    needs=("transformers",),
                )
                for name in (peer, ordered)
            ),
        ],
        benchmark,
        baseline=peer,
        goals=[Goal(own, peer), Goal(own, ordered)],
    )


@pytest.mark.usefixtures("full")
def test_score_pairs(bench: Bench, benchmark: Any, sides: Sides, precision: Precision) -> None:
    texts = texts_of(bench.workload, "para", TEXTS // 2)
    own, peer = f"mtbert predict pairs {precision}", f"sentence-transformers CrossEncoder {precision}"
    dtype = DTYPES[precision]
    bench.compare(
        f"score pairs, {precision}",
        [
            Candidate(own, lambda: sides.own_side(own, "para", precision, texts), dtype, FORWARD),
            Candidate(
                peer,
                lambda: sides.sentence_transformers_side(peer, "para", precision, texts),
                dtype,
                FORWARD,
                needs=("sentence_transformers",),
            ),
        ],
        benchmark,
        baseline=peer,
        goals=[Goal(own, peer)],
    )


@pytest.mark.usefixtures("full")
def test_all_pairs(bench: Bench, benchmark: Any, sides: Sides, fast: Precision, tmp_path: Path) -> None:
    """Similarities of N sentences with each other: N readings and a product, or N(N - 1) / 2 readings."""
    model, dtype = sides.own(fast), DTYPES[fast]
    sentences = texts_of(bench.workload, "encode", 10_000)
    reading = f"cross-encoder, {READ} sentences"

    def vectors(count: int) -> Candidate:
        name = f"vectors, {count:,} sentences"
        return Candidate(
            name,
            lambda: pairs_by_vectors(name, model, sentences[:count]),
            dtype,
            None,
            heavy=count > 1000,
        )

    bench.compare(
        "all pairs of sentences",
        [
            Candidate(
                reading,
                lambda: pairs_by_reading(
                    reading, lambda pairs: model.outputs("para", pairs), sentences[:READ]
                ),
                dtype,
                None,
            ),
            *(vectors(count) for count in (READ, 1000, 10_000)),
        ],
        benchmark,
        baseline=reading,
        unit="pairs",
    )
