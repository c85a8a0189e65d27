"""A short training with `transformers`, from nothing to its first score on dev: python -m bench.first_result_peer

Imports nothing of mtbert: its start must be what a user's own script would take. Reads the CS224N layout, tokenises,
takes --steps optimizer steps over the whole training tables in batches of like length (see bench/peers.py for the
loop), scores dev, and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

TASKS = {
    "sst": ("ids-sst", ("sentence",), "sentiment", 5),
    "para": ("quora", ("sentence1", "sentence2"), "is_duplicate", 1),
    "sts": ("sts", ("sentence1", "sentence2"), "similarity", 1),
}
"""File, texts, label and outputs of each task."""
BATCH = 32
LARGEST_SCORE = 5.0


class Model(nn.Module):
    """The encoder and a linear head a task on the first token."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.heads = nn.ModuleDict({name: nn.Linear(width, task[3]) for name, task in TASKS.items()})

    def forward(self, task: str, inputs: dict[str, Tensor]) -> Tensor:
        """[n, outputs]."""
        return self.heads[task](self.dropout(self.encoder(**inputs).last_hidden_state[:, 0])).float()


def read(folder: Path, task: str, split: str) -> tuple[list[tuple[str, ...]], list[float]]:
    """Texts and labels of a table."""
    name, texts, label, _ = TASKS[task]
    with open(folder / f"{name}-{split}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [tuple(row[column] for column in texts) for row in rows], [float(row[label]) for row in rows]


def loss_of(task: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Sum over the examples."""
    if task == "sst":
        return F.cross_entropy(outputs, labels.long(), reduction="sum")
    if task == "para":
        return F.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="sum")
    return F.mse_loss(outputs[:, 0], labels / LARGEST_SCORE, reduction="sum")


def score_of(task: str, outputs: Tensor, labels: Tensor) -> float:
    """Accuracy, or Pearson's correlation."""
    if task == "sts":
        return float(torch.corrcoef(torch.stack([outputs[:, 0], labels]))[0, 1])
    chosen = outputs.argmax(dim=1) if task == "sst" else (outputs[:, 0] > 0).long()
    return float((chosen == labels.long()).float().mean())


def main() -> None:
    """Train and score."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_result_peer")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    generator = random.Random(0)
    device = torch.device(options.device)
    tokeniser = AutoTokenizer.from_pretrained(options.encoder)
    encoder: Any = AutoModel.from_pretrained(
        options.encoder, add_pooling_layer=False, attn_implementation="sdpa", dtype=torch.float32
    )
    model = Model(encoder, encoder.config.hidden_size).to(device).train()
    if options.compiled:
        model.encoder.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run(task: str, rows: list[Any], labels: list[float]) -> tuple[Tensor, Tensor]:
        inputs = tokeniser.pad({"input_ids": rows}, return_tensors="pt")
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            outputs = model(task, {name: value.to(device) for name, value in inputs.items()})
        return outputs, torch.tensor(labels, device=device)

    data = {}
    for task in TASKS:
        for split in ("train", "dev"):
            texts, labels = read(options.data, task, split)
            ids = tokeniser(*map(list, zip(*texts, strict=True)), truncation=True, max_length=128)[
                "input_ids"
            ]
            order = sorted(range(len(ids)), key=lambda i, ids=ids: len(ids[i]))
            data[task, split] = [ids[i] for i in order], [labels[i] for i in order]

    batches = []
    for task in TASKS:
        rows, labels = data[task, "train"]
        for begin in range(0, len(rows), BATCH):
            batches.append((task, rows[begin : begin + BATCH], labels[begin : begin + BATCH]))
    generator.shuffle(batches)
    per_step = -(-len(batches) // options.steps)
    for begin in range(0, len(batches), per_step):
        optimizer.zero_grad(set_to_none=True)
        step = batches[begin : begin + per_step]
        for task, rows, labels in step:
            outputs, wanted = run(task, rows, labels)
            (loss_of(task, outputs, wanted) / sum(len(b[1]) for b in step if b[0] == task)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model.eval()
    scores = {}
    with torch.inference_mode():
        for task in TASKS:
            rows, labels = data[task, "dev"]
            parts = [
                run(task, rows[begin : begin + 2 * BATCH], labels[begin : begin + 2 * BATCH])
                for begin in range(0, len(rows), 2 * BATCH)
            ]
            scores[task] = score_of(task, torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
    print(json.dumps({"dev": scores}), flush=True)


if __name__ == "__main__":
    main()
