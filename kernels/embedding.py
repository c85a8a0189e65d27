"""Embeddings: three look-ups, their sum, LayerNorm and dropout in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtbert.ranges import operation

from . import dispatch, extension, reference
from .checks import FLOATS, check_dropout, check_parameter, check_tensor, fail
from .grouped import deliver, part, row, split
from .philox import Dropout
from .segments import Segments


@operation("embedding")
def embedding(
    ids: Tensor,
    type_ids: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    dropout_row: Tensor | None = None,
    dropout: Dropout | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[positions] + token_type[type_ids])), statistics in float32.

    ids, type_ids, positions: int32 [T]; tables: word [V, C], position [P, C], token_type [S, C], of one floating dtype;
    weight, bias: [C]. dtype: that of the result [T, C]. Gradients are dense and come back in the parameters' dtypes;
    none is computed for a frozen one. segments: groups of the T tokens; a parameter's companion gets one gradient a
    group instead of the parameter; that of the word table is by slot where the segments have slots. Raises ValueError
    naming the argument that does not fit; an index outside its table raises ValueError on a CPU (a slot: in the
    backward pass). A GPU cannot raise: there the Triton kernel reads nothing outside a table and makes the token's
    result NaN, and with it the gradients that it takes part in; a token whose slot is outside adds to no slot.
    """
    name = "embedding"
    words, position_table, types = tables
    check_tensor(name, "ids", ids, (None,), dtypes=(torch.int32,))
    slots = None if segments is None else segments.slots
    for argument, index in (("type_ids", type_ids), ("positions", positions), ("segments.slots", slots)):
        if index is not None:
            check_tensor(name, argument, index, tuple(ids.shape), dtypes=(torch.int32,), device=ids.device)
    word_name, position_name, type_name = "tables[0] (word)", "tables[1] (position)", "tables[2] (token_type)"
    check_parameter(name, word_name, words, (None, None), ids)
    for argument, table in ((position_name, position_table), (type_name, types)):
        check_tensor(name, argument, table, (None, words.shape[1]), dtypes=(words.dtype,), device=ids.device)
    check_parameter(name, "weight", weight, (words.shape[1],), ids)
    check_parameter(name, "bias", bias, (words.shape[1],), ids)
    if dtype not in FLOATS:
        fail(name, "dtype", "a floating dtype", dtype)
    active = check_dropout(name, dropout_row, dropout, ids)
    named = dict(
        zip((word_name, position_name, type_name, "weight", "bias"), (*tables, weight, bias), strict=True)
    )
    groups, parameters, companions = split(name, segments, ids.shape[0], named, slotted=word_name)
    implementation, _ = dispatch.select(
        name,
        device=ids.device.type,
        dtype=dtype,
        table_dtype=words.dtype,
        width=words.shape[1],
        types=types.shape[0],
    )
    if implementation == "cpu":
        rows = None if active is None else dropout_row
        slots = slots if companions[0] is not None else None
        options = (eps, dtype, rows, active, groups, slots)
        return _EmbeddingCpu.apply(ids, type_ids, positions, *options, *parameters, *companions)
    if implementation == "triton":
        from .triton_ops.embedding import embedding as fused

        rows = None if active is None else dropout_row
        return fused(ids, type_ids, positions, parameters, companions, segments, eps, dtype, rows, active)
    return reference.embedding(
        ids,
        type_ids,
        positions,
        tables,
        weight,
        bias,
        eps=eps,
        dtype=dtype,
        dropout_row=dropout_row,
        dropout=active,
        segments=segments,
    )


