"""Training steps of every kind, small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from support.assembly import Assembly, assemble, tiny_config

from mtbert.model.heads import HeadConfig
from mtbert.model.lora import LoraConfig
from mtbert.model.pals import PalConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.tasks.config import TaskConfig


def configured(bert: Path, cache: Path, case: str) -> Assembly:
    cross = HeadConfig(dropout=0.2, pooling="mean", hidden_layers=1)
    rows = replace(cross, pair=["concat", "difference"], pooling="pooler", tower_layers=1)
    heads = {"sst": replace(cross, pooling="cls"), "para": rows, "sts": cross}
    tasks = {name: TaskConfig(batch_size=6, max_length=64, head=head) for name, head in heads.items()}
    config = tiny_config(bert, cache, task=tasks)
    if case == "lora":
        config = replace(config, mode="lora", surgery=SurgeryConfig(method="pcgrad"))
        config.model.lora = LoraConfig(dropout=0.1)
    elif case == "bitfit":
        config = replace(config, mode="bitfit", surgery=SurgeryConfig(method="gradvac"))
    elif case == "a pass a task":
        config.surgery = SurgeryConfig(method="pcgrad", variant="reference", gradients="per-task")
    elif case == "pals":
        config.model.pals = PalConfig(size=8, heads=2)
        config.surgery = SurgeryConfig(method="upgrad")
    elif case == "uncertainty and regularisers":
        config.surgery = SurgeryConfig(method="uncertainty")
        config.mixout.p = 0.2
        config.optim.pretrained_decay = 0.01
        config.task["sst"].loss.class_weights = "balanced"
    elif case == "one pass":
        config.surgery = SurgeryConfig(method="pcgrad")
    return assemble(config)


CASES = [
    "summed",
    "one pass",
    "a pass a task",
    "lora",
    "bitfit",
    "pals",
    "uncertainty and regularisers",
]
