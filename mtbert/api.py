"""Trained models in Python: `mtbert.load("runs/first")` predicts for sentences and turns them into vectors."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast, get_args

import numpy as np
import torch

from mtbert.config import TrainConfig
from mtbert.data.dataset import MAX_POSITIONS
from mtbert.data.tables import Table, read_own_table
from mtbert.data.tokenisation import Tokeniser
from mtbert.engine.build import check_vocabulary, machine_of
from mtbert.engine.finish import swap_pairs
from mtbert.engine.interruptions import memory_errors
from mtbert.engine.load_run import load_run
from mtbert.engine.precision import Precision, product_settings, resolve_device
from mtbert.engine.predictor import Example, Predictor, Space
from mtbert.engine.run_folder import RunFolder
from mtbert.errors import ConfigError, DataError, ModelFileError, NonFiniteError
from mtbert.evaluation.assessment import Assessment, assess
from mtbert.evaluation.baselines import baselines
from mtbert.evaluation.bootstrap import RESAMPLES
from mtbert.evaluation.metrics import class_names
from mtbert.evaluation.predictions import Predictions, predictions_from_outputs, probabilities
from mtbert.kernels.dispatch import use_backend
from mtbert.model.multitask import MultiTaskModel
from mtbert.model.pooling import POOLINGS, Pooling
from mtbert.model.pretrained import MINILM, load_encoder, resolve
from mtbert.outside_files import own_file, read_json_object
from mtbert.tasks.registry import Task

__all__ = ["Answer", "Model", "load_model"]

CHUNK = 8192
"""Examples that are read, tokenised and packed together: what a stream of them keeps in memory."""

_T = TypeVar("_T")

_COMPUTING = threading.RLock()
"""Threads, kernels, casts and arithmetic are settings of the process: one call at a time, whatever the model."""


@dataclass(frozen=True)
class Answer:
    """What a model says of one example."""

    text: Example
    prediction: int | float
    """The number of a class, or a score in the labels' units."""
    name: str | None
    """The class in words; None for a score."""
    probabilities: dict[str, float]
    """Of each class by name, together 1; empty for a score."""


def load_model(
    path: str | Path,
    *,
    device: str,
    precision: Precision | None,
    max_tokens: int | None,
    threads: int | None,
    trust_plugins: bool,
) -> Model:
    """What `mtbert.load` gives."""
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens: expected at least 1, found {max_tokens}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: expected at least 1, found {threads}")
    if precision is not None and precision not in get_args(Precision):
        raise ConfigError(f"precision: expected {', '.join(get_args(Precision))}, found {precision!r:.40}")
    folder = Path(path).expanduser()
    from mtbert.cli import config_from_file

    # Heads are drawn before their weights are read: the host's random numbers must not notice.
    with _COMPUTING, torch.random.fork_rng(devices=[]):
        if (folder / "config.yaml").is_file():
            run = RunFolder.open(folder)
            if run.is_mlm:
                return _of_encoder(str(run.path), device, precision, max_tokens, threads)
            config = config_from_file(run.config_path, trust_plugins=trust_plugins)
            return _of_run(run, config, device, precision, max_tokens, threads)
        is_encoder = str(path) == MINILM or (folder / "config.json").is_file()
        if not is_encoder and (folder.exists() or (folder.parent != Path() and folder.parent.is_dir())):
            RunFolder.open(folder)  # raises, naming the run that may have been meant
        return _of_encoder(str(path), device, precision, max_tokens, threads)


def _of_run(
    run: RunFolder,
    config: TrainConfig,
    device: str,
    precision: Precision | None,
    max_tokens: int | None,
    threads: int | None,
) -> Model:
    loaded = load_run(run, config, device=device, precision=precision)
    config = loaded.config
    predictor = Predictor(
        loaded.model,
        loaded.tokeniser,
        loaded.machine,
        loaded.tasks,
        config.task,
        max_tokens=max_tokens or config.max_tokens,
    )
    space = _space_of_run(config, predictor)
    return Model(
        predictor, run.path, config.precision, space, config=config, step=loaded.step, threads=threads
    )


