"""LoRA adapters in PEFT's files: adapter_config.json and adapter_model.safetensors. `peft` itself is not needed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mtbert.errors import ModelFileError
from mtbert.model.bert import BertEncoder
from mtbert.model.lora import PROJECTIONS, LoraAdapter, LoraConfig
from mtbert.outside_files import own_file, read_json_object, tensor_facts

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

MODULES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
"""Where a projection is in a layer of Hugging Face's `BertModel`."""

_NAME = re.compile(
    r"base_model\.model\.(?:bert\.)?encoder\.layer\.(0|[1-9][0-9]{0,5})\.([a-z.]{1,40})\.lora_([AB])\.weight"
)
_PLAIN_VALUES: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "target_parameters": None,
    "exclude_modules": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "megatron_config": None,
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "arrow_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "loftq_config": {},
    "runtime_config": None,
    "ensure_weight_tying": False,
}
"""What PEFT's fields must be (or be empty) for an adapter that `LoraAdapter` is."""
_READ = {"r", "lora_alpha", "use_rslora", "peft_type", "init_lora_weights"}
_WITHOUT_EFFECT = {
    "lora_dropout", "inference_mode", "base_model_name_or_path", "revision", "task_type",
    "auto_mapping", "peft_version", "target_modules", "layers_to_transform", "layers_pattern", "qalora_group_size",
    "megatron_core",
}  # fmt: skip
"""What training begins with, or what the names of the tensors say."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`; others (pissa, olora, corda, loftq, lora_ga) take something out of the base's weights: the
adapter belongs on a base that the folder does not hold."""


def tensor_name(layer: int, projection: str, matrix: str) -> str:
    """The name of A or B of one adapter on a `BertModel`."""
    return f"base_model.model.encoder.layer.{layer}.{MODULES[projection]}.lora_{matrix}.weight"


def load_adapters(encoder: BertEncoder, config: LoraConfig, folder: Path, tasks: Sequence[str]) -> None:
    """Fill the adapters of `encoder` from PEFT's files in `folder`.

    tasks: who has adapters of its own (lora.per_task): each reads those of its own folder `folder`/TASK where there are
    such, else all begin with the same. Raises ModelFileError for adapters of another kind, of other places or of other
    sizes than model.lora says, naming what to set.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ModelFileError(f"model.adapter: there is no folder {folder}")
    owners: Sequence[str | None] = tasks or (None,)
    for task in owners:
        apart = folder / task if task is not None else folder
        _load(encoder, config, apart if (apart / ADAPTER_CONFIG).is_file() else folder, task)


def _load(encoder: BertEncoder, config: LoraConfig, folder: Path, task: str | None) -> None:
    described = own_file(folder, ADAPTER_CONFIG, ModelFileError)
    if not described.is_file():
        raise ModelFileError(f"{folder}: holds no {ADAPTER_CONFIG}; expected an adapter that peft has saved")
    path = own_file(folder, ADAPTER_WEIGHTS, ModelFileError)
    if not path.is_file():
        pickled = " (pickled files can run code, so adapter_model.bin is not opened)"
        raise ModelFileError(
            f"{folder}: holds no {ADAPTER_WEIGHTS}{pickled if (folder / 'adapter_model.bin').exists() else ''}"
        )
    values = read_json_object(described, ModelFileError)
    _refuse_other_kinds(described, values)
    found = _places(path)
    _check_settings(described, values, found, config, len(encoder.layers))
    targets = {
        (number, name): adapter
        for number, layer in enumerate(encoder.layers)
        for name, _, adapter in layer.adapted_weights(task)
    }
    _check_shapes(path, found, targets)
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            for place, adapter in targets.items():
                for matrix, parameter in (("A", adapter.lora_a), ("B", adapter.lora_b)):
                    parameter.copy_(file.get_tensor(found[place][matrix][0]))
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: cannot be read ({error!s:.300})") from None
    if not all(adapter.delta().isfinite().all() for adapter in targets.values()):
        raise ModelFileError(f"{path}: holds values that are not finite")


def _refuse_other_kinds(path: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ModelFileError(f"{path}: peft_type {kind!r:.80}; expected 'LORA'")
    start = values.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ModelFileError(
            f"{path}: init_lora_weights {start!r:.80} is not served: it changes the weights of the base; convert the"
            " adapter by peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for name, value in values.items():
        if name in _READ or name in _WITHOUT_EFFECT or not value:
            continue
        if name not in _PLAIN_VALUES or value != _PLAIN_VALUES[name]:
            raise ModelFileError(
                f"{path}: {name[:80]} {value!s:.80} is not served; expected plain LoRA adapters"
            )
    for name, kinds in (("r", int), ("lora_alpha", (int, float)), ("use_rslora", bool)):
        value = values.get(name, False if name == "use_rslora" else None)
        is_number = kinds is not bool and not isinstance(value, bool)
        if not isinstance(value, kinds) or (kinds is not bool and not (is_number and 0 < value < 2**31)):
            expected = "true or false" if kinds is bool else "a number above 0"
            raise ModelFileError(f"{path}: {name}: expected {expected}, found {value!r:.80}")


Places = dict[tuple[int, str], dict[str, tuple[str, tuple[int, ...]]]]
"""By layer and projection, then by matrix: the tensor's name and shape."""


