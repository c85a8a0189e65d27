"""Gradients of groups of tokens from one backward pass, against a pass for each group."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.kernel_checks import assert_accurate, bit_equal, poisoned
from support.segment_cases import CASES, IMPLEMENTATIONS, SLOTS, TOKENS, Case, Gradients

from mtbert.kernels import Segments, dispatch, extension, linear
from mtbert.kernels.segments import companion

ALL = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
BOUNDS = [(0, TOKENS), (0, 50, 51, TOKENS), (0, 0, 70, 70, TOKENS, TOKENS)]
"""One group; three; empty ones in front, between and behind."""


@pytest.fixture(autouse=True)
def _built() -> None:
    if extension.part("cpu") is None:
        pytest.skip(extension.problem)


def check(
    case: Case, found: Gradients, backend: str, dtype: torch.dtype, plain: Gradients, exact: Gradients
) -> None:
    """Every group's part on its own is as accurate as it must be."""
    assert list(found) == list(plain)
    for name in found:
        parts = [t[name].unbind() if name in case.parameters else [t[name]] for t in (found, plain, exact)]  # type: ignore[union-attr]
        if dtype != torch.float64:
            assert_accurate(*parts, dtype)
            continue
        for f, e in zip(parts[0], parts[2], strict=True):
            assert (f - e).abs().max() <= 1e-12, name


@ALL
@pytest.mark.parametrize("bounds", BOUNDS, ids=["one", "three", "empty"])
@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
def test_each_group_gets_its_own_gradient(
    case: Case, backend: str, dtype: torch.dtype, bounds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = case.upstream(dtype)
    exact = case.separately("reference", torch.float64, upstream.double(), bounds)
    plain = case.separately("reference", dtype, upstream, bounds)
    poisoned(monkeypatch)
    check(case, case.run_grouped(backend, dtype, upstream, bounds), backend, dtype, plain, exact)


@ALL
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", torch.float32), ("cpu", torch.bfloat16)])
def test_one_group_changes_no_bit(case: Case, backend: str, dtype: torch.dtype) -> None:
    upstream = case.upstream(dtype)
    usual = case.run(backend, dtype, upstream)
    no_companion = case.run_grouped(backend, dtype, upstream, (0, 7, TOKENS), named=())
    assert bit_equal(list(usual.values()), [no_companion[name] for name in usual])
    one = case.run_grouped(backend, dtype, upstream, (0, TOKENS))
    for name, gradient in usual.items():
        assert torch.equal(one[name].squeeze(0) if name in case.parameters else one[name], gradient)  # type: ignore


@ALL
@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS)
def test_parameters_without_a_companion_keep_their_gradient(
    case: Case, backend: str, dtype: torch.dtype
) -> None:
    """Each parameter alone with a companion, and each alone without one. The parts sum to the usual gradient."""
    upstream = case.upstream(dtype)
    usual = case.run(backend, dtype, upstream)
    wide = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).eps
    tolerance = 1e-12 if dtype == torch.float64 else wide
    for name in case.parameters:
        for named in ([name], [n for n in case.parameters if n != name]):
            found = case.run_grouped(backend, dtype, upstream, BOUNDS[1], named)
            assert set(found) == set(usual)
            for key, gradient in usual.items():
                assert gradient is not None
                whole = found[key].sum(0) if key in named else found[key]  # type: ignore[union-attr]
                assert whole.shape == gradient.shape
                assert (whole - gradient).abs().max() <= tolerance * gradient.abs().max() * 4, (named, key)


@ALL
def test_passes_add_up(case: Case) -> None:
    """Two passes over one set of companions, whose groups end elsewhere in the second."""
    _, parameters = case.leaves(torch.float32)
    first = case.segments((0, 50, TOKENS), parameters, list(parameters))
    second = Segments((0, 90, TOKENS), first.companions, first.slots)
    alone = []
    for seed, segments in ((1, first), (2, second)):
        found = case.run_grouped("cpu", torch.float32, case.upstream(torch.float32, seed), segments.bounds)
        alone.append(found)
        activations, _ = case.leaves(torch.float32)
        with dispatch.use_backend("cpu"):
            output = case.call(activations | parameters, torch.float32, {"segments": segments})
            output.backward(case.upstream(torch.float32, seed))
    for name, parameter in parameters.items():
        gradient = first.companions[parameter].grad
        assert gradient is not None
        total = case.dense(gradient) if name == "word" else gradient
        assert torch.equal(total, alone[0][name] + alone[1][name])  # type: ignore[operator]


