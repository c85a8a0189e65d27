"""Names a run's ranges, keeps them nested whatever happens, and carries the names over to the backward pass."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from mtbert.kernels.segments import Segments
from mtbert.ranges import PHASES, Range

_NAMED = "mtbert range"
"""Key in a graph node's metadata: the node carries a name already."""

_UNNAMED = ("encoder", "embeddings")
"""Modules that add nothing to the names of what is in them."""


@dataclass(frozen=True)
class Label:
    """A range: its name, and what a table counts it under."""

    name: str
    direction: str = ""
    """forward, backward or recompute (a forward pass that the backward pass repeats); empty for other ranges."""
    operation: str = ""
    """What it computes; empty where it only holds other ranges."""
    places: tuple[str, ...] = ()
    """Where in the model it is, from the outside."""


class _Local(threading.local):
    """What is open in one thread: autograd runs the backward pass of a GPU in a thread of its own."""

    def __init__(self) -> None:
        self.open: list[Label] = []
        self.places: list[str] = []
        self.modules: list[OpenRange] = []


class RangeTree(ABC):
    """Turns spans, operations and modules into nested ranges of one thread each; what a range is, a subclass says.

    A range of the backward pass is opened and closed by hooks on the nodes of the autograd graph that the forward range
    has made, so that it needs no node of its own and changes no value. Where a backward pass fails between the two
    hooks, the span around it closes what they left open.
    """

    def __init__(self) -> None:
        self._local = _Local()
        self._phases: list[str] = []

    @abstractmethod
    def _open(self, label: Label) -> None:
        """Open a range in this thread."""

    @abstractmethod
    def _close(self) -> None:
        """Close this thread's newest range."""

    def _cost(
        self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[str], None] | None:
        """What is to be told the direction whenever this call of an operation is computed; None: nothing."""
        return None

    def span(self, parts: tuple[object, ...]) -> Range:
        """See `mtbert.ranges.Listener`."""
        name = " ".join(map(str, parts))
        # Of all spans, only the losses have a line in the table of operations.
        is_loss = parts[0] == "loss" and len(parts) > 1
        return OpenRange(self, Label(name, "forward", "losses") if is_loss else Label(name))

    def call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `mtbert.ranges.Listener`."""
        cost = self._cost(name, args, kwargs)
        with OpenRange(self, self.here(name), cost) as opened:
            if cost is not None:
                cost(opened.label.direction)
            result = function(*args, **kwargs)
            opened.ends_in(result, inputs=_tensors((*args, *kwargs.values())))
        return result

    def here(self, *more: str, operation: str | None = None) -> Label:
        """The label of something in a forward pass, where this thread is in the model."""
        direction, places = "forward", tuple(self._local.places)
        if "backward" in self._phases:
            # What is computed again without its module is in the layer whose backward pass wants it.
            above = self._local.open[-1].places if self._local.open else ()
            direction, places = "recompute", places or above[:1]
        path = " ".join((direction, *places, *more))
        return Label(path, direction, (more[-1] if more else "") if operation is None else operation, places)

    def push(self, label: Label) -> int:
        """Open a range; returns how many were open in this thread before."""
        depth = len(self._local.open)
        self._open(label)
        self._local.open.append(label)
        if label.name in PHASES:
            self._phases.append(label.name)
        return depth

    def unwind(self, depth: int, label: Label) -> None:
        """Close this thread's ranges down to `depth`, `label`'s and all that were left open within it."""
        while len(self._local.open) > depth:
            self._local.open.pop()
            self._close()
        if label.name in PHASES:
            self._phases.pop()

    def name_backward(
        self,
        label: Label,
        outputs: Iterable[Tensor],
        inputs: Iterable[Tensor],
        cost: Callable[[str], None] | None,
    ) -> None:
        """Name the graph between outputs and inputs, as far as it has no names: each node's computation is a range.

        Sums of gradients into leaves are left out: such a node belongs to a parameter, and outlives the graph.
        """
        ends = {tensor.grad_fn for tensor in inputs}
        todo = [tensor.grad_fn for tensor in outputs]
        while todo:
            node = todo.pop()
            if node is None or node in ends or not node.next_functions:
                continue
            metadata = cast(
                dict[str, str], node.metadata
            )  # torch declares a method, and gives the dictionary
            if _NAMED in metadata:
                continue
            metadata[_NAMED] = label.name
            self._hook(node, label, cost)
            cost = None  # counted once: at the node that the backward pass reaches first
            todo.extend(following for following, _ in node.next_functions)

    def _hook(self, node: Node, label: Label, cost: Callable[[str], None] | None) -> None:
        depths: list[int] = []

        def begin(gradients: tuple[Tensor | None, ...]) -> None:
            depths.append(self.push(label))
            if cost is not None:
                cost(label.direction)

        def end(gradients: Any, incoming: Any) -> None:
            self.unwind(depths.pop(), label)

        node.register_prehook(begin)
        node.register_hook(end)

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Within it, the forward pass of every layer, projection and head in `model` is a range."""
        handles: list[RemovableHandle] = []
        owners = dict(model.named_modules())
        for path, module in owners.items():
            word = _word_of(path, owners)
            if word and type(module).__module__.startswith("mtbert."):
                begin, end = self._module_hooks(word, "heads" if word.split()[0] == "head" else "")
                handles.append(module.register_forward_pre_hook(begin))
                handles.append(module.register_forward_hook(end, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _module_hooks(
        self, word: str, operation: str
    ) -> tuple[Callable[[nn.Module, Any], None], Callable[[nn.Module, Any, Any], None]]:
        def begin(module: nn.Module, args: Any) -> None:
            self._local.places.append(word)
            opened = OpenRange(self, self.here(operation=operation), inputs=_tensors(args))
            self._local.modules.append(opened.__enter__())

        def end(module: nn.Module, args: Any, result: Any) -> None:
            self._local.places.pop()
            opened = self._local.modules.pop()
            opened.ends_in(*_tensors((result,)))
            opened.__exit__(None, None, None)

        return begin, end


class OpenRange:
    """One range of a tree; see `mtbert.ranges.Range`."""

    def __init__(
        self,
        tree: RangeTree,
        label: Label,
        cost: Callable[[str], None] | None = None,
        inputs: Iterable[Tensor] = (),
    ) -> None:
        self.tree = tree
        self.label = label
        self._cost = cost
        self._inputs = inputs
        self._depth = 0

    def __enter__(self) -> OpenRange:
        self._depth = self.tree.push(self.label)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tree.unwind(self._depth, self.label)

    def ends_in(self, *outputs: Tensor, inputs: Iterable[Tensor] | None = None) -> None:
        """Name the backward pass; `inputs`: where it ends, beside what has a name already."""
        name = " ".join(("backward", self.label.name.removeprefix(f"{self.label.direction} ")))
        backward = Label(name, "backward", self.label.operation, self.label.places)
        self.tree.name_backward(backward, outputs, self._inputs if inputs is None else inputs, self._cost)


def _word_of(path: str, owners: Mapping[str, nn.Module]) -> str:
    """`layer 3` for `encoder.layers.3`, `head sst` for `heads.sst`, else the last part of a module's path."""
    owner, _, last = path.rpartition(".")
    if isinstance(owners.get(owner), nn.ModuleList | nn.ModuleDict):
        return f"{owner.rpartition('.')[2].removesuffix('s')} {last}"
    return "" if last in _UNNAMED else last


def _tensors(values: Iterable[object]) -> list[Tensor]:
    """The tensors among some arguments and in tuples of them, with the companions that segments hold."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
        elif isinstance(value, Segments):
            found += value.companions.values()
    return found
