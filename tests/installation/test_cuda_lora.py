"""The LoRA functions of the extension, as far as a machine without a GPU can test them: arguments and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

_C = pytest.importorskip("mtbert._C")

if not hasattr(getattr(_C, "cuda", None), "lora_forward"):
    pytest.skip("the extension was built without nvcc", allow_module_level=True)

WORD = 1 << 32


def at(place: int, byte: int = 0) -> int:
    """An address: the places are far apart."""
    return (place << 32) + byte


SHAPE: dict[str, Any] = {
    "rows": 2,
    "inputs": 32,
    "outputs": 24,
    "blocks": 1,
    "rank": 8,
    "dtype": "bfloat16",
}
MASK: dict[str, Any] = {
    "dropout_row": at(7),
    "seed": 2**64 - 1,
    "step": 5,
    "step_pointer": 0,
    "site": 3,
    "threshold": 6554,
}
PLACE: dict[str, Any] = {"device": 0, "stream": 0}
FORWARD: dict[str, Any] = {
    **{"x": at(1), "weight": at(2), "bias": at(3), "a": at(4), "b": at(5)},
    **{"out": at(6), "s": at(8), "x_stride": 32, "out_stride": 24, "scale": 2.0, "ranks": [5]},
    **SHAPE,
    **MASK,
    **PLACE,
}
GROUPS: dict[str, Any] = {"bounds": 0, "groups": 1, "workspace": at(10)}
LOW: dict[str, Any] = {
    **{"grad": at(1), "b": at(5), "s": at(8), "ds": at(9), "grad_b": at(11)},
    **{"grad_stride": 24, "scale": 2.0, "ranks": [5]},
    **GROUPS,
    **SHAPE,
    **PLACE,
}
INPUT: dict[str, Any] = {
    **{"grad": at(1), "weight": at(2), "a": at(4), "ds": at(9), "dx": at(6)},
    **{"grad_stride": 24, "dx_stride": 32},
    **SHAPE,
    **MASK,
    **PLACE,
}
GRAD_A: dict[str, Any] = {
    **{"x": at(1), "ds": at(9), "grad_a": at(11), "x_stride": 32},
    **GROUPS,
    **SHAPE,
    **MASK,
    **PLACE,
}
CALLS = {"lora_forward": FORWARD, "lora_low": LOW, "lora_input": INPUT, "lora_grad_a": GRAD_A}

ALL = list(CALLS)
MASKED = ["lora_forward", "lora_input", "lora_grad_a"]
GROUPED = ["lora_low", "lora_grad_a"]
RANKED = ["lora_forward", "lora_low"]
PRODUCTS = ["lora_forward", "lora_input"]


def ranks(function: str, values: list[int]) -> dict[str, Any]:
    """For the functions that take them."""
    return {"ranks": values} if function in RANKED else {}


BAD: list[tuple[list[str], dict[str, Any], str]] = [
    (ALL, {"rows": -1}, "rows is -1, expected 0 to"),
    (ALL, {"rows": 1 << 31}, "rows is 2147483648, expected 0 to"),
    (ALL, {"inputs": 30}, "inputs is 30, expected a multiple of 8"),
    (ALL, {"inputs": 0}, "inputs is 0, expected 8 to"),
    (ALL, {"outputs": 20}, "outputs is 20, expected a multiple of 8"),
    (ALL, {"outputs": 1 << 25}, "outputs is 33554432, expected 8 to"),
    *(([name], {"blocks": 0} | ranks(name, []), "blocks is 0, expected 1 to 3") for name in ALL),
    *(
        ([name], {"blocks": 2} | ranks(name, [5, 5]), "outputs is 24, expected equal parts, multiples")
        for name in ALL
    ),
    (ALL, {"rank": 4}, "rank is 4, expected 8, 16, 32 or 64"),
    (ALL, {"rank": 128}, "rank is 128, expected 8, 16, 32 or 64"),
    (RANKED, {"ranks": [9]}, r"ranks\[0\] is 9, expected 0 to rank 8"),
    (RANKED, {"ranks": [-1]}, r"ranks\[0\] is -1, expected 0 to rank 8"),
    (RANKED, {"ranks": [8, 8]}, "ranks has 2 elements, expected blocks, 1"),
    (RANKED, {"ranks": [8, 8, 9], "blocks": 3}, r"ranks\[2\] is 9, expected 0 to rank 8"),
    (ALL, {"device": -1}, "device is -1"),
    (ALL, {"dtype": "float64"}, "dtype is 'float64', expected float32, float16 or bfloat16"),
    (["lora_forward", "lora_low"], {"scale": float("nan")}, "scale is -?nan, expected a finite number"),
    (["lora_forward", "lora_low"], {"scale": float("inf")}, "scale is inf, expected a finite number"),
    (
        ["lora_forward", "lora_low"],
        {"scale": 1e39},
        "expected a finite number, with that of dropout in float32",
    ),
    (["lora_forward"], {"scale": 1e37, "threshold": 65535}, "expected a finite number, with that of dropout"),
    (MASKED, {"threshold": 65536}, "threshold is 65536, expected 0 to 65535"),
    (MASKED, {"site": -1}, "site is -1, expected 0 to 4294967295"),
    (MASKED, {"step": WORD}, "step is 4294967296, expected 0 to 4294967295"),
    (MASKED, {"dropout_row": 0}, "dropout_row is a null pointer"),
    (MASKED, {"dropout_row": at(7, 2)}, "dropout_row is not aligned to 4 bytes"),
    (MASKED, {"step_pointer": at(15, 4), "step": -1}, "step_pointer is not aligned to 8 bytes"),
    (["lora_forward", "lora_grad_a"], {"x": 0}, "x is a null pointer"),
    (["lora_forward", "lora_grad_a"], {"x": at(1, 8)}, "x is not aligned to 16 bytes"),
    (["lora_forward", "lora_grad_a"], {"x_stride": 24}, "x_stride is 24, expected 32 to"),
    (
        ["lora_forward", "lora_grad_a"],
        {"x_stride": 36},
        "x_stride is 36, expected a multiple of 8 for bfloat16",
    ),
    (["lora_forward"], {"out_stride": 16}, "out_stride is 16, expected 24 to"),
    (["lora_forward"], {"out_stride": 26, "dtype": "float32"}, "a multiple of 4 for float32"),
    (["lora_forward"], {"weight": 0}, "weight is a null pointer"),
    (["lora_forward"], {"bias": at(3, 1)}, "bias is not aligned to 2 bytes"),
    (["lora_forward"], {"a": 0}, "a is a null pointer"),
    (["lora_forward"], {"b": at(5, 4)}, "b is not aligned to 16 bytes"),
    (["lora_forward"], {"s": 0}, "s is a null pointer"),
    (["lora_forward"], {"out": at(1)}, "out overlaps x"),
    (["lora_forward"], {"out": at(2, 16)}, "out overlaps weight"),
    (["lora_forward"], {"s": at(6)}, "out overlaps s"),
    (["lora_forward"], {"s": at(7)}, "s overlaps dropout_row"),
    (["lora_forward"], {"out": at(3)}, "out overlaps bias"),
    (["lora_forward"], {"kernel": "sm70"}, "kernel is 'sm70', expected auto, sm80, sm80_split, sm90 or"),
    (["lora_input"], {"kernel": "sm90_split"}, "kernel is one of two steps, expected auto, sm80 or sm90"),
    (["lora_low", "lora_input"], {"grad": 0}, "grad is a null pointer"),
    (["lora_low", "lora_input"], {"grad_stride": 8}, "grad_stride is 8, expected 24 to"),
    (["lora_input"], {"dx": at(1)}, "dx overlaps grad"),
    (["lora_input"], {"dx_stride": 33}, "dx_stride is 33, expected a multiple of 8"),
    (["lora_input"], {"ds": 0}, "ds is a null pointer"),
    (["lora_low"], {"s": 0}, "s is a null pointer"),
    (["lora_low"], {"ds": at(8)}, "ds overlaps s"),
    (["lora_low"], {"grad_b": at(9)}, "ds overlaps grad_b"),
    (["lora_grad_a"], {"grad_a": at(1)}, "grad_a overlaps x"),
    (["lora_grad_a"], {"grad_a": 0}, "grad_a is a null pointer"),
    (GROUPED, {"groups": 0}, "groups is 0, expected 1 to 65535"),
    (GROUPED, {"groups": 3}, "bounds is a null pointer, expected one for groups 3"),
    (GROUPED, {"groups": 3, "bounds": at(12, 1)}, "bounds is not aligned to 4 bytes"),
]


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [(function, change, message) for functions, change, message in BAD for function in functions],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_named(function: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(_C.cuda, function)(**{**CALLS[function], **change})


@pytest.mark.parametrize("function", CALLS)
def test_the_message_names_the_function(function: str) -> None:
    with pytest.raises(ValueError, match=f"^{function}: rank is 9"):
        getattr(_C.cuda, function)(**{**CALLS[function], "rank": 9})


SM90_BUILT = "sm_90a" in _C.build_info()["cuda"]["architectures"]
MOST = 1 << 30
UNSERVED: list[tuple[list[str], dict[str, Any], str]] = [
    (PRODUCTS, {"dtype": "float32"}, "dtype is float32, expected float16 or bfloat16 with kernel sm90"),
    (PRODUCTS, {"rows": MOST + 1}, "rows is 1073741825, expected at most 1073741824 with kernel sm90"),
    (
        ["lora_forward"],
        {"rows": 1 << 26, "outputs": 1 << 19},
        "rows 67108864 and outputs 524288 are 2147483648 tiles, expected at most 1073741824 with kernel sm90",
    ),
    (
        ["lora_input"],
        {"rows": 1 << 26, "inputs": 1 << 19},
        "rows 67108864 and inputs 524288 are 2147483648 tiles, expected at most 1073741824 with kernel sm90",
    ),
]


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [(function, change, message) for functions, change, message in UNSERVED for function in functions],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_why_the_sm90_kernels_do_not_serve(function: str, change: dict[str, Any], message: str) -> None:
    """Each refusal has its own reason; what is too much for the one product is none of the other's."""
    if not SM90_BUILT:
        message = "kernel is sm90, but the extension was built without sm_90a"
    with pytest.raises(ValueError, match=f"^{function}: {message}$"):
        getattr(_C.cuda, function)(**{**CALLS[function], **change, "kernel": "sm90"})
    plan = {key: CALLS[function][key] for key in (*SHAPE, "threshold")} | change
    planned = _C.cuda.lora_plan(architecture=90, **plan)
    part, other = ("forward", "input") if function == "lora_forward" else ("input", "forward")
    assert planned[part].startswith("sm80")
    assert "outputs" not in change or planned[other] == ("sm90" if SM90_BUILT else "sm80")


