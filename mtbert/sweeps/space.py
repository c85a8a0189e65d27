"""A search space: which fields of the configuration a sweep varies, and over what, and how trials are named by it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mtbert.config import TrainConfig
from mtbert.errors import ConfigError

Method = Literal["tpe", "random", "grid"]
PrunerName = Literal["median", "hyperband", "none"]
Scalar = str | int | float | bool | None
Read = Callable[[Sequence[str]], TrainConfig]
"""From options over a sweep's fixed settings to the configuration that they make; raises ConfigError."""

_TAGS = {
    "batch_size": "BS",
    "optim.lr": "LR",
    "dropout": "D",
    "hidden": "D",
    "epochs": "E",
    "hidden_layers": "FC",
    "rank": "R",
    "weight": "W",
    "seed": "seed",
}


@dataclass(frozen=True)
class Parameter:
    """One dimension of the search."""

    name: str
    fields: tuple[str, ...]
    """The fields of the configuration that it sets."""
    choices: Mapping[Scalar, Mapping[str, Any]] = field(default_factory=dict)
    """By label: the fields that a choice sets, and their values. Empty for a range."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    points: int | None = None
    """Of a range in a grid."""
    whole: bool = False
    """Whether a range holds whole numbers."""
    when: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    """Only where these parameters have one of these labels."""
    tag: str = ""
    """What stands before the value in names."""

    def active(self, values: Mapping[str, Scalar]) -> bool:
        """Whether it is part of a trial with these values of the parameters before it."""
        return all(name in values and values[name] in labels for name, labels in self.when.items())

    def settings(self, value: Scalar) -> dict[str, Any]:
        """The fields that a value sets."""
        if self.choices:
            return dict(self.choices[value])
        return dict.fromkeys(self.fields, value)

    def grid(self) -> list[Scalar]:
        """Every value of a grid. Raises ConfigError for a range without end."""
        if self.choices:
            return list(self.choices)
        if self.points is not None:
            share = [number / max(self.points - 1, 1) for number in range(self.points)]
            ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
            between = [ends[0] + (ends[1] - ends[0]) * part for part in share]
            values = [math.exp(value) if self.log else value for value in between]
            values[0], values[-1] = self.low, self.high if self.points > 1 else self.low
            found: list[Scalar] = [round(value) if self.whole else value for value in values]
            return list(dict.fromkeys(found))
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            raise ConfigError(
                f"parameters.{self.name}: a grid needs a number of values, found a range without points or step;"
                " possible: points, step, or choices"
            )
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        steps = [self.low + step * number for number in range(count)]
        return [int(value) if self.whole else round(value, 12) for value in steps]

    def tag_of(self, value: Scalar) -> str:
        """The value as a part of a name: BS8, D0.05, LR1e-5, lora, selu_gelu_gelu."""
        text = short(value)
        return f"{self.tag}{text}"

    def describe(self) -> str:
        """What it ranges over, in a line."""
        if self.choices:
            text = ", ".join(short(label) for label in self.choices)
        else:
            text = f"{short(self.low)} to {short(self.high)}"
            text += ", log scale" if self.log else ""
            text += f", step {short(self.step)}" if self.step else ""
            text += f", {self.points} points" if self.points else ""
        if self.when:
            text += "; only where " + " and ".join(
                f"{name} is {' or '.join(map(short, labels))}" for name, labels in self.when.items()
            )
        return text


@dataclass(frozen=True)
class Space:
    """What SPACE.yaml says."""

    path: Path
    parameters: tuple[Parameter, ...]
    fixed: tuple[str, ...] = ()
    """Training options of the fixed part."""
    method: Method = "tpe"
    trials: int | None = None
    """How many; a grid has its own number."""
    seed: int = 0
    evaluations: int | None = None
    """Evaluations of each trial, at equal distances; by default as evaluation.every says."""
    pruner: PrunerName = "median"
    pruner_startup: int = 5
    """Complete trials before the first is pruned (median)."""
    pruner_warmup: int = 0
    """Evaluations of a trial before it can be pruned (median)."""
    tpe_startup: int = 10
    """Random trials before the first that TPE chooses."""
    keep: int | Literal["all"] = 3
    """Of how many best trials the checkpoints are kept."""
    wandb: str | None = None
    """Weights & Biases project."""

    def settings(self, values: Mapping[str, Scalar]) -> dict[str, Any]:
        """The fields that the values of a trial's parameters set."""
        found: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.name in values:
                found |= parameter.settings(values[parameter.name])
        return found

    def options(self, values: Mapping[str, Scalar]) -> list[str]:
        """The same as training options."""
        return [option(name, value) for name, value in self.settings(values).items()]

    def tags(self, values: Mapping[str, Scalar]) -> list[str]:
        """What tells a trial from others, in the order of the parameters."""
        return [p.tag_of(values[p.name]) for p in self.parameters if p.name in values]

    def grid(self) -> list[dict[str, Scalar]]:
        """All combinations, each once. Raises ConfigError for a range without end."""
        return list(self._combinations(0, {}))

    def _combinations(self, place: int, values: dict[str, Scalar]) -> Iterator[dict[str, Scalar]]:
        if place == len(self.parameters):
            yield values
            return
        parameter = self.parameters[place]
        if not parameter.active(values):
            yield from self._combinations(place + 1, values)
            return
        for value in parameter.grid():
            yield from self._combinations(place + 1, values | {parameter.name: value})

    @property
    def total(self) -> int:
        """How many trials the sweep has."""
        if self.method == "grid":
            return len(self.grid())
        assert self.trials is not None
        return self.trials

    def describe(self) -> str:
        """The definition as sorted JSON, to find out whether two processes mean the same sweep."""
        parts = {
            parameter.name: [
                [[label, dict(values)] for label, values in parameter.choices.items()],
                *[parameter.low, parameter.high, parameter.log, parameter.step, parameter.points],
                {name: list(labels) for name, labels in parameter.when.items()},
                list(parameter.fields),
            ]
            for parameter in self.parameters
        }
        kept = {name: getattr(self, name) for name in ("method", "seed", "evaluations", "pruner")}
        return json.dumps([parts, kept], sort_keys=True)


def option(name: str, value: Any) -> str:
    """A training option."""
    return f"--{name}={value}" if isinstance(value, str) else f"--{name}={json.dumps(value)}"


# ---- reading ----


def abbreviation(names: Sequence[str]) -> str:
    """The abbreviation of a field, with its task where it sets one task's alone."""
    parts = names[0].split(".")
    tails = (names[0], parts[-1])
    found = next((_TAGS[tail] for tail in tails if tail in _TAGS), None)
    if found is None:
        found = "" if parts[-1] in ("mode", "activation", "tasks") else f"{parts[-1]}="
    alone = len(names) == 1 and len(parts) > 1 and parts[-1] in _TAGS and parts[0] not in ("optim", "model")
    return f"{parts[0]}-{found}" if alone else found


def short(value: Any) -> str:
    """A value as it stands in names: at most three digits, 7e-6 for 0.000007."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        text = f"{value:.3g}"
        if "e" in text:
            mantissa, exponent = text.split("e")
            return f"{mantissa}e{int(exponent)}"
        if value and abs(value) < 1e-3:
            mantissa, exponent = f"{value:.2e}".split("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return text
    if isinstance(value, list):
        return "-".join(map(short, value))
    return str(value)
