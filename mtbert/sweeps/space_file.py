"""A search space from YAML. What the configuration says of it is checked elsewhere (`space_check`)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import yaml

from mtbert.errors import ConfigError
from mtbert.sweeps.space import Method, Parameter, PrunerName, Scalar, Space, abbreviation, option, short

YAML_BOOLEANS = "YAML reads on, off, yes and no as true and false: put the word in quotes"

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
            hint = f" ({YAML_BOOLEANS})" if isinstance(found, bool) else ""
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
    for name, value in leaves(fixed):
        yield option(name, value)


def leaves(values: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of nested mappings by their dotted names, with their values."""
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def _parameter(name: Any, value: Any, before: Sequence[Parameter]) -> Parameter:
    where = f"parameters.{name}"
    if not isinstance(name, str):
        raise ConfigError(f"{where}: expected a name, found {name!r} ({YAML_BOOLEANS})")
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
    default_tag = "" if named else abbreviation(targets)
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
                raise ConfigError(f"{where}: expected names, found {label!r} ({YAML_BOOLEANS})")
            if not isinstance(settings, dict) or not settings:
                raise ConfigError(
                    f"{where}.{label}: expected a mapping of configuration fields to values, found {settings!r}"
                )
            result[label] = dict(leaves(settings))
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
                possible = ", ".join(map(short, known[name].choices))
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
        hint = f" ({YAML_BOOLEANS})" if isinstance(found, bool) else ""
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