GOOD: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CALLS),
    *((name, {"rows": 0}) for name in CALLS),
    *((name, {"kernel": "sm80"}) for name in PRODUCTS),
    *((name, {"kernel": "sm90"}) for name in PRODUCTS if SM90_BUILT),
    # Without dropout nothing else of the mask is looked at.
    *((name, {"threshold": 0, "dropout_row": 0, "step": -1, "site": -1}) for name in MASKED),
    *((name, {"step_pointer": at(15), "step": -1}) for name in MASKED),
    ("lora_forward", {"bias": 0}),
    ("lora_forward", {"bias": at(3, 2)}),
    # x and out as columns of one matrix.
    ("lora_forward", {"x_stride": 56, "out_stride": 56, "out": at(1, 64)}),
    ("lora_low", {"grad_b": 0, "s": 0}),
    *((name, {"groups": 3, "bounds": at(13, 4)}) for name in GROUPED),
    *((name, {"dtype": "float32", "blocks": 3, "rank": 64} | ranks(name, [64, 0, 1])) for name in CALLS),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("function", "change"), GOOD, ids=str)
def test_without_a_gpu_the_error_has_its_cuda_name(function: str, change: dict[str, Any]) -> None:
    """Good arguments come as far as the first call of the CUDA runtime."""
    with pytest.raises(RuntimeError, match=rf"^cudaError\w+: .*\(cuda\w+ in {function}\)$"):
        getattr(_C.cuda, function)(**{**CALLS[function], **change})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_host_memory_is_refused() -> None:
    x = torch.zeros(8, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="lora_forward: x is host memory"):
        _C.cuda.lora_forward(**{**FORWARD, "x": x.data_ptr()})


