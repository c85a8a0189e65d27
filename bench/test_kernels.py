"""Each kernel beside its peers and the speed of memory; on a CPU small, so that the harness is always exercised."""

from __future__ import annotations

from typing import Any

import pytest

from bench.kernels.session import Kernels
from bench.kernels.shapes import MINILM
from mtbert.engine.precision import resolve_device

TOKENS = {"cuda": (8192, 16384, 32768, 65536), "cpu": (256,)}
OPERATIONS = (
    "attention",
    "first_token_attention",
    "add_layer_norm",
    "bias_gelu",
    "linear_bias_gelu",
    "embedding",
    "softmax",
    "dropout",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each number of tokens."""
    if "tokens" in metafunc.fixturenames:
        option = metafunc.config.getoption
        device = resolve_device(option("--device"))
        metafunc.parametrize("tokens", (option("--tokens"),) if option("--tokens") else TOKENS[device.type])


def test_attention_in_long_rows(kernels: Kernels, benchmark: Any, tokens: int) -> None:
    kernels.compare(kernels.plan("attention", max(tokens, 1024), rows="reviews"), benchmark)


def test_encoder_layer(kernels: Kernels, benchmark: Any, tokens: int) -> None:
    kernels.compare(kernels.plan("encoder_layer", tokens), benchmark)


@pytest.mark.parametrize("backward", [True, False], ids=["both", "forward"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel(kernels: Kernels, benchmark: Any, operation: str, tokens: int, backward: bool) -> None:
    kernels.compare(kernels.plan(operation, tokens, backward=backward), benchmark)


@pytest.mark.parametrize("operation", ["attention", "add_layer_norm", "bias_gelu"])
def test_kernel_of_minilm(kernels: Kernels, benchmark: Any, operation: str, tokens: int) -> None:
    kernels.compare(kernels.plan(operation, tokens, encoder=MINILM), benchmark)
