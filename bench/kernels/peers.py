"""What each kernel is compared with: the ways in which a user of PyTorch would compute the same.

A peer gets tensors of its own in the layout and dtype that suit it best, so that no conversion is counted against it:
parameters in the dtype of the activations, padded rows where it wants padding. Dropout is PyTorch's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernels.calls import EPS, Call

Parts = tuple[Callable[[], Tensor], list[Tensor], Tensor]
"""The forward pass, what has a gradient, and the gradient of the output."""

EAGER, COMPILED = "eager", "torch.compile"
VARLEN, VARLEN_PUBLIC = "flash, packed rows", "torch.nn.attention.varlen, no dropout"
GPU = ("cuda",)
MASKED = ("memory-efficient, padded, masked", "cuDNN, padded, masked")
NESTED = ("flash, nested", "memory-efficient, nested", "cuDNN, nested")
UNMASKED = "flash, padded, unmasked"
LAYER = "torch.nn.TransformerEncoderLayer, padded"


@dataclass(frozen=True)
class Peer:
    """One way to compute what a call computes."""

    name: str
    build: Callable[[Call], Parts]
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where it is measured: some do not exist on a CPU, or compile for minutes there; plain attention over long padded
    rows is of no interest on a GPU."""

    def call(self, call: Call) -> Call:
        """The same operation, computed so."""
        forward, leaves, gradient = self.build(call)
        return Call(call.operation, call.setting, {}, forward, leaves, gradient)


def _leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Beyond the limit (for each size, encoder, forward alone) it would silently run eagerly.
    torch._dynamo.config.recompile_limit = 64
    # Each size gets code of its own, the best that the compiler can do: after a second size it would make code for any.
    return torch.compile(function, dynamic=False)


def _elementwise(
    function: Callable[..., Tensor], names: Sequence[str], *, compiled: bool = False
) -> Callable[[Call], Parts]:
    """A peer that applies `function` to copies of the call's tensors and p, all of them in one dtype."""

    def build(call: Call) -> Parts:
        leaves = [_leaf(call.tensors[name], call.setting.dtype) for name in names]
        run, p = _compile(function) if compiled else function, call.setting.p
        return lambda: run(*leaves, p), leaves, call.gradient

    return build


def _pair(function: Callable[..., Tensor], names: Sequence[str]) -> tuple[Peer, Peer]:
    return (
        Peer(EAGER, _elementwise(function, names)),
        Peer(COMPILED, _elementwise(function, names, compiled=True), GPU),
    )


def _eager_and_compiled(build: Callable[[bool], Callable[[Call], Parts]]) -> tuple[Peer, Peer]:
    return Peer(EAGER, build(False)), Peer(COMPILED, build(True), GPU)


def _layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, linear_bias: Tensor, p: float
) -> Tensor:
    return F.layer_norm(residual + F.dropout(x + linear_bias, p), weight.shape, weight, bias, EPS)


def _bias_gelu(x: Tensor, bias: Tensor, p: float) -> Tensor:
    return F.gelu(x + bias)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _dropout(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p)


