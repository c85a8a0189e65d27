"""BERT (Devlin et al. 2019) on packed tokens: post-LayerNorm layers, exact GELU, learned positions.

The network sees one stream of T tokens that holds N rows (sentences) end to end, without padding.
Everything but attention works on tokens; attention is told where rows begin and end. All computation is in
`mtbert.kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from mtbert import kernels
from mtbert.model.dropout import EMBEDDING, DropoutRates, DropoutStream, Place, layer_site
from mtbert.model.lora import LoraAdapter, LoraConfig


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


class PackedTokens(Protocol):
    """What the encoder reads of a packed batch; tensors are int32 and on the encoder's device."""

    @property
    def input_ids(self) -> Tensor:
        """[T] vocabulary ids."""

    @property
    def token_type_ids(self) -> Tensor:
        """[T] 0 in the first text of a row, 1 in the second."""

    @property
    def position_ids(self) -> Tensor:
        """[T] place of the token in its row, below max_position_embeddings."""

    @property
    def dropout_row(self) -> Tensor:
        """[T] row id * 4096 + position."""

    @property
    def cu_seqlens(self) -> Tensor:
        """[N + 1] row n is tokens cu_seqlens[n] : cu_seqlens[n + 1]."""

    @property
    def max_seqlen(self) -> int:
        """At least the length of the longest row."""


class Embeddings(nn.Module):
    """LayerNorm(word + position + token type), then dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.position = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        self.token_type = nn.Parameter(torch.empty(config.type_vocab_size, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, batch: PackedTokens, *, dtype: torch.dtype, p: float, dropout: DropoutStream | None
    ) -> Tensor:
        """Hidden states [T, C] in `dtype`."""
        return kernels.embedding(
            batch.input_ids,
            batch.token_type_ids,
            batch.position_ids,
            (self.word, self.position, self.token_type),
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            dtype=dtype,
            dropout_row=batch.dropout_row,
            dropout=dropout.at(p, EMBEDDING) if dropout else None,
        )


class Projection(nn.Module):
    """A linear layer that may carry a LoRA adapter. Its bias is added by the operation that follows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.adapter: LoraAdapter | None = None

    def forward(self, x: Tensor, dropout_row: Tensor, dropout: DropoutStream | None, site: int) -> Tensor:
        """[T, inputs] -> [T, outputs], without the bias. `site` is that of the adapter's dropout."""
        adapter = self.adapter
        if adapter is None or adapter.merged:
            return kernels.linear(x, self.weight, None)
        return kernels.lora_linear(
            x,
            self.weight,
            None,
            adapter.lora_a,
            adapter.lora_b,
            scale=adapter.scale,
            dropout_row=dropout_row,
            dropout=dropout.at(adapter.dropout, site) if dropout else None,
        )


class QueryKeyValue(nn.Module):
    """The three projections before attention as one linear layer; each third may carry a LoRA adapter."""

    PARTS = ("query", "key", "value")

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * config.hidden_size, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(3 * config.hidden_size))
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor, dropout_row: Tensor, dropout: DropoutStream | None, site: int) -> Tensor:
        """[T, C] -> [T, 3C]: query, key, value."""
        adapters = [self.adapter(part) for part in self.PARTS]
        active = [adapter for adapter in adapters if adapter is not None and not adapter.merged]
        if not active:
            return kernels.linear(x, self.weight, self.bias)
        query, key, value = ((a.lora_a, a.lora_b) if a is not None else None for a in adapters)
        return kernels.lora_qkv(
            x,
            self.weight,
            self.bias,
            (query, key, value),
            scale=active[0].scale,
            dropout_row=dropout_row,
            dropout=dropout.at(active[0].dropout, site) if dropout else None,
        )

    def adapter(self, part: str) -> LoraAdapter | None:
        """The adapter of `query`, `key` or `value`, if it has one."""
        if part not in self.adapters:
            return None
        adapter = self.adapters[part]
        assert isinstance(adapter, LoraAdapter)
        return adapter

    def part(self, tensor: Tensor, part: str) -> Tensor:
        """The rows of the fused weight or bias that belong to `query`, `key` or `value` (a view)."""
        return tensor.chunk(3)[self.PARTS.index(part)]


