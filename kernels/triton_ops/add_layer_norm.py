"""LayerNorm(residual + dropout(x + linear_bias)): one kernel forward, one kernel and a reduction backward.

A program holds whole rows in registers, so every operand is read once. The mask and the normalised rows are computed
again in the backward pass instead of being kept. Bytes moved for each element of s bytes, with nothing frozen: forward
reads x and residual and writes the result, 3 s; backward reads x, residual and the result's gradient and writes two
gradients, 5 s (4 s without dropout, where the two are one). That is the least there is when x and residual are what
is kept. Beside them 12 bytes a row (mean, rstd and the mask's row) and, backward, 12 bytes a column and program for the
partial sums, written and read. Those stay in a level 2 cache of 10 MB: at 768 columns in bfloat16 they are 15% of the
other bytes at 8,192 rows, and 2% at 65,536.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..grouped import deliver
from ..philox import Dropout
from .add_layer_norm_programs import add_layer_norm_backward, add_layer_norm_forward
from .launch import blocks, kept_scale, launch, mask_arguments, power_of_two
from .sums import add_partials, processors

_WIDEST_AT_ONCE = 4096
"""Columns of the widest rows whose backward pass is one launch."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x, residual, weight, bias, linear_bias; empty where not asked for. Those of parameters have a group axis."""


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    parameters: Sequence[Tensor | None],
    companions: Sequence[Tensor | None],
    eps: float,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
    bounds: Tensor | None,
    groups: int,
) -> Tensor:
    """The normalised rows [T, C] of x and residual [T, C].

    parameters: weight, bias and linear_bias (or None), [C] each; companions: theirs, [groups, C] each, or None; bounds:
    int32 [groups + 1] on the device of x, or None for one group of all rows; dropout_row: int32 [T], or None where
    nothing is dropped.
    """
    mask, step = mask_arguments(dropout)
    leaves = (*parameters, *companions)
    return _add_layer_norm(x, residual, *leaves, bounds, groups, eps, dropout_row, mask, step)[0]


