"""SMART (Jiang et al. 2020, "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through
Principled Regularized Optimization"): the smoothness-inducing adversarial regulariser of section 2.1.

    R(theta) = mean over examples of  max over |x' - x|_inf <= epsilon  of  l_s(f(x'; theta), f(x; theta))

x are the embeddings of an example's tokens, after their LayerNorm and dropout; x' is sought by gradient ascent from
x + noise_std * N(0, 1). Rows of a packed batch are independent, so one ascent serves all tasks. The initial noise is a
function of the seed, the step and the token's place in the step: passes and resumption do not change it.

What precision it takes, measured against float64 (MiniLM after 120 steps on three tasks, the default settings):
- With the same dropout masks in all passes, or none, the value is 6e-11 to 1e-9. float32 gives it within 1.3% and its
  gradient's direction with a cosine above 0.997. In bfloat16 the noise is lost beside hidden states of size 1, and
  what remains is rounding: values 500 to 10,000 times too large, cosines from -0.02 to 0.47; with epsilon 1e-2 the
  cosines are still below 0.43. So these passes run in float32, whatever the run's precision, the clean one included.
- With fresh masks for each pass, dropout 0.1 makes the value 2e-3 to 6e-2: the regulariser is then the divergence
  between two masks (R-Drop, Liang et al. 2021), to which epsilon 1e-6 adds at most 0.03% (epsilon 0.1 with
  step_size 1: 30 to 60 times the value). bfloat16 gives the value within 2.5% and a cosine above 0.997, so the run's
  own precision serves.
- The noise of `reference` has size 1: bfloat16 gives the value within 8% and a cosine above 0.995.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mtbert.data.packing import PackedBatch
from mtbert.errors import ConfigError
from mtbert.kernels.philox import WORD, philox4x32
from mtbert.losses.divergence import (
    DivergenceName,
    OutputDivergence,
    at_least_float32,
    build_divergences,
    check_divergence_names,
    has_encoder_dropout,
)
from mtbert.losses.objective import Objective, ObjectiveContext, Pass
from mtbert.model.dropout import EMBEDDING, DropoutStream
from mtbert.ranges import span

NOISE_SITE = EMBEDDING + 1
"""Place of the initial noise among the sites of `mtbert.model.dropout`: no dropout has it."""

_WORDS = 4


@dataclass
class SmartConfig:
    """SMART: outputs must not change under small adversarial changes of the embeddings."""

    tasks: list[str] = field(default_factory=list)
    """Tasks that are regularised; none by default."""
    weight: float = 1.0
    """lambda: weight beside the tasks' own losses. The paper tried 1, 3 and 5."""
    steps: int = 1
    """Steps of gradient ascent; each takes a forward and a backward pass."""
    step_size: float = 1e-3
    """eta: length of a step of ascent."""
    epsilon: float = 1e-6
    """Radius of the ball, in the infinity norm; with projection reference only what is added to a norm."""
    noise_std: float = 1e-5
    """Standard deviation of the initial noise."""
    projection: Literal["paper", "reference"] = "paper"
    """paper: steps along the gradient of infinity norm 1, projected to the ball. reference: what public code does
    instead, noise scaled to an infinity norm of 1 for every token, and half the gradient."""
    masks: Literal["fresh", "same"] = "fresh"
    """Dropout of the passes: fresh masks for each, as in public code (their difference outweighs that of epsilon by
    far), or the same masks for all, so that outputs differ by the perturbation alone."""
    divergence: dict[str, DivergenceName] = field(default_factory=dict)
    """l_s by task: kl (symmetrised), squared or mse. By default kl for classes and squared for similarities."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"smart.weight: expected a number above 0, found {self.weight}")
        for name in ("step_size", "epsilon", "noise_std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"smart.{name}: expected a number of at least 0, found {value}")
        if self.steps < 1:
            raise ConfigError(f"smart.steps: expected at least 1, found {self.steps}")
        for name, possible in (("projection", ("paper", "reference")), ("masks", ("fresh", "same"))):
            if getattr(self, name) not in possible:
                raise ConfigError(
                    f"smart.{name}: found {getattr(self, name)!r}; possible: {', '.join(possible)}"
                )
        check_divergence_names("smart.divergence", self.divergence)

    @property
    def without_noise(self) -> str | None:
        """The field whose 0 keeps the perturbation at 0 where passes differ by it alone; None when there is none.

        Without initial noise the ascent begins where the divergence is smallest, so that its gradient is 0, too.
        """
        if self.noise_std == 0:
            return "noise_std"
        return "epsilon" if self.projection == "paper" and self.epsilon == 0 else None


def normal_noise(dropout_row: Tensor, width: int, *, seed: int, step: int) -> Tensor:
    """Standard normal numbers, float32 `[T, width]`, by Philox and Box-Muller: the same wherever a token is packed.

    dropout_row: int32 `[T]` of a packed batch.
    """
    groups = torch.arange(-(-width // _WORDS), device=dropout_row.device)
    rows = dropout_row.to(torch.int64) & WORD
    words = philox4x32((seed & WORD, seed >> 32), (groups[None, :], rows[:, None], NOISE_SITE, step))
    uniform = [(word + 1).float() * 2.0**-32 for word in words]  # in (0, 1]
    numbers = []
    for radius, angle in (uniform[:2], uniform[2:]):
        radius = (-2.0 * radius.log()).sqrt()
        numbers += [radius * (2 * math.pi * angle).cos(), radius * (2 * math.pi * angle).sin()]
    return torch.stack(numbers, dim=-1).flatten(1)[:, :width]


def tokens_by_example(batch: PackedBatch) -> Tensor:
    """How many tokens each example of a packed batch has over all of its rows, int32 `[examples]`, in their order."""
    bounds = batch.cu_seqlens
    return torch.cat(
        [bounds[s.rows.start : s.rows.stop + 1 : s.rows_per_example].diff() for s in batch.segments]
    )


def paper_step(
    noise: Tensor, gradient: Tensor, lengths: Tensor, *, step_size: float, epsilon: float
) -> Tensor:
    """Algorithm 1 of the paper, lines 8 and 9, on the noise x' - x: clamp(noise + eta g / |g|_inf, -epsilon, epsilon).

    noise, gradient: `[T, C]`. lengths: `[examples]`, tokens of each example: the norm is over all tokens of all of its
    rows. An example without a gradient keeps its noise, projected.
    """
    largest = gradient.abs().amax(-1)
    norms = torch.segment_reduce(largest, "max", lengths=lengths.long(), unsafe=True)
    norms = norms.repeat_interleave(lengths, output_size=len(gradient)).unsqueeze(-1)
    return (noise + step_size * gradient / norms.where(norms > 0, 1.0)).clamp(-epsilon, epsilon)


def reference_step(noise: Tensor, gradient: Tensor, *, step_size: float, epsilon: float) -> Tensor:
    """The step of archinetai/smart-pytorch: s / (|s|_inf + epsilon) with s = noise + eta g, the norm of each token.

    noise, gradient: `[T, C]`; the gradient is that of the mean over the batch, so that s is nearly the initial noise.
    (namisan/mt-dnn differs: it adds eta g / (|g|_inf + epsilon) to the noise and bounds nothing.)
    """
    moved = noise + step_size * gradient
    norm = moved.abs().amax(-1, keepdim=True) + epsilon
    return moved / norm.where(norm > 0, 1.0)


class SmartObjective(Objective):
    """The regulariser of the chosen tasks: the mean of l_s over the examples of the step, times the weight.

    Beside the step's own pass: a pass without gradients of the parameters for each step of ascent (only the noise has
    one, and the clean outputs are constants), then one that trains. Their divergence from the clean outputs sends a
    gradient through both. The clean outputs are those of the step's own pass where masks are fresh and the encoder
    drops anything; else they take one more pass over the same rows in the same precision, so that where nothing else
    differs (`masks: same`, or nothing drops), no noise gives exactly 0.
    """

    name = "smart"

    def __init__(
        self,
        config: SmartConfig,
        divergences: Mapping[str, OutputDivergence],
        *,
        seed: int,
        width: int,
        dtype: torch.dtype,
        independent: bool,
    ) -> None:
        """width: of the embeddings. dtype: of the run's encoder. independent: whether its masks differ by pass."""
        self.config = config
        self.divergences = dict(divergences)
        self.seed = seed
        self.width = width
        self.independent = independent
        exact = config.projection == "paper" and not independent
        self.dtype = at_least_float32(dtype) if exact else dtype
        # The gradient that the noise follows is that of a mean, unscaled: float16 would lose it below 6e-8.
        self.ascent_dtype = at_least_float32(dtype) if dtype == torch.float16 else self.dtype

    def losses(self, run: Pass) -> Mapping[str, Tensor]:
        """The share of this pass in each task's mean over the step."""
        streams = [s.stream for s in run.segments if s.stream in self.divergences]
        if not streams:
            # What comes after this objective has the same masks, whichever passes or ranks hold its rows.
            for _ in range(
                1 if self.config.masks == "same" else self.config.steps + 1 + (not self.independent)
            ):
                run.fresh_dropout()
            return {}
        masks = self._masks(run)
        clean = run.outputs
        if not self.independent:
            clean = run.again(streams, dropout=masks(), dtype=self.dtype).outputs
        noise = self.ascend(run, streams, clean, masks)
        changed = run.again(streams, noise=noise, dropout=masks(), dtype=self.dtype).outputs
        found = self._means(run, streams, changed, clean)
        return {task: self.config.weight * mean for task, mean in found.items()}

    def ascend(
        self,
        run: Pass,
        streams: Sequence[str],
        clean: Mapping[str, Tensor],
        masks: Callable[[], DropoutStream | None],
    ) -> Tensor:
        """The perturbation `[T, C]` of the embeddings of `run.sub_batch(streams)`, at least float32."""
        config = self.config
        clean = {stream: clean[stream].detach() for stream in streams}
        batch = run.sub_batch(streams)
        lengths = tokens_by_example(batch)
        noise = normal_noise(batch.dropout_row, self.width, seed=self.seed, step=run.step)
        noise = config.noise_std * noise.to(at_least_float32(self.dtype))
        for _ in range(config.steps):
            noise.requires_grad_()
            changed = run.again(
                streams, noise=noise, trained=False, dropout=masks(), dtype=self.ascent_dtype
            ).outputs
            mean = torch.stack(list(self._means(run, streams, changed, clean).values())).sum()
            with span("backward"):
                (gradient,) = torch.autograd.grad(mean, noise)
            noise = noise.detach()
            size, epsilon = config.step_size, config.epsilon
            if config.projection == "paper":
                noise = paper_step(noise, gradient, lengths, step_size=size, epsilon=epsilon)
            else:
                noise = reference_step(noise, gradient, step_size=size, epsilon=epsilon)
        return noise

    def _masks(self, run: Pass) -> Callable[[], DropoutStream | None]:
        """The masks of the next pass, whenever it is called."""
        if self.config.masks == "fresh":
            return run.fresh_dropout
        same = run.fresh_dropout()
        return lambda: same

    def _means(
        self,
        run: Pass,
        streams: Sequence[str],
        changed: Mapping[str, Tensor],
        clean: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        means = {}
        for stream in streams:
            divergence = self.divergences[stream](changed[stream], clean[stream])
            segment = run.segment(stream)
            assert segment is not None
            means[stream] = (divergence * segment.weights.to(divergence.dtype)).sum()
        return means


def build_smart(config: SmartConfig, context: ObjectiveContext) -> SmartObjective | None:
    """The objective, or None when no task has it; ConfigError for tasks and divergences that are not possible."""
    if not config.tasks:
        return None
    if context.mode == "last-linear-layer":
        raise ConfigError(
            "smart.tasks: needs a pass through the encoder, mode last-linear-layer computes it once"
        )
    return SmartObjective(
        config,
        build_divergences(
            "smart",
            config.tasks,
            context.tasks,
            config.divergence,
            detached=config.projection == "reference",
        ),
        seed=context.seed,
        width=context.model.encoder.config.hidden_size,
        dtype=context.dtype,
        independent=config.masks == "fresh" and has_encoder_dropout(context.model),
    )
