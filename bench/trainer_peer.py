"""The multi-dataset trainer of `sentence-transformers`, as its documentation sets it up, one optimizer step at a time.

Its own loop runs in a thread and waits after every optimizer step until it is that side's turn again: nothing of the
library is taken apart. A step so counts all that its users pay for: batches drawn from one data set at a time in
proportion to their sizes, tokenising in the collator, padding, autocast, clipping, fused AdamW.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import Side
from bench.memory import peak_bytes
from bench.peers import BATCH
from bench.workload import Workload
from mtbert.optim.adamw import OptimizerConfig
from mtbert.tasks.registry import Task

NEEDS = ("sentence_transformers", "datasets", "accelerate")
_WORKERS = 4
"""Processes that tokenise and pad beside a GPU; on a CPU they would take the cores away from the training."""


class TrainerLoop:
    """`SentenceTransformerTrainer` over a data set a task: mean pooling, pairs as two rows."""

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        *,
        dtype: torch.dtype,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Losses: OnlineContrastiveLoss for a binary pair task, CosineSimilarityLoss for a similarity, and for a
        single sentence, for which the library has none, cross-entropy of a linear layer on the embedding."""
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

        torch.manual_seed(seed)
        self.tokens = 0
        self._folder = tempfile.TemporaryDirectory(prefix="mtbert-bench-")
        examples = sum(len(pool) for pool in workload.pool.values())
        batches = workload.tokens_per_step * examples / (workload.tokens * BATCH)
        config = OptimizerConfig()
        arguments = SentenceTransformerTrainingArguments(
            output_dir=self._folder.name,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=max(1, round(batches)),
            max_steps=1_000_000,
            learning_rate=config.lr,
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip_norm,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            dataloader_num_workers=0 if device.type == "cpu" else _WORKERS,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        model = _model(workload, device, dropout)
        self.trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=_data_sets(workload),
            loss={name: _loss(task, model) for name, task in workload.tasks.items()},
            callbacks=[_pauses(self)],
        )
        self._count_tokens()
        self._device = device
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._over = False
        self._thread = threading.Thread(target=self._train, name="sentence-transformers", daemon=True)

    def __call__(self, repeat: int) -> float:
        """Let the trainer take one optimizer step; returns its useful tokens."""
        if self._thread.ident is None:
            self._thread.start()
        self.tokens = 0
        self._turn.release()
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError("the trainer of sentence-transformers has failed") from self._error
        return int(self.tokens)

    def activation_bytes(self) -> tuple[int, int]:
        """After a first step: useful tokens of some batches, and the peaks of their forward and backward passes,
        gradients aside, added up."""
        trainer, held = self.trainer, 0
        loader = iter(trainer.get_train_dataloader())
        batches = [
            trainer._prepare_inputs(next(loader)) for _ in range(1 + trainer.args.gradient_accumulation_steps)
        ]

        def accumulate(batch: dict[str, Any]) -> None:
            trainer.accelerator.backward(trainer.compute_loss(trainer.model_wrapped, batch))

        accumulate(batches[0])
        self.tokens = 0
        for batch in batches[1:]:
            held += peak_bytes(lambda batch=batch: accumulate(batch), self._device)
        trainer.optimizer.zero_grad()
        return int(self.tokens), held

    def wait_for_turn(self) -> bool:
        """Called by the trainer between two steps; returns whether it shall go on."""
        self._turn.acquire()
        return not self._over

    def end_step(self) -> None:
        """Called by the trainer after a step."""
        self._done.release()

    def close(self) -> None:
        """End the trainer's loop."""
        self._over = True
        if self._thread.is_alive():
            self._turn.release()
            self._thread.join()
        self._folder.cleanup()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self._error = error
            self._done.release()

    def _count_tokens(self) -> None:
        compute = self.trainer.compute_loss

        def counted(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            # On a GPU the sum is read when the step is over.
            self.tokens = self.tokens + sum(
                mask.sum() for name, mask in inputs.items() if name.endswith("attention_mask")
            )
            return compute(model, inputs, *args, **kwargs)

        self.trainer.compute_loss = counted


def trainer_side(name: str, loop: TrainerLoop) -> Side:
    """One optimizer step a repeat."""
    return Side(name, loop, activations=loop.activation_bytes, close=loop.close)


class LinearClassifier(nn.Module):
    """Cross-entropy of a linear layer on the sentence's embedding."""

    def __init__(self, model: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.model = model
        self.output = nn.Linear(width, classes)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Mean loss of a batch."""
        (features,) = sentence_features
        embedding = self.model(features)["sentence_embedding"]
        return nn.functional.cross_entropy(
            self.output(embedding.to(self.output.weight.dtype)), labels.view(-1)
        )


def _pauses(loop: TrainerLoop) -> Any:
    """The trainer's callback that waits before its first step and after each."""
    from transformers import TrainerCallback

    class Pauses(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loop.wait_for_turn()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loop.end_step()
            if not loop.wait_for_turn():
                control.should_training_stop = True

    return Pauses()


def _model(workload: Workload, device: torch.device, dropout: float) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    encoder = Transformer(
        str(workload.encoder),
        model_kwargs={"attn_implementation": "sdpa", "dtype": torch.float32},
        config_kwargs={"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout},
        max_seq_length=workload.max_length,
    )
    pooling = Pooling(encoder.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[encoder, pooling], device=str(device))


def _data_sets(workload: Workload) -> dict[str, Any]:
    """The pool's texts and labels."""
    from datasets import Dataset

    found = {}
    for name, pool in workload.pool.items():
        table, task = workload.data[name].table, workload.tasks[name]
        assert table.labels is not None
        columns: dict[str, list[Any]] = {}
        for place in range(len(table.texts[0])):
            columns[f"sentence{place + 1}"] = [table.texts[example][place] for example in pool.tolist()]
        labels = table.labels[pool]
        if task.kind == "similarity":
            assert task.score_range is not None
            low, high = task.score_range
            labels = (labels - low) / (high - low)
        found[name] = Dataset.from_dict({**columns, "label": labels.tolist()})
    return found


def _loss(task: Task, model: Any) -> nn.Module:
    from sentence_transformers.sentence_transformer import losses

    if task.kind == "similarity":
        return losses.CosineSimilarityLoss(model)
    if task.is_pair:
        return losses.OnlineContrastiveLoss(model)
    return LinearClassifier(model, model.get_embedding_dimension(), task.outputs).to(model.device)
