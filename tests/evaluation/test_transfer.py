"""Transfer: multitask minus single-task."""

from __future__ import annotations

import numpy as np
import pytest

from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.halves import selection_half
from mtbert.evaluation.metrics import overall_of, score
from mtbert.evaluation.predictions import Predictions
from mtbert.evaluation.run import read_run
from mtbert.evaluation.transfer import transfer
from mtbert.tasks.registry import TASKS

TRIO = ("sst", "para", "sts")
SKILLS = {"sst": 0.25, "para": 0.9, "sts": 0.5}
HALF = {"evaluation": {"selection": "half"}}


def headline(folder, name: str, halved: bool = False) -> float:
    entry = read_run(folder).predictions(TASKS[name])
    assert entry.labels is not None
    held = ~selection_half(entry.ids, entry.labels) if halved else slice(None)
    return score(TASKS[name], entry.labels[held], entry.outputs[held]).headline


def write_runs(make_run, config=None):
    joint = make_run("joint", skill=0.6, config=config)
    singles = {
        name: make_run(f"only-{name}", names=(name,), skill=SKILLS[name], seed=1, config=config)
        for name in TRIO
    }
    return joint, singles


@pytest.mark.parametrize("halved", [False, True])
def test_differences_are_multitask_minus_single_task(make_run, halved: bool) -> None:
    joint, singles = write_runs(make_run, HALF if halved else None)
    found = transfer(joint, singles, TASKS)
    alone = [headline(singles[name], name, halved) for name in TRIO]
    together = [headline(joint, name, halved) for name in TRIO]
    for name, before, after in zip(TRIO, alone, together, strict=True):
        assert found.differences[name].value == pytest.approx(after - before)
        assert found.differences[name].low < after - before < found.differences[name].high
    assert found.differences["overall"].value == pytest.approx(overall_of(*together) - overall_of(*alone))
    assert found.differences["sst"].low > 0
    assert found.differences["para"].high < 0
    assert found.split == ("report half of dev" if halved else "dev")
    page = found.to_markdown()
    assert f"| metric on {found.split} | single-task | multitask | transfer |" in page
    assert (
        f"| STS-B similarity (Pearson) | {alone[2]:.3f} | {together[2]:.3f} | {together[2] - alone[2]:+.3f} |"
        in page
    )
    assert "overall" in found.to_text()


def test_one_run_without_halves_means_all_of_dev(make_run) -> None:
    joint, singles = write_runs(make_run, HALF)
    singles["sts"] = make_run("plain", names=("sts",))
    found = transfer(joint, singles, TASKS)
    assert found.split == "dev"
    assert found.differences["sst"].second == pytest.approx(headline(joint, "sst"))


def test_some_tasks_only(make_run) -> None:
    joint, singles = write_runs(make_run)
    found = transfer(joint, {"sts": singles["sts"]}, TASKS)
    assert list(found.differences) == ["sts"]


def test_what_does_not_fit_is_refused(make_run) -> None:
    joint, singles = write_runs(make_run)
    with pytest.raises(ConfigError, match="at least one single-task run"):
        transfer(joint, {}, TASKS)
    with pytest.raises(ConfigError, match="joint: did not train cfimdb, only sst, para, sts"):
        transfer(joint, {"cfimdb": make_run("film", names=("cfimdb",))}, TASKS)
    with pytest.raises(ConfigError, match="expected a run of para alone, found one of sst, para, sts"):
        transfer(joint, {"para": joint}, TASKS)
    with pytest.raises(DataError, match="no predictions for sst"):
        transfer(joint, {"sst": make_run("unfinished", names=("sst",), predicted=False)}, TASKS)
    small = Predictions("sst", "dev", ("x", "y"), np.array([0, 1]), np.eye(5)[:2])
    other = make_run("other", names=("sst",), predictions={"sst": small})
    with pytest.raises(
        DataError, match=r"joint and the single-task runs: sst \(dev\): .* different examples"
    ):
        transfer(joint, {"sst": other, "para": singles["para"]}, TASKS)
