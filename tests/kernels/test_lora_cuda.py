"""The LoRA products by the CUDA extension: on a GPU by its kernels, and anywhere by what stands in for them.

The stand-in computes from the extension's contract alone, so that all that is between it and the public functions is
tested without a GPU: packing and padding, scales, strides, groups, gradients, which calls are made, torch's own rules.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from support.kernel_checks import DROPOUT, assert_accurate, bit_equal, gradients, kinds, poisoned
from support.lora_extension import HostExtension
from support.packed import random_batch
from torch import Tensor

from mtbert import parity
from mtbert.errors import ConfigError
from mtbert.kernels import (
    Dropout,
    Segments,
    dispatch,
    extension,
    lora_cuda,
    lora_linear,
    lora_qkv,
    reference,
)
from mtbert.kernels.segments import companion

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FLOAT, BRAIN, HALF)
HOST, GPU = "by the stand-in", "on a GPU"
HAS_GPU = torch.cuda.is_available()
Operation = Callable[..., Tensor]


@dataclass
class Place:
    """Where the tensors lie, and on the host what stands in for the extension."""

    device: torch.device
    host: HostExtension | None

    def called(self) -> list[str]:
        """The functions called so far, without those that ask for sizes."""
        assert self.host is not None
        return [name for name, _ in self.host.calls if not name.endswith("workspace")]

    def last(self, name: str) -> dict[str, Any]:
        """The arguments of the last call of a function."""
        assert self.host is not None
        return [given for called, given in self.host.calls if called == name][-1]


@contextmanager
def precision(name: str) -> Iterator[None]:
    """What PyTorch may multiply float32 as: tf32 or ieee."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(params=[HOST, GPU] if HAS_GPU else [HOST])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The extension is asked for by name, and float32 may be multiplied as TF32."""
    with precision("tf32"):
        yield from _place(request)


def _place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == GPU:
        if not hasattr(extension.part("cuda"), "lora_forward"):
            pytest.skip("the extension was built without nvcc")
        with dispatch.use_backend("cuda"):
            yield Place(torch.device("cuda", torch.cuda.current_device()), None)
        return
    functions = HostExtension()
    with extension.cuda_stand_in(functions), dispatch.use_backend("cuda"):
        yield Place(torch.device("cpu"), functions)


@pytest.fixture
def host(place: Place) -> Place:
    """What is tested is which calls are made."""
    if place.host is None:
        pytest.skip("by the stand-in")
    return place


@pytest.fixture
def gpu(place: Place) -> Place:
    """What is tested is the kernels."""
    if place.host is not None:
        pytest.skip("needs a GPU")
    return place