def _embedding(compiled: bool) -> Callable[[Call], Parts]:
    """Tables in their own dtype, as in mtbert: a table that is trained stays in float32."""

    def compute(
        words: Tensor,
        position_table: Tensor,
        types: Tensor,
        weight: Tensor,
        bias: Tensor,
        indices: tuple[Tensor, Tensor, Tensor],
        p: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ids, positions, type_ids = indices
        total = (
            F.embedding(ids, words) + F.embedding(positions, position_table) + F.embedding(type_ids, types)
        )
        return F.dropout(F.layer_norm(total, weight.shape, weight, bias, EPS).to(dtype), p)

    def build(call: Call) -> Parts:
        t, setting = call.tensors, call.setting
        leaves = [_leaf(t[name]) for name in ("words", "position_table", "types", "weight", "bias")]
        run = _compile(compute) if compiled else compute
        indices = (t["ids"], t["positions"], t["type_ids"])
        return lambda: run(*leaves, indices, setting.p, setting.dtype), leaves, call.gradient

    return build


def _softmax(compiled: bool) -> Callable[[Call], Parts]:
    """The mask is ready, as a padded batch makes it once for all layers."""

    def compute(x: Tensor, outside: Tensor, p: float) -> Tensor:
        return F.dropout(x.masked_fill(outside, -float("inf")).softmax(-1), p)

    def build(call: Call) -> Parts:
        x, lengths = _leaf(call.tensors["x"]), call.tensors["lengths"]
        outside = torch.arange(x.shape[1], device=x.device)[None, :] >= lengths[:, None]
        run = _compile(compute) if compiled else compute
        return lambda: run(x, outside, call.setting.p), [x], call.gradient

    return build


def _packed(call: Call) -> tuple[list[Tensor], Tensor, int]:
    """q, k, v as leaves [T, H, D], the rows' bounds and the longest row."""
    t = call.tensors
    return [_leaf(part) for part in t["qkv"].unbind(1)], t["cu_seqlens"], max(call.setting.lengths)


def _flash_varlen(call: Call) -> Parts:
    """The operator beneath PyTorch's nested tensors: packed rows, with dropout."""
    leaves, bounds, longest = _packed(call)
    flash: Any = torch.ops.aten._flash_attention_forward
    p, scale = call.setting.p, call.facts["scale"]

    def forward() -> Tensor:
        return flash(*leaves, bounds, bounds, longest, longest, p, False, False, scale=scale)[0]

    return forward, leaves, call.gradient


def _first_tokens(call: Call) -> list[Tensor]:
    """Queries [N, H, D], keys and values [T, H, D] as leaves."""
    return [_leaf(call.tensors["query"]), *(_leaf(part) for part in call.tensors["key_value"].unbind(1))]


def _flash_varlen_first_tokens(call: Call) -> Parts:
    """`_flash_varlen` with one query a row."""
    leaves, bounds = _first_tokens(call), call.tensors["cu_seqlens"]
    queries = torch.arange(bounds.shape[0], dtype=torch.int32, device=bounds.device)
    flash: Any = torch.ops.aten._flash_attention_forward
    p, scale, longest = call.setting.p, call.facts["scale"], max(call.setting.lengths)

    def forward() -> Tensor:
        return flash(*leaves, queries, bounds, 1, longest, p, False, False, scale=scale)[0]

    return forward, leaves, call.gradient


def _public_varlen(call: Call) -> Parts:
    """torch.nn.attention.varlen, which has no dropout: less work than the others do. Its scale is the usual one."""
    leaves, bounds, longest = _packed(call)
    varlen: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def forward() -> Tensor:
        return varlen(*leaves, bounds, bounds, longest, longest)

    return forward, leaves, call.gradient


def _nested(backend: SDPBackend) -> Callable[[Call], Parts]:
    """Nested tensors of the jagged layout."""

    def build(call: Call) -> Parts:
        leaves, bounds, longest = _packed(call)
        offsets, shortest = bounds.long(), min(call.setting.lengths)

        def forward() -> Tensor:
            q, k, v = (
                torch.nested.nested_tensor_from_jagged(
                    leaf, offsets, min_seqlen=shortest, max_seqlen=longest
                ).transpose(1, 2)
                for leaf in leaves
            )
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q, k, v, dropout_p=call.setting.p, scale=call.facts["scale"]
                )
            return out.transpose(1, 2).values()

        return forward, leaves, call.gradient

    return build


def _inside(lengths: Tensor) -> Tensor:
    """Which places of the padded rows hold tokens, bool [N, longest]."""
    longest = int(lengths.max())
    return torch.arange(longest, device=lengths.device)[None, :] < lengths[:, None]


def _pad(packed: Tensor, lengths: Tensor) -> Tensor:
    """Packed rows [T, ...] as [N, longest, ...]; the padding is zero."""
    inside = _inside(lengths)
    padded = packed.new_zeros(*inside.shape, *packed.shape[1:])
    padded[inside] = packed
    return padded


