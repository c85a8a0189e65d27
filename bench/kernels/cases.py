"""Which calls make up the compile report, and the launches that they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest import mock

import torch

from bench.kernels.calls import OPERATIONS, Setting
from bench.kernels.compile import Variant, variant_of
from bench.kernels.shapes import BERT_BASE, LONGEST, MINILM, NARROW_HEADS, WIDE_HEADS, Encoder
from mtbert.kernels import dispatch
from mtbert.kernels.triton_ops.launch import Launch, recorded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUICK_LONGEST = (32, 64, 128, 512)
_LENGTHS = (5, 16, 0, 9, 12)


def plain(encoder: Encoder, dtype: torch.dtype = torch.bfloat16, max_seqlen: int = 32) -> Setting:
    """A training step's call: dropout, all parameters trained, no segments."""
    return Setting(encoder, _LENGTHS, max_seqlen, dtype, random=False)


def quick_cases() -> Iterator[tuple[str, Setting]]:
    """Operation and setting of what a bf16 training step of bert-base and of MiniLM launches."""
    for encoder in (BERT_BASE, MINILM):
        for longest in QUICK_LONGEST:
            yield "attention", plain(encoder, max_seqlen=longest)
        for operation in ("first_token_attention", "add_layer_norm", "bias_gelu", "embedding", "dropout"):
            yield operation, plain(encoder)


def all_cases() -> Iterator[tuple[str, Setting]]:
    """Operation and setting of everything that changes the code."""
    yield from quick_cases()
    for dtype in DTYPES:
        for encoder in (BERT_BASE, MINILM, NARROW_HEADS, WIDE_HEADS):
            for longest in LONGEST:
                yield from _with_and_without_dropout("attention", plain(encoder, dtype, longest))
            yield from _with_and_without_dropout("first_token_attention", plain(encoder, dtype))
        for longest in (*LONGEST, 8192):
            yield from _with_and_without_dropout("softmax", plain(BERT_BASE, dtype, longest))
        for encoder in (BERT_BASE, MINILM):
            setting = plain(encoder, dtype)
            yield "dropout", setting
            for operation in ("add_layer_norm", "bias_gelu", "embedding"):
                yield from _with_and_without_dropout(operation, setting)
                yield operation, replace(setting, groups=3)
                yield operation, replace(setting, trained=False)
                if dtype == torch.bfloat16:
                    yield operation, replace(setting, parameters=torch.bfloat16)
            yield "embedding", replace(setting, groups=3, slots=True)
    for operation in OPERATIONS:
        for encoder in (BERT_BASE, MINILM):
            yield operation, replace(plain(encoder), step_on_device=True)


def _with_and_without_dropout(operation: str, setting: Setting) -> Iterator[tuple[str, Setting]]:
    yield operation, setting
    yield operation, replace(setting, p=0.0)


def label(operation: str, setting: Setting) -> str:
    """What tells a case from others."""
    encoder = setting.encoder
    words = {
        "attention": [f"heads of {encoder.head_dim}", f"max_seqlen {setting.max_seqlen}"],
        "first_token_attention": [f"heads of {encoder.head_dim}"],
        "bias_gelu": [f"width {encoder.inner}"],
        "softmax": [f"width {setting.max_seqlen}"],
    }.get(operation, [f"width {encoder.width}"])
    words.append(str(setting.dtype).removeprefix("torch."))
    if setting.p == 0.0 and operation != "bias_gelu":
        words.append("no dropout")
    if setting.groups:
        words.append("segments, slots" if setting.slots else "segments")
    if not setting.trained:
        words.append("frozen")
    if setting.parameters != torch.float32:
        words.append("bfloat16 parameters")
    if setting.step_on_device:
        words.append("step on the device")
    return ", ".join(words)


def launches_of(operation: str, setting: Setting) -> list[Launch]:
    """What a call launches, forward and backward: on tensors in host memory, and without making the launches."""
    # On a GPU dispatch would choose Triton for these tensors; here it has to be told.
    told = mock.patch.object(dispatch, "triton_interpreted", return_value=True)
    with told, dispatch.use_backend("triton"), recorded() as launches:
        OPERATIONS[operation](setting).both()
    return launches


def distinct(cases: Sequence[tuple[str, Setting]]) -> dict[tuple[str, str], tuple[Variant, list[str]]]:
    """The variants of all launches, each once, with the labels of the cases that need it."""
    found: dict[tuple[str, str], tuple[Variant, list[str]]] = {}
    for operation, setting in cases:
        name = label(operation, setting)
        for launch in launches_of(operation, setting):
            variant = variant_of(launch)
            labels = found.setdefault((variant.kernel, variant.key), (variant, []))[1]
            if name not in labels:
                labels.append(name)
    return found