class BertLayer(nn.Module):
    """Self-attention and a feed-forward part, each followed by dropout, the residual sum and LayerNorm."""

    def __init__(self, config: BertConfig, number: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.number = number
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.query_key_value = QueryKeyValue(config)
        self.attention_output = Projection(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.intermediate = Projection(width, inner)
        self.output = Projection(inner, width)
        self.output_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self, hidden: Tensor, batch: PackedTokens, rates: DropoutRates, dropout: DropoutStream | None
    ) -> Tensor:
        """[T, C] -> [T, C]."""
        rows = batch.dropout_row

        def site(place: Place) -> int:
            return layer_site(self.number, place)

        qkv = self.query_key_value(hidden, rows, dropout, site(Place.LORA_QKV))
        context = kernels.attention(
            qkv.view(-1, 3, self.heads, self.head_size),
            batch.cu_seqlens,
            batch.max_seqlen,
            scale=self.head_size**-0.5,
            dropout_row=rows,
            dropout=dropout.at(rates.attention, site(Place.ATTENTION)) if dropout else None,
        ).flatten(1)
        attended = self.attention_output(context, rows, dropout, site(Place.LORA_ATTENTION_OUTPUT))
        hidden = kernels.add_layer_norm(
            attended,
            hidden,
            self.attention_norm.weight,
            self.attention_norm.bias,
            linear_bias=self.attention_output.bias,
            eps=self.attention_norm.eps,
            dropout_row=rows,
            dropout=dropout.at(rates.hidden, site(Place.ATTENTION_OUTPUT)) if dropout else None,
        )
        inner = self.intermediate(hidden, rows, dropout, site(Place.LORA_INTERMEDIATE))
        inner = kernels.bias_gelu(inner, self.intermediate.bias)
        return kernels.add_layer_norm(
            self.output(inner, rows, dropout, site(Place.LORA_OUTPUT)),
            hidden,
            self.output_norm.weight,
            self.output_norm.bias,
            linear_bias=self.output.bias,
            eps=self.output_norm.eps,
            dropout_row=rows,
            dropout=dropout.at(rates.hidden, site(Place.OUTPUT)) if dropout else None,
        )

    def add_adapter(self, name: str, config: LoraConfig, generator: torch.Generator | None) -> None:
        """Put a LoRA adapter on projection `name` (one of `mtbert.model.lora.PROJECTIONS`)."""
        if name in QueryKeyValue.PARTS:
            weight = self.query_key_value.part(self.query_key_value.weight, name)
        else:
            weight = getattr(self, name).weight
        adapter = LoraAdapter(weight.shape[1], weight.shape[0], config, generator).to(weight)
        if name in QueryKeyValue.PARTS:
            self.query_key_value.adapters[name] = adapter
        else:
            getattr(self, name).adapter = adapter

    def adapted_weights(self) -> Iterator[tuple[Tensor, LoraAdapter]]:
        """Every adapter of the layer with (a view of) the weight that it updates."""
        fused = self.query_key_value
        for part in fused.PARTS:
            adapter = fused.adapter(part)
            if adapter is not None:
                yield fused.part(fused.weight, part), adapter
        for projection in (self.attention_output, self.intermediate, self.output):
            if projection.adapter is not None:
                yield projection.weight, projection.adapter


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
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.pooler_is_pretrained = False
        self.register_state_dict_pre_hook(_refuse_merged)
        for name, parameter in self.named_parameters():
            initialise(parameter, "norm.weight" in name, config.initializer_range, generator)

    def forward(
        self, batch: PackedTokens, *, dtype: torch.dtype, dropout: DropoutStream | None = None
    ) -> Tensor:
        """Last hidden states [T, C] in `dtype`. Without a dropout stream nothing is dropped."""
        hidden = self.embeddings(batch, dtype=dtype, p=self.dropouts.embedding, dropout=dropout)
        for layer in self.layers:
            hidden = layer(hidden, batch, self.dropouts, dropout)
        return hidden

    def pool_first(self, hidden: Tensor) -> Tensor:
        """BERT's pooler on the hidden states of first tokens: tanh(linear), [N, C] -> [N, C]."""
        return torch.tanh(kernels.linear(hidden, self.pooler.weight, self.pooler.bias))

    @property
    def has_lora(self) -> bool:
        """Whether any weight has a LoRA adapter."""
        return any(isinstance(module, LoraAdapter) for module in self.modules())

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


def _refuse_merged(module: nn.Module, *_: object) -> None:
    assert isinstance(module, BertEncoder)
    if module.is_merged:
        raise RuntimeError("LoRA is merged into the weights: unmerge before state_dict, or use save_encoder")