def _of_encoder(
    name: str, device: str, precision: Precision | None, max_tokens: int | None, threads: int | None
) -> Model:
    place, folder = resolve_device(device), resolve(name)
    chosen = precision or "auto"
    machine = machine_of(place, chosen)
    model = MultiTaskModel(load_encoder(folder), {}).to(place)
    model.eval().requires_grad_(False)
    tokeniser = Tokeniser.from_folder(folder)
    check_vocabulary(folder, tokeniser, model)
    predictor = Predictor(model, tokeniser, machine, {}, {}, max_tokens=max_tokens or TrainConfig.max_tokens)
    space = Space(_stated_pooling(folder), _most_tokens(model))
    return Model(predictor, folder, cast(Precision, _name(machine.arithmetic)), space, threads=threads)


def _name(arithmetic: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16"}.get(arithmetic, arithmetic)


def _most_tokens(model: MultiTaskModel) -> int:
    return min(model.encoder.config.max_position_embeddings, MAX_POSITIONS)


def _stated_pooling(folder: Path) -> Pooling:
    """What sentence-transformers' file says, where the folder has one; else the mean. Raises ModelFileError.

    Warns of what such a model does beside it and `encode` does not: another pooling, and dense layers.
    """
    path = own_file(folder, "1_Pooling/config.json", ModelFileError)
    if not path.is_file():
        return "mean"
    said = read_json_object(path, ModelFileError)
    modes = {key.removeprefix("pooling_mode_") for key, value in said.items() if value is True}
    left = sorted(modes & {"max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"})
    left += sorted(each.parent.name for each in folder.glob("*_Dense/config.json"))
    if left:
        warnings.warn(f"{folder}: encode leaves out {', '.join(left)} of sentence-transformers", stacklevel=4)
    return "cls" if "cls_token" in modes else "mean"


def _space_of_run(config: TrainConfig, predictor: Predictor) -> Space | None:
    """Where sentences lie that the run has trained to be compared; None where only a task can say.

    The first of: a task that compares two rows, a similarity before others; an objective on sentence vectors; the mean.
    """
    pairs = [name for name in predictor.tasks if predictor.model.head(name).rows_per_example == 2]
    pairs.sort(key=lambda name: predictor.tasks[name].kind != "similarity")
    if pairs:
        return predictor.space_of(pairs[0], towers=True)
    objectives = [o for o in (config.simcse, config.mnrl, config.cosine_embedding, config.triplet) if o.tasks]
    if objectives:
        return replace(
            predictor.space_of(objectives[0].tasks[0], towers=False), pooling=objectives[0].pooling
        )
    if {"model.pals", "lora.per_task"} & set(predictor.model.encoder.additions):
        return None
    return Space("mean", _most_tokens(predictor.model))


class Model:
    """A trained model; `mtbert.load` makes it.

    Examples are strings, or pairs of strings for a task on pairs, in any iterable: lists, arrays, columns of a data
    frame, generators. They are packed without padding and computed in chunks of 8192; results are in their
    order. Texts that occur several times in a chunk are computed once. What is longer than the task's `max_length` is
    truncated as in training. An empty text raises DataError, as training has seen none.

    Calls may come from several threads, and take turns. Threads, arithmetic and kernels are set for the time of a call
    and put back.
    """

    def __init__(
        self,
        predictor: Predictor,
        path: Path,
        precision: Precision,
        space: Space | None,
        *,
        config: TrainConfig | None = None,
        step: int | None = None,
        threads: int | None = None,
    ) -> None:
        """config, step: of a run. space: how `encode` reads sentences where nothing else is asked for."""
        self.path = path
        self.precision: Precision = precision
        self.config = config
        self.step = step
        """The step of the checkpoint that was loaded; None without a run."""
        self.threads = threads
        self.space = space
        self._predictor = predictor
        self._kernels = None if config is None or config.kernels == "auto" else config.kernels

    def __repr__(self) -> str:
        tasks = ", ".join(self.tasks) or "no tasks"
        return f"<mtbert.Model {self.path}: {tasks}; {self.device}, {self.precision}>"

    @property
    def tasks(self) -> MappingProxyType[str, Task]:
        """The tasks by name; empty for an encoder alone."""
        return MappingProxyType(self._predictor.tasks)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._predictor.machine.device

    @property
    def width(self) -> int:
        """The numbers in a vector of `encode`, unless a task's towers change that."""
        return self._predictor.model.encoder.config.hidden_size

    def class_names(self, task: str) -> tuple[str, ...]:
        """The names of a task's classes in the order of their numbers; empty for a similarity."""
        return class_names(self.task(task))

    def predict(self, task: str, examples: Iterable[Any]) -> np.ndarray:
        """Predictions [n]: class numbers (int64), or scores in the labels' units (float32, not clipped)."""
        chosen = self.task(task)
        return predictions_from_outputs(chosen, self.outputs(task, examples))

    def probabilities(self, task: str, examples: Iterable[Any]) -> np.ndarray:
        """Probabilities [n, classes] float64, in the order of `class_names`. ConfigError for a similarity."""
        chosen = self.task(task)
        if chosen.kind == "similarity":
            raise ConfigError(f"task {task} gives scores, not probabilities: use predict")
        return probabilities(chosen, self.outputs(task, examples))

    def outputs(self, task: str, examples: Iterable[Any]) -> np.ndarray:
        """What the head computes, [n, k] float32: a logit a class; one logit (binary); one score (similarity)."""
        chosen = self.task(task)
        blocks = (block for _, block in self._outputs(chosen, examples))
        return _joined(blocks, examples, np.zeros((0, chosen.outputs), dtype=np.float32))

    def answers(self, task: str, examples: Iterable[Any]) -> Iterator[Answer]:
        """An answer for each example, as they come: a stream without an end needs no more memory than a chunk."""
        chosen = self.task(task)
        names = class_names(chosen)
        for texts, outputs in self._outputs(chosen, examples):
            values = predictions_from_outputs(chosen, outputs).tolist()
            if not names:
                yield from (Answer(text, value, None, {}) for text, value in zip(texts, values, strict=True))
                continue
            for text, value, chances in zip(
                texts, values, probabilities(chosen, outputs).tolist(), strict=True
            ):
                yield Answer(text, value, names[value], dict(zip(names, chances, strict=True)))

    def encode(
        self,
        sentences: Iterable[Any],
        *,
        task: str | None = None,
        pooling: Pooling | None = None,
        normalise: bool = False,
    ) -> np.ndarray:
        """Vectors [n, C] float32 of sentences.

        task: as its head reads a sentence: its pooling, its `max_length`, its adapters, and the towers of a head that
        compares two rows. Without it, the space that the run has trained to be compared (`Model.space`): that of a
        task that compares two rows, a similarity before others; else that of an objective on sentence vectors (SimCSE
        and its kin); else the mean of all tokens, as for an encoder alone, unless its folder says otherwise.
        pooling: cls, pooler or mean, instead, without towers. normalise: to length 1, so that products are cosines.
        """
        space = self._space(task, pooling)
        blocks = self._vectors(space, sentences, normalise)
        return _joined(blocks, sentences, np.zeros((0, self._width(space)), dtype=np.float32))

    def encode_blocks(
        self,
        sentences: Iterable[Any],
        *,
        task: str | None = None,
        pooling: Pooling | None = None,
        normalise: bool = False,
    ) -> Iterator[np.ndarray]:
        """The same vectors in blocks of up to 8192, as the sentences come: for what does not fit into memory."""
        return self._vectors(self._space(task, pooling), sentences, normalise)

    def similarity(
        self,
        first: Iterable[Any] | np.ndarray,
        second: Iterable[Any] | np.ndarray | None = None,
        *,
        task: str | None = None,
        pooling: Pooling | None = None,
    ) -> np.ndarray:
        """Cosines [n, m] float32 of each of `first` with each of `second` (by default `first` again).

        Both may be sentences, or vectors that `encode` gave: each sentence is computed once, however many it is
        compared with. task and pooling as in `encode`.
        """

        def unit(given: Iterable[Any] | np.ndarray) -> np.ndarray:
            if isinstance(given, np.ndarray) and given.dtype.kind == "f":
                if given.ndim != 2:
                    raise ValueError(f"expected vectors [n, C], found an array of shape {given.shape}")
                return _unit(given.astype(np.float32, copy=False))
            return self.encode(given, task=task, pooling=pooling, normalise=True)

        rows = unit(first)
        found = rows @ (rows if second is None else unit(second)).T
        return np.clip(found, -1.0, 1.0, out=found)

    def evaluate(
        self,
        task: str,
        examples: str | Path | Table | Iterable[Any],
        labels: Iterable[Any] | None = None,
        *,
        resamples: int = RESAMPLES,
    ) -> Assessment:
        """Scores of a table, or of examples and their labels, with intervals, calibration and swapped pairs.

        examples: the path of a table with the task's columns, separated by tabs or commas (see `read_own_table`); or a
        `Table`; or examples as for `predict` with a label each: class numbers, or scores in the task's range.
        resamples: of the bootstrap. Raises DataError for what cannot be scored; rows of a file that cannot be used are
        left out with a warning.
        """
        chosen = self.task(task)
        if resamples < 1:
            raise ConfigError(f"resamples: expected at least 1, found {resamples}")
        if labels is not None and isinstance(examples, str | Path | Table):
            raise TypeError("labels: a table has its own; give labels to examples only")
        if isinstance(examples, str | Path):
            table = read_own_table(examples, task, chosen.layout, labelled=True)
            if table.problems:
                left_out = f"{len(table.problems)} rows left out, the first: {table.problems[0]}"
                warnings.warn(f"{table.path}: {left_out}", stacklevel=2)
        elif isinstance(examples, Table):
            table = examples
        else:
            table = _table(chosen, list(_examples(task, chosen.is_pair, examples)), labels)
        if table.labels is None:
            raise DataError(f"{table.path}: has no labels")
        outputs = self.outputs(task, _texts_of(table))
        swaps = None
        if chosen.is_pair:
            with self._settings():
                swaps = swap_pairs(self._predictor, chosen, table)
        predictions = Predictions(
            task, table.split, tuple(table.ids), table.labels, outputs.astype(np.float64)
        )
        base = baselines(chosen, None, table.labels)
        return assess(chosen, predictions, swaps=swaps, baselines=base, resamples=resamples)

    def task(self, name: str) -> Task:
        """The task of that name. ConfigError for one that the model has not."""
        if name not in self.tasks:
            trained = (
                f"was trained on {', '.join(self.tasks)}" if self.tasks else "is an encoder without tasks"
            )
            raise ConfigError(f"{self.path} {trained}, not on {name}")
        return self.tasks[name]

    def _space(self, task: str | None, pooling: Pooling | None) -> Space:
        if pooling is not None and pooling not in POOLINGS:
            raise ConfigError(f"pooling: unknown pooling {pooling!r}; possible: {', '.join(POOLINGS)}")
        if task is not None:
            self.task(task)
            two_rows = self._predictor.model.head(task).rows_per_example == 2
            space = self._predictor.space_of(task, towers=two_rows and pooling is None)
        elif self.space is None:
            raise ConfigError(
                f"{self.path}: every task has layers of its own; say whose with task=: {', '.join(self.tasks)}"
            )
        else:
            space = self.space if pooling is None else replace(self.space, towers=False)
        return space if pooling is None else replace(space, pooling=pooling)

    def _width(self, space: Space) -> int:
        if space.towers and space.task is not None:
            towers = self._predictor.model.head(space.task).towers
            if len(towers):
                return int(cast(torch.nn.Linear, towers[-1]).out_features)
        return self.width

    def _outputs(self, task: Task, examples: Iterable[Any]) -> Iterator[tuple[list[Example], np.ndarray]]:
        done = 0
        for texts in _chunks(_examples(task.name, task.is_pair, examples)):
            with self._settings():
                outputs = self._predictor.outputs(task.name, texts)
            _check_finite(task.name, outputs, done)
            yield texts, outputs
            done += len(texts)

    def _vectors(self, space: Space, sentences: Iterable[Any], normalise: bool) -> Iterator[np.ndarray]:
        done = 0
        for texts in _chunks(text for (text,) in _examples(None, False, sentences)):
            with self._settings():
                rows = self._predictor.vectors(texts, space)
            _check_finite("encode", rows, done)
            yield _unit(rows) if normalise else rows
            done += len(texts)

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """The process as the model needs it; afterwards as it was."""
        with ExitStack() as stack:
            stack.enter_context(_COMPUTING)
            stack.enter_context(memory_errors(self._predictor.max_tokens))
            stack.enter_context(product_settings(self.precision))
            stack.enter_context(use_backend(self._kernels))
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if self.threads is not None:
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(self.threads)
            yield


def _examples(task: str | None, is_pair: bool, given: Iterable[Any]) -> Iterable[Example]:
    """The texts of each example, checked: all of them at once where they are in memory, else as they come."""
    wanted = "pairs of sentences" if is_pair else "sentences"
    if (
        isinstance(given, str | bytes | Mapping)
        or hasattr(given, "columns")
        or getattr(given, "ndim", 1) == 0
        or not isinstance(given, Iterable)
    ):
        found = "one string" if isinstance(given, str) else f"a {type(given).__name__}"
        hint = "put it into a list" if isinstance(given, str) else "give a list, or a column as a list"
        raise TypeError(f"expected {wanted}, found {found}: {hint}")
    checked = (_texts(number, task, is_pair, example) for number, example in enumerate(given))
    return list(checked) if isinstance(given, Sized) else checked


def _texts(number: int, task: str | None, is_pair: bool, example: Any) -> Example:
    if not is_pair:
        texts: Example = (example,)
    elif isinstance(example, tuple | list | np.ndarray) and len(example) == 2:
        texts = (example[0], example[1])
    else:
        found = f"{len(example)} of them" if isinstance(example, tuple | list) else f"{example!r:.60}"
        raise TypeError(
            f"example {number}: task {task} takes pairs of sentences, (first, second); found {found}"
        )
    for text in texts:
        if not isinstance(text, str):
            what = (
                f"task {task} takes single sentences"
                if task and isinstance(text, tuple | list)
                else "expected text"
            )
            raise TypeError(f"example {number}: {what}, found {type(text).__name__} {text!r:.60}")
        if not text or text.isspace():
            raise DataError(f"example {number}: a text is empty, which training has never seen; leave it out")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise DataError(f"example {number}: {text!r:.60} is not valid Unicode") from None
    return texts


def _texts_of(table: Table) -> list[Any]:
    """The table's examples as `predict` takes them."""
    return [texts if len(texts) > 1 else texts[0] for texts in table.texts]


def _table(task: Task, examples: list[Example], labels: Iterable[Any] | None) -> Table:
    """Examples and their labels as a table; ids are the examples' numbers."""
    kind = task.layout.labels
    found = np.asarray([] if labels is None else list(labels))
    if found.shape != (len(examples),):
        raise DataError(
            f"task {task.name}: {len(examples)} examples need as many labels, found {found.shape}"
        )
    numbers = range(len(examples))
    for number, label in zip(numbers, found.tolist(), strict=True):
        is_number = isinstance(label, int | float) and not isinstance(label, bool)
        if not is_number or not np.isfinite(label) or not kind.allows(label):
            raise DataError(f"label {number} of task {task.name} is {label!r}, expected {kind}")
    ids = [str(number) for number in numbers]
    return Table(task.name, "own", Path("examples"), ids, examples, found.astype(kind.dtype), list(numbers))


def _chunks(values: Iterable[_T]) -> Iterator[list[_T]]:
    rest = iter(values)
    while chunk := list(itertools.islice(rest, CHUNK)):
        yield chunk


def _joined(blocks: Iterator[np.ndarray], given: Iterable[Any], none: np.ndarray) -> np.ndarray:
    """The blocks as one array; where their number is known they are copied only once. none: the result of no blocks."""
    if not isinstance(given, Sized) or getattr(given, "ndim", 1) == 0:  # an array without axes has no length
        return np.concatenate([none, *blocks])
    joined = np.empty((len(given), none.shape[1]), dtype=none.dtype)
    done = 0
    for block in blocks:
        joined[done : done + len(block)] = block
        done += len(block)
    return joined


def _check_finite(what: str, values: np.ndarray, before: int) -> None:
    """before: how many examples came before these."""
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        raise NonFiniteError(
            f"{what}: the results of {len(bad)} of {len(values)} examples are NaN or infinite (the first is example"
            f" {before + int(bad[0])}): the model has diverged, or its weights are damaged"
        )


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays one."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
