"""mtbert's sides: its own step, as `python -m mtbert.train` takes it."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.measure import Side
from bench.memory import activation_bytes
from bench.workload import Workload
from mtbert.config import Mode, TrainConfig
from mtbert.curriculum import Curriculum, CurriculumConfig, build_curriculum
from mtbert.data.batching import TaskBatches
from mtbert.data.packing import plan_passes
from mtbert.engine.build import Machine, build_forward, load_model
from mtbert.engine.features import FrozenForward
from mtbert.engine.flops import EncoderSizes
from mtbert.engine.frozen_prefix import PrefixForward, keep_tables
from mtbert.engine.methods import build_train_step, task_losses
from mtbert.engine.peaks import synchronise
from mtbert.engine.precision import Precision, compute_dtype, product_settings
from mtbert.engine.step import TrainStep
from mtbert.engine.step_result import StepResult
from mtbert.engine.torch_profile import TorchProfile
from mtbert.evaluation.profile import read_profile
from mtbert.kernels import dispatch
from mtbert.model.lora import LoraConfig
from mtbert.model.pooling import Pooling
from mtbert.optim.surgery import SurgeryConfig
from mtbert.ranges import listening, span
from mtbert.tasks.config import TaskConfig


def build_step(
    workload: Workload,
    device: torch.device,
    *,
    mode: Mode = "full",
    precision: Precision = "bf16",
    lora: LoraConfig | None = None,
    dropout: float = 0.1,
    surgery: SurgeryConfig | None = None,
    mean: Collection[str] = (),
    trained_layers: int | None = None,
    frozen: Path | None = None,
) -> TrainStep:
    """A training step of `mode` over the workload's data, one pass of the encoder a step.

    mean: the tasks whose head pools by the mean of a row's tokens; all others read its first. Frozen first layers drop
    nothing here. frozen: where their outputs are kept; by default every step computes them.
    """
    config = TrainConfig(
        tasks=list(workload.tasks),
        mode=mode,
        precision=precision,
        task={
            name: TaskConfig(max_length=workload.max_length, head=workload.heads[name])
            for name in workload.tasks
        },
        max_tokens=max(4096, 2 * workload.tokens_per_step),
        surgery=surgery or SurgeryConfig(),
    )
    config.model.pretrained = str(workload.encoder)
    rates = dataclasses.replace(config.model.dropout, embedding=dropout, attention=dropout, hidden=dropout)
    config.model.dropout = rates
    for name, settings in config.task.items():
        pooling: Pooling = "mean" if name in mean else settings.head.pooling
        settings.head = dataclasses.replace(settings.head, dropout=dropout, pooling=pooling)
    if lora is not None:
        config.model.lora = lora
    config.model.trained_layers, config.model.frozen_dropout = trained_layers, False
    config.frozen_cache.use = "never" if frozen is None else "always"
    config.cache = None if frozen is None else str(frozen)
    machine = Machine(device, compute_dtype(precision, device))
    model, tokeniser = load_model(config, machine)
    data = {name: {"train": examples} for name, examples in workload.data.items()}
    tables = {name: {"train": examples.table} for name, examples in workload.data.items()}
    losses = task_losses(config, machine, data)
    forward = build_forward(config, model, machine)
    step = build_train_step(config, machine, model, forward, losses, tables, data, tokeniser)
    keep_tables(forward, step.data.values())
    return step


def curriculum_of(workload: Workload) -> Curriculum:
    """One epoch over the pool."""
    batches = {
        name: TaskBatches(data.lengths, len(workload.steps[0][name]), 0, name)
        for name, data in workload.data.items()
    }
    config = CurriculumConfig(epoch_length=len(workload.steps))
    sizes = {name: len(data) for name, data in workload.data.items()}
    return build_curriculum(batches, config, sizes=sizes, seed=0, epochs=1)


def own_side(name: str, workload: Workload, step: TrainStep, backend: str | None = None) -> Side:
    """One optimizer step a repeat. As in the trainer, the result of a step is checked after the next one.

    backend: the kernels of this side, as `--kernels` names them; None leaves the choice to the environment. Where steps
    are captured, a figure says which share of them was replayed.
    """
    taken = 0
    before: StepResult | None = None
    figures: dict[str, float] = {}

    def run(repeat: int) -> float:
        nonlocal taken, before
        with kernels(backend), arithmetic(step):
            result = step(workload.steps[repeat % len(workload.steps)], taken)
        if before is not None:
            before.check()
        before, taken = result, taken + 1
        if step.graphs is not None:
            figures["replayed_share"] = step.graphs.counts["replayed"] / taken
        return result.tokens

    def activations() -> tuple[int, int]:
        with kernels(backend):
            return activation_bytes(step, workload.steps[0], step.parameters[0].device)

    def profile() -> dict[str, Any]:
        with kernels(backend):
            return profile_of(step, workload)

    return Side(name, run, figures, activations=activations, profile=profile)


def kernels(backend: str | None) -> AbstractContextManager[None]:
    """Within, these kernels serve."""
    return nullcontext() if backend is None else dispatch.use_backend(backend)


def arithmetic(step: TrainStep) -> AbstractContextManager[None]:
    """Within, float16 products are added up as in a run; other sides of a comparison keep what PyTorch is set to."""
    return product_settings("fp16") if step.forward.dtype == torch.float16 else nullcontext()


def profile_of(step: TrainStep, workload: Workload) -> dict[str, Any]:
    """Where the time of a few steps goes: what `--profile torch` leaves in a run's profile.json."""
    skipped, recorded = 2, 3
    config = step.model.encoder.config
    with tempfile.TemporaryDirectory() as folder:
        profile = TorchProfile(
            Path(folder),
            step.parameters[0].device,
            step.forward.dtype,
            step.model,
            skip=skipped,
            active=recorded,
            encoder=EncoderSizes(config.num_hidden_layers, config.hidden_size, config.intermediate_size),
            tokens=workload.tokens_per_step,
        )
        with profile, listening(profile):
            for number in range(skipped + recorded):
                with span("step", number + 1):
                    step(workload.steps[number % len(workload.steps)], number).check()
        found = read_profile(Path(folder))
    assert found is not None
    return {name: value for name, value in found.values.items() if name not in ("trace", "apart")}


