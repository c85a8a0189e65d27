"""Calls of mtbert's operations, forward and backward, at given sizes: what the report compiles and the bench times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.kernels.shapes import Encoder
from mtbert import kernels
from mtbert.kernels import Dropout, Segments
from mtbert.kernels.segments import companion
from mtbert.model.bert import BertConfig, BertLayer, initialise
from mtbert.model.context import ForwardContext
from mtbert.model.dropout import DropoutRates, DropoutStream

EPS = 1e-12


@dataclass(frozen=True)
class Setting:
    """Everything about a call but its data."""

    encoder: Encoder
    lengths: tuple[int, ...]
    """Of the rows: N rows of T tokens together."""
    max_seqlen: int
    dtype: torch.dtype = torch.bfloat16
    p: float = 0.1
    device: str = "cpu"
    groups: int = 0
    """Parts of the tokens whose gradients are wanted apart; 0: none are."""
    slots: bool = False
    """Whether the word table's gradient of a group holds only the words of the batch."""
    parameters: torch.dtype = torch.float32
    trained: bool = True
    """Whether the parameters are."""
    seed: int = 2**40 + 5
    step: int = 7
    step_on_device: bool = False
    random: bool = True
    """False: tensors hold whatever their memory held, for calls that are only recorded."""

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)


@dataclass
class Call:
    """One operation on its inputs, ready to run again and again."""

    operation: str
    setting: Setting
    tensors: dict[str, Tensor]
    """The inputs by name, so that others can compute the same from them."""
    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    """What has a gradient."""
    gradient: Tensor
    """That of the output."""
    facts: dict[str, Any] = field(default_factory=dict)

    def both(self) -> None:
        """Forward and, where anything has a gradient, backward; the gradients are thrown away."""
        out = self.forward()
        if self.leaves:
            torch.autograd.grad(out, self.leaves, self.gradient)


