"""A step's numbers as one tensor: nothing is lost or mixed up on the way out of a graph or to the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.assembly import assemble, tiny_config

from mtbert.engine.step_numbers import OnTheWay, flat, refilled
from mtbert.engine.window import Window
from mtbert.losses.simcse import SimCseConfig
from mtbert.optim.surgery import SurgeryConfig


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float64, {"surgery": SurgeryConfig(method="pcgrad"), "simcse": SimCseConfig(tasks=["sts"])}),
        (torch.float16, {"surgery": SurgeryConfig(method="uncertainty")}),
    ],
    ids=["surgery and an objective", "loss scale and learned weights"],
)
def test_a_result_is_read_back(
    tiny_bert: Path, tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    assembly = assemble(tiny_config(tiny_bert, tmp_path, **changes), dtype=dtype)
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    result = assembly.step(plan, 0)
    numbers = flat(result)
    assert (
        len(numbers) > len(torch.unique(numbers)) > 20
    )  # many different ones: none can take another's place
    read = refilled(result, numbers)
    assert torch.equal(flat(read), numbers)
    assert read.check()
    assert [segment.ids for segment, _ in read.examples] == [segment.ids for segment, _ in result.examples]
    lines = []
    for each in (result, read, OnTheWay(result).result()):
        window = Window()
        window.add(each)
        lines.append(window.to_json())
    assert lines[1] == lines[0] == lines[2]
