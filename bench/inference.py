"""Sides that predict and encode: `mtbert.load`'s model, and what one would take instead.

All have the same weights: the encoder's, and heads that read BERT's pooler by a random linear layer, as
`AutoModelForSequenceClassification` does. A repeat is texts in, NumPy out: tokenising and sorting count.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench.measure import Side
from bench.peers import BATCH
from bench.workload import Workload
from mtbert.api import Model
from mtbert.config import TrainConfig
from mtbert.data.tokenisation import Tokeniser
from mtbert.engine.build import machine_of
from mtbert.engine.precision import DTYPES, Precision
from mtbert.engine.predictor import Predictor, Space
from mtbert.model.heads import Head, HeadConfig, HeadSpec
from mtbert.model.multitask import MultiTaskModel
from mtbert.model.pretrained import TOKENISER_FILES, load_encoder
from mtbert.tasks.config import TaskConfig

Work = Literal["encode", "sst", "para"]
"""Vectors of sentences, five classes of sentences, one logit of pairs."""

OUTPUTS = {"sst": 5, "para": 1}
_DEVIATION = 0.3
"""Of the random heads' weights: outputs differ enough for a mistake to show."""


def texts_of(workload: Workload, work: Work, count: int) -> list[Any]:
    """`count` different sentences or pairs of the workload, in no order of length."""
    names = ("para",) if work == "para" else tuple(workload.tasks)
    found: dict[Any, None] = {}
    for name in names:
        for example in workload.data[name].table.texts:
            found.update(dict.fromkeys([example] if work == "para" else example))
    values = list(found)
    order = np.random.default_rng(0).permutation(len(values))[:count]
    if len(order) < count and work == "encode":
        order = np.arange(len(values))
        values += [f"{values[n % len(order)]} {n}" for n in range(count - len(values))]
        order = np.random.default_rng(0).permutation(count)
    return [values[place] for place in order]