class _Inputs:
    """Makes the tensors of a setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        device = setting.device
        if setting.random:
            torch.manual_seed(0)
        lengths = np.asarray(setting.lengths, dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        position = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
        row = np.repeat(np.arange(len(lengths)), lengths)
        self.cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        self.positions = torch.tensor(position, dtype=torch.int32, device=device)
        self.dropout_row = torch.tensor(row * 4096 + position, dtype=torch.int32, device=device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)

    def dropout(self, site: int = 1) -> Dropout | None:
        s = self.setting
        if s.p == 0.0:
            return None
        step: int | Tensor = torch.tensor(s.step, device=s.device) if s.step_on_device else s.step
        return Dropout(s.p, s.seed, step, site)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        s = self.setting
        made = torch.empty(shape, dtype=dtype or s.dtype, device=s.device)
        return made.normal_(0.0, scale) if s.random else made

    def activations(self, *shape: int) -> Tensor:
        return self.tensor(self.setting.tokens, *shape).requires_grad_()

    def parameter(self, *shape: int, scale: float = 0.1) -> Tensor:
        s = self.setting
        return self.tensor(*shape, dtype=s.parameters, scale=scale).requires_grad_(s.trained)

    def indices(self, below: int) -> Tensor:
        """int32 [T], as unequally frequent as the words of a text: number k has a share of about 1 / k."""
        s = self.setting
        uniform = np.random.default_rng(0).uniform(0.0, np.log(below + 1), size=s.tokens)
        drawn = np.minimum(np.exp(uniform).astype(np.int64), below) - 1
        return torch.tensor(drawn, dtype=torch.int32, device=s.device)

    def segments(self, parameters: Sequence[Tensor], ids: Tensor | None = None) -> Segments | None:
        """Groups of nearly equal numbers of tokens. ids: those of the words, whose table is the first parameter."""
        s = self.setting
        if not s.groups:
            return None
        bounds = tuple(round(k * s.tokens / s.groups) for k in range(s.groups + 1))
        companions = {p: companion(p, s.groups) for p in parameters}
        if ids is None or not s.slots:
            return Segments(bounds, companions)
        used, slots = torch.unique(ids, return_inverse=True)
        companions[parameters[0]] = companion(parameters[0][: len(used)].detach(), s.groups)
        return Segments(bounds, companions, slots.to(torch.int32))

    def leaves(
        self, activations: Sequence[Tensor], parameters: Sequence[Tensor], segments: Segments | None
    ) -> list[Tensor]:
        """What has a gradient: activations, and parameters or their companions."""
        trained = [p for p in parameters if p.requires_grad]
        return [*activations, *(p if segments is None else segments.companions[p] for p in trained)]


def dropout(setting: Setting) -> Call:
    """Dropout of hidden states."""
    make = _Inputs(setting)
    x, mask = make.activations(setting.encoder.width), make.dropout()
    gradient = make.tensor(*x.shape)
    tensors = {"x": x, "dropout_row": make.dropout_row}
    return Call(
        "dropout", setting, tensors, lambda: kernels.dropout(x, make.dropout_row, mask), [x], gradient
    )


def attention(setting: Setting) -> Call:
    """Attention within the rows."""
    make, encoder = _Inputs(setting), setting.encoder
    qkv, mask = make.activations(3, encoder.heads, encoder.head_dim), make.dropout()
    scale = encoder.head_dim**-0.5

    def forward() -> Tensor:
        return kernels.attention(
            qkv,
            make.cu_seqlens,
            setting.max_seqlen,
            scale=scale,
            dropout_row=make.dropout_row,
            dropout=mask,
        )

    tensors = {"qkv": qkv, "cu_seqlens": make.cu_seqlens, "lengths": make.lengths}
    gradient = make.tensor(setting.tokens, encoder.heads, encoder.head_dim)
    return Call("attention", setting, tensors, forward, [qkv], gradient, {"scale": scale})


def first_token_attention(setting: Setting) -> Call:
    """Attention of the rows' first tokens."""
    make, encoder = _Inputs(setting), setting.encoder
    shape = (encoder.heads, encoder.head_dim)
    query = make.tensor(len(setting.lengths), *shape).requires_grad_()
    key_value, mask = make.activations(2, *shape), make.dropout()
    scale = encoder.head_dim**-0.5
    dropout_row = torch.arange(len(setting.lengths), dtype=torch.int32, device=setting.device) * 4096

    def forward() -> Tensor:
        return kernels.first_token_attention(
            query,
            key_value,
            make.cu_seqlens,
            setting.max_seqlen,
            scale=scale,
            dropout_row=dropout_row,
            dropout=mask,
        )

    tensors = {"query": query, "key_value": key_value, "cu_seqlens": make.cu_seqlens, "lengths": make.lengths}
    gradient, leaves = make.tensor(*query.shape), [query, key_value]
    return Call("first_token_attention", setting, tensors, forward, leaves, gradient, {"scale": scale})


def softmax(setting: Setting) -> Call:
    """The padded path's probabilities: a row of scores for every head and token, masked to its row's length."""
    make = _Inputs(setting)
    heads, wide = setting.encoder.heads, setting.max_seqlen
    x, mask = make.tensor(setting.tokens * heads, wide).requires_grad_(), make.dropout()
    lengths = torch.repeat_interleave(make.lengths, make.lengths * heads)
    dropout_row = torch.repeat_interleave(make.dropout_row, heads)
    gradient = make.tensor(*x.shape)

    def forward() -> Tensor:
        return kernels.softmax(x, lengths=lengths, dropout_row=dropout_row, dropout=mask)

    return Call("softmax", setting, {"x": x, "lengths": lengths}, forward, [x], gradient)


def add_layer_norm(setting: Setting) -> Call:
    """The end of a sub-layer."""
    make, width = _Inputs(setting), setting.encoder.width
    x, residual, mask = make.activations(width), make.activations(width), make.dropout()
    weight, bias, linear_bias = parameters = [make.parameter(width) for _ in range(3)]
    segments = make.segments(parameters)

    def forward() -> Tensor:
        return kernels.add_layer_norm(
            x,
            residual,
            weight,
            bias,
            linear_bias=linear_bias,
            eps=EPS,
            dropout_row=make.dropout_row,
            dropout=mask,
            segments=segments,
        )

    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias, "linear_bias": linear_bias}
    gradient = make.tensor(*x.shape)
    leaves = make.leaves([x, residual], parameters, segments)
    return Call("add_layer_norm", setting, tensors, forward, leaves, gradient)


