"""add_layer_norm by the Triton kernels: accuracy, masks, groups, frozen parameters, torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.kernel_checks import DROPOUT, assert_accurate, bit_equal, gradients, poisoned
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.kernels import Dropout, Segments, add_layer_norm, reference
from mtbert.kernels.segments import companion
from mtbert.kernels.triton_ops import add_layer_norm as operation
from mtbert.kernels.triton_ops.launch import mask_arguments, recorded
from mtbert.kernels.triton_ops.sums import add_partials

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
NAMES = ("x", "residual", "weight", "bias", "linear_bias")
EPS = 1e-12


@dataclass(frozen=True)
class Case:
    """Random inputs of one call, in the order of NAMES."""

    arguments: list[Tensor]
    upstream: Tensor
    rows: Tensor
    dropout: Dropout | None

    def kernel(self, *arguments: Tensor, segments: Segments | None = None) -> Tensor:
        x, residual, weight, bias, *linear_bias = arguments
        return add_layer_norm(
            x,
            residual,
            weight,
            bias,
            linear_bias=linear_bias[0] if linear_bias else None,
            eps=EPS,
            dropout_row=self.rows,
            dropout=self.dropout,
            segments=segments,
        )

    def plain(self, *arguments: Tensor) -> Tensor:
        """Step by step in the dtype of x."""
        x, residual, weight, bias, *linear_bias = arguments
        if linear_bias:
            x = x + linear_bias[0].to(x.dtype)
        if self.dropout is not None:
            columns = torch.arange(x.shape[1], device=x.device)
            kept = reference.dropout_mask(self.rows, columns, self.dropout)
            x = torch.where(kept, x * self.dropout.scale, 0.0)
        return F.layer_norm(residual + x, (x.shape[1],), weight.to(x.dtype), bias.to(x.dtype), EPS)

    def run(self, **options: Any) -> list[Tensor | None]:
        """The output, and the gradients in the order of NAMES."""
        return gradients(self.kernel, self.arguments, self.upstream, **options)

    def check(self, found: Sequence[Tensor | None]) -> None:
        plain = gradients(self.plain, self.arguments, self.upstream)
        exact = gradients(self.plain, [a.double() for a in self.arguments], self.upstream.double())
        assert_accurate(found, plain, exact, self.upstream.dtype)


def make(
    device: torch.device,
    tokens: int,
    width: int,
    dtype: torch.dtype = FLOAT,
    dropout: Dropout | None = DROPOUT,
) -> Case:
    torch.manual_seed(tokens * width)
    x, residual, upstream = (torch.randn(tokens, width).to(device, dtype) for _ in range(3))
    parameters = [torch.randn(width).to(device) for _ in range(3)]
    rows = torch.arange(tokens, dtype=torch.int32, device=device) * 4096
    return Case([x, residual, *parameters], upstream, rows, dropout)


@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "dropout"),
    [
        (1, 20, FLOAT, DROPOUT),
        (17, 20, BRAIN, DROPOUT),
        (15, 20, HALF, None),
        (9, 128, FLOAT, None),
        (3, 384, FLOAT, DROPOUT),
        (5, 384, BRAIN, DROPOUT),
        (3, 768, FLOAT, DROPOUT),
        (5, 768, BRAIN, DROPOUT),
        (5, 768, HALF, None),
        (3, 1024, BRAIN, DROPOUT),
        (3, 1100, FLOAT, None),
    ],
)
def test_accuracy(
    device: torch.device,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make(device, tokens, width, dtype, dropout)
    poisoned(monkeypatch)
    case.check(case.run())


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
def test_without_a_bias_of_the_linear_layer(device: torch.device, dropout: Dropout | None) -> None:
    case = make(device, 3, 40, BRAIN, dropout)
    case = replace(case, arguments=case.arguments[:4])
    case.check(case.run())


def test_one_column_has_no_variance(device: torch.device) -> None:
    case = make(device, 5, 1)
    output, *_ = case.run()
    assert torch.equal(output, case.arguments[3].expand(5, 1))


def test_numbers_far_from_zero(device: torch.device) -> None:
    """A large mean does not eat the variance, forward or backward."""
    case = make(device, 5, 384, dropout=None)
    case.arguments[0].add_(1000.0)
    found = case.run()
    exact = gradients(case.plain, [a.double() for a in case.arguments], case.upstream.double())
    for f, e in zip(found, exact, strict=True):
        assert (f.double() - e).abs().max() < 2e-4 * e.abs().max()


def test_the_mask_is_that_of_the_reference(device: torch.device) -> None:
    """Exactly zero gradients where it drops; the residual's times the scale where it keeps."""
    case = make(device, 3, 100)
    _, dx, dresidual, *_ = case.run()
    kept = reference.dropout_mask(case.rows, torch.arange(100, device=device), DROPOUT)
    assert torch.equal(dx != 0, kept)
    assert torch.allclose(dx[kept], dresidual[kept] * DROPOUT.scale, rtol=1e-6)