def _places(path: Path) -> Places:
    projections = {module: name for name, module in MODULES.items()}
    found: Places = {}
    for name, facts in tensor_facts(path, ModelFileError).items():
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in projections:
            raise ModelFileError(f"{path}: {name[:120]} is not a LoRA matrix of a layer of BERT")
        if facts.dtype not in ("F64", "F32", "F16", "BF16"):
            raise ModelFileError(f"{path}: {name} has dtype {facts.dtype[:20]}, expected floating point")
        place = found.setdefault((int(match[1]), projections[match[2]]), {})
        if match[3] in place:
            raise ModelFileError(f"{path}: has {name} twice")
        place[match[3]] = (name, facts.shape)
    if not found:
        raise ModelFileError(f"{path}: holds no adapter")
    return found


def _check_settings(
    path: Path, values: Mapping[str, Any], found: Places, config: LoraConfig, count: int
) -> None:
    """Raise unless model.lora describes these adapters, with the options that would."""
    wanted: dict[str, Any] = {
        "rank": values["r"],
        "alpha": float(values["lora_alpha"]),
        "rank_stabilised": values.get("use_rslora", False),
        "projections": [name for name in PROJECTIONS if any(name == place[1] for place in found)],
        "layers": sorted({place[0] for place in found}),
    }
    if max(wanted["layers"]) >= count:
        raise ModelFileError(
            f"{path}: has an adapter on layer {max(wanted['layers'])}, but the encoder has {count} layers"
        )
    own: dict[str, Any] = {
        "rank": config.rank,
        "alpha": float(config.alpha),
        "rank_stabilised": config.rank_stabilised,
        "projections": [name for name in PROJECTIONS if name in config.projections],
        "layers": config.layer_numbers(count),
    }
    different = [name for name, value in wanted.items() if own[name] != value]
    if different:
        options = " ".join(f"--model.lora.{name} {_as_option(wanted[name])}" for name in different)
        there = ", ".join(f"{name} {own[name]}" for name in different)
        raise ModelFileError(f"{path}: the adapter differs from the run's ({there}); set {options}")
    missing = [
        f"{name} of layer {n}"
        for n in wanted["layers"]
        for name in wanted["projections"]
        if (n, name) not in found
    ]
    if missing:
        raise ModelFileError(
            f"{path}: every adapted layer must have the same projections; missing: {', '.join(missing[:5])}"
        )


def _as_option(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'[{','.join(map(str, value))}]'" if isinstance(value, list) else str(value)


def _check_shapes(path: Path, found: Places, targets: Mapping[tuple[int, str], LoraAdapter]) -> None:
    for place, adapter in targets.items():
        for matrix, parameter in (("A", adapter.lora_a), ("B", adapter.lora_b)):
            name, shape = found[place].get(matrix, (f"lora_{matrix} of layer {place[0]}'s {place[1]}", None))
            if shape != tuple(parameter.shape):
                is_there = "is missing" if shape is None else f"has shape {list(shape)}"
                raise ModelFileError(f"{path}: {name} {is_there}, expected {list(parameter.shape)}")
