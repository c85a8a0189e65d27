"""A kernel beside its peers and beside a plain copy of the bytes that it cannot avoid, with the goals set for it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from bench.comparison import Comparison, Goal, summarise
from bench.harness import limit_name
from bench.kernels.bytes import COSTS, least
from bench.kernels.calls import OPERATIONS, Call, Setting, encoder_layer, linear_bias_gelu
from bench.kernels.peers import COMPILED, EAGER, LAYER, MASKED, NESTED, PEERS, UNMASKED, VARLEN, VARLEN_PUBLIC
from bench.kernels.shapes import BERT_BASE, REVIEWS, SENTENCES, Encoder, draw_lengths
from bench.kernels.timing import Stopwatch, copy_side, fastest_product, timed_side
from bench.measure import Alternation, Side
from mtbert.engine.flops import EncoderSizes, training_flops
from mtbert.engine.peaks import limit_shapes

OWN, COPY = "mtbert", "copy of the least bytes"
ROWS = {"sentences": (SENTENCES, 128), "reviews": (REVIEWS, 512)}
"""Distributions of the rows' lengths, and max_seqlen."""


@dataclass(frozen=True)
class Aim:
    """What forward and backward together should reach on an H200: bert-base, bf16, dropout 0.1."""

    operation: str
    to: str
    at_least: float
    rows: str = "sentences"
    from_tokens: int = 8192


AIMS = (
    Aim("attention", COPY, 0.75),
    Aim("attention", VARLEN, 2.0),
    Aim("attention", VARLEN_PUBLIC, 2.0),
    *(Aim("attention", peer, 3.0) for peer in MASKED),
    *(Aim("attention", peer, 1.0, "reviews") for peer in (VARLEN, VARLEN_PUBLIC, UNMASKED, *MASKED, *NESTED)),
    Aim("add_layer_norm", COPY, 0.85, from_tokens=32768),
    Aim("add_layer_norm", EAGER, 2.0, from_tokens=32768),
    Aim("bias_gelu", COPY, 0.85),
    *(Aim("bias_gelu", peer, 1.0) for peer in (EAGER, COMPILED)),
    *(Aim("linear_bias_gelu", peer, 1.0) for peer in (EAGER, COMPILED)),
    Aim("embedding", COPY, 0.85),
    *(Aim("embedding", peer, 1.0) for peer in (EAGER, COMPILED)),
)


@dataclass(frozen=True)
class Plan:
    """One comparison of kernels."""

    operation: str
    encoder: Encoder
    rows: str
    tokens: int
    device: torch.device
    dtype: torch.dtype
    backward: bool = True

    @property
    def name(self) -> str:
        """As the record calls it."""
        passes = "forward and backward" if self.backward else "forward"
        return f"{self.operation}, {self.encoder.name}, {self.rows}, {self.tokens} tokens, {passes}"

    def setting(self) -> Setting:
        """The call's: dropout of 0.1, everything trained."""
        distribution, longest = ROWS[self.rows]
        lengths = tuple(draw_lengths(distribution, self.tokens).tolist())
        return Setting(self.encoder, lengths, longest, self.dtype, device=str(self.device))

    def goals(self, unfair: Collection[str] = ()) -> list[Goal]:
        """Those that were set for a GPU; on a CPU the ratios are of interest, none is set.

        unfair: peers that pay for more than the kernels, which no goal is measured by.
        """
        aimed = self.backward and self.device.type == "cuda"
        aimed = aimed and self.encoder == BERT_BASE and self.dtype == torch.bfloat16
        found = []
        for peer in (COPY, *(peer.name for peer in PEERS[self.operation])):
            aims = [
                aim.at_least
                for aim in AIMS
                if (aim.operation, aim.to, aim.rows) == (self.operation, peer, self.rows)
                and self.tokens >= aim.from_tokens
            ]
            found.append(Goal(OWN, peer, aims[0] if aims and aimed and peer not in unfair else None))
        return found


def compare(plan: Plan, stopwatch: Stopwatch, measure: Callable[[Alternation], None]) -> Comparison:
    """One operation beside its peers; the unit is tokens a second. `measure` runs the rounds.

    The ratio to COPY is the share of the measured copy bandwidth at the least number of bytes.
    """
    build = {**OPERATIONS, "linear_bias_gelu": linear_bias_gelu}[plan.operation]
    call = build(plan.setting())
    moved = least_bytes(call, plan.backward)
    sides = [timed_side(OWN, _passes(call, plan.backward), stopwatch, plan.tokens, moved)]
    if moved is not None:
        sides.append(copy_side(COPY, stopwatch, plan.tokens / moved))
    others, left_out = _peer_sides(call, plan, stopwatch)
    alternation = Alternation([*sides, *others], clock=stopwatch)
    measure(alternation)
    baseline = OWN if moved is None else COPY
    # Outside of a graph the host's launches may last longer than the kernels.
    slow_hosts = [side.name for side in others if "without_a_graph" in side.figures]
    goals = plan.goals(unfair=slow_hosts)
    return summarise(plan.name, alternation, baseline=baseline, goals=goals, left_out=left_out)


def compare_layer(plan: Plan, stopwatch: Stopwatch, measure: Callable[[Alternation], None]) -> Comparison:
    """A whole encoder layer: its products' share of the measured rate of matrix products."""
    encoder, call = plan.encoder, encoder_layer(plan.setting())
    sizes = EncoderSizes(1, encoder.width, encoder.inner)
    limit = limit_name(plan.dtype)
    shapes = limit_shapes(plan.device, sizes, plan.tokens)
    others, left_out = _peer_sides(call, plan, stopwatch)
    sides = [
        timed_side(OWN, call.both, stopwatch, plan.tokens),
        *others,
        fastest_product(limit, stopwatch, plan.dtype, shapes),
    ]
    alternation = Alternation(sides, clock=stopwatch)
    measure(alternation)
    flops = training_flops(sizes, call.setting.lengths, "full") / plan.tokens
    return summarise(
        plan.name,
        alternation,
        baseline=OWN,
        limits=[limit],
        limit_of={OWN: (limit, flops), LAYER: (limit, flops)},
        goals=[Goal(OWN, LAYER)],
        left_out=left_out,
    )


def least_bytes(call: Call, backward: bool) -> float | None:
    """What a run has to move, or None where the operation is more than one kernel's."""
    if call.operation not in COSTS:
        return None
    cost = least(call.operation, call.setting, words=call.facts.get("words", 0))
    return cost.bytes if backward else cost.forward_bytes


def _passes(call: Call, backward: bool) -> Callable[[], object]:
    return call.both if backward else torch.no_grad()(call.forward)


def _peer_sides(call: Call, plan: Plan, stopwatch: Stopwatch) -> tuple[list[Side], list[str]]:
    """Those that can run here, and the others with the reason."""
    sides, left_out = [], []
    for peer in PEERS[plan.operation]:
        if plan.device.type not in peer.devices:
            continue
        try:
            passes = _passes(peer.call(call), plan.backward)
            side = timed_side(peer.name, passes, stopwatch, plan.tokens)
            side.run(0)
            sides.append(side)
        except Exception as error:  # a library that refuses the shape, in whatever way it does
            left_out.append(
                f"{peer.name} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
            )
    return sides, left_out