def test_what_is_dropped_may_be_nan(device: torch.device) -> None:
    case = make(device, 3, 100)
    expected = case.run()
    kept = reference.dropout_mask(case.rows, torch.arange(100, device=device), DROPOUT)
    case.arguments[0][~kept] = float("nan")
    assert bit_equal(case.run(), expected)


def test_a_step_on_the_device_is_the_step(device: torch.device) -> None:
    here = make(device, 2, 40)
    there = replace(here, dropout=replace(DROPOUT, step=torch.tensor(DROPOUT.step, device=device)))
    assert bit_equal(here.run(), there.run())
    other = replace(here, dropout=replace(DROPOUT, step=torch.tensor(8, device=device)))
    assert not torch.equal(here.run()[1], other.run()[1])


@pytest.mark.parametrize("width", [40, 384])
def test_rows_keep_to_themselves(device: torch.device, width: int) -> None:
    """Neither NaN nor infinity in one row changes a bit of another's output or gradients."""
    case = make(device, 6, width, BRAIN, None)
    expected = case.run()
    others = [0, 1, 3, 5]
    case.arguments[1][2] = float("nan")
    case.arguments[0][4] = float("inf")
    found = case.run()
    for f, e in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(f[others], e[others])
        assert f[[2, 4]].isnan().any(1).all()


def test_two_runs_are_bit_equal(device: torch.device) -> None:
    case = make(device, 9, 40, BRAIN)
    assert bit_equal(case.run(), case.run())


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (4,), (2, 3, 4), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(
    device: torch.device, frozen: tuple[int, ...], dropout: Dropout | None
) -> None:
    case = make(device, 3, 24, dropout=dropout)
    everything, some = case.run(), case.run(frozen=frozen)
    for index, (e, s) in enumerate(zip(everything, some, strict=True)):
        if index - 1 in frozen:
            assert s is None
        else:
            assert torch.equal(s, e), NAMES[index - 1]


def test_sums_of_what_is_frozen_are_not_computed(device: torch.device) -> None:
    case = make(device, 10, 24)
    for frozen, flags, count in (
        ((), (True,) * 3, 3),
        ((2,), (False, True, True), 2),
        ((2, 3, 4), (False,) * 3, 0),
    ):
        with recorded() as launches:
            case.run(frozen=frozen)
        backward = launches[1]
        assert tuple(backward.options[n] for n in ("DWEIGHT", "DBIAS", "DLINEAR_BIAS")) == flags
        assert len(launches) == 2 + (count > 0)
        if count:
            assert launches[2].arguments[0].shape[0] == count


@pytest.mark.parametrize("dtype", [BRAIN, torch.float64])
def test_gradients_come_in_the_dtypes_of_the_parameters(device: torch.device, dtype: torch.dtype) -> None:
    case = make(device, 3, 24, BRAIN, None)
    wide = case.run()
    case.arguments[3] = case.arguments[3].to(dtype)
    found = case.run()
    assert [t.dtype for t in found] == [BRAIN, BRAIN, BRAIN, FLOAT, dtype, FLOAT]
    assert torch.equal(found[4], wide[4].to(dtype))


def test_nothing_at_all(device: torch.device) -> None:
    output, *grads = make(device, 0, 24).run()
    assert output.shape == (0, 24)
    assert [tuple(g.shape) for g in grads] == [(0, 24), (0, 24), (24,), (24,), (24,)]
    assert all(not g.any() for g in grads)


# ---- groups ----

