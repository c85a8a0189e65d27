"""Masked-language modelling: the loss of hidden tokens, its training step and its evaluation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mtbert.curriculum import Plan
from mtbert.data.dataset import TaskData
from mtbert.data.masking import HELD_OUT_SITE, MaskedBatch, Masking
from mtbert.data.packing import Segment, pack, plan_passes, plan_shares
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.evaluator import Evaluation
from mtbert.engine.loss_scale import LossScaler
from mtbert.engine.step import update
from mtbert.engine.step_result import StepResult
from mtbert.evaluation.metrics import TaskScores
from mtbert.kernels.casts import WeightCasts
from mtbert.model.dropout import DropoutStream
from mtbert.model.mlm_head import MlmModel
from mtbert.ranges import span

NAME = "mlm"
"""Stands where other runs have the names of tasks."""


@dataclass(frozen=True)
class MlmData:
    """What is trained on, what is scored, and what is hidden of them."""

    train: TaskData
    held_out: TaskData
    masking: Masking

    def fingerprint(self) -> str:
        """A digest of the training tokens."""
        digest = hashlib.sha256()
        for array in (self.train.tokens, self.train.lengths):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def word_losses(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [M], at least float32, of scores [M, V]; targets: int64 [M]."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return F.cross_entropy(wide, targets, reduction="none")


@dataclass(frozen=True)
class MlmForward:
    """Guesses hidden tokens."""

    model: MlmModel
    device: torch.device
    dtype: torch.dtype
    losses: Callable[[Tensor, Tensor], Tensor] = word_losses
    """`word_losses`, or the same compiled."""

    def __call__(self, masked: MaskedBatch, dropout: DropoutStream | None) -> tuple[Tensor, Tensor]:
        """Scores [M, V] of all words at the hidden tokens, and the cross-entropy [M], at least float32."""
        with span("data"):
            masked = masked.to(self.device, non_blocking=True)
        with span("forward"):
            scores = self.model(masked.batch, masked.places, dtype=self.dtype, dropout=dropout)
        with span("loss"), span("loss", NAME) as opened:
            losses = self.losses(scores, masked.targets)
            opened.ends_in(losses)
        return scores, losses


@dataclass(frozen=True)
class PreparedMlmStep:
    """What a step reads, on the host."""

    step: int
    """Steps taken before this one."""
    tokens: int
    """Of all ranks."""
    passes: tuple[MaskedBatch, ...]


class MlmStep:
    """The training step: its loss is the mean over the hidden tokens of all its passes, on all ranks."""

    def __init__(
        self,
        forward: MlmForward,
        optimizer: torch.optim.Optimizer,
        data: MlmData,
        *,
        max_tokens: int,
        clip_norm: float,
        seed: int,
        scaler: LossScaler | None = None,
        world: World = ALONE,
    ) -> None:
        """scaler: the loss scale of fp16."""
        self.forward = forward
        self.optimizer = optimizer
        self.world = world
        self.data = {NAME: data.train}
        self.masking = data.masking
        self.max_tokens = max_tokens
        self.clip_norm = clip_norm
        self.seed = seed
        self.scaler = scaler
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, plan: Plan, step: int, progress: float = 0.0) -> StepResult:
        """Train on the sentences of `plan`; `step`, from 0, selects the masks."""
        with span("data"):
            ready = self.prepare(plan, step)
        return self.run(ready, progress)

    def prepare(self, plan: Plan, step: int) -> PreparedMlmStep:
        """Pack the passes and hide their tokens: the host's part, which another thread may do."""
        shares = plan_shares(plan, self.data, self.max_tokens, self.world.size)
        own = (each[self.world.rank] for each in shares)
        passes = [self.masking(pack(requests), step) for requests in own if requests]
        if self.forward.device.type == "cuda":
            passes = [masked.pinned() for masked in passes]
        return PreparedMlmStep(step, int(self.data[NAME].lengths[plan[NAME]].sum()), tuple(passes))

    def run(self, ready: PreparedMlmStep, progress: float = 0.0) -> StepResult:
        """Train on what was prepared."""
        result = self.backward(ready)
        update(self.optimizer, result, self.clip_norm, self.scaler)
        return result

    def state(self) -> dict[str, Tensor]:
        """The loss scale, where there is one."""
        return {} if self.scaler is None else self.scaler.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of `state()`."""
        if self.scaler is not None:
            self.scaler.restore(state)

    def accumulate(self, plan: Plan, step: int) -> StepResult:
        """Prepare the step and leave its gradient in `.grad`, unclipped."""
        return self.backward(self.prepare(plan, step))

    def backward(self, ready: PreparedMlmStep) -> StepResult:
        """Forward and backward of every pass; leaves the step's gradient in `.grad`, unclipped."""
        step, passes = ready.step, ready.passes
        with span("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
        dropout = DropoutStream(self.seed, step)
        hidden = sum(self.world.gathered(sum(len(masked.targets) for masked in passes)))
        total = torch.zeros((), device=self.forward.device)
        examples: list[tuple[Segment, Tensor]] = []
        with WeightCasts():
            for masked in passes:
                if not len(masked.targets):
                    continue
                _, losses = self.forward(masked, dropout)
                share = losses.sum() / hidden
                with span("backward"):
                    (share if self.scaler is None else self.scaler.scaled({NAME: share})[NAME]).backward()
                total = total + share.detach()
                examples.append((masked.batch.segments[0], _by_sentence(masked, losses.detach())))
        if self.scaler is not None:
            self.scaler.unscale([p.grad for p in self.parameters if p.grad is not None])
        *gradients, whole = self.world.summed([*((p.grad, p) for p in self.parameters), (total, total)])
        assert whole is not None
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        with span("optimizer"):
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.parameters if p.grad is not None], foreach=True
            )
        finite = torch.isfinite(norm) & torch.isfinite(whole)
        return StepResult(
            step=step,
            losses={NAME: whole},
            objectives={},
            total=whole,
            grad_norm=norm,
            finite=finite,
            tokens=ready.tokens,
            examples=tuple(examples),
            scaling=None if self.scaler is None else self.scaler.report(finite),
            world=self.world,
        )


