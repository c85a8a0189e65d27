"""BERT and its variants written out row by row and head by head, on the parameters of a packed encoder.

Slow and obvious: the oracle of the variants. Nothing is dropped.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from support.packed import Packed
from torch import Tensor, nn

from mtbert.model.bert import BertEncoder, BertLayer


def naive_hidden(
    encoder: BertEncoder, batch: Packed, *, heads: int | None = None, layers: int | None = None
) -> Tensor:
    """Hidden states [T, C] after `layers` layers (default: all), computed row after row."""
    states = []
    for segment in batch.segments:
        for row in segment.rows:
            low, high = batch.cu_seqlens[row : row + 2].tolist()
            ids, types = batch.input_ids[low:high].long(), batch.token_type_ids[low:high].long()
            states.append(_row(encoder, ids, types, segment.task, heads, layers))
    return torch.cat(states)


def _row(
    encoder: BertEncoder, ids: Tensor, types: Tensor, task: str, heads: int | None, layers: int | None
) -> Tensor:
    embeddings = encoder.embeddings
    h = embeddings.word[ids] + embeddings.position[: len(ids)] + embeddings.token_type[types]
    h = _normed(h, embeddings.norm)
    for layer in encoder.layers[:layers]:
        h = _layer(encoder, layer, h, task, heads or encoder.config.num_attention_heads)
    return h


def _layer(encoder: BertEncoder, layer: BertLayer, h: Tensor, task: str, heads: int) -> Tensor:
    fused = layer.query_key_value
    q, k, v = (
        h @ _weight(fused.weight.chunk(3)[i], fused, task, name).T + fused.bias.chunk(3)[i]
        for i, name in enumerate(("query", "key", "value"))
    )
    outputs = _attention(q, k, v, heads)
    if layer.extra_hidden is not None:
        outputs = [_perceptron(layer, o, j) for j, o in enumerate(outputs)]
    joined = torch.cat(outputs, dim=1)
    a = _normed(h + _linear(joined, layer.attention_output, task), layer.attention_norm)
    inner = F.gelu(_linear(a, layer.intermediate, task))
    total = a + _linear(inner, layer.output, task)
    pals = encoder.pals
    if pals is not None and task in pals.tasks and layer.number in pals.numbers:
        own = pals.tasks[task]
        down = h @ own.down.weight.T + own.down.bias
        attention = own.query_key_value[str(layer.number)]
        q, k, v = (down @ attention.weight.T + attention.bias).chunk(3, dim=1)
        attended = torch.cat(_attention(q, k, v, pals.config.heads), dim=1)
        total = total + attended @ own.up.weight.T + own.up.bias
    return _normed(total, layer.output_norm)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> list[Tensor]:
    size = q.shape[1] // heads
    outputs = []
    for j in range(heads):
        own = slice(j * size, (j + 1) * size)
        scores = q[:, own] @ k[:, own].T / math.sqrt(size)
        outputs.append(torch.softmax(scores, dim=1) @ v[:, own])
    return outputs


def _perceptron(layer: BertLayer, o: Tensor, head: int) -> Tensor:
    extra = layer.extra_hidden
    assert extra is not None
    x = o
    for hidden in extra.hidden:
        size = o.shape[1]
        x = extra.activation(x @ hidden.weight[head].T + hidden.bias[head * size : (head + 1) * size])
    return o + x @ extra.output.weight[head].T


def _linear(x: Tensor, projection: nn.Module, task: str) -> Tensor:
    return x @ _weight(projection.weight, projection, task).T + projection.bias


def _weight(weight: Tensor, module: nn.Module, task: str, part: str | None = None) -> Tensor:
    """The weight with the update of the adapter that this task uses."""
    adapter = module.adapter if part is None else dict(module.adapters.items()).get(part)
    if task in module.task_adapters:
        own = module.task_adapters[task]
        adapter = own if part is None else dict(own.items()).get(part)
    return weight if adapter is None else weight + adapter.scale * adapter.lora_b @ adapter.lora_a


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
