"""The sides that predict and encode give the same numbers for the same texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.inference import Sides, pairs_by_reading, pairs_by_vectors, texts_of
from bench.workload import build_workload

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sides(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    workload = build_workload(str(tiny_bert), tokens_per_step=2000, steps=2, folder=None)
    return Sides(workload, CPU, tmp_path_factory.mktemp("models"))


def test_all_sides_agree_and_count_the_same_tokens(sides: Sides) -> None:
    for package in ("transformers", "sentence_transformers"):
        pytest.importorskip(package)
    for work in ("encode", "sst", "para"):
        texts = texts_of(sides.workload, work, 30)
        assert len(set(texts)) == 30
        found = [sides.own_side("mtbert", work, "float32", texts)]
        if work == "sst":
            found += [sides.pipeline_side(f"{o}", "float32", texts, ordered=o) for o in (False, True)]
        else:
            found.append(sides.sentence_transformers_side("peer", work, "float32", texts))
        tokens = [side.run(0) for side in found]
        assert max(tokens) == min(tokens) > 30 * 3
        assert max(side.figures["largest_difference"] for side in found) < 1e-4


def test_both_ways_to_compare_all_pairs_do_as_many(sides: Sides) -> None:
    sentences = texts_of(sides.workload, "encode", 3000)
    assert len(set(sentences)) == 3000  # more than the sample has
    model, read = sides.own("float32"), []
    assert pairs_by_vectors("v", model, sentences[:9]).run(0) == 36
    assert pairs_by_reading("r", read.extend, sentences[:9]).run(0) == len(set(read)) == 36
