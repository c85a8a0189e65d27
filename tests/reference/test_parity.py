"""The packed program and the reference are the same program: float64, same sentences, same masks, 20 steps.

The packed side goes through mtbert's tokeniser, tables, packing, model, losses, training step and optimizer
groups; the reference side reads
the same sentences with the tokenizers library, pads them, and runs one task after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_bert import WORDS, write_tiny_bert
from support.twins import StatelessMasks, padded_rows, parameter_pairs, twin_of
from tokenizers import Tokenizer

from mtbert import reference
from mtbert.data.dataset import TaskData
from mtbert.data.tables import Table
from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.engine.forward import PackedForward
from mtbert.engine.step import TrainStep
from mtbert.losses.task_losses import LossConfig, TaskLoss
from mtbert.model import (
    DropoutRates,
    DropoutStream,
    HeadConfig,
    HeadSpec,
    LoraConfig,
    MultiTaskModel,
    add_lora,
    build_heads,
    load_encoder,
)
from mtbert.optim.adamw import OptimizerConfig, build_optimizer
from mtbert.optim.schedule import set_learning_rate
from mtbert.tasks.registry import get_task

TOLERANCE = 1e-9
STEPS = 20
BATCH = 5
EXAMPLES = 12
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM, SEED = 1e-3, 0.01, 1.0, 0x1234_5678_9ABC


@dataclass(frozen=True)
class TaskFacts:
    kind: str
    outputs: int
    weight: float
    pair: bool = False
    score_range: tuple[float, float] | None = None


TASKS = {
    "sst": TaskFacts("classification", 5, 1.0),
    "para": TaskFacts("binary", 1, 0.75, pair=True),
    "sts": TaskFacts("similarity", 1, 2.0, pair=True, score_range=(0.0, 5.0)),
}
NO_DROPOUT = DropoutRates(0.0, 0.0, 0.0)
DROPOUT = DropoutRates(embedding=0.05, attention=0.2, hidden=0.1)
LORA = LoraConfig(
    rank=3,
    alpha=5.0,
    dropout=0.15,
    projections=["query", "value", "attention_output", "intermediate", "output"],
    layers=[1],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(
        tmp_path_factory.mktemp("tiny"), hidden=16, heads=2, intermediate=24, max_positions=64, seed=5
    )


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    """Sentences of 1 to 7 known words with random labels."""
    random = np.random.default_rng(7)
    words = WORDS.split()

    def sentence() -> str:
        return " ".join(random.choice(words, random.integers(1, 8)))

    labels = {
        "sst": random.integers(0, 5, EXAMPLES),
        "para": random.integers(0, 2, EXAMPLES),
        "sts": random.integers(0, 21, EXAMPLES) / 4,
    }
    return {
        task: Table(
            task=task,
            split="train",
            path=Path(task),
            ids=[str(number) for number in range(EXAMPLES)],
            texts=[(sentence(), sentence()) if facts.pair else (sentence(),) for _ in range(EXAMPLES)],
            labels=labels[task],
            lines=list(range(EXAMPLES)),
        )
        for task, facts in TASKS.items()
    }


PAIRS = HeadConfig(pooling="mean", pair=["concat", "difference", "product"])
CROSS = HeadConfig(pooling="cls", pair="cross-encoder", hidden_layers=1, activation="tanh")

CASES: dict[str, tuple[str, Mapping[str, HeadConfig]]] = {
    # name: (mode, heads)
    "cross-encoder": ("full", {"sst": CROSS, "para": CROSS, "sts": CROSS}),
    "concat": ("full", dict.fromkeys(TASKS, HeadConfig(pooling="cls", pair=["concat"]))),
    "difference": ("full", dict.fromkeys(TASKS, HeadConfig(pooling="pooler", pair=["difference"]))),
    "product": ("full", dict.fromkeys(TASKS, HeadConfig(pooling="mean", pair=["product"]))),
    "dot": ("full", dict.fromkeys(TASKS, HeadConfig(pooling="cls", pair=["dot"]))),
    "cosine": ("full", dict.fromkeys(TASKS, HeadConfig(pooling="mean", pair=["cosine"]))),
    "all features, deep": (
        "full",
        {
            "sst": HeadConfig(
                pooling="cls", tower_layers=2, hidden_layers=2, hidden_size=6, activation="silu"
            ),
            "para": HeadConfig(
                pooling="mean",
                tower_layers=1,
                hidden_layers=2,
                hidden_size=10,
                activation="gelu",
                pair=["concat", "difference", "product", "dot", "cosine"],
            ),
            "sts": HeadConfig(pooling="pooler", tower_layers=2, activation="none", pair=["cosine"]),
        },
    ),
    "lora, pairs": ("lora", dict.fromkeys(TASKS, PAIRS)),
    "lora, cross-encoder": ("lora", dict.fromkeys(TASKS, CROSS)),
    "last-linear-layer, pairs": ("last-linear-layer", dict.fromkeys(TASKS, PAIRS)),
    "last-linear-layer, cross-encoder": ("last-linear-layer", {"sst": PAIRS, "para": CROSS, "sts": CROSS}),
}


@pytest.mark.parametrize("drop", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_the_reference(folder: Path, tables: dict[str, Table], case: str, drop: bool):
    mode, heads = CASES[case]
    model = build(folder, mode, heads, drop)
    twin = twin_of(model, lora_of(mode, drop))
    # With dropout the packed step is also cut into several passes: masks and gradients must not notice.
    packed = PackedProgram(folder, tables, model, max_tokens=60 if drop else 10_000)
    plain = ReferenceProgram(folder, tables, twin, list(heads))
    before = {name: theirs().clone() for name, _, theirs in parameter_pairs(model, twin)}

    for step in range(STEPS):
        order = np.random.default_rng(step)
        examples = {task: order.permutation(EXAMPLES)[:BATCH] for task in TASKS}
        stream = DropoutStream(SEED, step) if drop else None
        ours, theirs = packed.step(examples, step), plain.step(examples, stream)
        assert ours == pytest.approx(theirs, abs=TOLERANCE, rel=0), step
        # Gradients are compared after clipping, which divides both by the norm of all of them.
        compare(parameter_pairs(model, twin, gradients=True))

    compare(parameter_pairs(model, twin))
    moved = {name for name, _, now in parameter_pairs(model, twin) if not torch.equal(before[name], now())}
    trained = {name for name, get, _ in parameter_pairs(model, twin, gradients=True) if get() is not None}
    assert moved == trained
    assert any(name.startswith("heads.") for name in moved)
    assert any("layers." in name for name in moved) == (mode != "last-linear-layer")


def test_masks_matter(folder: Path, tables: dict[str, Table]):
    """The comparison can fail: the twin with another step's masks computes another loss."""
    mode, heads = CASES["lora, pairs"]
    model = build(folder, mode, heads, drop=True)
    packed = PackedProgram(folder, tables, model)
    plain = ReferenceProgram(folder, tables, twin_of(model, lora_of(mode, True)), list(heads))
    examples = {task: np.arange(BATCH) for task in TASKS}
    ours, theirs = packed.step(examples, 0), plain.step(examples, DropoutStream(SEED, 1))
    assert all(abs(ours[task] - theirs[task]) > 1e-4 for task in TASKS)


