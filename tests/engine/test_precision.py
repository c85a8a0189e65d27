"""What each precision computes in which type, operation by operation, and that bf16 trains as float32 does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.assembly import assemble, tiny_config
from torch import Tensor

from bench.precision_curves import BF16, BROKEN, FLOAT32, KINDS, gap, loss_curve
from mtbert import kernels
from mtbert.engine.precision import (
    DTYPES,
    compute_dtype,
    has_fast_bf16,
    precision_elsewhere,
    product_settings,
    resolve_precision,
)
from mtbert.errors import ConfigError
from mtbert.kernels.head_linear import head_linear
from mtbert.kernels.segments import Segments, companion
from mtbert.model.heads import HeadConfig
from mtbert.tasks.config import TaskConfig

CPU = torch.device("cpu")
NARROW = [torch.bfloat16, torch.float16]
TOKENS, WIDTH = 12, 32


@dataclasses.dataclass
class Call:
    """An operation on x [TOKENS, WIDTH] with float32 parameters, of which the first is looked at."""

    parameters: list[Tensor]
    output: Tensor
    segments: Segments


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def calls(x: Tensor) -> Iterator[tuple[str, Call]]:
    """Every operation with parameters, whose gradients are wanted by two groups of tokens."""
    rows = torch.arange(TOKENS, dtype=torch.int32)
    ids = rows % 5
    gain, bias, other = parameter(WIDTH), parameter(WIDTH), parameter(WIDTH)
    square, low, high = parameter(WIDTH, WIDTH), parameter(4, WIDTH), parameter(WIDTH, 4)
    tables = (parameter(40, WIDTH), parameter(64, WIDTH), parameter(2, WIDTH))
    by_head, heads = parameter(2, WIDTH // 2, WIDTH // 2), x.view(TOKENS, 2, WIDTH // 2)

    def with_segments(*taken: Tensor) -> Segments:
        return Segments((0, 5, TOKENS), {p: companion(p, 2) for p in taken})

    s = with_segments(square, bias)
    yield "linear", Call([square, bias], kernels.linear(x, square, bias, segments=s), s)
    s = with_segments(by_head)
    yield "head_linear", Call([by_head], head_linear(heads, by_head, None, segments=s), s)
    s = with_segments(low, high)
    adapted = kernels.lora_linear(x, square.detach(), None, low, high, scale=2.0, segments=s)
    yield "lora_linear", Call([low, high], adapted, s)
    s = with_segments(gain, bias, other)
    normed = kernels.add_layer_norm(x, x, gain, bias, linear_bias=other, eps=1e-12, segments=s)
    yield "add_layer_norm", Call([gain, bias, other], normed, s)
    s = with_segments(bias)
    yield "bias_gelu", Call([bias], kernels.bias_gelu(x, bias, segments=s), s)
    s = with_segments(*tables, gain, bias)
    looked_up = kernels.embedding(
        ids, ids % 2, rows, tables, gain, bias, eps=1e-12, dtype=x.dtype, segments=s
    )
    yield "embedding", Call([*tables, gain, bias], looked_up + 0 * x, s)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_activations_are_narrow_and_gradients_of_weights_float32(precision: str) -> None:
    dtype = DTYPES[precision]  # type: ignore[index]
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    seen = []
    for name, call in calls(x):
        seen.append(name)
        assert call.output.dtype == dtype, name
        companions = [call.segments.companions[p] for p in call.parameters]
        found = torch.autograd.grad(call.output.float().square().sum(), [x, *companions], allow_unused=True)
        assert found[0].dtype == dtype, name
        for gradient in found[1:]:
            assert gradient.dtype == torch.float32, name
    for name, output in (
        (
            "attention",
            kernels.attention(
                x.repeat(1, 3).view(TOKENS, 3, 2, 16),
                torch.tensor([0, 5, 12], dtype=torch.int32),
                32,
                scale=0.25,
            ),
        ),
        (
            "first_token_attention",
            kernels.first_token_attention(
                x[:2].view(2, 2, 16),
                x.repeat(1, 2).view(TOKENS, 2, 2, 16),
                torch.tensor([0, 5, 12], dtype=torch.int32),
                32,
                scale=0.25,
            ),
        ),
        ("softmax", kernels.softmax(x)),
        (
            "dropout",
            kernels.dropout(x, torch.arange(TOKENS, dtype=torch.int32), kernels.Dropout(0.1, 1, 2, 3)),
        ),
    ):
        seen.append(name)
        assert output.dtype == dtype, name
    assert {*seen, "lora_qkv"} == set(
        kernels.dispatch.OPERATIONS
    )  # lora_qkv is lora_linear with three adapters


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sums_and_statistics_are_float32(dtype: torch.dtype, backend: str) -> None:
    """Inputs whose sums or squares neither narrow type can hold: each answer is right to its rounding.

    The reference leaves the sum over rows behind a bias to PyTorch's own products, in the dtype of x.
    """
    with kernels.dispatch.use_backend(backend):
        if backend == "auto":
            rows = 5000
            bias = torch.zeros(16, requires_grad=True)
            x = torch.zeros(rows, 16, dtype=dtype)
            out = kernels.linear(x, torch.eye(16), bias)
            (gradient,) = torch.autograd.grad(out, bias, torch.full_like(x, 17.0))
            assert torch.equal(gradient, torch.full((16,), 17.0 * rows))  # 85,000: no float16

        # A mean of 257 and a deviation of 1, and squares of 66,049.
        spread = torch.tensor([256.0, 258.0], dtype=dtype).repeat(4, 16)
        ones, zeros = torch.ones(32), torch.zeros(32)
        normed = kernels.add_layer_norm(spread, torch.zeros_like(spread), ones, zeros, eps=1e-12)
        assert torch.equal(normed.float(), torch.tensor([-1.0, 1.0]).repeat(4, 16))

        equal = torch.zeros(512, 3, 2, 16, dtype=dtype)
        equal[:, 2] = 1.0
        attended = kernels.attention(equal, torch.tensor([0, 512], dtype=torch.int32), 512, scale=0.25)
        torch.testing.assert_close(attended.float(), torch.ones(512, 2, 16), rtol=0, atol=0.01)

        even = kernels.softmax(torch.zeros(2, 3000, dtype=dtype)).float()
        torch.testing.assert_close(even, torch.full_like(even, 1 / 3000), rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_everything_behind_the_encoder_is_float32(
    tiny_bert: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    poolings = {"sst": "mean", "para": "pooler", "sts": "cls"}
    tasks = {
        name: TaskConfig(batch_size=6, max_length=64, head=HeadConfig(pooling=pooling))  # type: ignore[arg-type]
        for name, pooling in poolings.items()
    }
    assembly = assemble(tiny_config(tiny_bert, tmp_path, task=tasks), dtype=dtype)
    hidden = []
    for layer in assembly.model.encoder.layers:
        layer.register_forward_hook(lambda _, __, output: hidden.append(output.dtype))
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    result = assembly.step(plan, 0)
    assert set(hidden) == {dtype}
    figures = [
        *result.losses.values(),
        result.total,
        result.grad_norm,
        *(loss for _, loss in result.examples),
    ]
    assert {figure.dtype for figure in figures} == {torch.float32}
    for name, weight in assembly.model.named_parameters():
        assert weight.dtype == torch.float32, name
        assert weight.grad is None or weight.grad.dtype == torch.float32, name
    for state in assembly.step.optimizer.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}


def test_a_mean_over_many_tokens_is_summed_in_float32(tiny_bert: Path, tmp_path: Path) -> None:
    """600 tokens of 300 in float16 are 180,000, beyond it."""
    from mtbert.model.pooling import pool

    assembly = assemble(tiny_config(tiny_bert, tmp_path))

    @dataclasses.dataclass
    class Batch:
        cu_seqlens: Tensor
        input_ids: Tensor

    @dataclasses.dataclass
    class Rows:
        rows: range
        tokens: range

    batch = Batch(torch.tensor([0, 600], dtype=torch.int32), torch.zeros(600))
    hidden = torch.full((600, 4), 300.0, dtype=torch.float16)
    pooled = pool("mean", assembly.model.encoder, hidden, batch, [Rows(range(1), range(600))])  # type: ignore[arg-type,list-item]
    assert torch.equal(pooled, torch.full((1, 4), 300.0))


# ---- what a device can do, and what PyTorch is told ----


def test_a_precision_that_the_device_lacks_names_those_that_it_has() -> None:
    native = "bf16 or float32" if has_fast_bf16(CPU) else "float32"
    with pytest.raises(ConfigError, match=rf"precision: tf32 needs a GPU .* possible: {native}$"):
        resolve_precision("tf32", CPU)
    assert [precision_elsewhere(p, CPU) for p in ("tf32", "fp16")] == ["float32", "fp16"]
    assert compute_dtype("fp16", CPU) == torch.float16
    assert resolve_precision("auto", CPU) == ("bf16" if has_fast_bf16(CPU) else "float32")


class OldGpu:
    """A GPU of compute capability 7.5, as torch.cuda describes it."""

    type = "cuda"


def test_an_old_gpu_is_offered_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    gpu: torch.device = OldGpu()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="T4 is older; possible: float32"):
        resolve_precision("tf32", gpu)
    with pytest.raises(ConfigError, match="T4 has no bfloat16; possible: fp16 or float32"):
        resolve_precision("bf16", gpu)
    assert resolve_precision("fp16", gpu) == "fp16"
    assert resolve_precision("auto", gpu) == "float32"


@contextmanager
def process_setting(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def settings() -> tuple[str, str, bool]:
    cuda = torch.backends.cuda.matmul
    return (
        cuda.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
        cuda.allow_fp16_reduced_precision_reduction,
    )


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_float32_is_float32_whatever_the_process_was_set_to(before: str) -> None:
    with process_setting(before):
        found = settings()
        for precision in DTYPES:
            with product_settings(precision):
                inside = settings()
                assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
            assert inside[0] == ("tf32" if precision == "tf32" else "ieee")
            assert inside[2] == (precision != "fp16")
            assert settings() == found


def test_float32_products_are_exact_where_the_process_allows_less() -> None:
    """`medium` lets oneDNN multiply float32 as bfloat16 where the processor has it."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    with process_setting("medium"):
        coarse = (a @ b - exact).abs().max()
        with product_settings("float32"):
            fine = (a @ b - exact).abs().max()
    assert fine < 1e-3
    assert coarse > 10 * fine or not has_fast_bf16(CPU)


# ---- training ----


def test_bf16_trains_as_float32_does_and_bf16_master_weights_would_not(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """On the sample, the smoothed losses stay within 0.002 of float32's, a fiftieth of what they fall by.

    Beside it a broken path, whose master weights are bfloat16: it leaves the band by a factor.
    """
    curves = {}
    for kind, (precision, after_step) in KINDS.items():
        config = tiny_config(tiny_bert, tmp_path, precision=precision)
        config.optim.lr = 2e-4
        curves[kind] = [loss_curve(config, 50, after_step)]
    band = 0.002
    assert gap(curves[BF16], curves[FLOAT32]) < band
    assert gap(curves[BROKEN], curves[FLOAT32]) > 3 * band
    assert curves[FLOAT32][0][0] - min(curves[FLOAT32][0]) > 50 * band
