"""The CUDA half of the extension, as far as it can be tested on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

_C = pytest.importorskip("mtbert._C")

if not hasattr(_C, "cuda"):
    pytest.skip("the extension was built without nvcc", allow_module_level=True)

ARGUMENTS: dict[str, Any] = {
    "input": 256,
    "output": 512,
    "dropout_row": 1024,
    "rows": 2,
    "columns": 8,
    "input_stride": 8,
    "output_stride": 8,
    "dtype": "float32",
    "seed": 1,
    "step": 2,
    "site": 3,
    "threshold": 6554,
    "device": 0,
    "stream": 0,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_has_its_cuda_name() -> None:
    with pytest.raises(RuntimeError, match=r"^cudaError\w+: .*\(cuda\w+ in dropout\)$"):
        _C.cuda.dropout(**ARGUMENTS)
    info = _C.cuda.driver_info()
    assert info["devices"] == []
    assert info["error"].startswith("cudaError")
    assert info["runtime_version"] >= 11000


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rows", -1, "rows is -1, expected 0 to"),
        ("columns", -8, "columns is -8, expected 0 to"),
        ("input_stride", 7, "input_stride is 7, expected 8 to"),
        ("output_stride", 7, "output_stride is 7, expected 8 to"),
        ("step", 1 << 32, "step is 4294967296, expected 0 to 4294967295"),
        ("site", -1, "site is -1"),
        ("threshold", 65536, "threshold is 65536, expected 0 to 65535"),
        ("device", -1, "device is -1"),
        ("dtype", "float64", "dtype is 'float64', expected float32, float16 or bfloat16"),
    ],
)
def test_bad_arguments_are_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.cuda.dropout(**{**ARGUMENTS, name: value})


def test_in_place_needs_equal_strides() -> None:
    with pytest.raises(ValueError, match="in place"):
        _C.cuda.dropout(**{**ARGUMENTS, "output": ARGUMENTS["input"], "output_stride": 16})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("columns", "stride"), [(384, 384), (384, 392), (61, 64), (61, 61)])
def test_a_gpu_draws_the_mask_of_the_reference(dtype: torch.dtype, columns: int, stride: int) -> None:
    from mtbert.kernels import Dropout, reference

    dropout = Dropout(p=0.1, seed=(1 << 63) + 5, step=9, site=4)
    storage = torch.randn(33, stride, dtype=dtype, device="cuda")
    x = storage[:, :columns]
    out = torch.full((33, stride), float("nan"), dtype=dtype, device="cuda")
    rows = torch.arange(33, dtype=torch.int32, device="cuda") * 4096 - 7
    _C.cuda.dropout(
        input=x.data_ptr(),
        output=out.data_ptr(),
        dropout_row=rows.data_ptr(),
        rows=33,
        columns=columns,
        input_stride=stride,
        output_stride=stride,
        dtype=str(dtype).removeprefix("torch."),
        seed=dropout.seed,
        step=dropout.step,
        site=dropout.site,
        threshold=dropout.threshold,
        device=0,
        stream=torch.cuda.current_stream().cuda_stream,
    )
    expected = reference.dropout(x.cpu().contiguous(), rows.cpu(), dropout)
    assert torch.equal(out[:, :columns].cpu(), expected)
    assert out[:, columns:].isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_host_memory_is_refused() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="input is host memory"):
        _C.cuda.dropout(**{**ARGUMENTS, "input": x.data_ptr()})
