"""The options of small runs to load."""

from __future__ import annotations

from pathlib import Path


def options(bert: Path, folder: Path, *more: str) -> list[str]:
    sizes = [f"--{name}.{o}" for name in ("sst", "para", "sts") for o in ("batch_size=8", "max_length=24")]
    fixed = ["--epochs=1", "--evaluation.train_examples=0", "--precision=float32"]
    return [f"--model.pretrained={bert}", f"--cache={folder / 'cache'}", *fixed, *sizes, *more]
