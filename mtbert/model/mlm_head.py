"""BERT's head for masked-language modelling, and the encoder with it (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from mtbert import kernels
from mtbert.errors import ModelFileError
from mtbert.model.bert import BertConfig, BertEncoder
from mtbert.model.context import PackedTokens
from mtbert.model.dropout import DropoutStream
from mtbert.model.pretrained import WEIGHTS_FILE

_PREFIX = "cls.predictions."
_NAMES = {
    "dense.weight": ("transform.dense.weight",),
    "dense.bias": ("transform.dense.bias",),
    "norm.weight": ("transform.LayerNorm.weight", "transform.LayerNorm.gamma"),
    "norm.bias": ("transform.LayerNorm.bias", "transform.LayerNorm.beta"),
    "bias": ("bias", "decoder.bias"),
}


class MlmHead(nn.Module):
    """Scores of all words: LayerNorm(GELU(linear(h))), then the product with the word table, plus a bias a word.

    For an encoder that comes without this head, the linear layer starts as the identity plus 1, where GELU is nearly
    linear, and the biases as the logarithms of the words' frequencies: of several starts this one learned fastest from
    a sentence encoder.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.eye_(self.dense.weight)
        nn.init.ones_(self.dense.bias)

    @torch.no_grad()
    def set_frequencies(self, counts: Tensor) -> None:
        """Start the biases from how often each word occurs, int64 [V]; one is added to every count."""
        smoothed = counts.double() + 1
        self.bias.copy_(torch.log(smoothed / smoothed.sum()))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        """hidden: [M, C]; words: [V, C], the encoder's word table. Returns scores [M, V] in the dtype of `hidden`."""
        x = kernels.bias_gelu(kernels.linear(hidden, self.dense.weight, None), self.dense.bias)
        wide = x if x.dtype == torch.float64 else x.float()
        wide = F.layer_norm(wide, wide.shape[1:], self.norm.weight, self.norm.bias, self.norm.eps)
        return kernels.linear(wide.to(x.dtype), words, self.bias)


class MlmModel(nn.Module):
    """The encoder with the head. The pooler takes no part in it and is not trained."""

    def __init__(self, encoder: BertEncoder, head: MlmHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.encoder.requires_grad_(True)
        self.encoder.pooler.requires_grad_(False)

    def forward(
        self,
        batch: PackedTokens,
        places: Tensor,
        *,
        dtype: torch.dtype,
        dropout: DropoutStream | None = None,
    ) -> Tensor:
        """Scores [M, V] in `dtype` of all words at the tokens `places`, int64 [M]; only these meet the vocabulary."""
        hidden = self.encoder(batch, dtype=dtype, dropout=dropout)
        return self.head(hidden.index_select(0, places), self.encoder.embeddings.word)


def load_mlm_head(folder: str | Path, head: MlmHead) -> bool:
    """Fill `head` from the `cls.predictions` tensors of a model's file; False when it has none.

    The decoder's weight is taken to be the word table. Raises ModelFileError for tensors that are missing or do not
    fit.
    """
    path = Path(folder) / WEIGHTS_FILE
    with safe_open(path, framework="pt") as file:
        stored = {name.removeprefix(_PREFIX) for name in file.keys() if name.startswith(_PREFIX)}  # noqa: SIM118
        if not any(name.startswith("transform.") for name in stored):
            return False
        for name, parameter in head.named_parameters():
            found = next((possible for possible in _NAMES[name] if possible in stored), None)
            if found is None:
                raise ModelFileError(f"{path}: {_PREFIX}{_NAMES[name][0]} is missing")
            value = file.get_tensor(_PREFIX + found)
            if value.shape != parameter.shape:
                raise ModelFileError(
                    f"{path}: {_PREFIX}{found} has shape {list(value.shape)}, expected {list(parameter.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(value)
    return True
