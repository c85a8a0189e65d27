"""The LoRA functions of mtbert._C.cuda by the sm_80 kernels' own source, on the emulated machine of tests/emulation."""

from __future__ import annotations

from typing import Any

import torch
from support.emulation import load

DTYPES = ("bfloat16", "float16", "float32")


class EmulatedExtension:
    """Stands in for mtbert._C.cuda with the fused kernels: `kernels.extension.cuda_stand_in(EmulatedExtension())`.

    order: that of the emulated threads, as the emulation takes it.
    """

    def __init__(self, order: int = 0) -> None:
        self.order = order
        self.calls: list[str] = []
        self._library = load("lora_sm80_entry.cpp")

    def _call(self, name: str, given: dict[str, Any], *arguments: Any) -> None:
        self.calls.append(name)
        call = [
            self.order,
            DTYPES.index(given["dtype"]),
            *(given[key] for key in ("rows", "inputs", "outputs", "blocks", "rank")),
            given.get("x_stride", given.get("dx_stride", given["inputs"])),
            given.get("out_stride", given.get("grad_stride", given["outputs"])),
            given.get("groups", 1),
            given.get("threshold", 0),
            _signed(given.get("seed", 0)),
            given.get("step", 0),
            given.get("site", 0),
            *(*given.get("ranks", ()), 0, 0, 0)[:3],
        ]
        # Addresses are integers here; the library takes them as pointers.
        self._library.call(name, torch.tensor(call, dtype=torch.int64), *arguments)

    def lora_forward(self, **g: Any) -> None:
        tensors = [g[key] for key in ("x", "weight", "bias", "a", "b", "out", "s")]
        fused = 0
        self._call("lora_forward", g, fused, g["scale"], *tensors, g["dropout_row"], g["step_pointer"])

    def lora_low(self, **g: Any) -> None:
        tensors = [g[key] for key in ("grad", "b", "s", "ds", "grad_b", "bounds")]
        self._call("lora_low", g, g["scale"], *tensors)

    def lora_input(self, **g: Any) -> None:
        tensors = [g[key] for key in ("grad", "weight", "a", "ds", "dx", "dropout_row", "step_pointer")]
        self._call("lora_input", g, *tensors)

    def lora_grad_a(self, **g: Any) -> None:
        tensors = [g[key] for key in ("x", "ds", "grad_a", "bounds", "dropout_row", "step_pointer")]
        self._call("lora_grad_a", g, *tensors)

    def lora_low_workspace(self, **_: Any) -> int:
        """The library has its own."""
        return 0

    lora_grad_a_workspace = lora_low_workspace


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
