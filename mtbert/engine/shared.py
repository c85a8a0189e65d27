"""What several runs in one process need not read, tokenise or compute twice.

Runs that share get the same numbers, bit for bit, as runs that don't: what is shared is never written to (of frozen
weights, which are next to trained ones, the bytes are verified after every run), and features are kept under everything
that their bits depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mtbert.data.dataset import TaskData
from mtbert.data.tables import Table
from mtbert.data.tokenisation import Tokeniser
from mtbert.kernels.dispatch import serving
from mtbert.kernels.extension import instruction_set
from mtbert.model.multitask import MultiTaskModel
from mtbert.model.pretrained import resolve
from mtbert.tasks.extra_data import extra_files
from mtbert.tasks.loading import load_tables
from mtbert.tasks.registry import Task

if TYPE_CHECKING:
    from mtbert.engine.features import FrozenForward

_MOST_FEATURE_BYTES = 1 << 30


class SharedParts:
    """Tables, tokens, the tokeniser, the pretrained file, frozen weights and a frozen encoder's features.

    It is for runs one after the other in one thread. Tables are read once, so a table that changes meanwhile is not
    noticed.
    """

    def __init__(self, *, splits: Collection[str] = ("train", "dev", "test")) -> None:
        """splits: of the tables; a run without `test` predicts dev alone."""
        self.splits = splits
        self._tables: dict[tuple[str, ...], dict[str, Table]] = {}
        self._data: dict[tuple[Any, ...], TaskData] = {}
        self._folders: dict[str, Path] = {}
        self._tokenisers: dict[Path, Tokeniser] = {}
        self._files: dict[Path, Any] = {}
        self._frozen: dict[tuple[Any, ...], nn.Parameter] = {}
        self._digests: dict[tuple[Any, ...], bytes] = {}
        self._features: OrderedDict[tuple[Any, ...], tuple[TaskData, Tensor]] = OrderedDict()
        self._encoders: weakref.WeakKeyDictionary[FrozenForward, tuple[Any, ...]] = (
            weakref.WeakKeyDictionary()
        )

    def tables(
        self, source: str, tasks: Sequence[Task], *, extra: Sequence[str] = ()
    ) -> dict[str, dict[str, Table]]:
        """As `load_tables`, each table read once."""
        joining = extra_files(extra)
        keys = {task.name: (source, task.name, *map(str, joining.get(task.name, ()))) for task in tasks}
        missing = [task for task in tasks if keys[task.name] not in self._tables]
        for name, found in load_tables(source, missing, extra=extra).items():
            self._tables[keys[name]] = {split: found[split] for split in found if split in self.splits}
        return {name: self._tables[key] for name, key in keys.items()}

    def task_data(self, key: tuple[Any, ...], table: Table, make: Callable[[], TaskData]) -> TaskData:
        """The examples of a table in one form; key: whatever their rows depend on beside the table."""
        key = (id(table), *key)
        if key not in self._data:
            self._data[key] = make()
        return self._data[key]

    def folder(self, name: str) -> Path:
        """As `resolve`, which reads the whole of the bundled model to check it."""
        if name not in self._folders:
            self._folders[name] = resolve(name)
        return self._folders[name]

    def tokeniser(self, folder: Path) -> Tokeniser:
        """The tokeniser of a model's folder."""
        if folder not in self._tokenisers:
            self._tokenisers[folder] = Tokeniser.from_folder(folder)
        return self._tokenisers[folder]

    def opened(self, path: Path) -> contextlib.AbstractContextManager[Any]:
        """As `safe_open`, for a file that stays open: its pages are read once."""
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return contextlib.nullcontext(self._files[path])

    def forget(self, run: Path) -> None:
        """Drop what was read from models in a run's own folder: no other run has them."""

        def apart(folder: Path) -> bool:
            return not folder.resolve().is_relative_to(run.resolve())

        self._folders = {name: folder for name, folder in self._folders.items() if apart(folder)}
        self._tokenisers = {folder: kept for folder, kept in self._tokenisers.items() if apart(folder)}
        self._files = {path: kept for path, kept in self._files.items() if apart(path)}
        self._frozen = {key: kept for key, kept in self._frozen.items() if apart(key[0])}
        self._digests = {key: kept for key, kept in self._digests.items() if apart(key[0])}

    # ---- frozen weights ----

    def adopt(self, model: MultiTaskModel, folder: Path) -> int:
        """Let the encoder's frozen parameters be those of the runs before it, where they are equal bit for bit.

        Returns how many bytes the model has in common with others. The pooler is left out: what reads it may come later
        and train it.
        """
        shared = 0
        for place, module in model.encoder.named_modules():
            if place.split(".")[0] == "pooler":
                continue
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None or parameter.requires_grad:
                    continue
                key = (folder, place, leaf, str(parameter.device), parameter.dtype, tuple(parameter.shape))
                kept = self._frozen.get(key)
                if kept is None:
                    self._frozen[key], self._digests[key] = parameter, _digest([parameter])
                elif _same_bits(kept, parameter):
                    module._parameters[leaf] = kept
                    shared += kept.untyped_storage().nbytes()
        return shared

    def verify(self) -> None:
        """Raise RuntimeError when a run has changed what others share; then nothing of it is shared any more."""
        for key, parameter in self._frozen.items():
            if parameter.requires_grad or _digest([parameter]) != self._digests[key]:
                self._frozen.clear()
                self._digests.clear()
                raise RuntimeError(
                    f"a run has changed the frozen weight {key[1]}.{key[2]}, which others share"
                )

    # ---- features ----

    def features(
        self, forward: FrozenForward, data: TaskData, compute: Callable[[TaskData], Tensor]
    ) -> Tensor:
        """Pooled rows of a table by a frozen encoder, computed for the first run that asks for them."""
        model = forward.model
        pooling = model.poolings.get(data.name) or model.probe_poolings[data.name]
        if forward not in self._encoders:
            self._encoders[forward] = _encoder_key(forward)
        key = (*self._encoders[forward], pooling, id(data))
        if key in self._features:
            self._features.move_to_end(key)
            return self._features[key][1]
        rows = compute(data)
        self._features[key] = (data, rows)  # the table stays, and with it its id
        while (
            len(self._features) > 1
            and sum(_bytes(t) for _, t in self._features.values()) > _MOST_FEATURE_BYTES
        ):
            self._features.popitem(last=False)
        return rows


def _encoder_key(forward: FrozenForward) -> tuple[Any, ...]:
    """Everything but table and pooling that a frozen encoder's features depend on, to the bit."""
    encoder = forward.model.encoder
    cuda = forward.device.type == "cuda"
    return (
        _digest(encoder.state_dict().values()),
        repr(encoder.config),
        str(forward.device),
        str(forward.dtype),
        torch.backends.cuda.matmul.fp32_precision if cuda else None,
        torch.get_num_threads(),
        forward.max_tokens,
        tuple(sorted(serving(forward.device.type, forward.dtype).items())),
        instruction_set(),
    )


def _digest(tensors: Iterable[Tensor]) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one.detach().view(torch.uint8), other.detach().view(torch.uint8)))


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