@dataclass
class Case:
    """One call on random inputs: x and the frozen weight in a dtype, adapters in float32."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    adapters: tuple[tuple[Tensor, Tensor] | None, ...]
    upstream: Tensor
    dropout: Dropout | None = DROPOUT
    scale: float = 0.7
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        tokens = self.x.shape[0]
        self.rows = torch.arange(tokens, dtype=torch.int32, device=self.x.device) * 4096 - 77

    @property
    def parameters(self) -> list[Tensor]:
        return [p for pair in self.adapters if pair is not None for p in pair]

    def call(
        self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        """One of lora_linear and lora_qkv, with these tensors."""
        given: dict[str, Any] = {"scale": self.scale, "dropout_row": self.rows, "dropout": self.dropout}
        if len(self.adapters) == 1:
            return module.lora_linear(x, weight, bias, *parameters, **given, **self.segments(parameters))
        pairs = iter(zip(parameters[::2], parameters[1::2], strict=True))
        adapters = tuple(None if pair is None else next(pairs) for pair in self.adapters)
        return module.lora_qkv(x, weight, bias, adapters, **given, **self.segments(parameters))

    def segments(self, parameters: tuple[Tensor, ...]) -> dict[str, Any]:
        return {}

    def run(self, module: Any = None, frozen: tuple[int, ...] = ()) -> list[Tensor | None]:
        """The output, the gradient of x, and those of the adapters. frozen: of x (0) and the adapters (1, ...)."""
        bias = None if self.bias is None else self.bias.detach()

        def function(x: Tensor, *parameters: Tensor) -> Tensor:
            wide = x.dtype if x.dtype == torch.float64 else self.weight.dtype
            b = None if bias is None else bias.to(wide)
            return self.call(module or PUBLIC, x, self.weight.detach().to(wide), b, *parameters)

        return gradients(function, [self.x, *self.parameters], self.upstream, frozen)

    def double(self) -> Case:
        pairs = tuple(None if p is None else (p[0].double(), p[1].double()) for p in self.adapters)
        return type(self)(
            self.x.double(), self.weight, self.bias, pairs, self.upstream.double(), self.dropout, self.scale
        )


class PUBLIC:
    lora_linear = staticmethod(lora_linear)
    lora_qkv = staticmethod(lora_qkv)


def make(
    place: Place,
    tokens: int,
    inputs: int,
    outputs: int,
    ranks: tuple[int | None, ...],
    dtype: torch.dtype = FLOAT,
    *,
    bias: bool = True,
    dropout: Dropout | None = DROPOUT,
    cls: type[Case] = Case,
) -> Case:
    """outputs: of each block; ranks: one a block, None without an adapter."""
    generator = torch.Generator().manual_seed(tokens + inputs)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        # Numbers that every dtype holds exactly.
        drawn = (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)
        return drawn.float().to(place.device)

    total = outputs * len(ranks)
    adapters = tuple(
        None if r is None else (random(r, inputs, scale=inputs**-0.5), random(outputs, r)) for r in ranks
    )
    return cls(
        random(tokens, inputs).to(dtype),
        random(total, inputs, scale=inputs**-0.5).to(dtype),
        random(total).to(dtype) if bias else None,
        adapters,
        random(tokens, total).to(dtype),
        dropout,
    )


def check(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The accuracy rule, against the reference."""
    plain, exact = case.run(reference), case.double().run(reference)
    with monkeypatch.context() as patch:
        poisoned(patch)
        found = case.run()
    assert_accurate(found, plain, exact, dtype)
    assert [f.dtype for f in found] == [dtype, dtype, *(p.dtype for p in case.parameters)]


# ---- accuracy ----

