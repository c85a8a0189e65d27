"""A NaN or an infinity never reaches the weights; the run ends and names task, step and examples."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtbert.engine.checkpoint import CheckpointStore

from .conftest import TRAIN_ROWS, Workplace, no_problem

_RARE = "@"  # in the tiny BERT's vocabulary, in no sentence of the tables
_FILES = {"sst": "ids-sst-train.csv", "para": "quora-train.csv", "sts": "sts-train.csv"}


@pytest.fixture
def poisoned(workplace: Workplace, tmp_path: Path) -> Path:
    """The tiny BERT with NaN where the embedding of the rare token was."""
    bert = Path(shutil.copytree(workplace.bert, tmp_path / "bert"))
    tensors = load_file(bert / "model.safetensors")
    rare = (bert / "vocab.txt").read_text().splitlines().index(_RARE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["embeddings.word_embeddings.weight"][rare] = math.nan
    save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
    return bert


def plant(tables: Path, task: str, row: int) -> str:
    """Put the rare token into the first sentence of one training example; returns the example's id."""
    path = tables / _FILES[task]
    lines = path.read_text(encoding="utf-8").splitlines()
    fields = lines[row + 1].split("\t")
    fields[2] += f" {_RARE}"
    lines[row + 1] = "\t".join(fields)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return fields[1]


@pytest.mark.parametrize(("task", "row"), [("sst", 3), ("para", 17), ("sts", TRAIN_ROWS - 1)])
def test_a_nan_in_the_weights_names_exactly_the_examples_that_meet_it(
    workplace: Workplace, poisoned: Path, tmp_path: Path, run: Path, task: str, row: int
) -> None:
    tables = Path(shutil.copytree(workplace.tables, tmp_path / "tables"))
    example = plant(tables, task, row)
    options = (f"--data={tables}", f"--model.pretrained={poisoned}", "--run.checkpoint_every=1", "--epochs=1")
    training = workplace.start(run, *options)
    assert training.wait() == 2
    assert "Traceback" not in training.err
    named = re.match(
        r"error: step (\d+): the loss is not finite\. task (\w+): examples ([\w, ]+)\. ", training.err
    )
    assert named, training.err
    assert named[2] == task
    assert named[3] == example
    # Every step before it (the first is step 1) has its checkpoint; the poisoned row is the only NaN there, as at the
    # beginning.
    found = CheckpointStore(run / "checkpoints").load_newest(no_problem)
    assert (0 if found is None else found.step) == int(named[1]) - 1
    if found is not None:
        for name, tensor in [*found.model.items(), *found.optimizer.items()]:
            bad = (~torch.isfinite(tensor)).sum()
            assert int(bad) == (tensor.shape[-1] if "word" in name and name in found.model else 0), name
    assert "NaN" not in (run / "metrics.jsonl").read_text()


def test_weights_that_run_away_end_in_a_message(workplace: Workplace, run: Path) -> None:
    training = workplace.start(
        run, "--optim.lr=900", "--optim.weight_decay=1000000", "--run.checkpoint_every=1"
    )
    assert training.wait() == 2
    assert "Traceback" not in training.err
    assert re.match(r"error: step \d+: ", training.err)
    assert "lower optim.lr" in training.err
