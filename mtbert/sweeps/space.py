"""A search space: which fields of the configuration a sweep varies, and over what; from YAML, checked as a whole."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mtbert.config import TrainConfig, to_dict
from mtbert.errors import ConfigError

Method = Literal["tpe", "random", "grid"]
PrunerName = Literal["median", "hyperband", "none"]
Scalar = str | int | float | bool | None
Read = Callable[[Sequence[str]], TrainConfig]
"""From options over a sweep's fixed settings to the configuration that they make; raises ConfigError."""

_REFUSED = {
    "output": "every trial has a folder of its own, below the sweep's",
    "seeds": "a trial is one run; vary seed to see how much a score owes to chance",
    "plugins": "they are imported once, before the first trial: give them in the fixed part",
    "profile": "it changes no score",
    "cache": "it changes no score",
    "device": "each start of a sweep has its own",
    "threads": "each start of a sweep has its own",
}
_INCOMPARABLE = {
    "evaluation.selection": "trials are compared by the score that it changes",
    "evaluation.every": "trials are compared and pruned evaluation by evaluation: `evaluations` says how many",
}
_YAML_BOOLEANS = "YAML reads on, off, yes and no as true and false: put the word in quotes"
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
        text = _short(value)
        return f"{self.tag}{text}"

    def describe(self) -> str:
        """What it ranges over, in a line."""
        if self.choices:
            text = ", ".join(_short(label) for label in self.choices)
        else:
            text = f"{_short(self.low)} to {_short(self.high)}"
            text += ", log scale" if self.log else ""
            text += f", step {_short(self.step)}" if self.step else ""
            text += f", {self.points} points" if self.points else ""
        if self.when:
            text += "; only where " + " and ".join(
                f"{name} is {' or '.join(map(_short, labels))}" for name, labels in self.when.items()
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

_TOP = tuple(entry.name for entry in fields(Space) if entry.name not in ("path", "parameters", "fixed"))
_FIXED = ("preset", "config", "fixed")
_RANGE = ("low", "high", "log", "step", "points")
_KEYS = ("field", "fields", "choices", *_RANGE, "when", "tag")


class _Loader(yaml.SafeLoader):
    """YAML in which no key may stand twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            twice = key in found
        except TypeError:
            raise yaml.YAMLError(
                f"line {key_node.start_mark.line + 1}: a key must be a word, found {key!r}"
            ) from None
        if twice:
            raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} stands there twice")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_space(path: Path) -> Space:
    """The space in a YAML file, its values not yet held against the configuration (`checked` does that).

    Raises ConfigError that names the file and the key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        found = "an empty file" if content is None else type(content).__name__
        raise ConfigError(f"{path}: expected a mapping with `parameters`, found {found}")
    try:
        return _space(path, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _space(path: Path, content: dict[Any, Any]) -> Space:
    _known(content, (*_TOP, *_FIXED, "parameters"), "")
    written = content.get("parameters")
    if not isinstance(written, dict) or not written:
        raise ConfigError(f"parameters: expected a mapping of at least one parameter, found {written!r}")
    parameters: list[Parameter] = []
    for name, value in written.items():
        parameters.append(_parameter(name, value, parameters))
    values: dict[str, Any] = {}
    for name, possible in (("method", get_args(Method)), ("pruner", get_args(PrunerName))):
        # A grid shows all of its combinations to the end, unless it is asked to stop poor ones.
        usual = "none" if name == "pruner" and values["method"] == "grid" else possible[0]
        found = content.get(name, usual)
        if found not in possible:
            hint = f" ({_YAML_BOOLEANS})" if isinstance(found, bool) else ""
            raise ConfigError(f"{name}: expected one of {', '.join(possible)}, found {found!r}{hint}")
        values[name] = found
    least = {
        "trials": 1,
        "seed": 0,
        "evaluations": 1,
        "pruner_startup": 0,
        "pruner_warmup": 0,
        "tpe_startup": 1,
    }
    for name, minimum in least.items():
        if content.get(name) is not None:
            values[name] = _whole(name, content[name], minimum)
    keep = content.get("keep", 3)
    values["keep"] = keep if keep == "all" else _whole("keep", keep, 0, " or all")
    values["wandb"] = content.get("wandb")
    if values["wandb"] is not None and not isinstance(values["wandb"], str):
        raise ConfigError(f"wandb: expected the name of a project, found {values['wandb']!r}")
    return Space(path, tuple(parameters), tuple(_fixed(content)), **values)


def _fixed(content: Mapping[str, Any]) -> Iterator[str]:
    """The fixed part as training options."""
    for name in ("preset", "config"):
        value = content.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise ConfigError(f"{name}: expected a name, found {value!r}")
            yield f"--{name}={value}"
    fixed = content.get("fixed") or {}
    if not isinstance(fixed, dict):
        raise ConfigError(f"fixed: expected a mapping of training options, found {fixed!r}")
    for name, value in _leaves(fixed):
        yield option(name, value)


def _leaves(values: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _parameter(name: Any, value: Any, before: Sequence[Parameter]) -> Parameter:
    where = f"parameters.{name}"
    if not isinstance(name, str):
        raise ConfigError(f"{where}: expected a name, found {name!r} ({_YAML_BOOLEANS})")
    if any(parameter.name == name for parameter in before):
        raise ConfigError(f"{where}: stands there twice")
    if isinstance(value, list):
        value = {"choices": value}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where}: expected a list of choices, or a mapping with choices or with low and high, found {value!r}"
        )
    _known(value, _KEYS, f"{where}.")
    if "choices" in value and any(key in value for key in _RANGE):
        raise ConfigError(
            f"{where}: has choices and {next(k for k in _RANGE if k in value)}; possible: one of both"
        )
    if "choices" not in value and not ("low" in value and "high" in value):
        raise ConfigError(
            f"{where}: expected choices, or low and high, found {', '.join(map(str, value)) or 'nothing'}"
        )
    named = isinstance(value.get("choices"), dict)
    targets = _targets(where, name, value, named)
    choices = _choices(where, value["choices"], targets) if "choices" in value else {}
    if named:
        targets = tuple(dict.fromkeys(each for settings in choices.values() for each in settings))
    tag = value.get("tag")
    if tag is not None and not isinstance(tag, str):
        raise ConfigError(f"{where}.tag: expected a word, found {tag!r}")
    conditions = _when(where, value.get("when"), before)
    default_tag = "" if named else _tag(targets)
    numbers = {} if choices else _range(where, value)
    return Parameter(
        name, targets, choices, when=conditions, tag=default_tag if tag is None else tag, **numbers
    )


def _targets(where: str, name: str, value: Mapping[str, Any], named: bool) -> tuple[str, ...]:
    given = [key for key in ("field", "fields") if key in value]
    if named and given:
        raise ConfigError(f"{where}.{given[0]}: named choices say themselves which fields they set")
    if len(given) > 1:
        raise ConfigError(f"{where}: has field and fields; possible: one of both")
    if not given:
        return (name,)
    found = value[given[0]]
    listed = [found] if given[0] == "field" else found
    if not isinstance(listed, list) or not listed or not all(isinstance(each, str) for each in listed):
        raise ConfigError(f"{where}.{given[0]}: expected names of configuration fields, found {found!r}")
    if len(set(listed)) < len(listed):
        raise ConfigError(f"{where}.fields: a field stands there twice")
    return tuple(listed)


def _choices(where: str, found: Any, targets: tuple[str, ...]) -> dict[Scalar, dict[str, Any]]:
    where = f"{where}.choices"
    if not isinstance(found, (list, dict)) or not found:
        raise ConfigError(f"{where}: expected a list, or a mapping of names to fields, found {found!r}")
    result: dict[Scalar, dict[str, Any]] = {}
    if isinstance(found, dict):
        for label, settings in found.items():
            if not isinstance(label, str):
                raise ConfigError(f"{where}: expected names, found {label!r} ({_YAML_BOOLEANS})")
            if not isinstance(settings, dict) or not settings:
                raise ConfigError(
                    f"{where}.{label}: expected a mapping of configuration fields to values, found {settings!r}"
                )
            result[label] = dict(_leaves(settings))
        fields_of = {frozenset(settings) for settings in result.values()}
        if len(fields_of) > 1:
            every = set().union(*fields_of)
            label, missing = next(
                (name, sorted(every - set(each))) for name, each in result.items() if every - set(each)
            )
            raise ConfigError(
                f"{where}.{label}: does not set {', '.join(missing)}, which other choices set; possible: the same"
                " fields in every choice"
            )
        return result
    seen: set[str] = set()
    for value in found:
        if isinstance(value, dict):
            raise ConfigError(f"{where}: found the mapping {value!r} in a list; possible: a name before it")
        label = "-".join(map(str, value)) if isinstance(value, list) else value
        if repr(label) in seen:
            raise ConfigError(f"{where}: {label!r} stands there twice")
        seen.add(repr(label))
        result[label] = dict.fromkeys(targets, value)
    if len(result) < len(seen):
        raise ConfigError(f"{where}: two choices are equal in {found!r}")
    return result


def _when(where: str, found: Any, before: Sequence[Parameter]) -> dict[str, tuple[Scalar, ...]]:
    where = f"{where}.when"
    if found is None:
        return {}
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{where}: expected a mapping of a parameter to its choices, found {found!r}")
    known = {parameter.name: parameter for parameter in before if parameter.choices}
    result: dict[str, tuple[Scalar, ...]] = {}
    for name, labels in found.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{where}: {name!r} is no parameter with choices that stands above.{hint} Possible:"
                f" {', '.join(known) or 'none'}"
            )
        listed = tuple(labels) if isinstance(labels, list) else (labels,)
        for label in listed:
            if label not in known[name].choices:
                possible = ", ".join(map(_short, known[name].choices))
                raise ConfigError(f"{where}.{name}: expected one of {possible}, found {label!r}")
        result[name] = listed
    return result