SIZES = [
    (1, 8, 8, 1),
    (15, 24, 16, 4),
    (17, 48, 40, 8),
    (33, 384, 384, 16),
    (129, 104, 88, 64),
    (70, 64, 136, 33),
]


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lora_linear(
    place: Place,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    *sizes, rank = size
    case = make(place, *sizes, (rank,), dtype, bias=rank != 8, dropout=dropout)
    check(case, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "ranks", [(8, 8, 8), (2, 16, 5), (4, None, 9), (None, None, 1), (33, None, None)], ids=str
)
def test_lora_qkv(
    place: Place, ranks: tuple[int | None, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(make(place, 37, 64, 64, ranks, dtype), dtype, monkeypatch)


@pytest.mark.parametrize("tokens", [16, 31, 32, 127, 128, 512])
def test_other_numbers_of_rows(place: Place, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(make(place, tokens, 32, 24, (4,), BRAIN), BRAIN, monkeypatch)


ENCODERS = [(384, 384, 3), (768, 768, 1), (768, 3072, 1), (3072, 768, 1), (1024, 1024, 3)]
"""Inputs, outputs of a block, blocks."""


@pytest.mark.parametrize("size", ENCODERS, ids=str)
def test_an_encoder_s_sizes(gpu: Place, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, outputs, blocks = size
    for dtype in DTYPES:
        for rank in (1, 4, 8, 16, 32, 64):
            check(make(gpu, 515, inputs, outputs, (rank,) * blocks, dtype), dtype, monkeypatch)


@pytest.mark.parametrize("dtype", [BRAIN, torch.float64])
def test_parameters_of_another_dtype(place: Place, dtype: torch.dtype) -> None:
    case = make(place, 20, 32, 24, (8,), BRAIN)
    usual = case.run()
    case.adapters = tuple(None if p is None else (p[0].to(dtype), p[1].to(dtype)) for p in case.adapters)
    found = case.run()
    assert bit_equal(found[:2], usual[:2])
    for f, u in zip(found[2:], usual[2:], strict=True):
        assert f.dtype == dtype
        assert torch.equal(f, u.to(dtype))


def test_the_step_may_lie_on_the_device(place: Place) -> None:
    case = make(place, 20, 32, 24, (4,), BRAIN)
    usual = case.run()
    step = torch.tensor(DROPOUT.step, device=place.device)
    case.dropout = Dropout(DROPOUT.p, DROPOUT.seed, step, DROPOUT.site)
    assert bit_equal(case.run(), usual)
    step.add_(1)
    assert not torch.equal(case.run()[0], usual[0])


def test_a_great_seed_and_step(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(place, 20, 32, 24, (4,))
    case.dropout = Dropout(0.5, 2**64 - 3, 2**32 - 1, 2**32 - 2)
    check(case, FLOAT, monkeypatch)


def test_two_runs_are_bit_equal(place: Place) -> None:
    case = make(place, 300, 128, 136, (16,), BRAIN)
    assert bit_equal(case.run(), case.run())


def test_rows_keep_to_themselves(place: Place) -> None:
    case = make(place, 150, 40, 48, (4,), BRAIN)
    expected = case.run()
    case.x[3] = float("nan")
    found = case.run()
    others = [row for row in range(150) if row != 3]
    assert torch.equal(found[0][others], expected[0][others])
    assert found[0][3].isnan().all()
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("ranks", [(1,), (8,), (1, None, 3)], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_what_it_reaches_in_the_reference(
    place: Place, ranks: tuple[int | None, ...], dropout: Dropout | None, value: float
) -> None:
    """Ranks are filled up with zeros, blocks without an adapter too, and zero times infinity is NaN."""
    for of_gradient in (False, True):
        case = make(place, 20, 32, 24, ranks, BRAIN, dropout=dropout)
        (case.upstream if of_gradient else case.x)[5, 3] = value
        for found, expected in zip(case.run(), case.double().run(reference), strict=True):
            assert torch.equal(kinds(found), kinds(expected))


@pytest.mark.parametrize("blocks", [1, 3])
def test_nothing_at_all(place: Place, blocks: int) -> None:
    output, dx, *others = make(place, 0, 32, 24, (4,) * blocks, BRAIN).run()
    assert output.shape == (0, 24 * blocks)
    assert dx.shape == (0, 32)
    assert len(others) == 2 * blocks
    assert all(not gradient.any() for gradient in others)


# ---- memory: strides, alignment, what is copied and what is kept ----


@pytest.mark.parametrize(
    "change",
    [
        lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
        lambda g: torch.cat([g[:, :3], g], 1)[:, 3:],
        lambda g: g.t().contiguous().t(),
        lambda g: g[:1].expand(*g.shape),
    ],
    ids=["apart", "misaligned", "transposed", "expanded"],
)
def test_the_gradient_s_layout_changes_nothing(place: Place, change: Callable[[Tensor], Tensor]) -> None:
    case = make(place, 20, 32, 24, (4,), BRAIN)
    laid_out = change(case.upstream)
    case.upstream = laid_out.contiguous()
    usual = case.run()
    x = case.x.detach().clone().requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in case.parameters]
    output = case.call(PUBLIC, x, case.weight, case.bias, *parameters)
    found = torch.autograd.grad(output, [x, *parameters], laid_out)
    assert bit_equal(found, usual[1:])


def test_rows_apart_are_not_copied(host: Place) -> None:
    case = make(host, 20, 32, 24, (4,), BRAIN)
    wide = torch.cat([case.upstream, case.upstream], 1)
    x = case.x.requires_grad_()
    torch.autograd.grad(case.call(PUBLIC, x, case.weight, None, *case.parameters), x, wide[:, :24])
    given = host.last("lora_low")
    assert given["grad"] == wide.data_ptr()
    assert given["grad_stride"] == 48


def test_misaligned_inputs_are_copied(place: Place) -> None:
    case = make(place, 20, 32, 24, (8,), BRAIN)
    usual = case.run()

    def moved(tensor: Tensor) -> Tensor:
        apart = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
        assert apart.data_ptr() % 16
        return apart.copy_(tensor)

    case.weight = moved(case.weight)
    found = case.run()
    assert bit_equal(found, usual)
    x = moved(case.x).requires_grad_()
    output = case.call(PUBLIC, x, case.weight, case.bias, *case.parameters)
    assert torch.equal(output, usual[0])
    assert torch.equal(torch.autograd.grad(output, x, case.upstream)[0], usual[1])


def test_adapters_that_need_no_padding_are_not_copied(host: Place) -> None:
    case = make(host, 20, 32, 24, (8,), BRAIN)
    a, b = (p.to(BRAIN).requires_grad_() for p in case.parameters)
    case.call(PUBLIC, case.x, case.weight, None, a, b)
    given = host.last("lora_forward")
    assert (given["a"], given["b"], given["weight"]) == (a.data_ptr(), b.data_ptr(), case.weight.data_ptr())
    assert (given["bias"], given["rank"]) == (0, 8)


@pytest.mark.parametrize(
    ("rank", "padded"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64)]
)
def test_ranks_are_padded(host: Place, rank: int, padded: int) -> None:
    case = make(host, 5, 16, 8, (None, rank, 1))
    case.run()
    assert host.last("lora_forward")["rank"] == padded


@pytest.mark.parametrize(
    ("frozen", "called"),
    [
        ((), ["lora_forward", "lora_low", "lora_input", "lora_grad_a"]),
        ((0,), ["lora_forward", "lora_low", "lora_grad_a"]),
        ((1,), ["lora_forward", "lora_low", "lora_input"]),
        ((2,), ["lora_forward", "lora_low", "lora_input", "lora_grad_a"]),
        ((0, 1), ["lora_forward", "lora_low"]),
        ((1, 2), ["lora_forward", "lora_low", "lora_input"]),
    ],
)
def test_only_what_is_needed_is_computed(host: Place, frozen: tuple[int, ...], called: list[str]) -> None:
    case = make(host, 20, 32, 24, (4,), BRAIN)
    everything = case.run()
    host.host.calls.clear()  # type: ignore[union-attr]
    some = case.run(frozen=frozen)
    assert host.called() == called
    assert (host.last("lora_low")["grad_b"] == 0) == (host.last("lora_low")["s"] == 0) == (2 in frozen)
    for index, (e, s) in enumerate(zip(everything, some, strict=True)):
        assert s is None if index - 1 in frozen else torch.equal(s, e)


def test_activations_are_kept_only_where_they_are_needed(place: Place) -> None:
    case = make(place, 20, 32, 24, (4,), BRAIN)
    x = case.x.requires_grad_()
    trained = [p.clone().requires_grad_() for p in case.parameters]
    constant = [p.detach() for p in case.parameters]

    def kept(*parameters: Tensor) -> set[int]:
        output = case.call(PUBLIC, x, case.weight, None, *parameters)
        return {t.data_ptr() for t in output.grad_fn.saved_tensors if t is not None}  # type: ignore[union-attr]

    assert {x.data_ptr(), case.weight.data_ptr()} <= kept(*trained)
    assert x.data_ptr() not in kept(constant[0], trained[1])
    x.requires_grad_(False)
    assert case.weight.data_ptr() not in kept(*trained)


def test_without_gradients_nothing_is_kept(place: Place) -> None:
    case = make(place, 20, 32, 24, (4,), BRAIN)
    usual = case.run()[0]
    with torch.no_grad():
        output = case.call(PUBLIC, case.x, case.weight.requires_grad_(), case.bias, *case.parameters)
    assert output.grad_fn is None
    assert torch.equal(output, usual)


# ---- groups of rows ----

BOUNDS = (0, 0, 70, 71, 150, 150)
"""Empty groups at both ends, one of one row, ends inside every tile."""


@dataclass
class Grouped(Case):
    """A call with segments; the gradients of the named parameters are those of their companions."""

    named: tuple[int, ...] | None = None
    found: dict[Tensor, Tensor] = field(default_factory=dict)

    def segments(self, parameters: tuple[Tensor, ...]) -> dict[str, Any]:
        named = range(len(parameters)) if self.named is None else self.named
        self.found = {parameters[i]: companion(parameters[i], len(BOUNDS) - 1) for i in named}
        return {"segments": Segments(BOUNDS, self.found)}

    def run(self, module: Any = None, frozen: tuple[int, ...] = ()) -> list[Tensor | None]:
        output, dx, *others = super().run(module, frozen)
        companions = [c.grad for c in self.found.values()]
        if self.named is not None:
            return [output, dx, *others, *companions]
        assert all(gradient is None for gradient in others)
        return [output, dx, *(part for c in companions for part in c.unbind())]


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN])
@pytest.mark.parametrize("ranks", [(4,), (16, None, 3)], ids=str)
def test_each_group_gets_its_own_gradient(
    place: Place, ranks: tuple[int | None, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(place, BOUNDS[-1], 32, 24, ranks, dtype, cls=Grouped)
    plain, exact = case.run(reference), case.double().run(reference)
    with monkeypatch.context() as patch:
        poisoned(patch)
        found = case.run()
    assert_accurate(found, plain, exact, dtype)
    for gradient, (low, high) in zip(found[2:], cycle(pairwise(BOUNDS)), strict=False):
        assert gradient.any() == (high > low)


def test_the_groups_parts_add_up(place: Place) -> None:
    usual = make(place, BOUNDS[-1], 32, 24, (4,)).run()
    parts = make(place, BOUNDS[-1], 32, 24, (4,), cls=Grouped).run()
    groups = len(BOUNDS) - 1
    assert bit_equal(parts[:2], usual[:2])
    for index in (0, 1):
        whole = torch.stack(parts[2 + index * groups : 2 + (index + 1) * groups]).sum(0)
        assert torch.allclose(whole, usual[2 + index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("named", [(0,), (1,), ()])
def test_a_parameter_without_a_companion_keeps_its_gradient(place: Place, named: tuple[int, ...]) -> None:
    usual = make(place, BOUNDS[-1], 32, 24, (4,)).run()
    case = make(place, BOUNDS[-1], 32, 24, (4,), cls=Grouped)
    case.named = named
    _, _, a, b, *companions = case.run()
    for index, (own, expected) in enumerate(zip((a, b), usual[2:], strict=True)):
        if index in named:
            assert own is None
            assert torch.allclose(companions.pop(0).sum(0), expected, rtol=1e-4, atol=1e-4)
        else:
            assert torch.allclose(own, expected, rtol=1e-4, atol=1e-4)


def test_one_group_is_all_rows(host: Place) -> None:
    case = make(host, 20, 32, 24, (4,), BRAIN)
    a, b = (p.requires_grad_() for p in case.parameters)
    takers = {p: companion(p, 1) for p in (a, b)}
    rest = {"dropout_row": case.rows, "dropout": DROPOUT, "segments": Segments((0, 20), takers)}
    lora_linear(case.x, case.weight, case.bias, a, b, scale=0.7, **rest).backward(case.upstream)
    assert host.last("lora_grad_a")["bounds"] == host.last("lora_low")["bounds"] == 0
    _, _, *usual = case.run()
    assert bit_equal([takers[a].grad[0], takers[b].grad[0]], usual)


# ---- torch's rules ----


def arguments(case: Case, bounds: Tensor | None) -> tuple[Any, ...]:
    """Those of the forward operator."""
    parameters = [p.clone().requires_grad_() for p in case.parameters]
    rest = [None] * (6 - len(parameters))
    groups = 1 if bounds is None else len(bounds) - 1
    takers = [None if bounds is None else companion(p, groups) for p in parameters]
    packed = lora_cuda._packed(parameters, case.weight.shape[0] // len(case.adapters), case.x)
    mask, step = lora_cuda.mask_arguments(case.dropout)
    x = case.x.detach().clone().requires_grad_()
    leaves = (*parameters, *rest, *takers, *rest)
    return (x, case.weight, case.bias, *packed, *leaves, bounds, groups, 0.7, case.rows, mask, step)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("ranks", [(4,), (8, 3, 8)], ids=str)
def test_the_operators_keep_torch_s_rules(place: Place, ranks: tuple[int, ...], grouped: bool) -> None:
    case = make(place, 5, 16, 8, ranks)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=place.device) if grouped else None
    given = arguments(case, bounds)
    torch.library.opcheck(lora_cuda._lora, given)
    x, weight, _, a, b = (None if t is None else t.detach() for t in given[:5])
    _, s = lora_cuda._lora(*given)
    constants = (bounds, given[-5], list(ranks), 0.7, case.rows, *given[-2:])
    for needs in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        kept = (x if needs[1] else None, weight if needs[0] else None, a, b, s.detach() if needs[2] else None)
        torch.library.opcheck(lora_cuda._lora_backward, (case.upstream, *kept, *constants, needs))


@pytest.mark.parametrize("ranks", [(8,), (4, None, 8)], ids=str)
def test_torch_compile_keeps_one_graph(
    place: Place, ranks: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(place, 6, 32, 24, ranks)
    usual = case.run()
    if place.host is not None:  # as on a GPU, where more is asked
        gpu = torch.compiler.assume_constant_result(lambda device: (8, 6))
        monkeypatch.setattr(extension, "capability", gpu)
        monkeypatch.setattr(extension, "architectures", lambda: ["sm_80"])

    class Compiled:
        lora_linear = staticmethod(torch.compile(lora_linear, fullgraph=True, backend="aot_eager"))
        lora_qkv = staticmethod(torch.compile(lora_qkv, fullgraph=True, backend="aot_eager"))

    assert bit_equal(case.run(Compiled), usual)


def test_forward_mode_is_refused(place: Place) -> None:
    """Torch lets tangents end in an operator without a word, as zeros."""
    case = make(place, 6, 32, 24, (4,))
    given = [case.x, *case.parameters]
    for index in range(3):

        def function(value: Tensor, index: int = index) -> Tensor:
            x, *parameters = [value if i == index else t for i, t in enumerate(given)]
            return case.call(PUBLIC, x, case.weight, case.bias, *parameters)

        with pytest.raises(NotImplementedError, match="no derivative in forward mode"):
            torch.func.jvp(function, (given[index],), (given[index],))


def test_gradients_of_gradients_are_refused(place: Place) -> None:
    case = make(place, 6, 32, 24, (4,))
    x = case.x.requires_grad_()
    output = case.call(PUBLIC, x, case.weight, case.bias, *case.parameters)
    (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear and lora_qkv can be differentiated once"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_autocast_changes_nothing(place: Place, backend: str) -> None:
    """The kernels compute in the dtype of x, and so does what PyTorch composes."""
    for ranks in ((4,), (4, None, 8)):
        case = make(place, 12, 32, 24, ranks)
        with dispatch.use_backend(backend):
            usual = case.run()
            with torch.autocast(place.device.type, dtype=BRAIN):
                found = case.run()
        assert bit_equal(found, usual)


def test_bounds_come_to_the_device_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host could not be a part of a graph: its source would be used for something else by then."""
    filled: list[int] = []
    fill = Tensor.fill_
    monkeypatch.setattr(Tensor, "fill_", lambda place, value: (filled.append(value), fill(place, value))[1])
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("copied from the host"))
    made = Segments((0, 2, 5), {})
    bounds = made.bounds_on(torch.device("cpu"))
    assert bounds.tolist() == [0, 2, 5] == filled
    assert bounds.dtype == torch.int32
    assert made.bounds_on(torch.device("cpu")) is bounds


COLD = """
import torch
from mtbert.kernels import Dropout, Segments, dispatch, lora_linear
from mtbert.kernels.segments import companion

device = torch.device("cuda", torch.cuda.current_device())
generator = torch.Generator().manual_seed(1)
def random(*shape): return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
x, a, b = (random(*shape).requires_grad_() for shape in ((300, 256), (16, 256), (192, 16)))
weight, upstream = random(192, 256), random(300, 192)
rows = torch.arange(300, dtype=torch.int32, device=device)
takers = {p: companion(p, 2) for p in (a, b)}
segments = Segments((0, 130, 300), takers)
leaves = [x, *takers.values()]

def both():
    given = {"scale": 0.5, "dropout_row": rows, "dropout": Dropout(0.1, 3, 5, 1), "segments": segments}
    with dispatch.use_backend("cuda"):
        output = lora_linear(x, weight, None, a, b, **given)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = both()
segments = Segments((0, 130, 300), takers)  # those of the graph lie in its memory
graph.replay()
torch.cuda.synchronize()
for found, expected in zip(captured, both(), strict=True):
    assert torch.equal(found, expected)
    assert found.isfinite().all()
"""


@pytest.mark.usefixtures("gpu")
def test_a_graph_is_captured_cold() -> None:
    """The first calls of a process: the kernels' code is loaded within the capture."""
    done = subprocess.run(
        [sys.executable, "-c", COLD], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_captured_graph_draws_new_masks(gpu: Place) -> None:
    case = make(gpu, 300, 768, 768, (16,), BRAIN)
    step = torch.tensor(5, device=gpu.device)
    case.dropout = Dropout(0.1, 3, step, 1)
    x = case.x.requires_grad_()
    leaves = [x, *(p.requires_grad_() for p in case.parameters)]

    def both() -> tuple[Tensor, ...]:
        output = case.call(PUBLIC, x, case.weight, case.bias, *leaves[1:])
        return (output.detach(), *torch.autograd.grad(output, leaves, case.upstream))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for value in (5, 6):
        step.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        case.dropout = Dropout(0.1, 3, value, 1)
        assert bit_equal(captured, both())


# ---- what serves ----


def select(**changes: Any) -> tuple[str, str]:
    facts = {"device": "cuda", "dtype": BRAIN, "rank": 16, "inputs": 768, "outputs": 768, "frozen": True}
    return dispatch.select("lora_linear", **(facts | changes))


UNSERVED = [
    ({"dtype": torch.float64}, "the dtype must be"),
    ({"dtype": FLOAT}, "float32 is multiplied as TF32"),
    ({"rank": 65}, "the rank must be 1 to 64"),
    ({"rank": 0}, "there must be an adapter"),
    ({"inputs": 20}, "multiples of 8"),
    ({"outputs": 12}, "multiples of 8"),
    ({"frozen": False}, "weight and bias must be frozen"),
    ({"capability": (7, 5)}, "compute capability 8.0 or higher"),
    ({"device": "cpu"}, "must be on a cuda device"),
]


def asked(**change: Any) -> str:
    """Who serves under kernels=cuda, on a made-up GPU."""
    with extension.cuda_stand_in(HostExtension()), dispatch.use_backend("cuda"):
        try:
            return select(**change)[0]
        except ConfigError:
            return "refused"


def test_whoever_asks_for_cuda_gets_the_extension() -> None:
    assert asked() == "cuda"
    with extension.cuda_stand_in(HostExtension()), dispatch.use_backend("cuda"):
        for operation in ("lora_linear", "lora_qkv"):
            for dtype in (BRAIN, HALF):
                assert dispatch.select(operation, device="cuda", dtype=dtype)[0] == "cuda"


def test_auto_composes_pytorch_s_products() -> None:
    with extension.cuda_stand_in(HostExtension()), dispatch.use_backend("auto"):
        for change in ({}, *(change for change, _ in UNSERVED), {"device": "cpu", "dtype": HALF}):
            assert select(**change)[0] in ("cpu", "torch")


@pytest.mark.parametrize(("change", "reason"), UNSERVED)
def test_whoever_asks_for_cuda_gets_it_or_the_reason(change: dict[str, Any], reason: str) -> None:
    with (
        extension.cuda_stand_in(None if change.get("device") == "cpu" else HostExtension()),
        dispatch.use_backend("cuda"),
        pytest.raises(ConfigError, match=f"kernels=cuda cannot serve lora_linear.*{reason}"),
    ):
        select(**change)


@pytest.mark.parametrize(
    ("built", "gpu", "implementation"),
    [
        (["sm_80", "sm_90a", "compute_90"], (8, 0), "cuda"),
        (["sm_80", "sm_90a", "compute_90"], (8, 9), "cuda"),
        (["sm_80", "sm_90a", "compute_90"], (9, 0), "cuda"),
        (["sm_80", "sm_90a", "compute_90"], (12, 0), "cuda"),
        (["sm_90a", "compute_90"], (8, 0), "refused"),
        (["sm_75"], (7, 5), "refused"),
    ],
)
def test_a_gpu_must_have_code(
    built: list[str], gpu: tuple[int, int], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "architectures", lambda: built)
    assert asked(capability=gpu) == implementation


@pytest.mark.parametrize(("name", "implementation"), [("tf32", "cuda"), ("ieee", "refused")])
def test_tf32_is_pytorch_s_own_setting(name: str, implementation: str) -> None:
    with precision(name):
        assert asked(dtype=FLOAT) == implementation


def test_a_trained_weight_is_not_the_extension_s(host: Place) -> None:
    case = make(host, 6, 32, 24, (4,))
    weight, bias = case.weight.clone().requires_grad_(), case.bias.clone().requires_grad_()  # type: ignore[union-attr]
    for w, b in ((weight, case.bias), (case.weight, bias)):
        with pytest.raises(ConfigError, match="weight and bias must be frozen"):
            case.call(PUBLIC, case.x, w, b, *case.parameters)
    taker = companion(case.weight, 1)
    with pytest.raises(ConfigError, match="weight and bias must be frozen"):
        lora_linear(
            case.x,
            case.weight,
            None,
            *case.parameters,
            scale=1.0,
            segments=Segments((0, 6), {case.weight: taker}),
        )
    with dispatch.use_backend("auto"):
        case.call(PUBLIC, case.x, weight, bias, *case.parameters).sum().backward()
    assert weight.grad is not None
    assert host.called() == []


def test_no_adapter_at_all_is_the_reason(host: Place) -> None:
    case = make(host, 6, 32, 24, (4, None, None))
    case.adapters = (None, None, None)
    with pytest.raises(ConfigError, match="there must be an adapter"):
        case.call(PUBLIC, case.x, case.weight, case.bias)


def test_an_encoder_runs_on_it(host: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's calls as they are: an encoder with adapters everywhere, forward and backward, beside the products."""
    from mtbert.model.bert import BertConfig, BertEncoder
    from mtbert.model.dropout import DropoutStream
    from mtbert.model.lora import PROJECTIONS, LoraConfig, add_lora

    torch.manual_seed(0)
    encoder = BertEncoder(BertConfig(60, 32, 2, 2, 64, 40))
    add_lora(encoder, LoraConfig(rank=4, dropout=0.1, projections=list(PROJECTIONS)))
    for name, parameter in encoder.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = random_batch({"sst": (5, 1, 9), "para": (12,)}, 60)

    def run() -> list[Tensor]:
        encoder.zero_grad()
        out = encoder(batch, dtype=FLOAT, dropout=DropoutStream(1, 2))
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in encoder.parameters() if p.requires_grad)]

    with dispatch.use_backend("auto"):
        expected = run()
        assert host.called() == []
        monkeypatch.setattr(sys.modules["mtbert.kernels.lora_linear"], "_select", lambda *_: "cuda")
        found = run()
    # Of each of the 2 layers' 4 products the forward pass and three calls behind; nothing trains below the first.
    assert len(host.called()) == 2 * 4 * 4 - 1
    for f, e in zip(found, expected, strict=True):
        assert torch.allclose(f, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("operation", ["lora_linear", "lora_qkv"])
def test_the_doctor_s_check_runs_on_it(host: Place, operation: str) -> None:
    (row,) = (r for r in dispatch.TABLE if (r.operation, r.implementation) == (operation, "cuda"))
    (case,) = (c for c in parity._cases("cpu") if c.operation == operation)
    for dtype in (FLOAT, BRAIN):
        found = parity._check(case, row, {"device": "cpu", "dtype": dtype})
        assert found.ok, found
    assert host.called() == 2 * ["lora_forward", "lora_low", "lora_input", "lora_grad_a"]


def test_the_doctor_names_it() -> None:
    with extension.cuda_stand_in(HostExtension()), dispatch.use_backend("cuda"):
        found = {e.operation: e for e in dispatch.explain("cuda", BRAIN)}
    assert found["lora_linear"].implementation == found["lora_qkv"].implementation == "cuda"
    assert "CUDA C++, the adapter within the product" in found["lora_linear"].reason
    assert "CUDA" not in found["linear"].reason
