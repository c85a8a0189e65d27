"""The LoRA products by the CUDA extension: packing, a custom operator forward and one backward, the calls.

One kernel (or two, as the extension's plan says) computes y and s = scale * dropout(x) A^T; backward, one pass over dy
gives ds = scale * dy B and the gradients of B, one kernel the input's gradient, one pass over x the gradients of A. The
weight and the bias are constants here: calls that train them go another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import extension
from .grouped import deliver
from .philox import WORD, Dropout
from .triton_ops.launch import mask_arguments

RANKS = (8, 16, 32, 64)
"""What the kernels compute with: lower ranks are padded with zeros to the next."""
_BLOCKS = 3
_VECTOR = 16
"""Bytes of the kernels' loads, of which addresses and row strides must be multiples."""


def lora(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    companions: Sequence[Tensor | None],
    scale: float,
    dropout_row: Tensor | None,
    dropout: Dropout | None,
    bounds: Tensor | None,
    groups: int,
) -> Tensor:
    """x weight^T + bias + scale (dropout(x) A^T) B^T of x [T, K].

    parameters: weight [N, K] and bias [N] (or None), which get no gradient, then A [r, K] and B [N / J, r] (or None and
    None) of each of J blocks of outputs, J 1 or 3; companions: theirs, [groups, *shape] each, or None; bounds: int32
    [groups + 1] on the device of x, or None for one group of all rows; dropout_row: int32 [T], or None where nothing is
    dropped.
    """
    weight, bias, *adapters = parameters
    assert weight is not None
    if not torch.compiler.is_compiling() and any(_has_tangent(t) for t in (x, *parameters) if t is not None):
        raise NotImplementedError("lora_linear and lora_qkv have no derivative in forward mode (jvp)")
    blocks = len(adapters) // 2
    a, b = _packed(adapters, weight.shape[0] // blocks, x)
    rest = [None] * (2 * (_BLOCKS - blocks))
    takers = (*adapters, *rest, *companions[2:], *rest)
    frozen = (weight.detach().to(x.dtype), None if bias is None else bias.detach().to(x.dtype))
    mask, step = mask_arguments(dropout)
    return _lora(x, *frozen, a, b, *takers, bounds, groups, scale, dropout_row, mask, step)[0]


def _has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation follows the tensor: torch would let it end in the operator, as a zero."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def padded_rank(adapters: Sequence[Tensor | None]) -> int:
    """The rank that the kernels compute with, for A and B of each block."""
    most = max(a.shape[0] for a in adapters[::2] if a is not None)
    return next(rank for rank in RANKS if rank >= most)


def _packed(adapters: Sequence[Tensor | None], outputs: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks' A below each other, [J * R, K], and B [N, R], in the dtype of x and padded with zeros.

    Constants: the gradients go to the adapters themselves. Those of one block that need no padding are not copied.
    """
    rank = padded_rank(adapters)
    blocks = len(adapters) // 2
    parts = [None if p is None else p.detach() for p in adapters]
    whole = all(a is not None and a.shape[0] == rank for a in parts[::2])
    if blocks == 1 and whole:
        return parts[0].to(x.dtype), parts[1].to(x.dtype)  # type: ignore[union-attr]
    make = x.new_empty if whole else x.new_zeros
    a, b = make(blocks * rank, x.shape[1]), make(blocks * outputs, rank)
    for block, (lora_a, lora_b) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        if lora_a is not None and lora_b is not None:
            a[block * rank : block * rank + lora_a.shape[0]] = lora_a
            b[block * outputs : (block + 1) * outputs, : lora_b.shape[1]] = lora_b
    return a, b


# ---- the operators ----


@torch.library.custom_op("mtbert::lora", mutates_args=())
def _lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    a0: Tensor | None,
    b0: Tensor | None,
    a1: Tensor | None,
    b1: Tensor | None,
    a2: Tensor | None,
    b2: Tensor | None,
    a0_companion: Tensor | None,
    b0_companion: Tensor | None,
    a1_companion: Tensor | None,
    b1_companion: Tensor | None,
    a2_companion: Tensor | None,
    b2_companion: Tensor | None,
    bounds: Tensor | None,
    groups: int,
    scale: float,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result [T, N], and s [T, J * R], which the backward pass reads.

    a, b: the packed adapters; a0 to b2_companion take no part in the computation, they take the gradients.
    """
    out, s = _outputs(x, a, b)
    x, weight, a, b = _rows(x), _aligned(weight), _aligned(a), _aligned(b)
    _functions().lora_forward(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=extension.pointer(bias),
        a=a.data_ptr(),
        b=b.data_ptr(),
        out=out.data_ptr(),
        s=s.data_ptr(),
        x_stride=_stride(x),
        out_stride=out.shape[1],
        ranks=_ranks((a0, a1, a2), a, b),
        scale=scale,
        **_shape(x.shape[0], a, b),
        **_mask(dropout_row, mask, step),
        **_place(x),
    )
    return out, s


def _ranks(adapters: Sequence[Tensor | None], a: Tensor, b: Tensor) -> list[int]:
    """That of each block, 0 without an adapter: what the kernels may use of the packed ones."""
    return [0 if own is None else own.shape[0] for own in adapters[: a.shape[0] // b.shape[1]]]


def _outputs(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@_lora.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(x, a, b)


@torch.library.custom_op("mtbert::lora_backward", mutates_args=())
def _lora_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    bounds: Tensor | None,
    groups: int,
    ranks: list[int],
    scale: float,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x [T, K] and, float32, of the packed adapters, [groups, J * R, K] and [groups, N, R].

    ranks: those of the blocks; rows of the one and columns of the other beyond them mean nothing. needs: which of them;
    the others are empty. x is not read where A needs none, weight where x, and s where B.
    """
    dx, grad_a, grad_b = _gradient_outputs(grad, a, b, groups, needs)
    functions, grad = _functions(), _rows(grad)
    a, b = _aligned(a), _aligned(b)
    shape, masked, place = _shape(grad.shape[0], a, b), _mask(dropout_row, mask, step), _place(grad)
    ds = grad.new_empty(grad.shape[0], a.shape[0])
    grouped = {"bounds": extension.pointer(bounds), "groups": groups}
    workspace = _workspace(functions.lora_low_workspace(**shape, groups=groups), grad)
    functions.lora_low(
        grad=grad.data_ptr(),
        b=b.data_ptr(),
        s=extension.pointer(s if needs[2] else None),
        ds=ds.data_ptr(),
        grad_b=extension.pointer(grad_b if needs[2] else None),
        workspace=extension.pointer(workspace),
        grad_stride=_stride(grad),
        ranks=ranks,
        scale=scale,
        **grouped,
        **shape,
        **place,
    )
    if needs[0]:
        assert weight is not None
        weight = _aligned(weight)
        functions.lora_input(
            grad=grad.data_ptr(),
            weight=weight.data_ptr(),
            a=a.data_ptr(),
            ds=ds.data_ptr(),
            dx=dx.data_ptr(),
            grad_stride=_stride(grad),
            dx_stride=dx.shape[1],
            **shape,
            **masked,
            **place,
        )
    if needs[1]:
        assert x is not None
        x = _rows(x)
        workspace = _workspace(functions.lora_grad_a_workspace(**shape, groups=groups), grad)
        functions.lora_grad_a(
            x=x.data_ptr(),
            ds=ds.data_ptr(),
            grad_a=grad_a.data_ptr(),
            workspace=extension.pointer(workspace),
            x_stride=_stride(x),
            **grouped,
            **shape,
            **masked,
            **place,
        )
    return dx, grad_a, grad_b


def _gradient_outputs(
    grad: Tensor, a: Tensor, b: Tensor, groups: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = grad.new_empty((grad.shape[0], a.shape[1]) if needs[0] else 0)
    grad_a, grad_b = (
        grad.new_empty((groups, *packed.shape) if needed else 0, dtype=torch.float32)
        for packed, needed in ((a, needs[1]), (b, needs[2]))
    )
    return dx, grad_a, grad_b


@_lora_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor | None,
    bounds: Tensor | None,
    groups: int,
    ranks: list[int],
    scale: float,
    dropout_row: Tensor | None,
    mask: list[int],
    step: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient_outputs(grad, a, b, groups, needs)


_TAKERS = slice(5, 5 + 4 * _BLOCKS)
"""The operator's arguments that take gradients, beside x."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, *_, bounds, groups, scale, dropout_row, mask, step = inputs
    _, s = output
    need_a, need_b = (any(_of_adapters(ctx, which)) for which in (0, 1))
    need_x = ctx.needs_input_grad[0]
    ctx.save_for_backward(
        x if need_a else None,
        weight if need_x else None,
        a,
        b,
        s if need_b else None,
        bounds,
        dropout_row,
        step,
    )
    ranks = _ranks(inputs[_TAKERS][: 2 * _BLOCKS : 2], a, b)
    ctx.constants = (groups, ranks, scale, mask, [need_x, need_a, need_b])
    ctx.adapters = [None if p is None else (p.shape, p.dtype) for p in inputs[_TAKERS][: 2 * _BLOCKS]]
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)


def _of_adapters(ctx: Any, which: int) -> list[bool]:
    """For every block, whether its A (0) or B (1), or the companion, needs a gradient."""
    flags = ctx.needs_input_grad[_TAKERS]
    pairs = zip(flags[: 2 * _BLOCKS], flags[2 * _BLOCKS :], strict=True)
    return [any(pair) for pair in pairs][which::2]


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    before, behind = (None,) * 4, (None,) * 6
    if grad is None:
        return (None, *before, *(None,) * (4 * _BLOCKS), *behind)
    x, weight, a, b, s, bounds, dropout_row, step = ctx.saved_tensors
    groups, ranks, scale, mask, needs = ctx.constants
    dx, grad_a, grad_b = _lora_backward(
        grad, x, weight, a, b, s, bounds, groups, ranks, scale, dropout_row, mask, step, needs
    )
    rank = b.shape[1]
    outputs = b.shape[0] // (a.shape[0] // rank)
    sums: list[Tensor | None] = []
    for block, (need_a, need_b) in enumerate(zip(_of_adapters(ctx, 0), _of_adapters(ctx, 1), strict=True)):
        of_a, of_b = ctx.adapters[2 * block : 2 * block + 2]
        own_a = grad_a[:, block * rank : block * rank + of_a[0][0]] if need_a else None
        own_b = grad_b[:, block * outputs : (block + 1) * outputs, : of_b[0][1]] if need_b else None
        sums += [None if own_a is None else own_a.to(of_a[1]).contiguous()]
        sums += [None if own_b is None else own_b.to(of_b[1]).contiguous()]
    flags = ctx.needs_input_grad[_TAKERS]
    taken = deliver(sums, flags[: 2 * _BLOCKS], flags[2 * _BLOCKS :])
    return (dx if needs[0] else None, *before, *taken, *behind)


_lora.register_autograd(_gradients, setup_context=_save)


def _gradients_of_gradients(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError("lora_linear and lora_qkv can be differentiated once: their gradients have none")


_lora_backward.register_autograd(_gradients_of_gradients)


# ---- arguments of the extension ----


def _functions() -> Any:
    functions = extension.part("cuda")
    assert functions is not None
    return functions


def _shape(rows: int, a: Tensor, b: Tensor) -> dict[str, Any]:
    rank = b.shape[1]
    return {
        "rows": rows,
        "inputs": a.shape[1],
        "outputs": b.shape[0],
        "blocks": a.shape[0] // rank,
        "rank": rank,
        "dtype": extension.DTYPE_NAMES[a.dtype],
    }


def _mask(dropout_row: Tensor | None, mask: list[int], step: Tensor | None) -> dict[str, int]:
    seed_low, seed_high, host_step, site, threshold = (word & WORD for word in mask)
    return {
        "dropout_row": extension.pointer(dropout_row),
        "seed": seed_low | seed_high << 32,
        "step": host_step,
        "step_pointer": extension.pointer(step),
        "site": site,
        "threshold": threshold,
    }


def _place(x: Tensor) -> dict[str, int]:
    """Where the kernels run. Results and workspaces are allocated for this stream, so nothing else has to keep them."""
    if not x.is_cuda:
        return {"device": 0, "stream": 0}
    stream = torch.cuda.current_stream(x.device)
    return {"device": x.device.index, "stream": stream.cuda_stream}


def _workspace(size: int, like: Tensor) -> Tensor | None:
    return like.new_empty(size, dtype=torch.uint8) if size else None


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor at an address that the kernels can load from: itself, or a contiguous copy."""
    if tensor.data_ptr() % _VECTOR == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _rows(tensor: Tensor) -> Tensor:
    """A matrix whose rows the kernels can load, though they may lie apart: itself, or a copy."""
    rows, columns = tensor.shape
    apart = tensor.stride(0)
    even = apart >= columns and apart * tensor.element_size() % _VECTOR == 0
    served = tensor.stride(1) == 1 and (rows <= 1 or even)
    return _aligned(tensor if served else tensor.contiguous())


def _stride(tensor: Tensor) -> int:
    """Elements from one row to the next; a single row's stride means nothing."""
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]