def bias_gelu(setting: Setting) -> Call:
    """Bias and activation of the feed-forward part."""
    make, inner = _Inputs(setting), setting.encoder.inner
    x, bias = make.activations(inner), make.parameter(inner)
    segments = make.segments([bias])
    gradient = make.tensor(*x.shape)
    leaves = make.leaves([x], [bias], segments)

    def forward() -> Tensor:
        return kernels.bias_gelu(x, bias, segments=segments)

    return Call("bias_gelu", setting, {"x": x, "bias": bias}, forward, leaves, gradient)


def linear_bias_gelu(setting: Setting) -> Call:
    """The same with the product that comes before it, weights in the dtype of the activations."""
    make, encoder = _Inputs(setting), setting.encoder
    x = make.activations(encoder.width)
    weight = make.tensor(encoder.inner, encoder.width, scale=0.02).requires_grad_(setting.trained)
    bias = make.tensor(encoder.inner, scale=0.1).requires_grad_(setting.trained)
    gradient = make.tensor(setting.tokens, encoder.inner)

    def forward() -> Tensor:
        return kernels.bias_gelu(kernels.linear(x, weight, None), bias)

    tensors = {"x": x, "weight": weight, "bias": bias}
    leaves = make.leaves([x], [weight, bias], None)
    return Call("linear_bias_gelu", setting, tensors, forward, leaves, gradient)


def embedding(setting: Setting) -> Call:
    """Look-ups, LayerNorm and dropout."""
    make, encoder = _Inputs(setting), setting.encoder
    ids, type_ids = make.indices(encoder.vocabulary), make.indices(encoder.types)
    tables = tuple(
        make.parameter(rows, encoder.width, scale=0.02)
        for rows in (encoder.vocabulary, encoder.positions, encoder.types)
    )
    weight, bias, mask = make.parameter(encoder.width), make.parameter(encoder.width), make.dropout()
    parameters = [*tables, weight, bias]
    segments = make.segments(parameters, ids)

    def forward() -> Tensor:
        return kernels.embedding(
            ids,
            type_ids,
            make.positions,
            tables,
            weight,
            bias,
            eps=EPS,
            dtype=setting.dtype,
            dropout_row=make.dropout_row,
            dropout=mask,
            segments=segments,
        )

    tensors = {
        "ids": ids,
        "type_ids": type_ids,
        "positions": make.positions,
        **dict(zip(("words", "position_table", "types"), tables, strict=True)),
        "weight": weight,
        "bias": bias,
    }
    gradient = make.tensor(setting.tokens, encoder.width)
    facts = {"words": int(torch.unique(ids).numel())}
    return Call(
        "embedding", setting, tensors, forward, make.leaves([], parameters, segments), gradient, facts
    )


def encoder_layer(setting: Setting) -> Call:
    """A whole layer, parameters in float32 as a trainer keeps them."""
    make, encoder = _Inputs(setting), setting.encoder
    config = BertConfig(
        hidden_size=encoder.width, num_attention_heads=encoder.heads, intermediate_size=encoder.inner
    )
    layer = BertLayer(config, 0).to(setting.device)
    for name, parameter in layer.named_parameters():
        initialise(parameter, "norm.weight" in name, config.initializer_range, None)
    ids = make.indices(encoder.vocabulary)
    batch = _Batch(ids, ids, make.positions, make.dropout_row, make.cu_seqlens, setting.max_seqlen)
    context = ForwardContext(batch, setting.dtype, DropoutStream(setting.seed, setting.step))
    rates = DropoutRates(setting.p, setting.p, setting.p)
    hidden = make.activations(encoder.width)
    return Call(
        "encoder_layer",
        setting,
        {"lengths": make.lengths},
        lambda: layer(hidden, context, rates),
        [hidden, *layer.parameters()],
        make.tensor(*hidden.shape),
    )


@dataclass(frozen=True)
class _Batch:
    """What an encoder layer reads of a packed batch."""

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    dropout_row: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


OPERATIONS: dict[str, Callable[[Setting], Call]] = {
    "dropout": dropout,
    "attention": attention,
    "first_token_attention": first_token_attention,
    "softmax": softmax,
    "add_layer_norm": add_layer_norm,
    "bias_gelu": bias_gelu,
    "embedding": embedding,
}
"""Those that have Triton kernels."""
