"""Embeddings: three look-ups, their sum, LayerNorm and dropout in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, extension, reference
from .checks import FLOATS, check_dropout, check_parameter, check_tensor, fail
from .philox import Dropout


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
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[positions] + token_type[type_ids])), statistics in float32.

    ids, type_ids, positions: int32 [T]; tables: word [V, C], position [P, C], token_type [S, C], of one floating dtype;
    weight, bias: [C]. dtype: that of the result [T, C]. Gradients are dense and come back in the parameters' dtypes;
    none is computed for a frozen one. Raises ValueError naming the argument that does not fit; an index outside its
    table raises ValueError on a CPU.
    """
    name = "embedding"
    words, position_table, types = tables
    check_tensor(name, "ids", ids, (None,), dtypes=(torch.int32,))
    check_tensor(name, "type_ids", type_ids, tuple(ids.shape), dtypes=(torch.int32,), device=ids.device)
    check_tensor(name, "positions", positions, tuple(ids.shape), dtypes=(torch.int32,), device=ids.device)
    check_parameter(name, "tables[0] (word)", words, (None, None), ids)
    for argument, table in (("tables[1] (position)", position_table), ("tables[2] (token_type)", types)):
        check_tensor(name, argument, table, (None, words.shape[1]), dtypes=(words.dtype,), device=ids.device)
    check_parameter(name, "weight", weight, (words.shape[1],), ids)
    check_parameter(name, "bias", bias, (words.shape[1],), ids)
    if dtype not in FLOATS:
        fail(name, "dtype", "a floating dtype", dtype)
    active = check_dropout(name, dropout_row, dropout, ids)
    implementation, _ = dispatch.select(name, device=ids.device.type, dtype=dtype, table_dtype=words.dtype)
    if implementation == "cpu":
        rows = None if active is None else dropout_row
        return _EmbeddingCpu.apply(
            ids, type_ids, positions, words, position_table, types, weight, bias, eps, dtype, rows, active
        )
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
    )


class _EmbeddingCpu(torch.autograd.Function):
    """Saves the indices and two numbers a token; the sums are looked up again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        type_ids: Tensor,
        positions: Tensor,
        words: Tensor,
        position_table: Tensor,
        types: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        dropout_row: Tensor | None,
        dropout: Dropout | None,
    ) -> Tensor:
        out = torch.empty(ids.shape[0], words.shape[1], dtype=dtype)
        mean, rstd = torch.empty(2, ids.shape[0])
        tables = (words, position_table, types)
        weight32 = weight.float()
        bias32 = bias.float()
        extension.cpu().embedding_forward(
            bias=bias32.data_ptr(),
            out=out.data_ptr(),
            eps=eps,
            **_arguments(ids, type_ids, positions, tables, weight32, mean, rstd, dtype, dropout_row, dropout),
        )
        ctx.save_for_backward(ids, type_ids, positions, *tables, weight, mean, rstd, dropout_row)
        ctx.dropout = dropout
        ctx.bias_dtype = bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, type_ids, positions, *tables, weight, mean, rstd, dropout_row = ctx.saved_tensors
        *_, need_weight, need_bias, _, _, _, _ = ctx.needs_input_grad
        need_tables = ctx.needs_input_grad[3:6]
        grad = grad.contiguous()
        dtables = [
            torch.zeros(table.shape) if need else None
            for table, need in zip(tables, need_tables, strict=True)
        ]
        dweight, dbias = (torch.empty(weight.shape[0]) if need else None for need in (need_weight, need_bias))
        weight32 = weight.float()
        extension.cpu().embedding_backward(
            dout=grad.data_ptr(),
            dwords=extension.pointer(dtables[0]),
            dposition_table=extension.pointer(dtables[1]),
            dtypes=extension.pointer(dtables[2]),
            dweight=extension.pointer(dweight),
            dbias=extension.pointer(dbias),
            **_arguments(
                ids,
                type_ids,
                positions,
                tuple(tables),
                weight32,
                mean,
                rstd,
                grad.dtype,
                dropout_row,
                ctx.dropout,
            ),
        )
        return (
            None,
            None,
            None,
            *(None if d is None else d.to(table.dtype) for d, table in zip(dtables, tables, strict=True)),
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(ctx.bias_dtype),
            None,
            None,
            None,
            None,
        )


def _arguments(
    ids: Tensor,
    type_ids: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, ...],
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
) -> dict[str, Any]:
    words, position_table, types = tables
    return {
        "ids": ids.data_ptr(),
        "type_ids": type_ids.data_ptr(),
        "positions": positions.data_ptr(),
        "words": words.data_ptr(),
        "position_table": position_table.data_ptr(),
        "types": types.data_ptr(),
        "word_rows": words.shape[0],
        "position_rows": position_table.shape[0],
        "type_rows": types.shape[0],
        "weight": weight.data_ptr(),
        "mean": mean.data_ptr(),
        "rstd": rstd.data_ptr(),
        "rows": ids.shape[0],
        "columns": words.shape[1],
        "dtype": extension.DTYPE_NAMES[dtype],
        "table_dtype": extension.DTYPE_NAMES[words.dtype],
        "threads": torch.get_num_threads(),
        **extension.dropout_arguments(dropout_row, dropout),
    }
