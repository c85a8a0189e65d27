"""Files that somebody else wrote: whatever is in them, they load or a UserError names the file.

Nothing else is raised, nothing outside the folder is read or written, nothing is imported, and no memory is allocated
by a size that a file merely claims.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.made_runs import loaded, make_run
from support.tiny_bert import write_tiny_bert

from mtbert.cli import config_from_file
from mtbert.config import TrainConfig
from mtbert.data.tokenisation import Tokeniser
from mtbert.engine.checkpoint import CheckpointStore
from mtbert.engine.load_run import LoadedRun, load_run
from mtbert.engine.run_folder import RunFolder
from mtbert.errors import UserError
from mtbert.evaluation.run import read_run
from mtbert.exporting.model_card import write_card
from mtbert.exporting.run import ExportedRun
from mtbert.exporting.write import write_export
from mtbert.model.kept_heads import load_heads
from mtbert.model.lora import LoraConfig, add_lora
from mtbert.model.peft_files import load_adapters
from mtbert.model.pretrained import load_config, load_encoder
from mtbert.tasks.registry import TASKS


def fuzz(examples: int) -> settings:
    """The same examples in every run of the tests; MTBERT_FUZZ=1000 tries so many new ones."""
    return settings(
        max_examples=int(os.environ.get("MTBERT_FUZZ", examples)),
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a seed has nothing to shrink
        derandomize="MTBERT_FUZZ" not in os.environ,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


DEEP = "[" * 100_000
HOSTILE: list[Any] = [
    None, True, -1, 0, 10**9, 10**6, 2**63, 10**400, 1.5, float("nan"), float("inf"), "", "x" * 5000,
    "../../../etc/passwd",
    "/etc/passwd", [], [[]], ["query"] * 3, {}, {"a": {"b": []}}, "!!python/object/apply:os.system", "\ud800", "[CLS]",
]  # fmt: skip


def mutate(value: Any, chance: random.Random) -> Any:
    """The same value with something in it replaced, removed or added."""
    value = copy.deepcopy(value)
    place, parent, key = value, None, None
    while isinstance(place, (dict, list)) and place and (parent is None or chance.random() < 0.75):
        parent = place
        key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
        place = place[key]
    what = chance.random()
    if parent is None:
        return chance.choice(HOSTILE)
    if what < 0.65:
        parent[key] = chance.choice(HOSTILE)
    elif what < 0.85:
        del parent[key]
    elif isinstance(parent, dict):
        parent[chance.choice(["__metadata__", "config", "plugins", "extra", "0"])] = chance.choice(HOSTILE)
    else:
        parent.append(chance.choice(HOSTILE))
    return value


def damage(data: bytes, chance: random.Random) -> bytes:
    """The same bytes, cut, or with some replaced."""
    kind = chance.random()
    if kind < 0.25:
        return data[: chance.randrange(len(data) + 1)]
    if kind < 0.3:
        return DEEP.encode()
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 20])):
        changed[chance.randrange(min(len(changed), 4000))] = chance.choice(b'\x00\xff{}[]:,"-0919eaE\n\\')
    return bytes(changed)


def with_header(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file with another header over the same numbers."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def corrupt(path: Path, chance: random.Random) -> None:
    """Change the file in a way that fits its kind, or its bytes."""
    data = path.read_bytes()
    if chance.random() < 0.25:
        path.write_bytes(damage(data, chance))
    elif path.suffix == ".safetensors":
        path.write_bytes(with_header(data, lambda header: mutate(header, chance)))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(plain(mutate(yaml.safe_load(data), chance))), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        changed = [mutate(line, chance) if chance.random() < 0.6 else line for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in changed), encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_bytes(damage(data, chance))
    else:
        path.write_text(json.dumps(mutate(json.loads(data), chance)), encoding="utf-8")


def plain(value: Any) -> Any:
    """YAML has no half characters."""
    return json.loads(json.dumps(value).replace("\\ud800", "?"))


def survives(
    folder: Path, file: str, use: Callable[[], Any], chance: random.Random, names: str | None = None
) -> None:
    """Corrupt the file; then `use` gives something, or a UserError that names it (or `names`). The file comes back."""
    path = folder / file
    before = path.read_bytes()
    message: str | None = None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        corrupt(path, chance)
        use()
    except UserError as error:
        message = str(error)
    finally:
        path.write_bytes(before)
    assert message is None or re.search(names or re.escape(path.name), message), message
    assert message is None or len(message) < 3000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 200_000, f"{grown} KiB for a file of {len(before)} bytes"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "bert"
    write_tiny_bert(folder, layers=1, hidden=16, intermediate=16)
    special = {
        "cls_token": "[CLS]",
        "sep_token": {"content": "[SEP]"},
        "do_lower_case": True,
        "unk_token": "[UNK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


VALUES = {
    "tasks": ["sst", "sts"],
    "sst": {"head": {"hidden_layers": 1}},
    "sts": {"head": {"pair": ["cosine"]}},
}


@pytest.fixture(scope="module")
def run(bert: Path) -> RunFolder:
    made = make_run(bert.parent / "run", bert, VALUES)
    counts = {"counts": [1, 2, 3, 4, 5]}
    data = {
        "sst": {
            "train": {
                "file": "a.csv",
                "rows": 15,
                "labels": counts,
                "own_labels": counts,
                "extra": [{"file": "/their/b.csv", "sha256": "b1", "rows": 3, "left_out": 0}],
            },
            "dev": {"rows": 2, "labels": counts, "overlap": 1},
        }
    }
    made.write_json(
        made.record_path,
        {**json.loads(made.record_path.read_text()), "data": data, "versions": {"torch": "2"}},
    )
    scores = {
        "kind": "classification",
        "examples": 2,
        "accuracy": 0.5,
        "macro_f1": 0.5,
        "classes": [],
        "confusion": [[1, 1]],
    }
    lines = [
        {"kind": "step", "step": 1, "epoch": 0.5, "loss": {"sst": 1.0}, "total_loss": 1.0},
        {
            "kind": "evaluation",
            "step": 4,
            "epoch": 1.0,
            "dev": {"sst": scores},
            "train": {"sst": scores},
            "score": 0.5,
        },
        {"kind": "epoch", "step": 4, "epoch": 1.0, "seconds": 2.0, "tokens": 7},
    ]
    made.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made.predictions.mkdir()
    outputs = [
        {"id": str(n), "label": n, "prediction": 1, "outputs": [0.1, 0.2, 0.9, 0.0, n]} for n in range(2)
    ]
    (made.predictions / "sst-dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in outputs))
    return made


@fuzz(40)
@given(seed=st.integers(0, 2**32), file=st.sampled_from(["config.json", "model.safetensors"]))
def test_model_folders(bert: Path, seed: int, file: str) -> None:
    survives(bert, file, lambda: load_encoder(bert), random.Random(seed), r"config\.json|model\.safetensors")


@fuzz(40)
@given(
    seed=st.integers(0, 2**32), file=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "vocab.txt"])
)
def test_tokenisers(bert: Path, tmp_path: Path, seed: int, file: str) -> None:
    folder = tmp_path / "tokeniser"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bert, folder)
    if file == "vocab.txt":
        (folder / "tokenizer.json").unlink()

    def use() -> None:
        Tokeniser.from_folder(folder).encode(["a good movie [SEP]", ""])

    survives(folder, file, use, random.Random(seed), r"tokenizer\.json|vocab\.txt|tokenizer_config\.json")


def test_a_pattern_without_an_end_is_given_up(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokeniser"
    shutil.copytree(bert, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="the tokeniser cannot read these texts"):
        Tokeniser.from_folder(folder).encode(["a" * 40 + "!"])


@pytest.fixture(scope="module")
def own(run: RunFolder) -> tuple[LoadedRun, TrainConfig]:
    return loaded(run)


@fuzz(40)
@given(seed=st.integers(0, 2**32))
def test_heads(own: tuple[LoadedRun, TrainConfig], bert: Path, seed: int) -> None:
    folder = bert.parent / "heads"
    if not folder.exists():
        write_export(ExportedRun(*own, None), "hf", folder)
    survives(folder, "heads.safetensors", lambda: load_heads(own[0].model, folder), random.Random(seed))


@fuzz(40)
@given(seed=st.integers(0, 2**32), file=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
def test_adapters(bert: Path, seed: int, file: str) -> None:
    lora = LoraConfig(rank=2)
    folder = bert.parent / "adapter"
    if not folder.exists():
        made = make_run(
            bert.parent / "lora", bert, {"tasks": ["sst"], "mode": "lora", "model": {"lora": {"rank": 2}}}
        )
        write_export(ExportedRun(*loaded(made), None), "peft", folder)

    def use() -> None:
        encoder = load_encoder(bert)
        add_lora(encoder, lora)
        load_adapters(encoder, lora, folder, ())

    survives(folder, file, use, random.Random(seed), r"adapter_")


@fuzz(8)
@given(seed=st.integers(0, 2**32))
def test_configurations_of_runs(run: RunFolder, seed: int) -> None:
    def use() -> None:
        opened = RunFolder.open(run.path)
        load_run(opened, config_from_file(opened.config_path), device="cpu")

    # What a readable configuration asks for may not fit the run: then the message names what does not.
    survives(
        run.path,
        "config.yaml",
        use,
        random.Random(seed),
        "config.yaml|checkpoint|model|run|task|head|max_length|device",
    )


@fuzz(40)
@given(
    seed=st.integers(0, 2**32),
    file=st.sampled_from(["run.json", "metrics.jsonl", "predictions/sst-dev.jsonl"]),
)
def test_run_folders(
    run: RunFolder, own: tuple[LoadedRun, TrainConfig], tmp_path: Path, seed: int, file: str
) -> None:
    def use() -> None:
        RunFolder.open(run.path)
        read_run(run.path)
        write_card(ExportedRun(*own, None), tmp_path, "hf", "model")

    survives(run.path, file, use, random.Random(seed))


@fuzz(40)
@given(seed=st.integers(0, 2**32), file=st.sampled_from(["COMPLETE", "state.json", "model.safetensors"]))
def test_checkpoints(run: RunFolder, own: tuple[LoadedRun, TrainConfig], seed: int, file: str) -> None:
    """Also where whoever changed a file has sealed it again."""
    import hashlib

    from mtbert.engine.checkpoint import _seal

    folder = run.checkpoints / "step-4"
    complete = (folder / "COMPLETE").read_bytes()
    chance = random.Random(seed)

    def use() -> None:
        try:
            fields = json.loads((folder / "COMPLETE").read_bytes())
            if chance.random() < 0.8:
                data = (folder / file).read_bytes()
                if file != "COMPLETE":
                    fields["files"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                fields.pop("seal", None)
                (folder / "COMPLETE").write_text(json.dumps({**fields, "seal": _seal(fields)}))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass  # it is too damaged for that
        CheckpointStore(run.checkpoints).load(4)
        load_run(RunFolder.open(run.path), own[1], device="cpu")

    try:
        survives(folder, file, use, chance, "step-|checkpoint")
    finally:
        (folder / "COMPLETE").write_bytes(complete)


def test_claimed_sizes_allocate_nothing(bert: Path, run: RunFolder) -> None:
    sizes = json.loads((bert / "config.json").read_text())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for name, value in (
            ("hidden_size", 10**9), ("num_hidden_layers", 10**6), ("vocab_size", 2**31 - 1), ("intermediate_size", -1),
            ("hidden_size", float("nan")), ("hidden_size", 16.0), ("num_hidden_layers", True),
            ("vocab_size", "9" * 10**6),
            ("num_attention_heads", 10**30), ("max_position_embeddings", 10**9), ("layer_norm_eps", float("inf")),
        ):  # fmt: skip
            (bert / "config.json").write_text(json.dumps({**sizes, name: value}))
            with pytest.raises(UserError, match=r"config\.json|model\.safetensors") as raised:
                load_encoder(bert)
            assert len(str(raised.value)) < 1500
        for text, message in (
            (DEEP, "nested too deeply"),
            ('{"a": ' + "9" * 10**5 + "}", "is not JSON"),
            ("x" * (2 << 20), "MiB"),
        ):
            (bert / "config.json").write_text(text)
            with pytest.raises(UserError, match=message):
                load_config(bert)
    finally:
        (bert / "config.json").write_text(json.dumps(sizes))
    text = run.config_path.read_text()
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
    )
    try:
        for changed, message in (
            (text.replace("hidden_size: null", "hidden_size: 1000000000"), "expected 1 to 16384"),
            (text.replace("rank: 8", "rank: 1000000000"), "expected 1 to 4096"),
            (text.replace("resamples: 1000", "resamples: 1000000000000"), "expected 1 to 1000000"),
            (text + "cache: !!python/object/apply:os.system ['touch owned']\n", "plain values"),
            (bomb, "aliases"),
            ("seed: " + "9" * 5000, "impossible value"),
            ("a: " + "[" * 5000, "levels deep|plain values"),
        ):
            run.config_path.write_text(changed)
            with pytest.raises(UserError, match=message) as raised:
                config_from_file(run.config_path)
            assert "config.yaml" in str(raised.value)
    finally:
        run.config_path.write_text(text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_plugins_of_a_run_are_imported_only_on_demand(run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    from mtbert import compare, evaluate, export, predict, train

    plugin = tmp_path / "their_plugin.py"
    plugin.write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    text = run.config_path.read_text()
    try:
        run.config_path.write_text(text.replace("plugins: []", f"plugins: [{plugin}]"))
        name = str(run.path)
        for main, arguments in (
            (evaluate.main, [name]), (predict.main, [name]), (export.main, [name]), (compare.main, [name, name]),
            (train.main, ["--resume", name]),
        ):  # fmt: skip
            with pytest.raises(UserError, match=r"names plugins .*their_plugin.*--trust-plugins"):
                main(arguments)
        assert not (tmp_path / "imported").exists()
        predict.main([name, "--trust-plugins", "--task", "sst", "good"])
        assert (tmp_path / "imported").exists()
    finally:
        run.config_path.write_text(text)


@pytest.mark.parametrize(
    "line",
    [
        "model: their_module.Model",
        "model: {class_path: their_module.Model}",
        "model.class_path: their_module.Model",
        "sst: {head: {class_path: their_module.Head, init_args: {}}}",
        "evaluation: other.yaml",
        "plugins+: [their_module]",
    ],
)
def test_the_option_parser_imports_and_reads_nothing(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    (tmp_path / "their_module.py").write_text(
        "open('imported', 'w').close()\nclass Model: pass\nHead = Model\n"
    )
    (tmp_path / "other.yaml").write_text("resamples: 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "config.yaml"
    values = yaml.safe_load(run.config_path.read_text())
    path.write_text(
        yaml.safe_dump({k: v for k, v in values.items() if k != line.split(":")[0]}) + line + "\n"
    )
    with pytest.raises(UserError, match=r"config\.yaml: (unknown option|.*expected a group of fields)"):
        config_from_file(path)
    assert not (tmp_path / "imported").exists()


def test_links_do_not_lead_out(run: RunFolder, bert: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("{}")
    # A model's folder: as a whole it may be a link, and so may the files of a snapshot in the hub's cache.
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in bert.iterdir():
        shutil.copy(path, blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    (tmp_path / "link").symlink_to(snapshot)
    load_encoder(tmp_path / "link")
    Tokeniser.from_folder(tmp_path / "link")
    for file in ("tokenizer_config.json", "config.json", "model.safetensors", "heads.safetensors"):
        theirs = tmp_path / f"theirs-{file}"
        shutil.copytree(bert, theirs)
        (theirs / file).unlink(missing_ok=True)
        (theirs / file).symlink_to(secret / "key")
        with pytest.raises(UserError, match=f"{file}: leads out of its folder"):
            make_run(tmp_path / "never", theirs, {"tasks": ["sst"]})
    # A run's folder.
    assert (secret / "key").read_text() == "{}"
    for name in ("predictions", "encoder", "plots", "run.json", "checkpoints", "metrics.jsonl", "report.md"):
        theirs = tmp_path / f"run-{name}"
        shutil.copytree(run.path, theirs)
        shutil.rmtree(theirs / name, ignore_errors=True) if (theirs / name).is_dir() else (
            theirs / name
        ).unlink(missing_ok=True)
        (theirs / name).symlink_to(secret)
        with pytest.raises(UserError, match=f"{name}: leads out of the run's folder"):
            RunFolder.open(theirs)
        if name in ("run.json", "metrics.jsonl", "predictions"):  # a comparison opens no run
            with pytest.raises(UserError, match="leads out of its folder"):
                read_run(theirs).predictions(TASKS["sst"])
    (tmp_path / "run-link").symlink_to(run.path)
    loaded(RunFolder.open(tmp_path / "run-link"))
    # A checkpoint whose best step is a path, and one that is a link.
    theirs = tmp_path / "run-best"
    shutil.copytree(run.path, theirs)
    shutil.move(theirs / "checkpoints" / "step-4", secret / "step-4")
    (theirs / "checkpoints" / "step-4").symlink_to(secret / "step-4")
    with pytest.raises(UserError, match="leads out of"):
        CheckpointStore(theirs / "checkpoints").load_best(lambda _: None)


def test_pipes_are_not_waited_for_and_other_numbers_are_no_weights(run: RunFolder, tmp_path: Path) -> None:
    import hashlib

    from mtbert.engine.checkpoint import _seal

    theirs = RunFolder(tmp_path / "run")
    shutil.copytree(run.path, theirs.path)
    weights, complete = (theirs.checkpoints / "step-4" / name for name in ("model.safetensors", "COMPLETE"))

    def seal() -> None:
        fields = json.loads(complete.read_bytes())
        data = weights.read_bytes()
        fields["files"][weights.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        fields.pop("seal")
        complete.write_text(json.dumps({**fields, "seal": _seal(fields)}))

    for dtype in (torch.int8, torch.complex64):
        found = load_file(run.checkpoints / "step-4" / weights.name)
        found["heads.sst.output.bias"] = found["heads.sst.output.bias"].to(dtype)
        save_file(found, weights)
        seal()
        with pytest.raises(UserError, match=r"heads\.sst\.output\.bias has dtype"):
            loaded(theirs)
    for path in (weights, complete, theirs.metrics_path):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(UserError, match="COMPLETE is no ordinary file"):
        loaded(theirs)
    with pytest.raises(UserError, match=r"metrics\.jsonl: expected a file"):
        read_run(theirs.path)
    theirs.metrics_path.unlink()
    (theirs.path / "profile").mkdir()
    (theirs.path / "profile" / "profile.json").write_text('{"phases": 1}')
    with pytest.raises(UserError, match=r"profile\.json: is no profile"):
        read_run(theirs.path)
    (tmp_path / "secret").write_text("{}")
    (theirs.path / "profile" / "profile.json").unlink()
    (theirs.path / "profile" / "profile.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out of its folder"):
        read_run(theirs.path)


def test_exports_appear_whole_or_not_at_all(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, config = loaded(run)
    exported = ExportedRun(own, config, None)
    there = tmp_path / "there"
    there.mkdir()
    write_export(exported, "hf", there)  # an empty folder is no obstacle
    with pytest.raises(UserError, match="is not empty"):
        write_export(exported, "hf", there)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        write_export(exported, "hf", tmp_path / "file")
    from mtbert.exporting import write

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_card", full)
    with pytest.raises(UserError, match=r"new cannot be written: No space left on device"):
        write_export(exported, "hf", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]
    save_file({}, there / "more.safetensors")  # what was written is an ordinary folder
