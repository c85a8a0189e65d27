"""Search spaces: what they come to, and every mistake in them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mtbert.cli import train_reader
from mtbert.errors import ConfigError
from mtbert.sweep import shipped
from mtbert.sweeps.space import Parameter, Space
from mtbert.sweeps.space_check import checked
from mtbert.sweeps.space_file import read_space
from mtbert.sweeps.trial import trial_name

READ = train_reader([])


def space_of(folder: Path, text: str) -> Space:
    path = folder / "space.yaml"
    path.write_text(text, encoding="utf-8")
    space = read_space(path)
    return checked(space, READ)


LR = "parameters: {optim.lr: {low: 1e-5, high: 1e-2, log: true}}\n"

MISTAKES = {
    # YAML, and the file's own keys
    "[1, 2]": "expected a mapping with `parameters`, found list",
    "": "found an empty file",
    "a: [": "not a YAML file",
    "trials: 3\ntrials: 4\n" + LR: "'trials' stands there twice",
    "trails: 3\n" + LR: "trails: is not known. Did you mean trials?",
    "trials: 3": "parameters: expected a mapping of at least one parameter, found None",
    "trials: three\n" + LR: "trials: expected a whole number, at least 1, found 'three'",
    "trials: 3\nmethod: bayes\n" + LR: "method: expected one of tpe, random, grid, found 'bayes'",
    "trials: 3\npruner: no\n" + LR: "pruner: expected one of median, hyperband, none, found False",
    "trials: 3\nkeep: -1\n" + LR: "keep: expected a whole number, at least 0 or all, found -1",
    LR: "trials: expected how many for method tpe, found nothing",
    "method: grid\n"
    + LR: "parameters.optim.lr: a grid needs a number of values, found a range without points or step",
    "method: grid\ntrials: 3\nparameters: {mode: [full]}": "trials: a grid runs every combination once",
    # a parameter
    "trials: 3\nparameters: {optim.lr: 3}": "parameters.optim.lr: expected a list of choices, or a mapping",
    "trials: 3\nparameters: {optim.lr: {low: 1}}": "parameters.optim.lr: expected choices, or low and high, found low",
    "trials: 3\nparameters: {optim.lr: {low: 1, hihg: 2}}": "optim.lr.hihg: is not known. Did you mean high?",
    "trials: 3\nparameters: {optim.lr: {low: 2, high: 1}}": "optim.lr: the range is empty: low is 2 and high 1",
    "trials: 3\nparameters: {optim.lr: {low: 0, high: 1, log: true}}": "parameters.optim.lr.low: a log scale needs",
    "trials: 3\nparameters: {optim.lr: {low: .nan, high: 1}}": "parameters.optim.lr.low: expected a number, found nan",
    "trials: 3\nparameters: {optim.lr: {low: small, high: 1}}": "optim.lr.low: expected a number, found 'small'",
    "trials: 3\nparameters: {optim.lr: {low: 1e-5, high: 1e-2, points: 3}}": "points: would have no effect",
    "trials: 3\nparameters: {epochs: {low: 1, high: 4, step: 9}}": "step: expected above 0 and at most 3, found 9",
    "trials: 3\nparameters: {mode: []}": "parameters.mode.choices: expected a list, or a mapping of names",
    "trials: 3\nparameters: {mode: [full, full]}": "parameters.mode.choices: 'full' stands there twice",
    "trials: 3\nparameters: {on: [1, 2]}": "parameters.True: expected a name, found True (YAML reads on, off",
    "trials: 3\nparameters: {a: {choices: {x: {mode: full}, y: {epochs: 1}}}}": "parameters.a.choices.x: does not set",
    "trials: 3\nparameters: {a: {choices: {off: {mode: full}}}}": "expected names, found False (YAML reads on, off",
    "trials: 3\nparameters: {a: {fields: [seed], when: {b: 1}, choices: [1]}}": "'b' is no parameter with choices",
    "trials: 3\nparameters: {mode: [full], seed: {choices: [1], when: {mode: lora}}}": "of full, found 'lora'",
    # against the configuration
    "trials: 3\nparameters: {optim.lrr: [1]}": "unknown option optim.lrr. Did you mean optim.lr?",
    "trials: 3\nparameters: {sst.batch_size: [8, x]}": "sst.batch_size: expected int, found x",
    "trials: 3\nparameters: {sst.batch_size: {low: 0, high: 4}}": "batch_size: expected at least 1, found 0",
    "trials: 3\nparameters: {sst.batch_size: {low: 1.5, high: 4}}": "parameters.sst.batch_size.low",
    "trials: 3\nparameters: {mode: {low: 1, high: 2}}": "parameters.mode.low: mode: expected full",
    "trials: 3\nparameters: {sst.head.activation: [selo]}": "did you mean 'selu'?",
    "trials: 3\nparameters: {sst.head.activation: [yes]}": "YAML reads on, off, yes and no as true and false",
    "trials: 3\nparameters: {sst.head: [1]}": "parameters.sst.head.choices",
    "trials: 3\nparameters: {threads: [1, 2]}": "threads cannot be searched: each start of a sweep has its own",
    "trials: 3\nparameters: {output: [a]}": "output cannot be searched: every trial has a folder of its own",
    "trials: 3\nparameters: {evaluation.selection: [dev]}": "evaluation.selection cannot be searched",
    "trials: 3\nparameters: {tasks: [[sst], [sst, para]]}": "scores of different tasks cannot be compared",
    "trials: 3\nfixed: {seeds: 2}\n" + LR: "seeds: expected 1, found 2",
    "trials: 3\nfixed: {optim.lr: 1}\n"
    + LR: "optim.lr is given in the fixed part or on the command line, too",
    "trials: 3\nparameters: {seed: [1], a: {field: seed, choices: [2]}}": "parameters.a: seed is set by seed, too",
    "trials: 3\npreset: minilmm\n" + LR: "no such preset. Did you mean minilm?",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_named_with_its_file_and_field(tmp_path: Path, text: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        _checked_file(path)
    assert MISTAKES[text] in str(caught.value)
    if "preset" not in text:  # that is the command line's message
        assert str(caught.value).startswith(f"{path}: ")


def _checked_file(path: Path) -> None:
    space = read_space(path)
    checked(space, train_reader(space.fixed) if space.fixed else READ)


def test_values_are_those_of_the_configuration(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        """
        trials: 3
        parameters:
          optim.lr: [1e-5, 0.001]     # YAML 1.1 reads the first as a word
          epochs: {low: 1, high: 50}
          batch: {fields: [sst.batch_size, para.batch_size], low: 2, high: 128, log: true}
          tasks: [[sst, para, sts], [para, sts, sst]]
          mode: [full, lora]
          model.lora.rank: {choices: [4, 8], when: {mode: lora}}
          activations:
            choices:
              SELU/GELU/GELU: {sst.head.activation: selu, para.head.activation: gelu, sts.head.activation: gelu}
              none: {sst: {head: {activation: none}}, para.head.activation: none, sts.head.activation: none}
        """,
    )
    by_name = {parameter.name: parameter for parameter in space.parameters}
    assert list(by_name["optim.lr"].choices) == [1e-5, 1e-3]
    assert [by_name[name].whole for name in ("epochs", "batch")] == [False, True]
    values: dict[str, Any] = {
        "optim.lr": 7e-6,
        "batch": 8,
        "tasks": "para-sts-sst",
        "mode": "lora",
        "model.lora.rank": 4,
        "activations": "SELU/GELU/GELU",
    }
    config = READ(space.options(values | {"optim.lr": 1e-5}))
    assert config.optim.lr == 1e-5
    assert [config.task[name].batch_size for name in ("sst", "para", "sts")] == [8, 8, 16]
    assert config.tasks == ["para", "sts", "sst"]
    assert (config.mode, config.model.lora.rank) == ("lora", 4)
    assert [config.task[n].head.activation for n in ("sst", "para", "sts")] == ["selu", "gelu", "gelu"]
    tags = space.tags(values)
    assert tags == ["LR7e-6", "BS8", "para-sts-sst", "lora", "R4", "SELU/GELU/GELU"]
    assert trial_name(7, tags) == "0007-LR7e-6-BS8-para-sts-sst-lora-R4-SELU_GELU_GELU"


def test_a_grid_has_every_combination_once_and_conditions_hold(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        """
        method: grid
        parameters:
          mode: [full, lora]
          model.lora.rank: {choices: [4, 8], when: {mode: lora}}
          optim.lr: {low: 1e-5, high: 1e-3, log: true, points: 3}
          sst.head.hidden_layers: {low: 0, high: 4}
          model.lora.alpha: {choices: [1e-3, 8], when: {mode: lora}}
          seed: {choices: [1, 2], when: {model.lora.alpha: [1e-3]}}     # which YAML reads as a word in both places
        """,
    )
    grid = space.grid()
    assert len(grid) == (1 + 2 * (2 + 1)) * 3 * 5
    assert all(("seed" in values) == (values.get("model.lora.alpha") == 1e-3) for values in grid)
    assert len({tuple(sorted(values.items(), key=str)) for values in grid}) == len(grid)
    assert all(("model.lora.rank" in values) == (values["mode"] == "lora") for values in grid)
    assert sorted({values["optim.lr"] for values in grid}, key=float) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert {values["sst.head.hidden_layers"] for values in grid} == {0, 1, 2, 3, 4}


@given(
    low=st.integers(1, 50),
    size=st.integers(1, 80),
    log=st.booleans(),
    points=st.integers(2, 12),
    whole=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_points_of_a_range_lie_in_it_and_have_its_ends(
    low: int, size: int, log: bool, points: int, whole: bool
) -> None:
    one = Parameter("x", ("x",), low=low, high=low + size, log=log, points=points, whole=whole)
    found = [value for value in one.grid() if isinstance(value, (int, float))]
    assert found[0] == low
    assert found[-1] == low + size
    assert all(a < b for a, b in itertools.pairwise(found))
    assert len(found) <= points
    assert all(isinstance(value, int) for value in found) or not whole


@given(tags=st.lists(st.text(max_size=40), max_size=8))
def test_names_are_folders_of_their_own(tags: list[str]) -> None:
    name = trial_name(12, tags)
    assert name.startswith("0012")
    assert len(name.encode()) <= 120
    assert not set(name) & set('/\\:*?"<>| \n\0')
    assert name not in (".", "..")


def test_the_example_of_the_page_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    path = tmp_path / "space.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    space = read_space(path)
    checked(space, train_reader([*space.fixed, "--data=sample"]))


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_space_is_valid(name: str) -> None:
    space = read_space(shipped()[name])
    found = checked(space, train_reader([*space.fixed, "--data=sample"]))
    assert found.total >= 40
    assert yaml.safe_load(shipped()[name].read_text())["preset"] == "minilm"
