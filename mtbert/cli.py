"""What the entry points share: the parser, presets, and errors that end with one clear message."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from mtbert.config import TrainConfig, tasks_with_settings
from mtbert.engine.distributed import World, refuse_ranks
from mtbert.errors import ConfigError, Interrupted, UserError
from mtbert.outside_files import read_yaml_object
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.registry import TASKS

TRUST = "--trust-plugins"


def run_main(main: Callable[[list[str]], None], *, ranks: bool = False) -> None:
    """Run an entry point: a UserError becomes one message and exit code 2 (`--debug` shows the traceback).

    ranks: whether torchrun may start several processes of it.
    """
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        if not ranks:
            refuse_ranks("this program")
        main([a for a in arguments if a != "--debug"])
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(error if isinstance(error, Interrupted) else f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("interrupted", file=sys.stderr)
        raise SystemExit(Interrupted.exit_code) from None
    except BrokenPipeError:
        # The reader of our output went away (`| head`); Python's own flush at exit must not complain again.
        sys.stdout = None


def presets(*, papers: bool = True) -> dict[str, Path]:
    """The presets shipped in the package, by name; `papers`: also those of the papers' rows."""
    folder = Path(str(resources.files("mtbert") / "presets"))
    found = {file.stem: file for file in folder.glob("*.yaml")}
    if papers:
        found |= {file.stem: file for file in (folder / "papers").glob("*.yaml") if file.name != "rows.yaml"}
    return found


def preset_path(name: str) -> Path:
    """The file of a shipped preset, or of a YAML file of the user's own."""
    known = presets()
    if name in known:
        return known[name]
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"--preset {name}: there is no such file")
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    listed = ", ".join(sorted(presets(papers=False)))
    raise ConfigError(
        f"--preset {name}: no such preset.{hint} Presets: {listed}, and the papers' rows (mtbert.reproduce --list)"
    )


def load_plugins(plugins: Sequence[str]) -> None:
    """Import modules or Python files that register tasks."""
    for plugin in plugins:
        name = _module_name(plugin)
        if name in sys.modules:
            continue
        if plugin.endswith(".py"):
            if not Path(plugin).is_file():
                raise ConfigError(f"plugins: there is no file {plugin}")
            spec = importlib.util.spec_from_file_location(name, plugin)
            if spec is None or spec.loader is None:
                raise ConfigError(f"plugins: {plugin} cannot be imported")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                del sys.modules[name]
                raise _plugin_error(plugin, error) from error
        else:
            try:
                importlib.import_module(name)
            except Exception as error:
                raise _plugin_error(plugin, error) from error


def _module_name(plugin: str) -> str:
    return Path(plugin).stem if plugin.endswith(".py") else plugin


