"""Format peft: the LoRA adapters of a run as `peft.PeftModel.from_pretrained(AutoModel, DIR)` reads them.

The folder also has the heads, which PEFT has no place for, in a file of mtbert's own, and in `base/` the frozen encoder
where that is no model of the hub. Adapters of one task each (lora.per_task) have a folder a task.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mtbert.errors import ExportError
from mtbert.exporting.run import MINILM_HUB_ID, ExportedRun, write_bert, write_json, write_tensors
from mtbert.model.kept_heads import save_heads
from mtbert.model.lora import PROJECTIONS
from mtbert.model.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODULES, tensor_name
from mtbert.model.pretrained import hugging_face_views as views
from mtbert.model.pretrained import load_config, load_encoder, resolve

BASE = "base"


def write_adapters(exported: ExportedRun, folder: Path) -> None:
    """Write the adapters, and what belongs to them. Raises ExportError for a run without any."""
    encoder = exported.encoder
    if not encoder.has_lora:
        raise ExportError(
            f"--format peft carries LoRA adapters, but the run has mode {exported.config.mode}, which trains"
            " none; --format hf carries the whole encoder"
        )
    left = [name for name in encoder.additions if name != "lora.per_task"]
    if left:
        raise ExportError(
            f"--format peft cannot carry {', '.join(left)}: it has a place for LoRA adapters alone"
        )
    base = hub_base(exported)
    if base is None:
        _write_base(exported, folder / BASE)
    if encoder.has_task_adapters:
        for name in [exported.name] if exported.name is not None else list(exported.loaded.tasks):
            _write_adapter(exported, folder / name, name, base)
    else:
        _write_adapter(exported, folder, None, base)
    save_heads(exported.loaded.model, folder)
    exported.loaded.tokeniser.write(folder, max_length=exported.max_length)


def hub_base(exported: ExportedRun) -> str | None:
    """The hub id of the model that the adapters belong on; None where that is no model of the hub as it is there."""
    name = exported.config.model.pretrained
    known = exported.base_model
    if known is None or (Path(name).expanduser().exists() and known != MINILM_HUB_ID):
        return None
    source = resolve("minilm") if known == MINILM_HUB_ID else resolve(known)
    if load_config(source) != exported.encoder.config:
        return None  # fewer layers, or other heads
    original = dict(views(load_encoder(source)))
    same = all(torch.equal(original[name], view) for name, view in views(exported.encoder))
    return known if same else None


def _write_base(exported: ExportedRun, folder: Path) -> None:
    """The frozen encoder without its adapters."""
    folder.mkdir()
    write_bert(
        exported, folder, tensors=dict(views(exported.encoder)), extra={"architectures": ["BertModel"]}
    )


def _write_adapter(exported: ExportedRun, folder: Path, task: str | None, base: str | None) -> None:
    lora = exported.config.model.lora
    layers = exported.encoder.layers
    tensors: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        for projection, _, adapter in layer.adapted_weights(task):
            tensors[tensor_name(number, projection, "A")] = adapter.lora_a.detach()
            tensors[tensor_name(number, projection, "B")] = adapter.lora_b.detach()
    numbers = lora.layer_numbers(len(layers))
    chosen: list[str] = [name for name in PROJECTIONS if name in lora.projections]
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        **_targets(chosen, numbers, len(layers)),
    }
    folder.mkdir(exist_ok=True)
    write_json(folder / ADAPTER_CONFIG, config)
    write_tensors(folder / ADAPTER_WEIGHTS, tensors)


def _targets(projections: list[str], numbers: list[int], count: int) -> dict[str, object]:
    """Which modules have an adapter. PEFT compares ends of names, so `output.dense` would be `attention.output.dense`,
    too: then a pattern says it."""
    if "output" in projections and "attention_output" not in projections:
        layers = "|".join(map(str, numbers))
        modules = "|".join(MODULES[name] for name in projections).replace(".", r"\.")
        return {"target_modules": rf".*encoder\.layer\.({layers})\.({modules})"}
    ends = [MODULES[name].removeprefix("attention.self.") for name in projections]
    some = {} if len(numbers) == count else {"layers_to_transform": numbers, "layers_pattern": "layer"}
    return {"target_modules": ends, **some}
