"""The objectives that compare embeddings in real training steps: passes, surgery, shared rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config

from mtbert.errors import ConfigError
from mtbert.losses.cosine_embedding import CosineEmbeddingConfig
from mtbert.losses.mnrl import MnrlConfig
from mtbert.losses.simcse import SimCseConfig
from mtbert.losses.triplet import TripletConfig
from mtbert.model.heads import HeadConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.tasks.config import TaskConfig

EVERYTHING = {
    "simcse": SimCseConfig(["sst", "para"]),
    "mnrl": MnrlConfig(["para", "sts"], symmetric=True),
    "cosine_embedding": CosineEmbeddingConfig(["sts"], margin=0.1),
    "triplet": TripletConfig(["para"]),
}


def gradients(assembly: Assembly, progress: float = 0.0) -> dict[str, torch.Tensor]:
    plan = {name: np.arange(12) for name in assembly.config.tasks}
    assembly.step.accumulate(plan, 3, progress)
    return {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-11, msg=name)


def test_a_step_with_all_of_them(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = assemble(tiny_config(tiny_bert, tmp_path, max_tokens=8192, **EVERYTHING))
    plan = {name: np.arange(12) for name in assembly.config.tasks}
    result = assembly.step(plan, 0)
    assert set(result.objectives) == {
        "sst/simcse",
        "para/simcse",
        "para/mnrl",
        "sts/mnrl",
        "sts/cosine_embedding",
        "para/triplet",
    }
    assert all(loss > 0 for loss in result.objectives.values())
    result.check()
    total = torch.stack([*result.losses.values(), *result.objectives.values()]).sum()
    torch.testing.assert_close(result.total, total)


def test_the_split_into_passes_does_not_change_losses_of_single_pairs(
    tiny_bert: Path, tmp_path: Path
) -> None:
    changes = {"cosine_embedding": CosineEmbeddingConfig(["sts", "para"], margin=-0.5, labels="extremes")}
    whole = gradients(assemble(tiny_config(tiny_bert, tmp_path, max_tokens=8192, **changes)))
    same(gradients(assemble(tiny_config(tiny_bert, tmp_path, max_tokens=192, **changes))), whole)
    plain = gradients(assemble(tiny_config(tiny_bert, tmp_path, max_tokens=8192)))
    assert any(not torch.allclose(gradient, plain[name]) for name, gradient in whole.items())


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradient_surgery_sees_them_as_parts_of_their_tasks(
    tiny_bert: Path, tmp_path: Path, mode: str
) -> None:
    found = {
        kind: gradients(
            assemble(
                tiny_config(
                    tiny_bert,
                    tmp_path,
                    mode=mode,
                    max_tokens=8192,
                    surgery=SurgeryConfig(method="pcgrad", gradients=kind),  # type: ignore[arg-type]
                    **EVERYTHING,
                )
            )
        )
        for kind in ("one-pass", "per-task")
    }
    same(found["one-pass"], found["per-task"])


def test_the_tasks_own_rows_serve_without_packing_them_again(tiny_bert: Path, tmp_path: Path) -> None:
    """A Siamese head's rows are what a stream of the objective's own holds, but for their dropout masks."""
    head = HeadConfig(pair=["cosine"], pooling="mean", dropout=0.0)
    tasks = {"sts": TaskConfig(batch_size=6, max_length=64, head=head)}
    config = tiny_config(
        tiny_bert,
        tmp_path,
        tasks=["sts"],
        task=tasks,
        max_tokens=8192,
        mnrl=MnrlConfig(["sts"], threshold=3.0),
    )
    config.model.dropout = replace(config.model.dropout, embedding=0.0, attention=0.0, hidden=0.0)
    shared = assemble(config)
    assert "sts/mnrl" not in shared.step.data
    other = replace(head, pooling="cls")
    apart = assemble(replace(config, task={"sts": replace(tasks["sts"], head=other)}))
    assert "sts/mnrl" in apart.step.data
    plan = {"sts": np.arange(30)}
    losses = [assembly.step.accumulate(plan, 0).objectives["sts/mnrl"] for assembly in (shared, apart)]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_frozen_encoder_refuses_them(tiny_bert: Path, tmp_path: Path) -> None:

    for group, settings in EVERYTHING.items():
        config = tiny_config(tiny_bert, tmp_path, mode="last-linear-layer", **{group: settings})
        with pytest.raises(ConfigError, match=rf"{group}\.tasks: needs a trained encoder"):
            assemble(config)
