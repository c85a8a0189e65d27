"""The encoder's linear layers, which may carry LoRA adapters: one for all tasks, or one for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtbert import kernels
from mtbert.model.context import ForwardContext
from mtbert.model.lora import LoraAdapter


class Projection(nn.Module):
    """A linear layer. Its bias is added by the operation that follows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.adapter: LoraAdapter | None = None
        self.task_adapters = nn.ModuleDict()

    def forward(self, x: Tensor, context: ForwardContext, site: int) -> Tensor:
        """[T, inputs] -> [T, outputs], without the bias. `site` is that of the adapter's dropout."""
        if self.task_adapters:
            return context.by_task(
                lambda task, tokens: self._adapted(x, context, site, self.task_adapter(task), tokens)
            )
        return self._adapted(x, context, site, self.adapter)

    def _adapted(
        self,
        x: Tensor,
        context: ForwardContext,
        site: int,
        adapter: LoraAdapter | None,
        tokens: slice | None = None,
    ) -> Tensor:
        # Segments are for a pass over all tokens; a stretch of them belongs to one task, and its adapter is its own.
        dropout_row, segments = context.batch.dropout_row, context.segments
        if tokens is not None:
            x, dropout_row, segments = x[tokens], dropout_row[tokens], None
        if adapter is None or adapter.merged:
            return kernels.linear(x, self.weight, None, segments=segments)
        return kernels.lora_linear(
            x,
            self.weight,
            None,
            adapter.lora_a,
            adapter.lora_b,
            scale=adapter.scale,
            dropout_row=dropout_row,
            dropout=context.mask(adapter.dropout, site),
            segments=segments,
        )

    def task_adapter(self, task: str) -> LoraAdapter | None:
        """The adapter that only `task` uses, if there is one."""
        return _adapter(self.task_adapters, task)


class _Block(NamedTuple):
    """Some of query, key and value, with their rows of the fused weight and bias."""

    parts: tuple[str, ...]
    weight: Tensor
    bias: Tensor


class QueryKeyValue(nn.Module):
    """The three projections before attention as one linear layer; each third may carry an adapter."""

    PARTS = ("query", "key", "value")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.bias = nn.Parameter(torch.empty(3 * width))
        self.adapters = nn.ModuleDict()
        self.task_adapters = nn.ModuleDict()

    def forward(self, x: Tensor, context: ForwardContext, site: int) -> Tensor:
        """[T, C] -> [T, 3C]: query, key, value."""
        return self._project(x, context, site, _Block(self.PARTS, self.weight, self.bias))

    def apart(
        self, x: Tensor, first: Tensor, context: ForwardContext, rows: ForwardContext, site: int
    ) -> tuple[Tensor, Tensor]:
        """Queries of the first tokens, keys and values of all tokens: [N, C] and [T, 2C].

        x: [T, C], all tokens, which are those of `context`; first: [N, C], the first tokens, which are those of `rows`.
        """
        width = x.shape[1]
        sizes = (width, 2 * width)
        weights, biases = self.weight.split(sizes), self.bias.split(sizes)
        query, key_value = (
            _Block(parts, weight, bias)
            for parts, weight, bias in zip((self.PARTS[:1], self.PARTS[1:]), weights, biases, strict=True)
        )

        def with_parts(one: ForwardContext) -> ForwardContext:
            if one.segments is None:
                return one
            segments = one.segments.with_parts(self.weight, weights).with_parts(self.bias, biases)
            return replace(one, segments=segments)

        return (
            self._project(first, with_parts(rows), site, query),
            self._project(x, with_parts(context), site, key_value),
        )

    def _project(self, x: Tensor, context: ForwardContext, site: int, block: _Block) -> Tensor:
        if self.task_adapters:
            return context.by_task(
                lambda task, tokens: self._adapted(x, context, site, block, self._of_task(task), tokens)
            )
        return self._adapted(x, context, site, block, self.adapters)

    def _adapted(
        self,
        x: Tensor,
        context: ForwardContext,
        site: int,
        block: _Block,
        adapters: nn.ModuleDict,
        tokens: slice | None = None,
    ) -> Tensor:
        dropout_row, segments = context.batch.dropout_row, context.segments
        if tokens is not None:
            x, dropout_row, segments = x[tokens], dropout_row[tokens], None
        found = [_adapter(adapters, part) for part in block.parts]
        active = [adapter for adapter in found if adapter is not None and not adapter.merged]
        if not active:
            return kernels.linear(x, block.weight, block.bias, segments=segments)
        options: dict[str, Any] = {
            "scale": active[0].scale,
            "dropout_row": dropout_row,
            "dropout": context.mask(active[0].dropout, site),
            "segments": segments,
        }
        pairs = tuple((a.lora_a, a.lora_b) if a is not None else None for a in found)
        if len(pairs) == 1 and pairs[0] is not None:
            return kernels.lora_linear(x, block.weight, block.bias, *pairs[0], **options)
        return kernels.lora_qkv(x, block.weight, block.bias, pairs, **options)

    def adapter(self, part: str) -> LoraAdapter | None:
        """The adapter of `query`, `key` or `value`, if it has one for all tasks."""
        return _adapter(self.adapters, part)

    def task_adapter(self, part: str, task: str | None) -> LoraAdapter | None:
        """The adapter of `query`, `key` or `value` that only `task` uses, if there is one."""
        return None if task is None else _adapter(self._of_task(task), part)

    def add_adapter(self, part: str, adapter: LoraAdapter, task: str | None) -> None:
        """Put an adapter on `query`, `key` or `value`; for one task alone where a task is named."""
        if task is None:
            self.adapters[part] = adapter
            return
        if task not in self.task_adapters:
            self.task_adapters[task] = nn.ModuleDict()
        self._of_task(task)[part] = adapter

    def part(self, tensor: Tensor, part: str) -> Tensor:
        """The rows of the fused weight or bias that belong to `query`, `key` or `value` (a view)."""
        return tensor.chunk(3)[self.PARTS.index(part)]

    def _of_task(self, task: str) -> nn.ModuleDict:
        adapters = self.task_adapters[task] if task in self.task_adapters else nn.ModuleDict()
        assert isinstance(adapters, nn.ModuleDict)
        return adapters


def _adapter(adapters: nn.ModuleDict, name: str) -> LoraAdapter | None:
    if name not in adapters:
        return None
    adapter = adapters[name]
    assert isinstance(adapter, LoraAdapter)
    return adapter
