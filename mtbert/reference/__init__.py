"""The specification: BERT, LoRA, task heads and a training step, as plainly as PyTorch allows.

Padded batches, one task after another, `torch.nn` and autograd alone; nothing of the fast path is imported.
The tests hold the packed program against it: same weights, same sentences, same dropout masks, same
numbers.

Read in this order: `minbert`, `lora`, `heads`, `training`.
"""

from __future__ import annotations

from mtbert.reference.heads import Head, MultitaskBert
from mtbert.reference.lora import LoraLinear, add_lora
from mtbert.reference.minbert import BertConfig, Dropout, Masks, MinBert, Rows
from mtbert.reference.training import TaskBatch, make_optimizer, task_loss, training_step

__all__ = [
    "BertConfig",
    "Dropout",
    "Head",
    "LoraLinear",
    "Masks",
    "MinBert",
    "MultitaskBert",
    "Rows",
    "TaskBatch",
    "add_lora",
    "make_optimizer",
    "task_loss",
    "training_step",
]
