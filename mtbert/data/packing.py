"""One stream of tokens for all rows of all tasks of a step, without padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mtbert.data.dataset import MAX_POSITIONS, TaskData
from mtbert.errors import DataError

MAX_ROWS = 2**31 // MAX_POSITIONS
"""Rows of a global step: row_id * 4096 + position must fit into int32."""


@dataclass(frozen=True, eq=False)
class Segment:
    """The part of a packed batch that belongs to one stream: a task's own examples, or rows that an objective adds.

    `stream` is unique in a batch; `task` is the task whose gradient it belongs to, and the two are the same for a
    task's own examples. Its rows and tokens are contiguous ranges of the batch. `examples` int64 [n] are indices
    into the TaskData. `weights` float64 [n] are the shares of the examples in the stream's loss of the whole step
    (they sum to 1 over its passes, and are 0 for unlabelled examples). `labels` [n] are int64 classes or
    float64 scores. The rows of a pair are interleaved: a0 b0 a1 b1.
    """

    stream: str
    task: str
    rows: range
    tokens: range
    examples: np.ndarray
    ids: tuple[str, ...]
    labels: Tensor
    weights: Tensor
    rows_per_example: int
    padded: bool = False
    """Whether filler rows follow on those of the examples (see `mtbert.data.padding`): then labels and weights have a
    zero for each, and `examples` and `ids` are shorter."""


@dataclass(frozen=True, eq=False)
class Computed:
    """What the encoder's first layers give for the tokens of a batch: `hidden` `[T, C]`, above so many `layers`."""

    hidden: Tensor
    layers: int


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """All rows of one pass, concatenated: T tokens, N rows, row n being cu_seqlens[n] : cu_seqlens[n + 1].

    `input_ids`, `token_type_ids`, `position_ids`, `dropout_row` are int32 [T]; `cu_seqlens` int32
    [N + 1]; `dropout_row` is row_id * 4096 + position. `max_seqlen` is the longest row, rounded up to 32,
    64, 128, 256, 512 or a multiple of 512. `below` is what the encoder's first layers need not compute any more.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    dropout_row: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    segments: tuple[Segment, ...]
    below: Computed | None = None

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return self.input_ids.shape[0]

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return self.cu_seqlens.shape[0] - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> PackedBatch:
        """The same batch in page-locked memory, which a GPU reads while the host goes on."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with other tensors in place of its own, always in the same order."""
        return PackedBatch(
            move(self.input_ids),
            move(self.token_type_ids),
            move(self.position_ids),
            move(self.dropout_row),
            move(self.cu_seqlens),
            self.max_seqlen,
            tuple(replace(s, labels=move(s.labels), weights=move(s.weights)) for s in self.segments),
            None if self.below is None else replace(self.below, hidden=move(self.below.hidden)),
        )

    def subset(self, streams: Collection[str]) -> PackedBatch:
        """The rows of these streams alone, in their order, packed anew; dropout rows stay what they are."""
        kept = [s for s in self.segments if s.stream in streams]
        if len(kept) == len(self.segments):
            return self
        segments, lengths = [], []
        first_row = first_token = 0
        for s in kept:
            rows, tokens = len(s.rows), len(s.tokens)
            segments.append(
                replace(
                    s,
                    rows=range(first_row, first_row + rows),
                    tokens=range(first_token, first_token + tokens),
                )
            )
            lengths.append(self.cu_seqlens[s.rows.start : s.rows.stop + 1].diff())
            first_row, first_token = first_row + rows, first_token + tokens

        def tokens_of(x: Tensor) -> Tensor:
            return torch.cat([x[s.tokens.start : s.tokens.stop] for s in kept]) if kept else x[:0]

        ends = torch.cat([self.cu_seqlens[:1], *lengths]).cumsum(0, dtype=torch.int32)
        return PackedBatch(
            tokens_of(self.input_ids),
            tokens_of(self.token_type_ids),
            tokens_of(self.position_ids),
            tokens_of(self.dropout_row),
            ends,
            self.max_seqlen,
            tuple(segments),
            None if self.below is None else replace(self.below, hidden=tokens_of(self.below.hidden)),
        )