@pytest.mark.parametrize("function", ["lora_low_workspace", "lora_grad_a_workspace"])
def test_workspaces(function: str) -> None:
    ask = getattr(_C.cuda, function)
    sizes = [ask(**SHAPE, groups=groups) for groups in (1, 4)]
    assert all(isinstance(size, int) and size >= 0 for size in sizes)
    assert ask(**{**SHAPE, "rows": 0}, groups=3) == 0
    for change, message in (({"rank": 9}, "rank is 9"), ({"groups": 0}, "groups is 0")):
        with pytest.raises(ValueError, match=f"{function}: {message}"):
            ask(**{**SHAPE, "groups": 1, **change})


def test_the_plan() -> None:
    shape = {**SHAPE, "rows": 8192, "inputs": 768, "outputs": 3072, "threshold": 6554}
    assert _C.cuda.lora_plan(architecture=80, **shape) == {"forward": "sm80_split", "input": "sm80"}
    few = {**shape, "rows": 64}
    assert _C.cuda.lora_plan(architecture=86, **few) == {"forward": "sm80", "input": "sm80"}
    name = "sm90" if SM90_BUILT else "sm80"
    assert _C.cuda.lora_plan(architecture=90, **few) == {"forward": name, "input": name}
    assert _C.cuda.lora_plan(architecture=90, **few | {"dtype": "float32"})["input"] == "sm80"


def test_every_function_says_what_it_does() -> None:
    for name in (*CALLS, "lora_low_workspace", "lora_grad_a_workspace", "lora_plan"):
        assert len(getattr(_C.cuda, name).__doc__.split("\n", 2)[-1]) > 20
