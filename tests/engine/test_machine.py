"""What a run computes on, and what it says when the memory is too small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.assembly import tiny_config

from mtbert.engine.build import prepare_machine
from mtbert.engine.interruptions import memory_errors
from mtbert.engine.precision import compute_dtype, has_fast_bf16, resolve_device
from mtbert.errors import ConfigError, UserError
from mtbert.kernels import dispatch

CPU = torch.device("cpu")


def test_auto_precision_follows_the_hardware() -> None:
    assert compute_dtype("auto", CPU) == (torch.bfloat16 if has_fast_bf16(CPU) else torch.float32)
    assert compute_dtype("float32", CPU) == torch.float32
    assert compute_dtype("bf16", CPU) == torch.bfloat16


def test_an_absent_device_is_named() -> None:
    with pytest.raises(ConfigError, match=r"device: expected auto, cpu, cuda or cuda:N, found 'gpu9'"):
        resolve_device("gpu9")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ],
)
def test_running_out_of_memory_names_the_token_budget(error: Exception) -> None:
    with (
        pytest.raises(UserError, match="out of memory with a token budget of 777 tokens"),
        memory_errors(777),
    ):
        raise error


def test_other_runtime_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors(777):
        raise RuntimeError("shapes do not match")


def test_the_environment_chooses_the_kernels_unless_the_configuration_does(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTBERT_KERNELS", "reference")
    try:
        prepare_machine(tiny_config(tiny_bert, tmp_path))
        assert dispatch.backend() == "reference"
        prepare_machine(tiny_config(tiny_bert, tmp_path, kernels="cpu"))
        assert dispatch.backend() == "cpu"
    finally:
        dispatch.set_backend(None)
