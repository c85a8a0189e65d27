"""A whole training step of mtbert beside what one would use instead, on the same sentences."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bench.comparison import Goal
from bench.harness import Bench, Candidate
from bench.measure import Side
from bench.own import build_step, curriculum_of, frozen_side, own_side
from bench.papers_peer import PapersLoop, papers_side
from bench.peers import BATCH, PlainLoop, loop_side
from bench.trainer_peer import NEEDS, TrainerLoop, trainer_side
from bench.workload import Workload, build_workload
from mtbert.config import Mode
from mtbert.engine.capture import CudaRecorder
from mtbert.engine.flops import Pass
from mtbert.engine.graphs import enable
from mtbert.engine.precision import DTYPES, Precision, has_fast_bf16
from mtbert.model.lora import PROJECTIONS, LoraConfig

QUERY_VALUE = LoraConfig()
EVERYWHERE = LoraConfig(projections=list(PROJECTIONS))  # type: ignore[arg-type]


def own(
    bench: Bench,
    name: str,
    precision: Precision,
    mode: Mode = "full",
    lora: LoraConfig | None = None,
    *,
    backend: str | None = None,
    heavy: bool = False,
    workload: Workload | None = None,
    graphs: bool = False,
    only_on: str | None = None,
) -> Candidate:
    """A side of mtbert. backend: its kernels, as `--kernels` names them. graphs: captures its steps, on a GPU."""

    def build() -> Side:
        sentences = workload or bench.workload
        step = build_step(sentences, bench.device, mode=mode, precision=precision, lora=lora)
        if graphs:
            enable(step, curriculum_of(sentences), CudaRecorder(bench.device))
        if mode == "last-linear-layer":
            return frozen_side(name, sentences, step)
        return own_side(name, sentences, step, backend)

    counted: Pass | None = "full" if mode == "full" else "lora" if mode == "lora" else None
    only_on = "cuda" if graphs else only_on
    return Candidate(
        name, build, DTYPES[precision], counted, lora, heavy=heavy, workload=workload, only_on=only_on
    )


def peer(
    bench: Bench,
    name: str,
    precision: Precision,
    *,
    bucketed: bool,
    step_every_batch: bool = False,
    compiled: bool = False,
    batch: int = BATCH,
    lora: LoraConfig | None = None,
    heavy: bool = False,
    workload: Workload | None = None,
) -> Candidate:
    """A plain loop over `transformers`, with `lora` also `peft`. Compiling takes a CPU minutes."""

    def build() -> Side:
        loop = PlainLoop(
            workload or bench.workload,
            bench.device,
            dtype=DTYPES[precision],
            bucketed=bucketed,
            step_every_batch=step_every_batch,
            compiled=compiled,
            batch=batch,
            lora=lora,
        )
        return loop_side(name, loop)

    return Candidate(
        name,
        build,
        DTYPES[precision],
        "full" if lora is None else "lora",
        lora,
        ("transformers",) if lora is None else ("transformers", "peft"),
        heavy or (compiled and bench.device.type == "cpu"),
        workload,
    )


@pytest.fixture
def fast(bench: Bench) -> Precision:
    """What the machine multiplies fastest."""
    return "bf16" if has_fast_bf16(bench.device) else "float32"


def test_full_fine_tuning(bench: Bench, benchmark: Any, fast: Precision) -> None:
    mtbert, bucketed = f"mtbert full {fast}", f"transformers bucketed {fast}"
    compiled, stock = f"{bucketed}, compiled", f"transformers stock {fast}"
    float32 = [] if fast == "float32" else [own(bench, "mtbert full float32", "float32")]
    stock_float32 = "transformers stock float32"
    if fast != "float32":
        float32.append(peer(bench, stock_float32, "float32", bucketed=False))

    def papers() -> Side:
        return papers_side("reference of the papers float32", PapersLoop(bench.workload, bench.device))

    bench.compare(
        "full fine-tuning",
        [
            own(bench, mtbert, fast),
            own(bench, f"{mtbert}, graphs", fast, graphs=True),
            own(bench, "mtbert full fp16", "fp16", heavy=True, only_on="cuda"),
            own(bench, f"{mtbert}, plain kernels", fast, backend="reference", heavy=True),
            peer(bench, bucketed, fast, bucketed=True),
            peer(
                bench, f"{bucketed}, a step a batch", fast, bucketed=True, step_every_batch=True, heavy=True
            ),
            peer(bench, compiled, fast, bucketed=True, compiled=True),
            peer(bench, stock, fast, bucketed=False),
            *float32,
            Candidate("reference of the papers float32", papers, torch.float32),
        ],
        benchmark,
        baseline=mtbert,
        memory=True,
        goals=[
            Goal(mtbert, None, bench.aim(two_cores=0.55), of="limit share"),
            Goal(mtbert, None, bench.aim(one_gpu=870_000)),
            Goal(mtbert, None, bench.aim(one_gpu=970_000)),
            Goal(mtbert, bucketed, bench.aim(two_cores=2.0)),
            Goal(mtbert, stock, bench.aim(one_gpu=6.0)),
            Goal(mtbert, compiled, bench.aim(one_gpu=1.5)),
            Goal(mtbert, stock_float32, bench.aim(two_cores=7.0)),
            Goal(mtbert, bucketed, at_most=bench.aim(two_cores=0.5, one_gpu=0.5), of="activation memory"),
        ],
    )


def test_lora_and_frozen(bench: Bench, benchmark: Any, fast: Precision) -> None:
    # Goals are set for rank 16 on a GPU.
    lora = dataclasses.replace(QUERY_VALUE, rank=16) if bench.device.type == "cuda" else QUERY_VALUE
    everywhere = dataclasses.replace(EVERYWHERE, rank=lora.rank)
    full, own_lora = f"mtbert full {fast}", f"mtbert lora query,value {fast}"
    frozen, bucketed = f"mtbert last-linear-layer {fast}", f"peft lora query,value bucketed {fast}"
    compiled, stock = f"{bucketed}, compiled", f"peft lora query,value stock {fast}"
    on_cpu = bench.device.type == "cpu"
    bench.compare(
        "lora",
        [
            own(bench, full, fast),
            own(bench, own_lora, fast, "lora", lora),
            own(bench, f"mtbert lora all six {fast}", fast, "lora", everywhere, heavy=on_cpu),
            own(bench, frozen, fast, "last-linear-layer"),
            peer(bench, bucketed, fast, bucketed=True, lora=lora),
            peer(bench, compiled, fast, bucketed=True, compiled=True, lora=lora),
            peer(bench, stock, fast, bucketed=False, lora=lora, heavy=on_cpu),
        ],
        benchmark,
        baseline=full,
        memory=True,
        goals=[
            Goal(own_lora, full, bench.aim(two_cores=1.3)),
            Goal(own_lora, None, bench.aim(one_gpu=1_000_000)),
            Goal(own_lora, None, bench.aim(one_gpu=1_250_000)),
            Goal(own_lora, bucketed, bench.aim(two_cores=3.0)),
            Goal(own_lora, stock, bench.aim(one_gpu=6.0)),
            Goal(own_lora, compiled, bench.aim(one_gpu=1.5)),
            Goal(frozen, full, bench.aim(two_cores=50.0)),
            Goal(own_lora, bucketed, at_most=bench.aim(two_cores=0.5, one_gpu=0.5), of="activation memory"),
        ],
    )


def test_sentence_transformers(bench: Bench, benchmark: Any, fast: Precision) -> None:
    """Pairs as two rows and the cosine of their means, which is what that library trains."""
    workload = build_workload(
        bench.workload.encoder_name,
        tokens_per_step=bench.workload.wanted_tokens,
        steps=len(bench.workload.steps),
        pairs="cosine",
    )
    mtbert, theirs = f"mtbert full {fast}, two rows a pair", f"sentence-transformers trainer {fast}"

    def trainer() -> Side:
        return trainer_side(theirs, TrainerLoop(workload, bench.device, dtype=DTYPES[fast]))

    bench.compare(
        "two rows a pair",
        [
            own(bench, mtbert, fast, workload=workload),
            Candidate(theirs, trainer, DTYPES[fast], needs=NEEDS, workload=workload),
        ],
        benchmark,
        baseline=mtbert,
        memory=True,
        goals=[Goal(mtbert, theirs), Goal(mtbert, theirs, of="activation memory")],
    )