class Sides:
    """Builds the sides of a workload; peers read `folder`, which holds their copies of the models."""

    def __init__(self, workload: Workload, device: torch.device, folder: Path) -> None:
        self.workload, self.device, self.folder = workload, device, folder
        generator = torch.Generator().manual_seed(0)
        width = load_encoder(workload.encoder).config.hidden_size
        self.weights = {
            name: (
                torch.randn(n, width, generator=generator) * _DEVIATION,
                torch.randn(n, generator=generator),
            )
            for name, n in OUTPUTS.items()
        }
        self._tokeniser = Tokeniser.from_folder(workload.encoder)

    def own(self, precision: Precision) -> Model:
        """What `mtbert.load` gives for such a run."""
        spec = {name: HeadSpec(name, n, self.workload.tasks[name].is_pair) for name, n in OUTPUTS.items()}
        settings = {
            name: TaskConfig(max_length=self.workload.max_length, head=HeadConfig(pooling="pooler"))
            for name in OUTPUTS
        }
        encoder = load_encoder(self.workload.encoder)
        width = encoder.config.hidden_size
        heads = {name: Head(spec[name], settings[name].head, width) for name in OUTPUTS}
        with torch.no_grad():
            for name, (weight, bias) in self.weights.items():
                output = heads[name].output
                assert output is not None
                output.weight.copy_(weight)
                output.bias.copy_(bias)
        model = MultiTaskModel(encoder, heads).to(self.device).eval().requires_grad_(False)
        tasks = {name: self.workload.tasks[name] for name in OUTPUTS}
        machine = machine_of(self.device, precision)
        predictor = Predictor(
            model, self._tokeniser, machine, tasks, settings, max_tokens=TrainConfig.max_tokens
        )
        space = Space("mean", self.workload.max_length)
        return Model(predictor, self.workload.encoder, precision, space)

    def own_side(self, name: str, work: Work, precision: Precision, texts: Sequence[Any]) -> Side:
        """The public methods, as they are called."""
        model = self.own(precision)
        call = {
            "encode": lambda: model.encode(texts, normalise=True),
            "sst": lambda: model.outputs("sst", texts),
            "para": lambda: model.outputs("para", texts),
        }[work]
        return self._side(name, call, work, texts)

    def sentence_transformers_side(
        self, name: str, work: Work, precision: Precision, texts: Sequence[Any]
    ) -> Side:
        """`SentenceTransformer.encode`, or `CrossEncoder.predict`: both sort by length."""
        from sentence_transformers import CrossEncoder, SentenceTransformer
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        weights = {"dtype": DTYPES[precision]}
        device = str(self.device)
        options: dict[str, Any] = {"batch_size": BATCH, "show_progress_bar": False}
        if work == "encode":
            bert = Transformer(
                str(self.workload.encoder), max_seq_length=self.workload.max_length, model_kwargs=weights
            )
            parts = [bert, Pooling(bert.get_embedding_dimension(), "mean"), Normalize()]
            encoder = SentenceTransformer(modules=parts, device=device)
            return self._side(name, lambda: encoder.encode(list(texts), **options), work, texts)
        cross = CrossEncoder(
            str(self.classifier("para")),
            device=device,
            max_length=self.workload.max_length,
            model_kwargs=weights,
            activation_fn=torch.nn.Identity(),
        )
        return self._side(name, lambda: cross.predict(list(texts), **options).reshape(-1, 1), work, texts)

    def pipeline_side(
        self, name: str, precision: Precision, texts: Sequence[str], *, ordered: bool = False
    ) -> Side:
        """`pipeline("text-classification")`, which pads each batch to its longest and doesn't sort.

        ordered: its user has sorted the texts by length.
        """
        from transformers import pipeline

        pipe: Any = pipeline(
            "text-classification", str(self.classifier("sst")), device=self.device, dtype=DTYPES[precision]
        )
        given = sorted(texts, key=len) if ordered else list(texts)
        options: dict[str, Any] = {
            "batch_size": BATCH,
            "truncation": True,
            "max_length": self.workload.max_length,
        }

        def call() -> np.ndarray:
            found = pipe(given, top_k=None, function_to_apply="none", **options)
            rows = [{each["label"]: each["score"] for each in row} for row in found]
            return np.array([[row[label] for label in sorted(row)] for row in rows])

        return self._side(name, call, "sst", given)

    def classifier(self, work: Literal["sst", "para"]) -> Path:
        """The folder of a model for sequence classification with the head's weights."""
        from transformers import AutoModelForSequenceClassification

        folder = self.folder / work
        if not folder.is_dir():
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                self.workload.encoder, num_labels=OUTPUTS[work], dtype=torch.float32
            )
            weight, bias = self.weights[work]
            with torch.no_grad():
                model.classifier.weight.copy_(weight)
                model.classifier.bias.copy_(bias)
            model.save_pretrained(folder)
            for file in TOKENISER_FILES:
                if (self.workload.encoder / file).is_file():
                    shutil.copyfile(self.workload.encoder / file, folder / file)
        return folder

    def _side(self, name: str, call: Callable[[], Any], work: Work, texts: Sequence[Any]) -> Side:
        """A repeat does all texts; `largest_difference` is that to mtbert's float32."""
        tokens = self._tokens(work, texts)
        reference = self.own("float32")
        wanted = (
            reference.encode(texts, normalise=True) if work == "encode" else reference.outputs(work, texts)
        )
        figures = {"largest_difference": float(np.abs(np.asarray(call(), dtype=np.float32) - wanted).max())}

        def run(_: int) -> float:
            call()
            return tokens

        return Side(name, run, figures)

    def _tokens(self, work: Work, texts: Sequence[Any]) -> int:
        """Real tokens of the texts, special ones included."""
        flat = list(itertools.chain(*texts)) if work == "para" else list(texts)
        sizes = np.array([len(ids) for ids in self._tokeniser.encode(flat)]).reshape(len(texts), -1)
        return int(np.minimum(sizes.sum(axis=1) + sizes.shape[1] + 1, self.workload.max_length).sum())


def pairs_by_vectors(name: str, model: Model, sentences: Sequence[str]) -> Side:
    """The similarities of all pairs of the sentences: each is encoded once, the rest is one matrix product."""
    pairs = len(sentences) * (len(sentences) - 1) // 2

    def run(_: int) -> float:
        model.similarity(sentences)
        return pairs

    return Side(name, run, {"sentences": len(sentences), "pairs": pairs})


def pairs_by_reading(
    name: str, read: Callable[[list[tuple[str, str]]], Any], sentences: Sequence[str]
) -> Side:
    """The same by a cross-encoder, which reads every pair."""
    pairs = list(itertools.combinations(sentences, 2))

    def run(_: int) -> float:
        read(pairs)
        return len(pairs)

    return Side(name, run, {"sentences": len(sentences), "pairs": len(pairs)})