def _padded(backend: SDPBackend, *, masked: bool = True) -> Callable[[Call], Parts]:
    """All rows padded to the longest, from the start: padding them is not counted.

    masked=False attends to the padding too. That is not what is wanted, but no masked form can be faster.
    """

    def build(call: Call) -> Parts:
        setting, lengths = call.setting, call.tensors["lengths"]
        leaves = [_pad(part.detach(), lengths).requires_grad_() for part in call.tensors["qkv"].unbind(1)]
        gradient = _pad(call.gradient, lengths)
        mask = _inside(lengths)[:, None, None, :] if masked else None

        def forward() -> Tensor:
            q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=setting.p, scale=call.facts["scale"]
                )
            return out.transpose(1, 2)

        return forward, leaves, gradient

    return build


def _padded_first_tokens(backend: SDPBackend) -> Callable[[Call], Parts]:
    """Keys and values padded to the longest row, from the start, and masked."""

    def build(call: Call) -> Parts:
        lengths = call.tensors["lengths"]
        query, *others = _first_tokens(call)
        leaves = [query, *(_pad(other.detach(), lengths).requires_grad_() for other in others)]
        mask = _inside(lengths)[:, None, None, :]

        def forward() -> Tensor:
            q, k, v = leaves
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q[:, :, None],
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    attn_mask=mask,
                    dropout_p=call.setting.p,
                    scale=call.facts["scale"],
                )
            return out[:, :, 0]

        return forward, leaves, call.gradient

    return build


def _encoder_layer(call: Call) -> Parts:
    """torch's own encoder layer (post-LayerNorm, exact GELU) on rows padded to the longest, under autocast."""
    setting, encoder = call.setting, call.setting.encoder
    layer = nn.TransformerEncoderLayer(
        encoder.width,
        encoder.heads,
        encoder.inner,
        dropout=setting.p,
        activation=F.gelu,
        layer_norm_eps=EPS,
        batch_first=True,
        device=setting.device,
    )
    lengths = call.tensors["lengths"]
    x = _pad(call.leaves[0].detach(), lengths).requires_grad_()
    outside = ~_inside(lengths)
    gradient = _pad(call.gradient, lengths).float()
    leaves = [x, *layer.parameters()]

    def forward() -> Tensor:
        half = setting.dtype != torch.float32
        with torch.autocast(x.device.type, setting.dtype, enabled=half, cache_enabled=False):
            return layer(x, src_key_padding_mask=outside).float()

    return forward, leaves, gradient


PEERS: dict[str, tuple[Peer, ...]] = {
    "attention": (
        Peer(EAGER, _padded(SDPBackend.MATH), ("cpu",)),
        Peer(VARLEN, _flash_varlen, GPU),
        Peer(VARLEN_PUBLIC, _public_varlen, GPU),
        Peer(MASKED[0], _padded(SDPBackend.EFFICIENT_ATTENTION), GPU),
        Peer(MASKED[1], _padded(SDPBackend.CUDNN_ATTENTION), GPU),
        Peer(UNMASKED, _padded(SDPBackend.FLASH_ATTENTION, masked=False), GPU),
        Peer(NESTED[0], _nested(SDPBackend.FLASH_ATTENTION), GPU),
        Peer(NESTED[1], _nested(SDPBackend.EFFICIENT_ATTENTION), GPU),
        Peer(NESTED[2], _nested(SDPBackend.CUDNN_ATTENTION), GPU),
    ),
    "first_token_attention": (
        Peer(EAGER, _padded_first_tokens(SDPBackend.MATH)),
        Peer(VARLEN, _flash_varlen_first_tokens, GPU),
        Peer(MASKED[0], _padded_first_tokens(SDPBackend.EFFICIENT_ATTENTION), GPU),
    ),
    "softmax": _eager_and_compiled(_softmax),
    "add_layer_norm": _pair(_layer_norm, ("x", "residual", "weight", "bias", "linear_bias")),
    "bias_gelu": _pair(_bias_gelu, ("x", "bias")),
    "linear_bias_gelu": _pair(_linear_gelu, ("x", "weight", "bias")),
    "embedding": _eager_and_compiled(_embedding),
    "dropout": (Peer(EAGER, _elementwise(_dropout, ("x",))),),
    "encoder_layer": (Peer(LAYER, _encoder_layer),),
}
"""By operation."""