@ALL
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_gradient_of_something_else_writes_nowhere(case: Case, backend: str) -> None:
    activations, parameters = case.leaves(torch.float32)
    segments = case.segments(BOUNDS[1], parameters, list(parameters))
    with dispatch.use_backend(backend):
        output = case.call(activations | parameters, torch.float32, {"segments": segments})
        other = list(activations.values()) or [segments.companions[parameters["weight"]]]
        torch.autograd.grad(output, other, case.upstream(torch.float32))
    leaves: Sequence[torch.Tensor] = [
        *activations.values(),
        *parameters.values(),
        *segments.companions.values(),
    ]
    assert all(leaf.grad is None for leaf in leaves)


@ALL
def test_deterministic_whatever_the_number_of_threads(case: Case) -> None:
    upstream = case.upstream(torch.bfloat16)
    one = case.run_grouped("cpu", torch.bfloat16, upstream, BOUNDS[1])
    torch.set_num_threads(2)
    try:
        two = case.run_grouped("cpu", torch.bfloat16, upstream, BOUNDS[1])
    finally:
        torch.set_num_threads(1)
    assert bit_equal([one[n] for n in case.parameters], [two[n] for n in case.parameters])


@ALL
def test_reference_gradients(case: Case) -> None:
    """By differences: the reference's output depends on its companions as on the groups' own parameters."""
    activations, parameters = case.leaves(torch.float64)
    companions = {
        p: torch.zeros(c.shape, dtype=torch.float64, requires_grad=True)
        for p, c in case.segments(BOUNDS[1], parameters, list(parameters)).companions.items()
    }
    segments = Segments(BOUNDS[1], companions, case.slots)

    def call(*_: torch.Tensor) -> torch.Tensor:
        return case.call(activations | parameters, torch.float64, {"segments": segments})

    with dispatch.use_backend("reference"):
        inputs = (*activations.values(), *companions.values())
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_companions_in_bfloat16() -> None:
    """A companion's gradient comes in its dtype."""
    x, weight = torch.randn(6, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    segments = Segments((0, 2, 6), {weight: companion(weight, 2)})
    linear(x, weight, None, segments=segments).sum().backward()
    gradient = segments.companions[weight].grad
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    assert torch.allclose(gradient[1, 0].float(), x[2:].float().sum(0), atol=0.05)


@ALL
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bounds_that_do_not_fit(case: Case, backend: str) -> None:
    activations, parameters = case.leaves(torch.float32)
    operation = case.name.split()[0]
    segments = case.segments((0, 50, TOKENS - 1), parameters, list(parameters))
    with (
        dispatch.use_backend(backend),
        pytest.raises(ValueError, match=f"{operation}: segments.bounds must be .* 131"),
    ):
        case.call(activations | parameters, torch.float32, {"segments": segments})
    name = list(parameters)[-1]
    wrong = Segments((0, 50, TOKENS), {parameters[name]: companion(parameters[name], 3)})
    with (
        dispatch.use_backend(backend),
        pytest.raises(ValueError, match=f"{operation}: the companion of .* of shape"),
    ):
        case.call(activations | parameters, torch.float32, {"segments": wrong})


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (SLOTS.long(), "segments.slots must be of dtype int32"),
        (SLOTS[1:].clone(), r"segments.slots must be of shape \[131\]"),
        (torch.where(SLOTS == 3, 99, SLOTS), "word_slots must be 0 to 22, got 99 at token"),
        (torch.where(SLOTS == 3, -1, SLOTS), "word_slots must be 0 to 22, got -1 at token"),
    ],
)
def test_slots_that_do_not_fit(slots: torch.Tensor, message: str) -> None:
    case = CASES[-1]
    activations, parameters = case.leaves(torch.float32)
    segments = case.segments((0, TOKENS), parameters, ["word"])
    segments = Segments(segments.bounds, segments.companions, slots)
    with pytest.raises(ValueError, match=f"embedding: {message}"):
        case.call(activations | parameters, torch.float32, {"segments": segments}).sum().backward()