BOUNDS = (0, 0, 3, 4, 9, 9)
"""Empty groups at both ends, one of one row; each group is walked through by two programs."""


def grouped(
    case: Case, bounds: tuple[int, ...], function: Any = None, named: Sequence[int] = (2, 3, 4)
) -> list[Tensor | None]:
    """The output, and the gradients in the order of NAMES, the named ones those of companions."""
    leaves = [a.detach().clone().requires_grad_() for a in case.arguments]
    companions = {leaves[i]: companion(leaves[i], len(bounds) - 1) for i in named}
    output = (function or case.kernel)(*leaves, segments=Segments(bounds, companions))
    output.backward(case.upstream.to(output.dtype))
    return [output.detach(), *(companions[a].grad if a in companions else a.grad for a in leaves)]


def twin(case: Case) -> Any:
    """The reference with the segments."""

    def call(*arguments: Tensor, segments: Segments) -> Tensor:
        return reference.add_layer_norm(
            *arguments[:4],
            linear_bias=arguments[4],
            eps=EPS,
            dropout_row=case.rows,
            dropout=case.dropout,
            segments=segments,
        )

    return call


@pytest.mark.parametrize(
    ("width", "dtype", "dropout"), [(24, FLOAT, None), (24, HALF, DROPOUT), (384, BRAIN, DROPOUT)]
)
def test_each_group_gets_its_own_gradient(
    device: torch.device,
    width: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make(device, BOUNDS[-1], width, dtype, dropout)
    wide = replace(case, arguments=[a.double() for a in case.arguments], upstream=case.upstream.double())
    plain, exact = grouped(case, BOUNDS, twin(case)), grouped(wide, BOUNDS, twin(wide))
    poisoned(monkeypatch)
    found = grouped(case, BOUNDS)
    assert_accurate(found[:3], plain[:3], exact[:3], dtype)
    for index in (3, 4, 5):
        assert_accurate(found[index].unbind(), plain[index].unbind(), exact[index].unbind(), dtype)
        assert not found[index][[0, 4]].any()


def test_a_group_is_as_if_it_were_alone(device: torch.device) -> None:
    """The same programs for the same rows: bit-equal, whatever the other groups hold."""
    case = make(device, 9, 24, dropout=None)
    together = grouped(case, BOUNDS)
    case.arguments[0][3] = float("nan")
    case.upstream[3] = float("nan")
    spoiled = grouped(case, BOUNDS)
    for t, s in zip(together[3:], spoiled[3:], strict=True):
        assert s[2].isnan().any()
        assert torch.equal(t[[0, 1, 3, 4]], s[[0, 1, 3, 4]])


def test_one_group_changes_no_bit(device: torch.device) -> None:
    case = make(device, 9, 24, dropout=None)
    usual, one = case.run(), grouped(case, (0, 9))
    assert bit_equal(usual[:3], one[:3])
    assert bit_equal(usual[3:], [t[0] for t in one[3:]])
    assert bit_equal(usual, grouped(case, BOUNDS, named=()))


@pytest.mark.parametrize("named", [(2,), (3, 4)])
def test_parameters_without_a_companion_keep_their_gradient(
    device: torch.device, named: tuple[int, ...]
) -> None:
    case = make(device, 9, 24, dropout=None)
    usual, found = case.run(), grouped(case, BOUNDS, named=named)
    assert bit_equal(usual[:3], found[:3])
    for index in (2, 3, 4):
        whole = found[index + 1].sum(0) if index in named else found[index + 1]
        assert torch.allclose(whole, usual[index + 1], atol=1e-5)


@pytest.mark.parametrize("programs", [1, 2, 30])
def test_however_many_programs(device: torch.device, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(device, 9, 16, dropout=None)
    expected = case.run()
    monkeypatch.setattr(operation, "_programs", lambda *_: programs)
    found = grouped(case, (0, 5, 9))
    assert bit_equal(found[:3], expected[:3])
    for f, e in zip(found[3:], expected[3:], strict=True):
        assert torch.allclose(f.sum(0), e, atol=1e-5)


def test_the_widest_rows_take_several_passes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(device, 3, 24)
    expected = case.run()
    passes = operation._passes
    assert passes(4096, [True] * 5) == [[True] * 5]
    monkeypatch.setattr(operation, "_passes", lambda _, needs: passes(8192, needs))
    poisoned(monkeypatch)
    for frozen in ((), (2, 3), (0, 1, 4), (0, 1, 2)):
        kept = [i for i in range(6) if i - 1 not in frozen]
        found = case.run(frozen=frozen)
        assert bit_equal([found[i] for i in kept], [expected[i] for i in kept])


@pytest.mark.parametrize("programs", [1, 511, 1025])
def test_the_second_sum(device: torch.device, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    partials = torch.randn(3, 2, programs, 20, device=device)
    poisoned(monkeypatch)
    for dtypes in ([FLOAT], [BRAIN, FLOAT], [HALF, FLOAT, torch.float64]):
        sums = add_partials(partials[: len(dtypes)], dtypes)
        assert [s.dtype for s in sums] == dtypes
        for found, exact in zip(sums, partials.double().sum(2), strict=False):
            eps = max(torch.finfo(t).eps for t in (FLOAT, found.dtype))
            assert (found - exact).abs().max() <= 16 * eps * exact.abs().max()


# ---- torch's rules ----


def operator_arguments(case: Case, bounds: tuple[int, ...] | None) -> tuple[Any, ...]:
    leaves = [a.detach().clone().requires_grad_() for a in case.arguments]
    groups = 1 if bounds is None else len(bounds) - 1
    companions = [None if bounds is None else companion(p, groups) for p in leaves[2:]]
    where = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=case.rows.device)
    rows = None if case.dropout is None else case.rows
    return (*leaves, *companions, where, groups, EPS, rows, *mask_arguments(case.dropout))


@pytest.mark.parametrize(
    ("dropout", "bounds"), [(None, None), (DROPOUT, (0, 2, 3))], ids=["plain", "everything"]
)
def test_the_operator_keeps_torch_s_rules(
    device: torch.device, dropout: Dropout | None, bounds: tuple[int, ...] | None
) -> None:
    torch.library.opcheck(
        operation._add_layer_norm, operator_arguments(make(device, 3, 24, dropout=dropout), bounds)
    )


def test_the_backward_operator_keeps_torch_s_rules(device: torch.device) -> None:
    case = make(device, 2, 24)
    mask, step = mask_arguments(DROPOUT)
    mean, rstd = torch.zeros(2, device=device), torch.ones(2, device=device)
    for needs in ([True] * 5, [False, True, False, True, False]):
        arguments = (case.upstream, *case.arguments, mean, rstd, None, 1, case.rows, mask, step, needs)
        torch.library.opcheck(operation._add_layer_norm_backward, arguments)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
def test_torch_compile_keeps_one_graph(device: torch.device, dropout: Dropout | None) -> None:
    case = make(device, 3, 24, dropout=dropout)
    compiled = torch.compile(case.kernel, fullgraph=True, backend="aot_eager")
    assert bit_equal(gradients(compiled, case.arguments, case.upstream), case.run())
    expected = grouped(case, (0, 2, 3))
    assert bit_equal(grouped(case, (0, 2, 3), compiled), expected)


def test_what_triton_does_not_serve(device: torch.device) -> None:
    case = make(device, 2, 8)
    with pytest.raises(ConfigError, match="kernels=triton cannot serve add_layer_norm for float64"):
        case.kernel(*(a.double() for a in case.arguments))
    with pytest.raises(ConfigError, match="rows must be 1 to 8192 columns wide"):
        make(device, 1, 8193).run()


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t.t(), r"x must be contiguous"),
        (1, lambda t: t[:, :7].contiguous(), r"residual must be of shape \[6, 8\]"),
        (1, lambda t: t.half(), "residual must be of dtype float32"),
        (2, lambda t: t[:7], r"weight must be of shape \[8\]"),
        (4, lambda t: t.long(), "linear_bias must be of dtype"),
    ],
)
def test_errors_name_the_argument(device: torch.device, index: int, change: Any, message: str) -> None:
    case = make(device, 8 if index == 0 else 6, 8)
    arguments = [change(a) if i == index else a for i, a in enumerate(case.arguments)]
    with pytest.raises(ValueError, match=f"add_layer_norm: {message}"):
        case.kernel(*arguments)