def prefix_side(name: str, workload: Workload, step: TrainStep) -> Side:
    """A step that begins above frozen layers, whose outputs were computed before.

    Figures: the bytes of the files, the tokens a second of the one time that they are computed and written, and the
    seconds of opening them later, which reads all of them for their checksums.
    """
    forward = step.forward
    assert isinstance(forward, PrefixForward)
    synchronise(forward.device)
    begin = time.perf_counter()
    forward.open_files()
    made = time.perf_counter()
    again = PrefixForward(
        forward.model,
        forward.device,
        forward.dtype,
        forward.files.folder,
        forward.config,
        max_tokens=step.max_tokens,
    )
    again.keep(step.data.values())
    opening = time.perf_counter()
    again.open_files()
    figures = {
        "frozen_layers_tokens_per_second": workload.tokens / (made - begin),
        "opening_seconds": time.perf_counter() - opening,
        "file_bytes": sum(path.stat().st_size for path in forward.files.folder.glob("*.hidden")),
    }
    return Side(name, own_side(name, workload, step).run, figures)


def frozen_side(name: str, workload: Workload, step: TrainStep) -> Side:
    """Mode last-linear-layer: the whole pool a repeat, as a step takes a moment once the features are there.

    Their one pass through the encoder is the figure `features_tokens_per_second`.
    """
    forward = step.forward
    assert isinstance(forward, FrozenForward)
    device = forward.packed.device
    with torch.no_grad():  # what is done only once stays out of the time
        forward.packed(plan_passes(workload.steps[0], workload.data, step.max_tokens)[0], None)
    synchronise(device)
    begin = time.perf_counter()
    for data in workload.data.values():
        forward.features(data)
    synchronise(device)
    tokens = sum(int(data.lengths.sum()) for data in workload.data.values())
    figures = {"features_tokens_per_second": tokens / (time.perf_counter() - begin)}
    side = own_side(name, workload, step)
    return Side(name, lambda _: sum(side.run(k) for k in range(len(workload.steps))), figures)
