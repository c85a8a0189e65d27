"""What a call of a bench setting needs at least, by the formulas of `mtbert.engine.costs`.

`traffic.py` has what mtbert's Triton kernels move beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.kernels.calls import Setting
from mtbert.engine import costs
from mtbert.engine.costs import Cost


def _tokens(s: Setting) -> dict[str, Any]:
    return {"tokens": s.tokens, "width": s.encoder.width, "size": s.dtype.itemsize}


def _rows(s: Setting) -> dict[str, Any]:
    return {
        "lengths": s.lengths,
        "heads": s.encoder.heads,
        "size": s.dtype.itemsize,
        "masked": s.p > 0,
    }


def _parameters(s: Setting) -> dict[str, Any]:
    return {"parameter": s.parameters.itemsize, "groups": s.groups, "trained": s.trained}


def _embedding(s: Setting, words: int) -> Cost:
    e = s.encoder
    return costs.embedding(
        **_tokens(s),
        **_parameters(s),
        words=words,
        longest=max(s.lengths),
        tables=(e.vocabulary, e.positions, e.types),
        masked=s.p > 0,
        slots=s.slots,
    )


COSTS: dict[str, Callable[..., Cost]] = {
    "dropout": lambda s: costs.dropout(**_tokens(s)),
    "attention": lambda s: costs.attention(**_rows(s), width=s.encoder.width),
    "first_token_attention": lambda s: costs.first_token_attention(**_rows(s), width=s.encoder.width),
    "softmax": lambda s: costs.softmax(**_rows(s), columns=s.max_seqlen),
    "add_layer_norm": lambda s: costs.add_layer_norm(**_tokens(s), **_parameters(s), masked=s.p > 0),
    "bias_gelu": lambda s: costs.bias_gelu(
        tokens=s.tokens, inner=s.encoder.inner, size=s.dtype.itemsize, **_parameters(s)
    ),
    "embedding": _embedding,
}


def least(operation: str, setting: Setting, *, words: int = 0) -> Cost:
    """What a call of `operation` needs at least. words: the embedding's number of different words."""
    return COSTS[operation](setting, **({"words": words} if operation == "embedding" else {}))
