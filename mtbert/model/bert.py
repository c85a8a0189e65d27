"""BERT (Devlin et al. 2019) on packed tokens: post-LayerNorm layers, exact GELU, learned positions.

The network sees one stream of T tokens that holds N rows (sentences) end to end, without padding.
Everything but attention works on tokens; attention is told where rows begin and end. All computation is in
`mtbert.kernels`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from mtbert import kernels
from mtbert.kernels.segments import Segments
from mtbert.model.checkpointing import CheckpointingConfig, Recipes, recomputed
from mtbert.model.context import ForwardContext, LayersBelow, PackedTokens, TaskBatch
from mtbert.model.dropout import EMBEDDING, DropoutRates, DropoutStream, Place, layer_site
from mtbert.model.extra_hidden import ExtraHidden
from mtbert.model.first_tokens import FirstTokens, by_stream, first_token_context
from mtbert.model.lora import LoraAdapter, LoraConfig
from mtbert.model.pals import Pals
from mtbert.model.projections import Projection, QueryKeyValue


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT, under the names of Hugging Face's config.json."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    initializer_range: float = 0.02

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class Embeddings(nn.Module):
    """LayerNorm(word + position + token type), then dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.position = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        self.token_type = nn.Parameter(torch.empty(config.type_vocab_size, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, context: ForwardContext, p: float) -> Tensor:
        """Hidden states [T, C]; `p` is the dropout probability."""
        batch = context.batch
        return kernels.embedding(
            batch.input_ids,
            batch.token_type_ids,
            batch.position_ids,
            (self.word, self.position, self.token_type),
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            dtype=context.dtype,
            dropout_row=batch.dropout_row,
            dropout=context.mask(p, EMBEDDING),
            segments=context.segments,
        )


class BertLayer(nn.Module):
    """Self-attention and a feed-forward part, each followed by dropout, the residual sum and LayerNorm."""

    def __init__(self, config: BertConfig, number: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.number = number
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.query_key_value = QueryKeyValue(width)
        self.extra_hidden: ExtraHidden | None = None
        self.attention_output = Projection(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.intermediate = Projection(width, inner)
        self.output = Projection(inner, width)
        self.output_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        context: ForwardContext,
        rates: DropoutRates,
        beside: Tensor | None = None,
        *,
        first: ForwardContext | None = None,
    ) -> Tensor:
        """[T, C] -> [T, C]. beside: [T, C], joins the layer's last sum.

        first: compute the first token of each row alone, [T, C] -> [N, C]; it is `first_token_context` of `context`.
        """

        def site(place: Place) -> int:
            return layer_site(self.number, place)

        if first is not None:
            whole, context = context, first
            places = cast(FirstTokens, first.batch).places
            everywhere, hidden = hidden, hidden.index_select(0, places)
            beside = None if beside is None else beside.index_select(0, places)
            query, key_value = self.query_key_value.apart(
                everywhere, hidden, whole, context, site(Place.LORA_QKV)
            )
            attended = kernels.first_token_attention(
                query.view(-1, self.heads, self.head_size),
                key_value.view(-1, 2, self.heads, self.head_size),
                whole.batch.cu_seqlens,
                whole.batch.max_seqlen,
                scale=self.head_size**-0.5,
                dropout_row=first.batch.dropout_row,
                dropout=context.mask(rates.attention, site(Place.ATTENTION)),
            )
        else:
            qkv = self.query_key_value(hidden, context, site(Place.LORA_QKV))
            attended = kernels.attention(
                qkv.view(-1, 3, self.heads, self.head_size),
                context.batch.cu_seqlens,
                context.batch.max_seqlen,
                scale=self.head_size**-0.5,
                dropout_row=context.batch.dropout_row,
                dropout=context.mask(rates.attention, site(Place.ATTENTION)),
            )
        batch, segments = context.batch, context.segments
        if self.extra_hidden is not None:
            attended = self.extra_hidden(attended, context)
        hidden = context.cheap(
            kernels.add_layer_norm,
            self.attention_output(attended.flatten(1), context, site(Place.LORA_ATTENTION_OUTPUT)),
            hidden,
            self.attention_norm.weight,
            self.attention_norm.bias,
            linear_bias=self.attention_output.bias,
            eps=self.attention_norm.eps,
            dropout_row=batch.dropout_row,
            dropout=context.mask(rates.hidden, site(Place.ATTENTION_OUTPUT)),
            segments=segments,
        )
        inner = self.intermediate(hidden, context, site(Place.LORA_INTERMEDIATE))
        inner = context.cheap(kernels.bias_gelu, inner, self.intermediate.bias, segments=segments)
        return kernels.add_layer_norm(
            self.output(inner, context, site(Place.LORA_OUTPUT)),
            hidden if beside is None else hidden + beside,
            self.output_norm.weight,
            self.output_norm.bias,
            linear_bias=self.output.bias,
            eps=self.output_norm.eps,
            dropout_row=batch.dropout_row,
            dropout=context.mask(rates.hidden, site(Place.OUTPUT)),
            segments=segments,
        )

    def add_adapter(
        self, name: str, config: LoraConfig, generator: torch.Generator | None, task: str | None = None
    ) -> None:
        """Put a LoRA adapter on projection `name` (one of `mtbert.model.lora.PROJECTIONS`).

        task: the only one that uses it; None: all do.
        """
        fused = self.query_key_value
        is_part = name in QueryKeyValue.PARTS
        weight = fused.part(fused.weight, name) if is_part else getattr(self, name).weight
        adapter = LoraAdapter(weight.shape[1], weight.shape[0], config, generator).to(weight)
        if is_part:
            fused.add_adapter(name, adapter, task)
        elif task is None:
            getattr(self, name).adapter = adapter
        else:
            getattr(self, name).task_adapters[task] = adapter

    def adapted_weights(self, task: str | None = None) -> Iterator[tuple[str, Tensor, LoraAdapter]]:
        """Every adapter that all tasks use, with its projection's name and (a view of) the weight that it updates.

        task: those that this task alone uses, too.
        """
        fused = self.query_key_value
        for part in fused.PARTS:
            for adapter in (fused.adapter(part), fused.task_adapter(part, task)):
                if adapter is not None:
                    yield part, fused.part(fused.weight, part), adapter
        for name in ("attention_output", "intermediate", "output"):
            projection: Projection = getattr(self, name)
            for adapter in (projection.adapter, None if task is None else projection.task_adapter(task)):
                if adapter is not None:
                    yield name, projection.weight, adapter


class BertEncoder(nn.Module):
    """The encoder with its pooler. Parameters are drawn as BERT's are until `load_encoder` fills them.

    Parameters keep their own dtype (float32; float64 in tests) whatever dtype the forward pass computes in.
    """

    def __init__(
        self,
        config: BertConfig,
        dropouts: DropoutRates | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dropouts = dropouts or DropoutRates()
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(BertLayer(config, number) for number in range(config.num_hidden_layers))
        self.layers = cast(Sequence[BertLayer], layers)
        self.pals: Pals | None = None
        self.undropped_layers = 0
        """The first so many layers drop nothing; where they are any, neither do the embeddings."""
        self.checkpointing = CheckpointingConfig()
        """What the backward pass computes again instead of the forward pass keeping it."""
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.pooler_is_pretrained = False
        self.register_state_dict_pre_hook(_refuse_merged)
        for name, parameter in self.named_parameters():
            initialise(parameter, "norm.weight" in name, config.initializer_range, generator)

    def forward(
        self,
        batch: PackedTokens,
        *,
        dtype: torch.dtype,
        dropout: DropoutStream | None = None,
        segments: Segments | None = None,
        noise: Tensor | None = None,
        below: LayersBelow | None = None,
        layers: int | None = None,
    ) -> Tensor:
        """Last hidden states [T, C] in `dtype`. Without a dropout stream nothing is dropped.

        segments: the groups of tokens whose gradients are wanted apart. noise: [T, C], added to the embeddings' output.
        below: what the first layers give; they are not computed then. layers: compute the first so many, by default
        all. Adapters and layers of one task's own apply to its tokens; then the batch must be a `TaskBatch`.
        """
        context, hidden = self._below_last(batch, dtype, dropout, segments, noise, below, layers)
        last = len(self.layers) - 1
        return hidden if layers is not None and layers <= last else self._run_layer(last, context, hidden)

    def parts(
        self,
        batch: TaskBatch,
        first: Collection[str],
        *,
        dtype: torch.dtype,
        dropout: DropoutStream | None = None,
        segments: Segments | None = None,
        noise: Tensor | None = None,
        below: LayersBelow | None = None,
    ) -> list[tuple[ForwardContext, Tensor]]:
        """Last hidden states, for the streams in `first` of each row's first token alone: the last layer computes no
        other of theirs. Further arguments as in `forward`.

        Returns those streams and the others, where there are any, each with the pass that its tokens are of: batch (a
        `TaskBatch`) and segments say which they are.
        """
        context, hidden = self._below_last(batch, dtype, dropout, segments, noise, below)
        last = len(self.layers) - 1
        inside, outside = by_stream(context, hidden, first)
        found = []
        if inside is not None:
            rows = first_token_context(inside[0])
            found.append((rows, self._run_layer(last, *inside, first=rows)))
        if outside is not None:
            found.append((outside[0], self._run_layer(last, *outside)))
        return found

    def _below_last(
        self,
        batch: PackedTokens,
        dtype: torch.dtype,
        dropout: DropoutStream | None,
        segments: Segments | None,
        noise: Tensor | None,
        below: LayersBelow | None = None,
        layers: int | None = None,
    ) -> tuple[ForwardContext, Tensor]:
        """The pass, and the hidden states [T, C] that the last layer starts from, or those after `layers` layers."""
        again: Sequence[int] = ()
        recipes: Recipes | None = None
        if torch.is_grad_enabled():
            again = self.checkpointing.layer_numbers(len(self.layers))
            recipes = Recipes() if self.checkpointing.mode == "selective" else None
        context = ForwardContext(batch, dtype, dropout, segments, recipes)
        undropped = replace(context, dropout=None) if self.undropped_layers else context
        if below is None:
            hidden = self.embeddings(undropped, self.dropouts.embedding)
        else:
            hidden = _checked(below, batch, dtype, noise)
        if noise is not None:
            hidden = hidden + noise.to(hidden.dtype)
        last = len(self.layers) - 1
        stop = last if layers is None else min(layers, last)
        for number in range(0 if below is None else below.layers, stop):
            run = partial(self._run_layer, number, undropped if number < self.undropped_layers else context)
            if number not in again:
                hidden = run(hidden)
            elif recipes is not None:
                with recipes.layer():
                    hidden = run(hidden)
            else:
                hidden = recomputed(run, hidden, self._layer_parameters(number))
        return undropped if last < self.undropped_layers else context, hidden

    def _run_layer(
        self, number: int, context: ForwardContext, hidden: Tensor, *, first: ForwardContext | None = None
    ) -> Tensor:
        """One layer and what stands beside it, [T, C] -> [T, C], or [N, C] with `first` (see `BertLayer`)."""
        beside = self.pals(hidden, number, context) if self.pals is not None else None
        return self.layers[number](hidden, context, self.dropouts, beside, first=first)

    def _layer_parameters(self, number: int) -> list[nn.Parameter]:
        """All parameters that `_run_layer` uses."""
        beside = [] if self.pals is None else list(self.pals.parameters())
        return [*self.layers[number].parameters(), *beside]

    def pool_first(self, hidden: Tensor, segments: Segments | None = None) -> Tensor:
        """BERT's pooler on the hidden states of first tokens: tanh(linear), [N, C] -> [N, C].

        segments: as in `forward`, with bounds in rows.
        """
        return torch.tanh(kernels.linear(hidden, self.pooler.weight, self.pooler.bias, segments=segments))

    def set_checkpointing(self, config: CheckpointingConfig) -> None:
        """Compute again in the backward pass what `config` says. Raises ConfigError where there are too few layers."""
        config.layer_numbers(len(self.layers))
        self.checkpointing = config

    @property
    def lowest_trained_layer(self) -> int:
        """Number of the lowest layer that the backward pass reaches: 0 where the embeddings are trained."""
        if any(p.requires_grad for p in self.embeddings.parameters()):
            return 0
        trained = [layer.number for layer in self.layers if any(p.requires_grad for p in layer.parameters())]
        if self.pals is not None and any(p.requires_grad for p in self.pals.parameters()):
            trained += self.pals.numbers
        return min(trained, default=len(self.layers))

    @property
    def has_lora(self) -> bool:
        """Whether any weight has a LoRA adapter."""
        return any(isinstance(module, LoraAdapter) for module in self.modules())

    @property
    def has_task_adapters(self) -> bool:
        """Whether every task has LoRA adapters of its own."""
        return any(
            isinstance(m, Projection | QueryKeyValue) and bool(m.task_adapters) for m in self.modules()
        )

    @property
    def additions(self) -> list[str]:
        """What it has beside BERT and adapters that can be merged, by the names of the configuration."""
        present = {
            "model.extra_hidden": any(layer.extra_hidden is not None for layer in self.layers),
            "model.pals": self.pals is not None,
            "lora.per_task": self.has_task_adapters,
        }
        return [name for name, is_present in present.items() if is_present]

    @property
    def is_merged(self) -> bool:
        """Whether LoRA adapters are folded into the weights."""
        return any(isinstance(module, LoraAdapter) and module.merged for module in self.modules())


@torch.no_grad()
def initialise(parameter: Tensor, is_gain: bool, deviation: float, generator: torch.Generator | None) -> None:
    """BERT's initial values: matrices normal with `deviation`, LayerNorm gains 1, biases 0."""
    if is_gain:
        parameter.fill_(1.0)
    elif parameter.dim() >= 2:
        parameter.normal_(0.0, deviation, generator=generator)
    else:
        parameter.zero_()


def _checked(below: LayersBelow, batch: PackedTokens, dtype: torch.dtype, noise: Tensor | None) -> Tensor:
    """The hidden states that the first layers gave. Raises ValueError for those of another batch or dtype."""
    hidden = below.hidden
    if hidden.dtype != dtype or hidden.shape[0] != batch.input_ids.shape[0]:
        raise ValueError(
            f"the first layers gave {hidden.dtype} for {hidden.shape[0]} tokens, expected {dtype} for"
            f" {batch.input_ids.shape[0]}"
        )
    if noise is not None:
        raise ValueError("noise is added to the embeddings: the layers above them must be computed")
    return hidden


def _refuse_merged(module: nn.Module, *_: object) -> None:
    assert isinstance(module, BertEncoder)
    if module.is_merged:
        raise RuntimeError("LoRA is merged into the weights: unmerge before state_dict, or use save_encoder")