def _range(where: str, value: Mapping[str, Any]) -> dict[str, Any]:
    low, high = (_number(f"{where}.{key}", value[key]) for key in ("low", "high"))
    log = value.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{where}.log: expected true or false, found {log!r}")
    if low >= high:
        raise ConfigError(
            f"{where}: the range is empty: low is {low:g} and high {high:g}; expected low below high"
        )
    if log and low <= 0:
        raise ConfigError(f"{where}.low: a log scale needs numbers above 0, found {low:g}")
    step = None
    if value.get("step") is not None:
        step = _number(f"{where}.step", value["step"])
        if log:
            raise ConfigError(f"{where}.step: a log scale has none; possible: choices, or points in a grid")
        if not 0 < step <= high - low:
            raise ConfigError(f"{where}.step: expected above 0 and at most {high - low:g}, found {step:g}")
    points = value.get("points")
    if points is not None:
        points = _whole(f"{where}.points", points, 2)
        if step is not None:
            raise ConfigError(f"{where}: has points and step; possible: one of both")
    return {"low": low, "high": high, "log": log, "step": step, "points": points}


def _number(where: str, found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, (int, float, str)):
        hint = f" ({_YAML_BOOLEANS})" if isinstance(found, bool) else ""
        raise ConfigError(f"{where}: expected a number, found {found!r}{hint}")
    try:
        number = float(found)  # YAML 1.1 reads 1e-5 as a word
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: expected a number, found {found!r}")
    return number


