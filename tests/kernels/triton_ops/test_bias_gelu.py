"""bias_gelu by the Triton kernels: accuracy, tails and limits, groups, frozen parameters, torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.kernel_checks import assert_accurate, bit_equal, gradients, poisoned
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.kernels import Segments, bias_gelu, reference
from mtbert.kernels.segments import companion
from mtbert.kernels.triton_ops import bias_gelu as operation
from mtbert.kernels.triton_ops.launch import recorded

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT, BRAIN, HALF)
INFINITY = float("inf")


@dataclass(frozen=True)
class Case:
    """Random x and bias of one call."""

    arguments: list[Tensor]
    upstream: Tensor

    def run(self, **options: Any) -> list[Tensor | None]:
        """The output, and the gradients of x and bias."""
        return gradients(bias_gelu, self.arguments, self.upstream, **options)

    def double(self) -> Case:
        return Case([a.double() for a in self.arguments], self.upstream.double())


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias.to(x.dtype))


def make(device: torch.device, tokens: int, width: int, dtype: torch.dtype = FLOAT) -> Case:
    torch.manual_seed(tokens * width)
    x, upstream = (2 * torch.randn(tokens, width).to(device, dtype) for _ in range(2))
    return Case([x, torch.randn(width).to(device)], upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 20), (129, 20), (512, 5), (33, 384), (17, 1536), (9, 3072), (31, 3)]
)
def test_accuracy(
    device: torch.device, tokens: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(device, tokens, width, dtype)
    poisoned(monkeypatch)
    found = case.run()
    exact = case.double()
    assert_accurate(
        found,
        gradients(plain, case.arguments, case.upstream),
        gradients(plain, exact.arguments, exact.upstream),
        dtype,
    )


def test_far_from_zero(device: torch.device) -> None:
    """Relative accuracy in the left tail; all of z on the right."""
    x = torch.linspace(-12, -0.01, 900, device=device)[None]
    exact = 0.5 * x.double() * torch.erfc(-x.double() * 0.5**0.5)
    zero = torch.zeros(x.shape[1], device=device)
    error = ((bias_gelu(x, zero).double() - exact) / exact).abs()[exact.abs() > 1e-30]
    assert error.max() < 2e-5
    assert error[-300:].max() < 2e-6
    right = -x
    assert torch.allclose(bias_gelu(right, zero).double(), exact - x, rtol=3e-7)


@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_half_width_results_are_all_but_the_nearest(device: torch.device, dtype: torch.dtype) -> None:
    """The short form for half-width numbers errs by a sixth of their rounding, in the tail as well."""
    x = torch.linspace(-12, 12, 4001, device=device).to(dtype)[None]
    exact = 0.5 * x.double() * torch.erfc(-x.double() * 0.5**0.5)
    found = bias_gelu(x, torch.zeros(x.shape[1], device=device)).double()
    precision = torch.finfo(dtype)
    allowed = 0.6 * precision.eps * exact.abs() + 0.6 * precision.eps * precision.smallest_normal
    assert ((found - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_far_from_zero(device: torch.device, dtype: torch.dtype) -> None:
    """Everywhere, to the precision of the dtype, beyond the point from which the tail is taken as zero."""
    x = torch.linspace(-20, 20, 1601, dtype=torch.float64, device=device).to(dtype)[None].requires_grad_()
    bias_gelu(x, torch.zeros(x.shape[1], device=device)).sum().backward()
    z = x.detach().double()
    exact = 0.5 * torch.erfc(-z * 0.5**0.5) + z * torch.exp(-0.5 * z * z) * 0.3989422804014327
    assert (x.grad.double() - exact).abs().max() < torch.finfo(dtype).eps * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits(device: torch.device, dtype: torch.dtype) -> None:
    values = [-INFINITY, -200.0, -14.5, 0.0, 200.0, INFINITY, float("nan")]
    x = torch.tensor([values], dtype=dtype, device=device, requires_grad=True)
    output = bias_gelu(x, torch.zeros(7, device=device))
    output.sum().backward()
    assert output[0, :6].tolist() == [0.0, 0.0, 0.0, 0.0, 200.0, INFINITY]
    assert x.grad[0, :6].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5, 1.0, 1.0], abs=1e-3)
    assert output[0, 6].isnan()
    assert x.grad[0, 6].isnan()


def test_rows_keep_to_themselves(device: torch.device) -> None:
    case = make(device, 11, 40, BRAIN)
    expected = case.run()
    case.arguments[0][3] = float("nan")
    found = case.run()
    others = [row for row in range(11) if row != 3]
    for f, e in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(f[others], e[others])
        assert f[3].isnan().all()


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    case = make(device, 300, 40, BRAIN)
    assert bit_equal(case.run(), case.run())


@pytest.mark.parametrize("frozen", [(0,), (1,)])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(
    device: torch.device, frozen: tuple[int, ...]
) -> None:
    case = make(device, 10, 24)
    everything, some = case.run(), case.run(frozen=frozen)
    for index, (e, s) in enumerate(zip(everything, some, strict=True)):
        assert s is None if index - 1 in frozen else torch.equal(s, e)
    with recorded() as launches:
        case.run(frozen=(1,))
    assert len(launches) == 2
    assert launches[1].arguments[4] is None


@pytest.mark.parametrize("dtype", [BRAIN, torch.float64])
def test_the_bias_s_gradient_comes_in_its_dtype(device: torch.device, dtype: torch.dtype) -> None:
    case = make(device, 10, 24, BRAIN)
    wide = case.run()[2]
    case.arguments[1] = case.arguments[1].to(dtype)
    found = case.run()[2]
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wide.double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(0, 24), (3, 0)])
def test_nothing_at_all(device: torch.device, shape: tuple[int, int]) -> None:
    output, dx, dbias = make(device, *shape).run()
    assert output.shape == dx.shape == shape
    assert dbias.shape == shape[1:]
    assert not dbias.any()


# ---- groups ----

BOUNDS = (0, 0, 70, 71, 150, 150)
"""Empty groups at both ends, one of one row, ends inside the tiles of 8 rows."""


def grouped(
    case: Case, bounds: tuple[int, ...], function: Any = bias_gelu, named: bool = True
) -> list[Tensor | None]:
    """The output, and the gradients of x and of the bias's companion (or of the bias, unless `named`)."""
    x, bias = (a.detach().clone().requires_grad_() for a in case.arguments)
    other = companion(bias, len(bounds) - 1)
    output = function(x, bias, segments=Segments(bounds, {bias: other} if named else {}))
    output.backward(case.upstream.to(output.dtype))
    return [output.detach(), x.grad, other.grad if named else bias.grad]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_group_gets_its_own_gradient(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(device, BOUNDS[-1], 24, dtype)
    of_reference: Sequence[Any] = [grouped(c, BOUNDS, reference.bias_gelu) for c in (case, case.double())]
    poisoned(monkeypatch)
    found = grouped(case, BOUNDS)
    parts = [[*tensors[:2], *tensors[2].unbind()] for tensors in (found, *of_reference)]
    assert_accurate(*parts, dtype)
    assert not found[2][[0, 4]].any()


def test_a_group_is_as_if_it_were_alone(device: torch.device) -> None:
    case = make(device, BOUNDS[-1], 24)
    together = grouped(case, BOUNDS)[2]
    case.arguments[0][70] = float("nan")
    spoiled = grouped(case, BOUNDS)[2]
    assert spoiled[2].isnan().all()
    assert torch.equal(together[[0, 1, 3, 4]], spoiled[[0, 1, 3, 4]])


def test_one_group_changes_no_bit(device: torch.device) -> None:
    case = make(device, 150, 24)
    usual, one = case.run(), grouped(case, (0, 150))
    assert bit_equal(usual, [*one[:2], one[2][0]])
    assert bit_equal(usual, grouped(case, BOUNDS, named=False))


# ---- torch's rules ----


@pytest.mark.parametrize("groups", [1, 2])
def test_the_operators_keep_torch_s_rules(device: torch.device, groups: int) -> None:
    case = make(device, 5, 24)
    x, bias = (a.detach().clone().requires_grad_() for a in case.arguments)
    bounds = None if groups == 1 else torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    other = None if groups == 1 else companion(bias, groups)
    torch.library.opcheck(operation._bias_gelu, (x, bias, other, bounds, groups))
    for needs in ([True, True], [True, False], [False, True]):
        arguments = (case.upstream, *case.arguments, bounds, groups, needs)
        torch.library.opcheck(operation._bias_gelu_backward, arguments)


def test_torch_compile_keeps_one_graph(device: torch.device) -> None:
    case = make(device, 6, 24)
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    assert bit_equal(gradients(compiled, case.arguments, case.upstream), case.run())
    assert bit_equal(grouped(case, (0, 2, 6), compiled), grouped(case, (0, 2, 6)))


def test_what_triton_does_not_serve(device: torch.device) -> None:
    with pytest.raises(ConfigError, match="kernels=triton cannot serve bias_gelu for float64"):
        bias_gelu(*make(device, 2, 8).double().arguments)


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t.t(), r"x must be contiguous"),
        (0, lambda t: t.long(), "x must be of dtype"),
        (1, lambda t: t[:7], r"bias must be of shape \[8\]"),
        (1, lambda t: t.repeat(2)[::2], "bias must be contiguous"),
    ],
)
def test_errors_name_the_argument(device: torch.device, index: int, change: Any, message: str) -> None:
    arguments = make(device, 8, 8).arguments
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=f"bias_gelu: {message}"):
        bias_gelu(*arguments)
