"""torch.compile for what has no kernels of its own: the layers of the heads and the losses.

The encoder's operations are kernels already, and a graph could only break at them. What is left are chains of small
operations on [rows, C] and [rows, classes]: the features of a pair, a layer with its activation, a score's range, each
task's loss, the cross-entropy of masked words. Each such part is compiled on its own, for any number of rows, and only
for training: an evaluation computes as one without compilation does. A part that cannot be compiled here goes on as it
is, with a warning that says why.

Not compiled: pooling (one gather, or a segmented sum that inductor hands back to PyTorch), surgery (products and one
weighted sum for each parameter; its small matrices follow another random order in every step) and random activations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtbert.losses.task_losses import TaskLoss
from mtbert.model.multitask import MultiTaskModel

logger = logging.getLogger(__name__)

MOST_GRAPHS = 4
"""Compilations of one part that nobody needs to hear of: one for any number of rows and one for a single row, which
torch.compile always takes as a constant; both once more where an objective holds the weights still."""

Part = Callable[..., Tensor]


class Compiled:
    """A function of tensors, compiled where gradients are wanted.

    The first dimension of all that are not parameters may change freely.
    """

    def __init__(self, name: str, function: Part, backend: str = "inductor") -> None:
        self.name = name
        self.function = function
        self.backend = backend
        self.graphs = 0
        """How often it was compiled."""
        self.reason: str | None = None
        """Why it is not compiled, where that has failed."""
        # Per-task gradients go through the same graph several times, for which it must keep what it saved.
        torch._functorch.config.donated_buffer = False
        self._compiled: Part = torch.compile(function, fullgraph=True, backend=self._compile)

    def __call__(self, *arguments: Tensor) -> Tensor:
        """What the function gives."""
        wanted = torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments)
        if self.reason is not None or not wanted:
            return self.function(*arguments)
        for argument in arguments:
            if not isinstance(argument, nn.Parameter):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        try:
            return self._compiled(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError) as error:
            result = self.function(
                *arguments
            )  # what is wrong with the arguments is said by the function itself
            self.reason = _first_line(getattr(error, "inner_exception", error))
            logger.warning("torch.compile: %s runs uncompiled, because %s", self.name, self.reason)
            return result

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        if self.graphs == MOST_GRAPHS + 1:
            logger.warning(
                "torch.compile: %s was compiled %d times; if that goes on, compile false is faster",
                self.name,
                self.graphs,
            )
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self.backend)(graph, inputs)
        return compiled


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class CompiledParts:
    """Everything of a run that was given to torch.compile."""

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self.parts: list[Compiled] = []

    def add(self, name: str, function: Part) -> Compiled:
        """Compile a function."""
        self.parts.append(Compiled(name, function, self.backend))
        return self.parts[-1]

    def add_tasks(self, model: MultiTaskModel, losses: Mapping[str, TaskLoss]) -> None:
        """Compile what the heads compute between their masks, and the tasks' losses."""
        for task, loss in losses.items():
            head = model.head(task)
            for name in head.used_parts:
                head.parts[name] = self.add(f"{task} head {name}", head.parts[name])
            loss.compute = self.add(f"{task} loss", loss.compute)

    def to_json(self) -> dict[str, Any]:
        """How often each part was compiled, and why others were not."""
        return {
            "graphs": {part.name: part.graphs for part in self.parts if part.reason is None},
            "uncompiled": {part.name: part.reason for part in self.parts if part.reason is not None},
        }