class _EmbeddingCpu(torch.autograd.Function):
    """Saves the indices and two numbers a token; the sums are looked up again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        type_ids: Tensor,
        positions: Tensor,
        eps: float,
        dtype: torch.dtype,
        dropout_row: Tensor | None,
        dropout: Dropout | None,
        groups: list[slice],
        slots: Tensor | None,
        words: Tensor,
        position_table: Tensor,
        types: Tensor,
        weight: Tensor,
        bias: Tensor,
        *companions: Tensor | None,
    ) -> Tensor:
        out = torch.empty(ids.shape[0], words.shape[1], dtype=dtype)
        mean, rstd = torch.empty(2, ids.shape[0])
        tables = (words, position_table, types)
        weight32 = weight.float()
        bias32 = bias.float()
        by_token = (ids, type_ids, positions, mean, rstd, dropout_row)
        extension.cpu().embedding_forward(
            bias=bias32.data_ptr(),
            out=out.data_ptr(),
            eps=eps,
            **_arguments(by_token, tables, weight32, dtype, dropout),
        )
        ctx.save_for_backward(*by_token, slots, *tables, weight)
        ctx.dropout, ctx.groups = dropout, groups
        ctx.dtypes = [p.dtype for p in (*tables, weight, bias)]
        ctx.companion_shapes = [None if c is None else c.shape for c in companions]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *by_token, slots, words, position_table, types, weight = ctx.saved_tensors
        tables, groups = (words, position_table, types), ctx.groups
        need_parameters, need_companions = ctx.needs_input_grad[9:14], ctx.needs_input_grad[14:]
        grad = grad.contiguous()
        # The extension adds to the tables' gradients: those of all groups may be one.
        shapes = [
            shape if need else (1, *table.shape)
            for table, shape, need in zip(tables, ctx.companion_shapes, need_companions, strict=False)
        ]
        shapes += [(len(groups), weight.shape[0])] * 2
        sums = [
            torch.zeros(shape) if any(needs) else None
            for shape, *needs in zip(shapes, need_parameters, need_companions, strict=True)
        ]
        weight32 = weight.float()
        for number, rows in enumerate(groups):
            dwords, dposition_table, dtypes, dweight, dbias = (
                extension.pointer(row(s, 0 if s is None or len(s) == 1 else number)) for s in sums
            )
            extension.cpu().embedding_backward(
                dout=part(grad, rows).data_ptr(),
                word_slots=extension.pointer(part(slots, rows)),
                slot_rows=0 if slots is None else shapes[0][1],
                dwords=dwords,
                dposition_table=dposition_table,
                dtypes=dtypes,
                dweight=dweight,
                dbias=dbias,
                **_arguments(
                    tuple(part(t, rows) for t in by_token),
                    tables,
                    weight32,
                    grad.dtype,
                    ctx.dropout,
                ),
            )
        sums = [None if s is None else s.to(dtype) for s, dtype in zip(sums, ctx.dtypes, strict=True)]
        return (*(None for _ in range(9)), *deliver(sums, need_parameters, need_companions))


def _arguments(
    by_token: tuple[Tensor | None, ...],
    tables: tuple[Tensor, ...],
    weight: Tensor,
    dtype: torch.dtype,
    dropout: Dropout | None,
) -> dict[str, Any]:
    """by_token: ids, type_ids, positions, mean, rstd, dropout_row (None: nothing is dropped)."""
    ids, type_ids, positions, mean, rstd, dropout_row = by_token
    assert ids is not None
    words, position_table, types = tables
    return {
        "ids": ids.data_ptr(),
        "type_ids": extension.pointer(type_ids),
        "positions": extension.pointer(positions),
        "words": words.data_ptr(),
        "position_table": position_table.data_ptr(),
        "types": types.data_ptr(),
        "word_rows": words.shape[0],
        "position_rows": position_table.shape[0],
        "type_rows": types.shape[0],
        "weight": weight.data_ptr(),
        "mean": extension.pointer(mean),
        "rstd": extension.pointer(rstd),
        "rows": ids.shape[0],
        "columns": words.shape[1],
        "dtype": extension.DTYPE_NAMES[dtype],
        "table_dtype": extension.DTYPE_NAMES[words.dtype],
        "threads": torch.get_num_threads(),
        **extension.dropout_arguments(dropout_row, dropout),
    }
