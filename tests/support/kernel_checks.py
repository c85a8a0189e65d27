"""The accuracy rule of the kernels, and what their tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mtbert.kernels import Dropout

DROPOUT = Dropout(p=0.1, seed=(5 << 40) + 12345, step=7, site=3)


def gradients(
    function: Callable[..., Tensor],
    arguments: Sequence[Tensor],
    output_gradient: Tensor,
    frozen: Sequence[int] = (),
) -> list[Tensor | None]:
    """The output and the gradient of each argument (None for the frozen ones)."""
    leaves = [a.detach().clone().requires_grad_(i not in frozen) for i, a in enumerate(arguments)]
    output = function(*leaves)
    output.backward(output_gradient.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_accurate(
    found: Sequence[Tensor | None],
    plain: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> None:
    """Error at most twice that of plain PyTorch in the same dtype, plus eps times the greatest magnitude."""
    for index, (f, p, e) in enumerate(zip(found, plain, exact, strict=True)):
        assert f is not None, f"tensor {index} is missing"
        assert p is not None
        assert e is not None
        assert f.shape == e.shape
        allowed = 2 * (p.double() - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()
        error = (f.double() - e).abs().max()
        assert error <= allowed, f"tensor {index}: error {error:.3g}, allowed {allowed:.3g}"


def kinds(tensor: Tensor) -> Tensor:
    """Of every element: 0 where it is finite, 1 or -1 where it is infinite, 2 where it is NaN."""
    return torch.where(tensor.isnan(), 2, tensor.isposinf().int() - tensor.isneginf().int())


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every freshly allocated tensor with NaN, so that an element nobody writes is seen."""
    empty, empty_like = torch.empty, torch.empty_like
    new_empty = Tensor.new_empty

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: fill(new_empty(self, *a, **k)))


def bit_equal(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    """Whether all tensors agree to the last bit."""
    return all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )
