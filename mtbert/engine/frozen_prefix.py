"""The outputs of frozen first layers, computed once and read from files by every later step, run and seed.

Where the first layers (with the embeddings) are never trained and drop nothing, what they give for a row is a constant.
Bytes: tokens of the different rows x width x bytes of the compute type. The results are those of computing them anew in
every step: bit for bit where a product's rows do not depend on how many there are (float32 and float64 on a CPU from
passes of a hundred tokens or so on), else up to the rounding of the compute type.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import mtbert.kernels
import mtbert.model
from mtbert.data.dataset import TaskData
from mtbert.data.packing import Computed, PackedBatch, Request, distinct_rows, pack, plan_passes
from mtbert.engine.environment import device_name
from mtbert.engine.forward import Forward, PackedForward
from mtbert.engine.hidden_states import StatesFolder, StatesKey
from mtbert.errors import ConfigError, UserError
from mtbert.kernels.dispatch import explain
from mtbert.kernels.extension import instruction_set
from mtbert.model.multitask import MultiTaskModel

if TYPE_CHECKING:
    from mtbert.config import TrainConfig

logger = logging.getLogger(__name__)

FOLDER = "frozen"
"""Within the folder of the tokenised tables."""
_GIB = 2**30


@dataclass
class FrozenCacheConfig:
    """The outputs of frozen first layers in files, so that every step begins above them."""

    use: Literal["auto", "always", "never"] = "auto"
    """auto: where the first layers are frozen and drop nothing (model.frozen_dropout false, or no dropout at all);
    always: the same, but what stands against it ends the run with the reason; never: every step computes all layers.
    The choice changes no result beyond rounding: whether frozen layers drop is model.frozen_dropout's alone."""
    most_gib: float = 16.0
    """The most that the files may take, in GiB (tokens x width x 2 bytes in bf16). Files that were used longest ago
    make room; what one run needs must fit."""

    def __post_init__(self) -> None:
        if not 0 < self.most_gib < float("inf"):
            raise ConfigError(f"frozen_cache.most_gib: expected a number above 0, found {self.most_gib}")


class PrefixForward(PackedForward):
    """Like the packed forward, but the encoder begins above its frozen first layers, whose outputs it reads from files.

    Only for the tables that it is told to `keep`; a pass that holds rows of another one computes all layers.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
        config: FrozenCacheConfig,
        *,
        max_tokens: int,
    ) -> None:
        """The layers below the lowest that `model` trains now must never be trained. max_tokens: of one pass."""
        super().__init__(model, device, dtype)
        self.layers = model.encoder.lowest_trained_layer
        if not self.layers:
            raise ValueError("no layer is frozen below the lowest trained one")
        self.config = config
        self.max_tokens = max_tokens
        self.files = StatesFolder(folder)
        self._kept: dict[TaskData, _Rows] = {}
        self._open: dict[TaskData, np.ndarray] = {}
        self._weights: tuple[int, bytes] | None = None
        self._given_up = False
        self._opening = threading.Lock()

    @property
    def serves(self) -> bool:
        """Whether files are read: not after a disk that was full where `use` is auto, and not where they would be too
        large."""
        return bool(self._kept) and not self._given_up

    def keep(self, tables: Iterable[TaskData]) -> None:
        """Read the rows of these tables from files, too. Says what that takes; a ConfigError where it is too much."""
        for data in tables:
            if data not in self._kept:
                self._kept[data] = _Rows(data)
        width = self.model.encoder.config.hidden_size
        tokens = sum({rows.digest: rows.tokens for rows in self._kept.values()}.values())
        need = tokens * width * self.dtype.itemsize
        text = (
            f"the outputs of {self.layers} frozen layers for {tokens:,} tokens take {need:,} bytes"
            f" ({need / _GIB:.3g} GiB) in {self.files.folder}"
        )
        if need > self.config.most_gib * _GIB:
            limit = f"frozen_cache.most_gib: {text}, but the limit is {self.config.most_gib:g} GiB"
            if self.config.use == "always":
                raise ConfigError(f"{limit}; possible: above {need / _GIB:.3g}, or frozen_cache.use never")
            self._give_up(limit)
        else:
            logger.info("%s", text)

    def open_files(self) -> None:
        """Open the files of all kept tables, and compute those that are not there."""
        for data in self._kept:
            self._states(data)

    def pack(self, requests: Sequence[Request]) -> PackedBatch:
        """What the encoder reads, with what its first layers give."""
        batch = pack(requests)
        if self._given_up or not all(request.data in self._kept for request in requests):
            return batch
        hidden = self.hidden_states(requests, batch.tokens)
        return batch if hidden is None else replace(batch, below=Computed(hidden, self.layers))

    def hidden_states(self, requests: Sequence[Request], tokens: int) -> Tensor | None:
        """What the frozen layers give for the rows of these requests, `[tokens, C]` on the host; None without files."""
        hidden = torch.empty(tokens, self.model.encoder.config.hidden_size, dtype=self.dtype)
        raw = hidden.view(torch.uint8).numpy()
        end = 0
        for request in requests:
            states = self._states(request.data)
            if states is None:
                return None
            for begin, length in self._kept[request.data].places(request.examples):
                raw[end : end + length] = states[begin : begin + length]
                end += length
        assert end == tokens
        return hidden

    def _states(self, data: TaskData) -> np.ndarray | None:
        """The open file of a table, made where there is none; None where that is given up."""
        with self._opening:  # the thread that prepares the next steps, and an evaluation
            self._follow_weights()
            if data not in self._open and not self._given_up:
                try:
                    self._open[data] = self._opened(data)
                except OSError as error:
                    self._failed(data, error)
            return self._open.get(data)

    def _follow_weights(self) -> None:
        """Close the files when somebody has written other values into the frozen weights: a checkpoint was loaded."""
        version = sum(parameter._version for _, parameter in self._frozen())
        if self._weights is None or self._weights[0] != version:
            digest = _digest_of(self._frozen())
            if self._weights is not None and self._weights[1] != digest:
                self._open.clear()
            self._weights = (version, digest)

    def _opened(self, data: TaskData) -> np.ndarray:
        """Raises OSError where a file cannot be written."""
        key = self._key(data)
        states = self.files.load(key, warn=False)
        if states is None:
            with self.files.lock():
                states = self.files.load(key, warn=True)  # another process may have written it meanwhile
                if states is None:
                    self.files.make_room(map(self._key, self._kept), self.config.most_gib * _GIB)
                    self.files.store(key, self._computed(data))
                    states = self.files.load(key, warn=True)
        if states is None:
            raise OSError(f"{self.files.folder}: a file that was just written cannot be read")
        return states

    def _key(self, data: TaskData) -> StatesKey:
        rows, encoder = self._kept[data], self.model.encoder
        assert self._weights is not None
        facts = (
            encoder.config,
            self.layers,
            str(self.dtype),
            torch.backends.cuda.matmul.fp32_precision if self.device.type == "cuda" else None,
            str(torch.__version__),
            device_name(self.device),
            torch.backends.cpu.get_cpu_capability(),
            torch.get_num_threads(),
            [(row.operation, row.implementation) for row in explain(self.device.type, self.dtype)],
            instruction_set(),
        )
        digest = hashlib.sha256(repr(facts).encode() + _code_digest() + self._weights[1] + rows.digest)
        return StatesKey(digest.digest(), rows.tokens, encoder.config.hidden_size, self.dtype)

    def _computed(self, data: TaskData) -> Iterator[Tensor]:
        """The states `[t, C]` of the table's different rows, in the order of the file."""
        rows = self._kept[data]
        passes = plan_passes({data.name: rows.order}, {data.name: rows.apart}, self.max_tokens)
        title = f"{data.name}: {self.layers} frozen layers"
        for requests in tqdm(passes, desc=title, unit="pass", disable=None):
            # Evaluation runs in inference mode; nothing that is kept may come from there.
            with torch.inference_mode(False), torch.no_grad():
                batch = pack(requests).to(self.device)
                yield self.model.encoder(batch, dtype=self.dtype, layers=self.layers)

    def _frozen(self) -> list[tuple[str, nn.Parameter]]:
        encoder = self.model.encoder
        modules = [("embeddings", encoder.embeddings), *_numbered(encoder.layers[: self.layers])]
        return [(f"{place}.{name}", p) for place, module in modules for name, p in module.named_parameters()]

    def _failed(self, data: TaskData, error: OSError) -> None:
        key = self._key(data)
        text = (
            f"frozen_cache: the outputs of {self.layers} frozen layers for {data.name} cannot be kept in"
            f" {self.files.folder}: {error.strerror or error}; {key.size:,} bytes are needed there"
        )
        if self.config.use == "always":
            raise UserError(f"{text}; possible: another folder (cache), or frozen_cache.use never") from error
        self._give_up(text)

    def _give_up(self, why: str) -> None:
        logger.warning("%s: every step computes all layers", why)
        self._given_up = True
        self._open.clear()