def _by_sentence(masked: MaskedBatch, losses: Tensor) -> Tensor:
    """The losses [M] of hidden tokens, summed over each row: [N]."""
    rows = torch.searchsorted(masked.batch.cu_seqlens.long(), masked.places, right=True) - 1
    return losses.new_zeros(masked.batch.rows).index_add_(0, rows.to(losses.device), losses)


@dataclass(frozen=True)
class MlmEvaluation(Evaluation):
    """How well hidden tokens of unseen sentences are guessed."""

    @property
    def score(self) -> float:
        """Minus the loss: it tells checkpoints apart better than the accuracy does."""
        return -self.dev_loss[NAME]

    @property
    def accuracy(self) -> float:
        """Share of the hidden tokens whose likeliest word is right."""
        return self.dev[NAME].headline

    @property
    def perplexity(self) -> float:
        """e to the mean loss of a hidden token."""
        return math.exp(min(self.dev_loss[NAME], 700.0))

    def to_json(self) -> dict[str, Any]:
        """The evaluation's part of a line of metrics.jsonl."""
        return super().to_json() | {"perplexity": self.perplexity, "score": self.score}


class MlmEvaluator:
    """Scores the sentences held out, always with the same tokens hidden. The ranks share the passes."""

    def __init__(self, forward: MlmForward, data: MlmData, *, max_tokens: int, world: World = ALONE) -> None:
        self.forward = forward
        self.world = world
        order = np.argsort(-data.held_out.lengths, kind="stable")
        plan, tables = {NAME: order}, {NAME: data.held_out}
        self.batches = [
            data.masking(pack(r), 0, HELD_OUT_SITE) for r in plan_passes(plan, tables, max_tokens)
        ]

    @torch.inference_mode()
    def evaluate(self) -> MlmEvaluation:
        """Loss and accuracy over all hidden tokens."""
        ends = np.cumsum([0, *(len(masked.targets) for masked in self.batches)])
        count = int(ends[-1])
        losses, hits = np.zeros(count), np.zeros(count)
        with WeightCasts():
            for number in self.world.share_of(len(self.batches)):
                masked, places = self.batches[number], slice(ends[number], ends[number + 1])
                if len(masked.targets):
                    scores, cross_entropy = self.forward(masked, None)
                    losses[places] = cross_entropy.double().cpu().numpy()
                    hits[places] = (scores.argmax(1).cpu() == masked.targets).numpy()
        accuracy = float(self.world.added(hits).sum()) / max(1, count)
        loss = float(self.world.added(losses).sum()) / max(1, count)
        result = TaskScores("classification", count, accuracy=accuracy)
        return MlmEvaluation({}, {NAME: result}, {}, {NAME: loss})