@dataclass(frozen=True, eq=False)
class Request:
    """Examples of one stream to pack: indices int64 [n], the id of their first row, the weight of each."""

    data: TaskData
    examples: np.ndarray
    first_row_id: int
    weight: float


def pack(requests: Sequence[Request]) -> PackedBatch:
    """Packs the requests one after the other; every request becomes one segment.

    Raises DataError when a row id does not fit into the dropout rows.
    """
    parts, segments = [], []
    first_row = first_token = 0
    for request in requests:
        data, examples = request.data, np.asarray(request.examples, dtype=np.int64)
        part = _rows_of(data, examples)
        rows, tokens = len(part.lengths), len(part.ids)
        if request.first_row_id + rows > MAX_ROWS:
            raise DataError(
                f"task {data.name}: a step of more than {MAX_ROWS} rows cannot be packed (row ids reach "
                f"{request.first_row_id + rows}); use smaller batches"
            )
        part.dropout_row += np.repeat(
            np.arange(request.first_row_id, request.first_row_id + rows) * MAX_POSITIONS, part.lengths
        )
        parts.append(part)
        segments.append(make_segment(request, first_row=first_row, first_token=first_token, tokens=tokens))
        first_row, first_token = first_row + rows, first_token + tokens
    lengths = np.concatenate([part.lengths for part in parts]) if parts else np.zeros(0, dtype=np.int64)
    return PackedBatch(
        input_ids=_joined([part.ids for part in parts]),
        token_type_ids=_joined([part.types for part in parts]),
        position_ids=_joined([part.positions for part in parts]),
        dropout_row=_joined([part.dropout_row for part in parts]),
        cu_seqlens=_joined([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        max_seqlen=rounded_length(int(lengths.max(initial=1))),
        segments=tuple(segments),
    )


def distinct_rows(data: TaskData) -> tuple[TaskData, np.ndarray]:
    """The different rows of a table, each as an example of its own, and which of them each row is.

    Rows are the same where all of their tokens and token types are. The second is int64 [n * rows_per_example].
    """
    part = _rows_of(data, np.arange(len(data)))
    words = np.stack([part.ids, part.types], axis=1)
    ends = np.cumsum(part.lengths)
    numbers: dict[bytes, int] = {}
    first: list[int] = []
    which = np.empty(len(ends), dtype=np.int64)
    for row, (begin, end) in enumerate(zip((ends - part.lengths).tolist(), ends.tolist(), strict=True)):
        number = numbers.setdefault(words[begin:end].tobytes(), len(numbers))
        if number == len(first):
            first.append(row)
        which[row] = number
    return data.rows_apart(np.array(first, dtype=np.int64)), which


def word_ids(request: Request) -> np.ndarray:
    """The word ids int32 that the rows of a request hold, in their order."""
    return _rows_of(request.data, np.asarray(request.examples, dtype=np.int64)).ids


def make_segment(request: Request, *, first_row: int = 0, first_token: int = 0, tokens: int = 0) -> Segment:
    """The segment of a request whose rows and tokens begin at these places of a batch or cached features."""
    data, examples = request.data, np.asarray(request.examples, dtype=np.int64)
    weight = 0.0 if data.labels is None else request.weight
    return Segment(
        stream=data.name,
        task=data.task,
        rows=range(first_row, first_row + len(examples) * data.rows_per_example),
        tokens=range(first_token, first_token + tokens),
        examples=examples,
        ids=tuple([data.ids[example] for example in examples.tolist()]),
        labels=_labels(data, examples),
        weights=torch.full((len(examples),), weight, dtype=torch.float64),
        rows_per_example=data.rows_per_example,
    )


def rounded_length(length: int) -> int:
    """The length up to which kernels are specialised: 32, 64, 128, 256, 512, then multiples of 512."""
    if length > 512:
        return -(-length // 512) * 512
    return max(32, 1 << (length - 1).bit_length())


def plan_passes(
    step: Mapping[str, np.ndarray], datasets: Mapping[str, TaskData], max_tokens: int
) -> list[list[Request]]:
    """Splits the examples of one step (stream -> indices) into passes of at most `max_tokens` tokens.

    The passes are contiguous parts of the step in its order, as few as possible, and the largest is as small
    as that number of passes allows. Row ids count the rows of the whole step, and the weight of an example is
    1 / (examples of its stream in the whole step), so that the split changes neither the dropout masks nor the
    loss. Raises DataError when one example alone has more than `max_tokens` tokens.
    """
    return [shares[0] for shares in plan_shares(step, datasets, max_tokens, 1)]


def plan_shares(
    step: Mapping[str, np.ndarray], datasets: Mapping[str, TaskData], max_tokens: int, ranks: int
) -> list[list[list[Request]]]:
    """The passes of `plan_passes` for several ranks that make each pass together: pass -> rank -> requests.

    A pass is a contiguous part of the step, and of each of its streams every rank takes a contiguous part, in the order
    of the ranks; a rank may get none of a stream, or nothing at all. The ranks' tokens are as even as whole examples
    allow, and none has more than `max_tokens`. All ranks compute the same from the same arguments.
    """
    names = [name for name, examples in step.items() if len(examples)]
    if not names:
        return []
    lengths = np.concatenate([datasets[name].lengths[step[name]] for name in names])
    longest = int(lengths.max())
    if longest > max_tokens:
        _raise_too_long(step, datasets, names, int(lengths.argmax()), max_tokens)
    ends = np.cumsum(lengths)
    starts = np.concatenate([[0], np.cumsum([len(step[name]) for name in names])])
    capacity = ranks * max_tokens
    while True:
        bounds = _balanced_bounds(ends, longest, capacity)
        cuts = [_share_out(ends, starts, low, high, ranks) for low, high in pairwise(bounds)]
        if capacity == max_tokens or _largest_share(ends, cuts) <= max_tokens:
            break
        capacity = max(max_tokens, capacity - longest)  # shares are even but for a part of an example

    counts = [len(step[name]) for name in names]
    rows = [datasets[name].rows_per_example for name in names]
    first_rows = np.concatenate([[0], np.cumsum([c * r for c, r in zip(counts, rows, strict=True)])]).tolist()
    begins = starts.tolist()
    passes = []
    for cut in cuts:
        shares: list[list[Request]] = []
        for rank in range(ranks):
            requests = []
            for k, name in enumerate(names):
                low, high = int(cut[k, rank]) - begins[k], int(cut[k, rank + 1]) - begins[k]
                if low < high:
                    examples = np.asarray(step[name], dtype=np.int64)[low:high]
                    first_row = first_rows[k] + low * rows[k]
                    requests.append(Request(datasets[name], examples, first_row, 1.0 / counts[k]))
            shares.append(requests)
        passes.append(shares)
    return passes


def _share_out(ends: np.ndarray, starts: np.ndarray, low: int, high: int, ranks: int) -> np.ndarray:
    """Bounds int64 [streams, ranks + 1] of the ranks' parts of each stream, in the pass of the examples low : high.

    ends: tokens up to the end of each example of the step. starts: the first example of each stream, and their number.
    Of the streams up to any one, the first r ranks have r / ranks of the tokens, to the nearest example: what a stream
    leaves uneven the next one evens out.
    """
    begins, stops = np.clip(starts[:-1], low, high), np.clip(starts[1:], low, high)
    cuts = np.empty((len(begins), ranks + 1), dtype=np.int64)
    cuts[:, 0], cuts[:, -1] = begins, stops
    if ranks == 1:
        return cuts
    before = np.concatenate([[0], ends])  # tokens before each example
    parts = np.arange(1, ranks) / ranks
    given = np.zeros(ranks - 1)
    for k, (begin, stop) in enumerate(zip(begins.tolist(), stops.tolist(), strict=True)):
        wanted = parts * (before[stop] - before[low]) - given + before[begin]
        right = np.searchsorted(before, wanted).clip(begin, stop)
        left = np.maximum(right - 1, begin)
        nearest = np.where(before[right] - wanted < wanted - before[left], right, left)
        cuts[k, 1:-1] = np.maximum.accumulate(nearest)
        given += before[cuts[k, 1:-1]] - before[begin]
    return cuts


def _largest_share(ends: np.ndarray, cuts: Sequence[np.ndarray]) -> int:
    """The most tokens that a rank has in a pass."""
    before = np.concatenate([[0], ends])
    return max(int(np.diff(before[cut], axis=1).sum(axis=0).max()) for cut in cuts)


def _balanced_bounds(ends: np.ndarray, longest: int, max_tokens: int) -> list[int]:
    """Bounds of the fewest contiguous parts of at most `max_tokens`, with the smallest largest part."""
    best = _greedy_bounds(ends, max_tokens)
    low, high = max(longest, -(-int(ends[-1]) // (len(best) - 1))), max_tokens
    while low < high:
        middle = (low + high) // 2
        bounds = _greedy_bounds(ends, middle)
        if len(bounds) > len(best):
            low = middle + 1
        else:
            best, high = bounds, middle
    return best


def _greedy_bounds(ends: np.ndarray, capacity: int) -> list[int]:
    bounds, done = [0], 0
    while bounds[-1] < len(ends):
        bounds.append(int(np.searchsorted(ends, done + capacity, side="right")))
        done = int(ends[bounds[-1] - 1])
    return bounds


def _raise_too_long(
    step: Mapping[str, np.ndarray],
    datasets: Mapping[str, TaskData],
    names: list[str],
    place: int,
    max_tokens: int,
) -> None:
    for name in names:
        if place < len(step[name]):
            data, example = datasets[name], int(step[name][place])
            raise DataError(
                f"{data.table.place(example)}: the example takes "
                f"{data.lengths[example]} tokens, more than the {max_tokens} of one pass; "
                "raise the token budget or lower the task's max_length"
            )
        place -= len(step[name])


@dataclass(eq=False)
class _Rows:
    """The rows of one request, concatenated; `dropout_row` starts as the positions."""

    lengths: np.ndarray
    ids: np.ndarray
    types: np.ndarray
    positions: np.ndarray
    dropout_row: np.ndarray


def _rows_of(data: TaskData, examples: np.ndarray) -> _Rows:
    sizes = data.sizes[examples]
    lengths = sizes.sum(axis=1) + 3 if data.form == "cross" else sizes.reshape(-1) + 2
    ends = np.cumsum(lengths)
    begins = ends - lengths
    total = int(ends[-1]) if len(ends) else 0

    ids = np.empty(total, dtype=np.int32)
    ids[begins] = data.cls_id
    ids[ends - 1] = data.sep_id
    types = np.zeros(total, dtype=np.int32)
    if data.form == "cross":
        middles = begins + 1 + sizes[:, 0]
        ids[middles] = data.sep_id
        targets = np.stack([begins + 1, middles + 1], axis=1).reshape(-1)
        # Type 1 begins after the middle [SEP] of a row and ends with the row: the sum of +1 and -1 marks.
        marks = np.zeros(total + 1, dtype=np.int32)
        marks[middles + 1] = 1
        marks[ends] -= 1
        np.cumsum(marks[:-1], out=types)
    else:
        targets = begins + 1

    sizes = sizes.reshape(-1)
    within = _counts_from_zero(sizes)
    sources = np.repeat(data.starts[examples].reshape(-1), sizes) + within
    skips = data.skips[examples].reshape(-1)
    if skips.any():
        heads = data.heads[examples].reshape(-1)
        sources += np.where(within >= np.repeat(heads, sizes), np.repeat(skips, sizes), 0)
    ids[np.repeat(targets, sizes) + within] = data.tokens[sources]

    positions = _counts_from_zero(lengths)
    return _Rows(lengths, ids, types, positions, positions.copy())


def _counts_from_zero(sizes: np.ndarray) -> np.ndarray:
    """0 .. size - 1 for every size, concatenated (int64)."""
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes, sizes)


def _labels(data: TaskData, examples: np.ndarray) -> Tensor:
    if data.labels is None:
        return torch.zeros(len(examples), dtype=torch.int64)
    return torch.from_numpy(data.labels[examples])


def _joined(parts: list[np.ndarray]) -> Tensor:
    if not parts:
        return torch.zeros(0, dtype=torch.int32)
    return torch.from_numpy(np.concatenate(parts).astype(np.int32, copy=False))