# ---- the two programs ----


def lora_of(mode: str, drop: bool) -> LoraConfig | None:
    if mode != "lora":
        return None
    return LORA if drop else LoraConfig(LORA.rank, LORA.alpha, 0.0, LORA.projections, LORA.layers)


def build(folder: Path, mode: str, heads: Mapping[str, HeadConfig], drop: bool) -> MultiTaskModel:
    generator = torch.Generator().manual_seed(11)
    encoder = load_encoder(folder, dropouts=DROPOUT if drop else NO_DROPOUT, dtype=torch.float64)
    specs = [HeadSpec(name, facts.outputs, facts.pair, facts.score_range) for name, facts in TASKS.items()]
    if not drop:
        heads = {name: replace(config, dropout=0.0) for name, config in heads.items()}
    built = build_heads(specs, heads, encoder.config.hidden_size, generator)
    lora = lora_of(mode, drop)
    if lora is not None:
        add_lora(encoder, lora, generator)
    model = MultiTaskModel(encoder, built).double()
    model.set_mode(mode)
    with torch.no_grad():
        # Away from the start, where B = 0 would hide A and small heads would hide the encoder.
        for name, parameter in model.named_parameters():
            if "lora_b" in name or name.startswith("heads."):
                parameter.add_(torch.randn(parameter.shape, generator=generator).double() * 0.1)
    return model