class _Rows:
    """The different rows of a table and where the file has them: longest first, as they are computed."""

    def __init__(self, data: TaskData) -> None:
        self.apart, self._which = distinct_rows(data)
        self._each = data.rows_per_example
        self.order = np.argsort(-self.apart.lengths, kind="stable")
        lengths = self.apart.lengths
        self.tokens = int(lengths.sum())
        self._begins = np.empty(len(lengths), dtype=np.int64)
        self._begins[self.order] = np.cumsum(lengths[self.order]) - lengths[self.order]
        digest = hashlib.sha256(np.ascontiguousarray(lengths[self.order], dtype="<i8").tobytes())
        if len(self.order):
            batch = pack([Request(self.apart, self.order, 0, 0.0)])
            for words in (batch.input_ids, batch.token_type_ids):
                digest.update(words.numpy().tobytes())
        self.digest = digest.digest()

    def places(self, examples: np.ndarray) -> Iterator[tuple[int, int]]:
        """First token in the file, and tokens, of every row of these examples."""
        rows = (np.asarray(examples)[:, None] * self._each + np.arange(self._each)).reshape(-1)
        which = self._which[rows]
        return zip(self._begins[which].tolist(), self.apart.lengths[which].tolist(), strict=True)


def build_prefix_forward(config: TrainConfig, packed: PackedForward, folder: Path) -> PackedForward:
    """A forward that reads the frozen layers' outputs from files, or `packed` where that is not possible or not wanted.

    Raises ConfigError where it is not possible and `frozen_cache.use` is always.
    """
    use, model = config.frozen_cache.use, packed.model
    if use == "never":
        return packed
    layers, rates = model.encoder.lowest_trained_layer, model.encoder.dropouts
    drops = any((rates.embedding, rates.attention, rates.hidden)) and not model.encoder.undropped_layers
    reason = None
    if not layers:
        reason = (
            f"mode {config.mode} trains in the first layer or below it; possible: model.trained_layers, or"
            " model.lora.layers in mode lora"
        )
    elif drops:
        reason = f"the first {layers} layers are frozen but drop; possible: model.frozen_dropout false"
    elif config.smart.tasks:
        reason = (
            f"smart adds noise to the embeddings, so that the {layers} frozen layers are computed anew;"
            " possible: frozen_cache.use never, or smart.tasks empty"
        )
    if reason is None:
        return PrefixForward(
            model,
            packed.device,
            packed.dtype,
            folder / FOLDER,
            config.frozen_cache,
            max_tokens=config.max_tokens,
        )
    if use == "always":
        raise ConfigError(f"frozen_cache.use: always is not possible, {reason}")
    if layers:
        logger.info("the outputs of frozen layers are not cached: %s", reason)
    return packed


def keep_tables(forward: Forward, tables: Iterable[TaskData]) -> None:
    """Tell a forward that can read them from files which tables it will see again and again."""
    if isinstance(forward, PrefixForward):
        forward.keep(tables)


def describe_frozen(forward: Forward) -> dict[str, Any]:
    """The run's record of its frozen layers: how many, whether they drop, and whether their outputs were cached."""
    encoder = forward.model.encoder
    layers, rates = encoder.lowest_trained_layer, encoder.dropouts
    return {
        "layers": layers,
        "drop": any((rates.embedding, rates.attention, rates.hidden)) and not encoder.undropped_layers,
        "cached": isinstance(forward, PrefixForward) and forward.serves,
    }


def _numbered(layers: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    return [(f"layers.{number}", layer) for number, layer in enumerate(layers)]


def _digest_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> bytes:
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        values = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(cast(Any, values.numpy().data))
    return digest.digest()


@functools.cache
def _code_digest() -> bytes:
    """Of all code that computes: another version of the kernels may round otherwise."""
    digest = hashlib.sha256()
    folders = [Path(cast(str, module.__file__)).parent for module in (mtbert.kernels, mtbert.model)]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    files += sorted(Path(mtbert.__file__).parent.glob("_C*.*"))
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.digest()