@torch.library.custom_op("mtbert::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_bias: Tensor | None,
    weight_companion: Tensor | None,
    bias_companion: Tensor | None,
    linear_bias_companion: Tensor | None,
    bounds: Tensor | None,
    groups: int,
    eps: float,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and the reciprocal standard deviation of every row, float32 [T]."""
    out, mean, rstd = _outputs(x)
    rows, width = x.shape
    if rows == 0:
        return out, mean, rstd
    main, rest = _parts(width)
    tile_rows, warps = _forward_tile(main)
    launch(
        add_layer_norm_forward,
        (blocks(rows, tile_rows),),
        x,
        residual,
        weight,
        bias,
        linear_bias,
        out,
        mean,
        rstd,
        dropout_row,
        rows,
        eps,
        *mask,
        step,
        kept_scale(mask[4]),
        WIDTH=width,
        ROWS=tile_rows,
        MAIN=main,
        REST=rest,
        DROPOUT=dropout_row is not None,
        num_warps=warps,
    )
    return out, mean, rstd


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        torch.empty_like(x),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@_add_layer_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x)


@torch.library.custom_op("mtbert::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor | None,
    groups: int,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
    needs: list[bool],
) -> Gradients:
    """What `needs` asks for; see `Gradients`."""
    dx, dresidual, *sums = _gradient_outputs(x, weight, bias, linear_bias, groups, needs)
    rows, width = x.shape
    asked = [i for i in range(3) if needs[2 + i]]
    if rows == 0:
        return dx, dresidual, *(s.zero_() for s in sums)  # type: ignore[return-value]
    main, rest = _parts(width)
    warps = _backward_warps(x, main, rest)
    programs = _programs(x, groups, main + rest, warps)
    partials = x.new_empty(len(asked), groups, programs, width, dtype=torch.float32)
    written = 0
    for part in _passes(main + rest, needs):
        launch(
            add_layer_norm_backward,
            (programs, groups),
            dout,
            x,
            residual,
            weight,
            linear_bias,
            mean,
            rstd,
            dx if part[0] else None,
            dresidual if part[1] else None,
            partials[written:],
            bounds,
            dropout_row,
            rows,
            *mask,
            step,
            kept_scale(mask[4]),
            WIDTH=width,
            MAIN=main,
            REST=rest,
            DROPOUT=dropout_row is not None,
            DWEIGHT=part[2],
            DBIAS=part[3],
            DLINEAR_BIAS=part[4],
            WIDE=main + rest > _WIDEST_AT_ONCE,
            num_warps=warps,
        )
        written += sum(part[2:])
    if asked:
        for i, added in zip(asked, add_partials(partials, [sums[i].dtype for i in asked]), strict=True):
            sums[i] = added
    return dx, dresidual, *sums  # type: ignore[return-value]


def _gradient_outputs(
    x: Tensor, weight: Tensor, bias: Tensor, linear_bias: Tensor | None, groups: int, needs: list[bool]
) -> Gradients:
    rows, width = x.shape
    dx, dresidual = (x.new_empty((rows, width) if needed else 0) for needed in needs[:2])
    dtypes = [x.dtype if p is None else p.dtype for p in (weight, bias, linear_bias)]
    dweight, dbias, dlinear_bias = (
        x.new_empty((groups, width) if needed else 0, dtype=dtype)
        for needed, dtype in zip(needs[2:], dtypes, strict=True)
    )
    return dx, dresidual, dweight, dbias, dlinear_bias


@_add_layer_norm_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    linear_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor | None,
    groups: int,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
    needs: list[bool],
) -> Gradients:
    return _gradient_outputs(x, weight, bias, linear_bias, groups, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, linear_bias, *_, bounds, groups, _, dropout_row, mask, step = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, residual, weight, bias, linear_bias, mean, rstd, bounds, dropout_row, step)
    ctx.groups, ctx.mask = groups, mask
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 6
    if dout is None:
        return (None,) * 8 + nothing
    x, residual, weight, bias, linear_bias, mean, rstd, bounds, dropout_row, step = ctx.saved_tensors
    need_x, need_residual = ctx.needs_input_grad[:2]
    need_parameters, need_companions = ctx.needs_input_grad[2:5], ctx.needs_input_grad[5:8]
    # Without dropout the two gradients are one tensor, which is written once.
    apart = dropout_row is not None
    needs = [need_x and apart, need_residual or (need_x and not apart)]
    needs += [any(pair) for pair in zip(need_parameters, need_companions, strict=True)]
    arguments = (mean, rstd, bounds, ctx.groups, dropout_row, ctx.mask, step, needs)
    dx, dresidual, *sums = _add_layer_norm_backward(
        dout.contiguous(), x, residual, weight, bias, linear_bias, *arguments
    )
    if not apart:
        dx = dresidual
    asked = [s if needed else None for s, needed in zip(sums, needs[2:], strict=True)]
    return (
        dx if need_x else None,
        dresidual if need_residual else None,
        *deliver(asked, need_parameters, need_companions),
        *nothing,
    )


_add_layer_norm.register_autograd(_gradients, setup_context=_save)


def _parts(width: int) -> tuple[int, int]:
    """Columns of the one or two tiles of a row: its next power of two, or 3/4 of that as a half and a quarter."""
    whole = max(8, power_of_two(width))
    return (whole // 2, whole // 4) if whole >= 32 and width <= whole // 4 * 3 else (whole, 0)


def _forward_tile(main: int) -> tuple[int, int]:
    """Rows and warps of a program: 32 to 48 elements a thread, and where one warp does, no waiting of warps."""
    return max(1, 1024 // main), max(1, main // 1024)


def _backward_warps(x: Tensor, main: int, rest: int) -> int:
    """Warps of a program, which holds one row at a time: the narrower tile takes a load of 16 bytes a thread.

    That makes 4 to 24 elements a thread, each with its part of three sums in registers. Of very wide rows a thread
    holds 12 elements or, where 16 warps would not have registers enough, 32.
    """
    if main + rest > _WIDEST_AT_ONCE:
        return 16 if rest else 8
    return max(1, min(16, (rest or main) * x.element_size() // 512))


def _programs(x: Tensor, groups: int, columns: int, warps: int) -> int:
    """Programs for each group in the backward pass: no more than run at the same time, with 8 rows each or more."""
    share = columns // (32 * warps)
    resident = 8 if share > 16 else 12 if share > 8 else 16
    most = max(1, resident // warps) * processors(x.device)
    return max(1, min(most, blocks(x.shape[0], 8 * groups)))


def _passes(columns: int, needs: list[bool]) -> list[list[bool]]:
    """What each launch of the backward kernel computes of what is needed.

    All at once, but of very wide rows in two passes: a program has not registers enough for all of their sums.
    """
    if columns <= _WIDEST_AT_ONCE:
        return [needs]
    sums = [False, False, needs[2], needs[3], False]
    others = [needs[0], needs[1], False, False, needs[4]]
    return [part for part in (sums, others) if any(part)]