def _plugin_error(plugin: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return ConfigError(f"plugins: {plugin} cannot be imported ({type(error).__name__}: {error})")


def train_parser(defaults: Path | None) -> ArgumentParser:
    """The parser of every training option; `defaults` is a preset's YAML file."""
    names = ", ".join([*sorted(presets(papers=False)), "or a paper's row: mtbert.reproduce --list"])
    parser = ArgumentParser(
        prog="python -m mtbert.train",
        description="Fine-tune one BERT on several sentence tasks at once. Without arguments: the preset"
        " quickstart, on built-in synthetic sentences.",
        default_config_files=[str(defaults)] if defaults else [],
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file: a preset or a run's config.yaml.")
    parser.add_argument("--preset", type=str, help=f"A shipped preset ({names}) or a YAML file.")
    parser.add_argument("--resume", type=str, help="The folder of an interrupted run to go on with.")
    parser.add_argument("--debug", type=bool, nargs="?", const=True, default=False, help="Show tracebacks.")
    parser.add_class_arguments(TrainConfig, None, skip={"task"}, fail_untyped=True)
    for name, task in TASKS.items():
        parser.add_class_arguments(TaskConfig, name, help=f"task {name}: {task.title}")
    return parser


def parse_train(arguments: list[str]) -> TrainConfig:
    """The configuration from preset, `--config` files and options, in this order of precedence from low to high.

    Raises ConfigError for an unknown key (suggesting the nearest), an ill-typed or an impossible value.
    """
    return train_reader(arguments)(())


def train_reader(arguments: Sequence[str]) -> Callable[[Sequence[str]], TrainConfig]:
    """What `parse_train` gives for these arguments with others behind them, as often as wanted.

    Presets and plugins are read at once.
    """
    load_plugins(_plugins_named(arguments))
    given = {a.split("=")[0] for a in arguments}
    preset = option_value(arguments, "--preset")
    if preset is None and not given & {"--data", "--config"}:
        preset = "quickstart"
    with _descriptions(wanted=bool(given & {"--help", "-h"})):
        parser = train_parser(preset_path(preset) if preset else None)
        if given & {"--help", "-h"}:
            parse_or_explain(parser, list(arguments))  # prints and exits
    return lambda more: parse_with(parser, [*arguments, *more])


@contextlib.contextmanager
def _descriptions(*, wanted: bool) -> Iterator[None]:
    """Within it, the parser reads what stands below each field in the source: seconds, so only for whoever asks."""
    set_parsing_settings(docstring_parse_attribute_docstrings=wanted)
    try:
        yield
    finally:
        set_parsing_settings(docstring_parse_attribute_docstrings=False)


def resume_options(arguments: Sequence[str]) -> list[str]:
    """What stands beside `--resume FOLDER`: only how to profile may change. Raises ConfigError for anything else."""
    options, rest = [], list(arguments)
    while rest:
        name, has_value, _ = rest[0].partition("=")
        count = 1 if has_value or len(rest) == 1 else 2
        if name == "--profile" or name.startswith("--profiling."):
            options += rest[:count]
        elif rest[0] == TRUST:
            count = 1
        elif name != "--resume":
            raise ConfigError(
                f"--resume takes everything from the run's config.yaml, found {rest[0]} beside it; possible: --profile,"
                f" --profiling.*, {TRUST}"
            )
        del rest[:count]
    return options


def count(text: str) -> int:
    """The type of an option that counts something: a whole number, at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, found {text!r}")
    return value


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option of whoever opens a run whose configuration names plugins."""
    parser.add_argument(
        TRUST,
        action="store_true",
        help="import the plugins that the run's config.yaml names: they are Python code, which can do anything",
    )


def load_plugins_of_run(path: Path, values: Mapping[str, Any], *, trusted: bool) -> None:
    """Import the plugins that a run's config.yaml names; a ConfigError unless its reader has said to trust them.

    Those that the command line has named are imported already, and need no trust of their own.
    """
    listed = values.get("plugins") or []
    plugins = [str(plugin) for plugin in (listed if isinstance(listed, list) else [listed])]
    unknown = [plugin for plugin in plugins if _module_name(plugin) not in sys.modules]
    if unknown and not trusted:
        raise ConfigError(
            f"{path}: names plugins ({', '.join(unknown)[:200]}), Python code that would run here; read it, and if you"
            f" trust it add {TRUST}"
        )
    load_plugins(plugins)


def config_from_file(path: Path, options: Sequence[str] = (), *, trust_plugins: bool = False) -> TrainConfig:
    """The configuration that a run's config.yaml holds, with these options of the command line over it.

    Nothing that it names is imported unless `trust_plugins` says so. Raises ConfigError, naming the file.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such configuration file")
    values = read_yaml_object(path, ConfigError)
    not_fields = sorted({"config", "preset", "resume", "debug"} & values.keys())
    if not_fields:
        raise ConfigError(
            f"{path}: {not_fields[0]} belongs to the command line, not into a run's configuration"
        )
    load_plugins_of_run(path, values, trusted=trust_plugins)
    try:
        parser = train_parser(None)
        _refuse_other_than_fields(values, [o for o in _options(parser) if not o.endswith("+")])
        return parse_with(parser, ["--config", str(path), *options])
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from error
    except SystemExit:
        raise ConfigError(f"{path}: holds an option that only prints something") from None


def _refuse_other_than_fields(values: Mapping[Any, Any], options: Sequence[str], prefix: str = "") -> None:
    """Raise ConfigError for a key that is no option, and for a group that is no mapping.

    jsonargparse has more in mind for both: it imports the module of a `class_path` before it refuses the class, takes
    text in a group's place for such a path or for another file to read, and appends to `plugins+`.
    """
    for key, value in values.items():
        name = f"{prefix}{key}"
        if any(option.startswith(f"{name}.") for option in options):
            if not isinstance(value, Mapping):
                raise _not_a_group(name, value, options)
            _refuse_other_than_fields(value, options, f"{name}.")
        elif name not in options:
            raise ConfigError(f"unknown option {name}.{_suggest(name, options)}")


def config_on_all_ranks(
    world: World, path: Path, options: Sequence[str] = (), *, trust_plugins: bool = False
) -> TrainConfig:
    """The configuration in a file that rank 0 alone needs to see, with these options of the command line over it."""
    text = world.told(lambda: path.read_text(encoding="utf-8") if path.is_file() else None)
    if world.is_main or text is None:
        return config_from_file(path, options, trust_plugins=trust_plugins)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        return config_from_file(copy, options, trust_plugins=trust_plugins)


def parse_with(parser: ArgumentParser, arguments: list[str]) -> TrainConfig:
    """Parse and build the dataclasses."""
    values = parse_or_explain(parser, joined_extra_data(arguments))
    options = _options(parser)
    for group in sorted({option.split(".")[0] for option in options if "." in option}):
        if group in values and not isinstance(values[group], Namespace):
            raise _not_a_group(group, values[group], options)
    try:
        built = parser.instantiate(values)
    except ConfigError as error:
        raise ConfigError(_with_group(str(error), values)) from error
    except UserError:
        raise
    except Exception as error:
        raise _config_error(error, parser) from error
    fields: dict[str, Any] = dict(vars(built))
    for name in ("config", "preset", "resume", "debug", "__default_config__"):
        fields.pop(name, None)
    task = {name: fields.pop(name) for name in TASKS if name in fields}
    try:
        config = TrainConfig(**fields, task=task)
    except (TypeError, ValueError, AttributeError) as error:  # null, where a field must have a value
        raise ConfigError(f"a value is of another kind than its field ({error})") from error
    config.task = {name: config.task[name] for name in tasks_with_settings(config)}
    _refuse_nulls(config)
    return config


def _refuse_nulls(values: Any, prefix: str = "") -> None:
    """Raise ConfigError for a null where a field must have a value: the parser lets it pass."""
    hints = get_type_hints(type(values))
    for field in dataclasses.fields(values):
        value, name = getattr(values, field.name), f"{prefix}{field.name}"
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if (value is None and NoneType not in get_args(hints[field.name])) or None in inside:
            raise ConfigError(f"{name}: expected a value, found null")
        if dataclasses.is_dataclass(value):
            _refuse_nulls(value, f"{name}.")
        for key, entry in value.items() if isinstance(value, dict) else ():
            if dataclasses.is_dataclass(entry):
                _refuse_nulls(entry, f"{key}.")


def parse_or_explain(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse; jsonargparse's errors become ConfigErrors that suggest the nearest option."""
    try:
        return parser.parse_args(arguments)
    except UserError:
        raise
    except SystemExit:
        raise
    except Exception as error:
        raise _config_error(error, parser) from error


def joined_extra_data(arguments: Sequence[str]) -> list[str]:
    """The arguments with all `--extra-data TASK=FILE` (or `--extra_data`) as one list, which is what the parser reads.

    A list in brackets is taken as it is.
    """
    rest: list[str] = []
    files: list[str] = []
    waiting = list(arguments)
    while waiting:
        name, has_value, value = waiting.pop(0).partition("=")
        if name not in ("--extra-data", "--extra_data"):
            rest.append(name + has_value + value)
            continue
        if not has_value:
            if not waiting:
                raise ConfigError("--extra-data: expected TASK=FILE, found nothing behind it")
            value = waiting.pop(0)
        if value.startswith("["):
            try:
                listed = yaml.safe_load(value)
            except yaml.YAMLError:
                listed = None
            if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
                raise ConfigError(f"--extra-data: expected TASK=FILE or a list of such, found {value!r}")
            files += listed
        else:
            files.append(value)
    return [*rest, "--extra_data", json.dumps(files)] if files else rest


def _with_group(message: str, values: Namespace) -> str:
    """The message with its field's full name: the groups of the model and of the tasks know only their own."""
    field = message.split(":")[0]
    if values.get(f"model.{field}") is not None:
        return f"model.{message}"
    try:
        default = reduce(getattr, field.split("."), TaskConfig())
    except AttributeError:
        return message
    for name in TASKS:
        value = values.get(f"{name}.{field}")
        if value != default and str(value) in message:  # the default cannot be the mistake
            return f"{name}.{message}"
    return message


def _config_error(error: BaseException, parser: ArgumentParser) -> UserError:
    """jsonargparse's error in the words of this project: the option, what was expected, what was found."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__cause__ or cause.__context__
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    options = _options(parser)
    for pattern in _UNKNOWN:
        match = re.search(pattern, text)
        if match:
            name = ".".join(part for part in match.groups() if part).split("=")[0].lstrip("-")
            return ConfigError(f"unknown option {name}.{_suggest(name, options)}")
    match = re.search(r'Parser key "([\w.]+)": (.*)', text)
    if match is None:
        return ConfigError(text)
    if "Unable to load config" in text:
        found_text = re.search(r"Unable to load config '?(.*?)'? - ", text)
        return _not_a_group(match[1], found_text[1] if found_text else "a value", options)
    name, problem = match.groups()
    kinds = re.findall(r"Expected an? (.*?)(?= - Expected|\. Got value| Given value|$)", problem)
    expected = list(dict.fromkeys(kinds))
    found = re.search(r"Given value: (.*)$", problem) or re.search(r"Got value: (.*)$", problem)
    if not expected or not found:
        return ConfigError(f"{name}: {problem}")
    wanted = " or ".join(_plain_type(kind) for kind in expected)
    if wanted == "list" and re.fullmatch(r"[\w, .-]+", found.group(1)):
        wanted = f"a list in brackets, [{found.group(1)}]"
    return ConfigError(f"{name}: expected {wanted}, found {found.group(1)}")


def _options(parser: ArgumentParser) -> list[str]:
    """The names of all options, sorted: `model.lora.rank`."""
    return sorted({o.lstrip("-") for a in parser._actions for o in a.option_strings if o.startswith("--")})


def _not_a_group(name: str, found: object, options: Sequence[str]) -> ConfigError:
    fields = sorted({o[len(name) + 1 :].split(".")[0] for o in options if o.startswith(f"{name}.")})
    return ConfigError(f"{name}: expected a group of fields ({', '.join(fields)}), found {found}")


_UNKNOWN = (
    r"[Uu]nrecognized arguments: (\S+)",
    r"Group '([^']*)' does not accept (?:option|nested key) '([^']*)'",
    r"Option '([^']*)' is not accepted",
)


def _plain_type(text: str) -> str:
    """`typing.Literal['a', 'b']` as `a, b`, `<class 'int'>` as `int`."""
    text = re.sub(r"<class '(\w+)'>", r"\1", text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda m: m.group(1).replace("'", ""), text)
    return re.sub(r"^list\[(.*)\]$", r"a list of \1", text)


def _suggest(name: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if not close:
        tails = {o.rsplit(".", 1)[-1]: o for o in options}
        close = [
            tails[t] for t in difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, n=1, cutoff=0.75)
        ]
    return f" Did you mean {close[0]}?" if close else " `--help` lists what there is."


def option_value(arguments: Sequence[str], option: str) -> str | None:
    """The last value of `option` on a raw command line: presets and plugins shape the parser itself."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(option + "="):
            value = argument.split("=", 1)[1]
    return value


def _plugins_named(arguments: Sequence[str]) -> list[str]:
    named: list[str] = []
    for option in ("--preset", "--config"):
        path = option_value(arguments, option)
        if path and path.endswith((".yaml", ".yml")) and Path(path).is_file():
            try:
                content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from error
            if isinstance(content, dict):
                listed = content.get("plugins") or []
                named += listed if isinstance(listed, list) else [listed]
    value = option_value(arguments, "--plugins")
    if value:
        try:
            listed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--plugins: expected a name or a list, found {value!r}") from error
        named += listed if isinstance(listed, list) else [listed]
    return [str(n) for n in named]