class PackedProgram:
    """The engine's training step: all tasks packed, in one pass or several."""

    def __init__(
        self, folder: Path, tables: Mapping[str, Table], model: MultiTaskModel, max_tokens: int = 10_000
    ) -> None:
        self.model = model
        tokeniser = Tokeniser.from_folder(folder)
        self.data = {}
        for task, table in tables.items():
            form = "single" if not TASKS[task].pair else "pair-rows" if model.head(task).features else "cross"
            self.data[task] = TaskData(task, tokenise(table, tokeniser), form=form, max_length=40)
            assert self.data[task].n_truncated == 0
        optimizer = build_optimizer(
            model, OptimizerConfig(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip_norm=MAX_NORM)
        )
        self.train_step = TrainStep(
            PackedForward(model, torch.device("cpu"), torch.float64),
            optimizer,
            {
                task: TaskLoss(get_task(task), LossConfig(weight=facts.weight), tables[task].labels)
                for task, facts in TASKS.items()
            },
            self.data,
            max_tokens=max_tokens,
            clip_norm=MAX_NORM,
            seed=SEED,
        )

    def step(self, examples: Mapping[str, np.ndarray], number: int) -> dict[str, float]:
        set_learning_rate(self.train_step.optimizer, 1.0)
        result = self.train_step(dict(examples), number)
        result.check()
        return {task: float(loss) for task, loss in result.losses.items()}


class ReferenceProgram:
    """One padded batch after another."""

    def __init__(
        self,
        folder: Path,
        tables: Mapping[str, Table],
        twin: reference.MultitaskBert,
        head_names: Sequence[str],
    ) -> None:
        self.twin, self.tables, self.head_names = twin, tables, head_names
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.optimizer = reference.make_optimizer(twin, LEARNING_RATE, WEIGHT_DECAY)

    def step(self, examples: Mapping[str, np.ndarray], stream: DropoutStream | None) -> dict[str, float]:
        batches, first_row = [], 0
        for task, numbers in examples.items():
            facts, table = TASKS[task], self.tables[task]
            two_rows = bool(self.twin.heads[task].pair_features)
            texts = [table.texts[number] for number in numbers]
            columns = [[(pair[side],) for pair in texts] for side in (0, 1)] if two_rows else [texts]
            rows = []
            for side, column in enumerate(columns):
                # The rows of a pair have neighbouring ids.
                row_ids = range(first_row + side, first_row + len(columns) * len(numbers), len(columns))
                masks = StatelessMasks(row_ids, stream, self.head_names) if stream else None
                encodings = [self.tokenizer.encode(*words) for words in column]
                rows.append(padded_rows([(encoding.ids, encoding.type_ids) for encoding in encodings], masks))
            first_row += len(columns) * len(numbers)
            labels = torch.tensor(table.labels[numbers])
            batches.append(
                reference.TaskBatch(
                    task, facts.kind, labels, *rows, weight=facts.weight, score_range=facts.score_range
                )
            )
        return reference.training_step(self.twin, self.optimizer, batches, max_norm=MAX_NORM)


def compare(pairs) -> None:
    for name, get_ours, get_theirs in pairs:
        ours, theirs = get_ours(), get_theirs()
        assert (ours is None) == (theirs is None), name
        if ours is not None and theirs is not None:
            assert ours.shape == theirs.shape, name
            error = (ours - theirs).abs().max().item()
            assert error <= TOLERANCE, (name, error)
