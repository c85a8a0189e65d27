"""What mtbert's Triton kernels move beyond the least bytes, by formula; a table of both.

    python -m bench.kernels.traffic          at 32,768 tokens of sentences, bf16, dropout 0.1

Partial sums are as many as the launches say. What a cache serves is counted too: partial sums, a word's row for every
token that looks it up.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from bench.kernels.bytes import least
from bench.kernels.calls import OPERATIONS, Setting
from bench.kernels.cases import launches_of, plain
from bench.kernels.shapes import BERT_BASE, MINILM, SENTENCES, draw_lengths
from mtbert.engine.costs import Cost
from mtbert.kernels.triton_ops.launch import Launch

TOKENS = 32768
_WHOLE_ROWS = 128
"""Tokens of the longest row that attention keeps in one tile."""
_FLOAT = 4
_STATISTICS = 2 * _FLOAT
"""Bytes a row: mean and reciprocal deviation, or maximum and sum. Written forward, read backward."""


def moved(operation: str, setting: Setting, *, words: int = 0, partial_sums: float = 0) -> Cost:
    """The bytes that the kernels move; FLOPs as for the least.

    words: the embedding's number of different words; partial_sums: bytes of the buffers of partial sums, which are
    written once and read once.
    """
    cost = least(operation, setting, words=words)
    forward, backward = _beyond(operation, setting, words)
    return replace(
        cost,
        forward_bytes=cost.forward_bytes + forward,
        backward_bytes=cost.backward_bytes + backward + 2 * partial_sums,
    )


def _beyond(operation: str, s: Setting, words: int) -> tuple[float, float]:
    tokens, encoder = s.tokens, s.encoder
    if operation == "attention":
        # Long rows: backward, one kernel for the queries' gradient and one for those of keys and values, which read
        # five tensors again and the output; and two float32 numbers a row and head.
        long = sum(length for length in s.lengths if length > _WHOLE_ROWS)
        statistic = long * encoder.heads * _FLOAT
        return statistic, 6 * long * encoder.width * s.dtype.itemsize + 4 * statistic
    if operation == "first_token_attention":  # backward passes over keys and values twice
        return 0.0, 2 * tokens * encoder.width * s.dtype.itemsize
    if operation == "softmax":
        rows = tokens * encoder.heads * _STATISTICS
        return rows, rows
    if operation == "add_layer_norm":
        return tokens * _STATISTICS, tokens * _STATISTICS
    if operation == "embedding":
        # Backward, the sums' gradient goes through memory in float32: written once, read for two of the tables. Two
        # sorts of 32-bit keys take four passes each, and their gradients are zeroed before they are written.
        forward = tokens * _STATISTICS + (tokens - words) * encoder.width * s.parameters.itemsize
        if not s.trained:
            return forward, 0.0
        sums = 3 * tokens * encoder.width * _FLOAT
        sorting = 2 * 4 * tokens * 2 * (4 + 8)
        written = (words + max(s.lengths)) * encoder.width * s.parameters.itemsize
        return forward, forward + sums + sorting + written
    return 0.0, 0.0


def partial_sums(launches: Sequence[Launch]) -> float:
    """Bytes of the buffers of partial sums, which one kernel adds up for all operations."""
    added = [launch.arguments[0] for launch in launches if launch.kernel.fn.__name__ == "add_partials_kernel"]
    return float(sum(partials.numel() * partials.element_size() for partials in added))


def table(tokens: int = TOKENS) -> list[tuple[str, ...]]:
    """A line an operation and encoder, after a line of titles: MB of the least and moved, GFLOP, and FLOP a byte."""
    passes = ("forward", "backward")
    titles = (
        "operation",
        "encoder",
        *(f"{what}, {each}" for each in passes for what in ("least MB", "moved MB")),
    )
    lines: list[tuple[str, ...]] = [(*titles, "GFLOP", "FLOP a byte")]
    lengths = tuple(draw_lengths(SENTENCES, tokens).tolist())
    for operation, build in OPERATIONS.items():
        for encoder in (BERT_BASE, MINILM):
            setting = replace(plain(encoder, max_seqlen=max(SENTENCES)), lengths=lengths)
            words = build(setting).facts.get("words", 0)
            needed = least(operation, setting, words=words)
            sums = partial_sums(launches_of(operation, setting))
            done = moved(operation, setting, words=words, partial_sums=sums)
            numbers = (
                needed.forward_bytes / 1e6,
                done.forward_bytes / 1e6,
                needed.backward_bytes / 1e6,
                done.backward_bytes / 1e6,
                needed.flops / 1e9,
                needed.flops / needed.bytes,
            )
            lines.append((operation, encoder.name, *(f"{number:,.1f}" for number in numbers)))
    return lines


def main() -> int:
    """The command."""
    lines = table()
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