def _whole(where: str, found: Any, minimum: int, also: str = "") -> int:
    if isinstance(found, bool) or not isinstance(found, int) or found < minimum:
        raise ConfigError(f"{where}: expected a whole number, at least {minimum}{also}, found {found!r}")
    return found


def _known(values: Mapping[Any, Any], possible: Sequence[str], where: str) -> None:
    for key in values:
        if key not in possible:
            close = difflib.get_close_matches(str(key), possible, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{where}{key}: is not known.{hint} Possible: {', '.join(possible)}")


# ---- against the configuration ----


def checked(space: Space, read: Read, given: Sequence[str] = ()) -> Space:
    """The space with every value as the configuration holds it, after each has been tried.

    read: makes a configuration of options over the fixed part. given: the options of the command line, which no
    parameter may set as well. Raises ConfigError that names the file and the parameter.
    """
    try:
        base = read(())
        if base.seeds != 1:
            raise ConfigError(f"seeds: expected 1, found {base.seeds}: {_REFUSED['seeds']}")
        options = [each.split("=")[0] for each in (*space.fixed, *given) if each.startswith("--")]
        pinned = _given_fields([name.lstrip("-").replace("-", "_") for name in options], base)
        parameters: list[Parameter] = []
        labels: dict[str, dict[Scalar, Scalar]] = {}
        for parameter in space.parameters:
            _refuse_fields(parameter, pinned, parameters)
            # Conditions name labels as they stand in the file: 1e-3 is a word there.
            when = {
                name: tuple(labels[name][label] for label in named) for name, named in parameter.when.items()
            }
            tried = _tried(dataclasses.replace(parameter, when=when), read, base)
            labels[parameter.name] = dict(zip(parameter.choices, tried.choices, strict=True))
            parameters.append(tried)
        if space.method != "grid":
            for parameter in parameters:
                if parameter.points is not None:
                    raise ConfigError(
                        f"parameters.{parameter.name}.points: would have no effect, because the method is"
                        f" {space.method}; possible: method grid, or step"
                    )
            if space.trials is None:
                raise ConfigError(f"trials: expected how many for method {space.method}, found nothing")
        elif space.trials is not None:
            raise ConfigError("trials: a grid runs every combination once; possible: without trials")
        found = dataclasses.replace(space, parameters=tuple(parameters))
        if found.method == "grid":
            found.grid()
        return found
    except ConfigError as error:
        raise ConfigError(
            str(error) if str(error).startswith(str(space.path)) else f"{space.path}: {error}"
        ) from error


def _given_fields(names: Sequence[str], base: TrainConfig) -> set[str]:
    """The fields that options set: by name, by a group of them, or by a beginning that the parser takes."""
    known = {name for name, _ in _leaves(to_dict(base))}
    return {
        each
        for name in names
        for each in ({name} if name in known else {full for full in known if full.startswith(name)})
    }


def _refuse_fields(parameter: Parameter, pinned: set[str], before: Sequence[Parameter]) -> None:
    where = f"parameters.{parameter.name}"
    for name in parameter.fields:
        for refused in (_REFUSED, _INCOMPARABLE):
            if name in refused:
                raise ConfigError(f"{where}: {name} cannot be searched: {refused[name]}")
        if name in pinned:
            raise ConfigError(f"{where}: {name} is given in the fixed part or on the command line, too")
        for other in before:
            if name in other.fields and not _apart(parameter, other):
                raise ConfigError(
                    f"{where}: {name} is set by {other.name}, too; possible: conditions (when) that never hold together"
                )


def _apart(one: Parameter, other: Parameter) -> bool:
    """Whether two parameters are never part of the same trial."""
    return any(
        name in other.when and not set(labels) & set(other.when[name]) for name, labels in one.when.items()
    )


def _tried(parameter: Parameter, read: Read, base: TrainConfig) -> Parameter:
    where = f"parameters.{parameter.name}"
    if parameter.choices:
        choices: dict[Scalar, Mapping[str, Any]] = {}
        for label, settings in parameter.choices.items():
            place = f"{where}.choices" + ("" if label in settings.values() else f" {_short(label)}")
            held = _held(place, settings, read, base)
            value = next(iter(held.values()))
            own = label if isinstance(label, str) and not _is_scalar_choice(label, settings) else value
            if own in choices:
                raise ConfigError(f"{where}.choices: {_short(own)} stands there twice")
            choices[own] = held
        return dataclasses.replace(parameter, choices=choices)
    ends = {}
    for key in ("low", "high"):
        value = getattr(parameter, key)
        number = int(value) if float(value).is_integer() else value
        held = _held(f"{where}.{key}", dict.fromkeys(parameter.fields, number), read, base)
        ends[key] = held
    values = [value for held in ends.values() for value in held.values()]
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        raise ConfigError(f"{where}: {', '.join(parameter.fields)} is no number; possible: choices")
    whole = all(isinstance(value, int) for value in values)
    if not whole and any(isinstance(value, int) for value in values):
        raise ConfigError(
            f"{where}: {', '.join(parameter.fields)} are whole numbers in one place and others elsewhere"
        )
    if whole and parameter.step is not None and not float(parameter.step).is_integer():
        raise ConfigError(f"{where}.step: expected a whole number, found {parameter.step:g}")
    return dataclasses.replace(parameter, whole=whole)


def _is_scalar_choice(label: Scalar, settings: Mapping[str, Any]) -> bool:
    return all(value == label for value in settings.values())


def _held(where: str, settings: Mapping[str, Any], read: Read, base: TrainConfig) -> dict[str, Any]:
    """The values as the configuration holds them."""
    try:
        config = read([option(name, value) for name, value in settings.items()])
    except ConfigError as error:
        hint = f" ({_YAML_BOOLEANS})" if any(isinstance(v, bool) for v in settings.values()) else ""
        raise ConfigError(f"{where}: {error}{hint}") from error
    if set(config.tasks) != set(base.tasks):
        raise ConfigError(
            f"{where}: tasks: expected {', '.join(base.tasks)} in any order, found {', '.join(config.tasks)}: scores"
            " of different tasks cannot be compared"
        )
    values = to_dict(config)
    held: dict[str, Any] = {}
    for name, given in settings.items():
        found: Any = values
        for part in name.split("."):
            if not isinstance(found, dict) or part not in found:
                raise ConfigError(f"{where}: {name} is no field of a trial's configuration")
            found = found[part]
        if isinstance(found, dict):
            raise ConfigError(f"{where}: {name} is a group of fields: {', '.join(found)}")
        if isinstance(given, bool) != isinstance(found, bool):
            raise ConfigError(
                f"{where}: {name}: expected {type(found).__name__}, found {given!r} ({_YAML_BOOLEANS})"
            )
        held[name] = found
    return held


# ---- words ----


def _tag(names: Sequence[str]) -> str:
    """The abbreviation of a field, with its task where it sets one task's alone."""
    parts = names[0].split(".")
    tails = (names[0], parts[-1])
    short = next((_TAGS[tail] for tail in tails if tail in _TAGS), None)
    if short is None:
        short = "" if parts[-1] in ("mode", "activation", "tasks") else f"{parts[-1]}="
    alone = len(names) == 1 and len(parts) > 1 and parts[-1] in _TAGS and parts[0] not in ("optim", "model")
    return f"{parts[0]}-{short}" if alone else short


def _short(value: Any) -> str:
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
        return "-".join(map(_short, value))
    return str(value)
