"""A search space held against the configuration, before the first trial."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mtbert.config import TrainConfig, to_dict
from mtbert.errors import ConfigError
from mtbert.sweeps.space import Parameter, Read, Scalar, Space, option, short
from mtbert.sweeps.space_file import YAML_BOOLEANS, leaves

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
    known = {name for name, _ in leaves(to_dict(base))}
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
            place = f"{where}.choices" + ("" if label in settings.values() else f" {short(label)}")
            held = _held(place, settings, read, base)
            value = next(iter(held.values()))
            own = label if isinstance(label, str) and not _is_scalar_choice(label, settings) else value
            if own in choices:
                raise ConfigError(f"{where}.choices: {short(own)} stands there twice")
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
        hint = f" ({YAML_BOOLEANS})" if any(isinstance(v, bool) for v in settings.values()) else ""
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
                f"{where}: {name}: expected {type(found).__name__}, found {given!r} ({YAML_BOOLEANS})"
            )
        held[name] = found
    return held


# ---- words ----
