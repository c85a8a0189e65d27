"""Frozen first layers from files: the same losses and gradients bit for bit, and files that cannot be trusted."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config
from support.small_disk import small_disk
from support.tiny_bert import write_tiny_bert

from mtbert.data.packing import Computed, Request, distinct_rows, pack
from mtbert.engine.forward import PackedForward
from mtbert.engine.frozen_prefix import FrozenCacheConfig, PrefixForward, describe_frozen
from mtbert.engine.hidden_states import StatesFolder, StatesKey
from mtbert.engine.inference import infer
from mtbert.errors import ConfigError, UserError
from mtbert.evaluation.run import frozen_layers_text
from mtbert.losses.bregman import BregmanConfig
from mtbert.losses.simcse import SimCseConfig
from mtbert.losses.smart import SmartConfig
from mtbert.model.heads import HeadConfig
from mtbert.model.lora import LoraConfig
from mtbert.model.pals import PalConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.optim.unfreezing import UnfreezingConfig
from mtbert.tasks.config import TaskConfig

LAST_TWO: dict[str, dict[str, Any]] = {
    "full": {"trained_layers": 2},
    "bitfit": {"trained_layers": 2},
    "lora": {"lora": LoraConfig(rank=2, layers=[2, 3], dropout=0.1)},
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers."""
    return write_tiny_bert(tmp_path_factory.mktemp("four-layers"), layers=4)


def build(
    bert: Path,
    cache: Path,
    use: Any = "auto",
    *,
    mode: str = "full",
    pair: Any = "cross-encoder",
    dtype: torch.dtype = torch.float32,
    frozen_dropout: bool = False,
    rows: int = 30,
    most_gib: float = 1.0,
    model: dict[str, Any] | None = None,
    **changes: Any,
) -> Assembly:
    single = HeadConfig(dropout=0.2, pooling="mean")
    heads = {
        "sst": single,
        "para": dataclasses.replace(single, pair=pair),
        "sts": dataclasses.replace(single, pair=pair, pooling="cls"),
    }
    tasks = {name: TaskConfig(batch_size=9, max_length=64, head=head) for name, head in heads.items()}
    config = tiny_config(bert, cache, mode=mode, task=tasks, max_tokens=1024, **changes)
    settings = {"frozen_dropout": frozen_dropout} | (LAST_TWO[mode] if model is None else model)
    config.model = dataclasses.replace(config.model, **settings)
    config.frozen_cache = FrozenCacheConfig(use, most_gib)
    return assemble(config, dtype=dtype, rows=rows)


def trained(assembly: Assembly, step: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The losses and the gradients of a step."""
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    result = assembly.step.accumulate(plan, step)
    gradients = {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}
    return result.losses | result.objectives | {"norm": result.grad_norm}, gradients


def assert_same(cached: Assembly, plain: Assembly) -> None:
    assert isinstance(cached.forward, PrefixForward)
    assert cached.forward.serves
    assert not isinstance(plain.forward, PrefixForward)
    losses, gradients = trained(cached)
    expected, wanted = trained(plain)
    assert losses.keys() == expected.keys()
    assert gradients.keys() == wanted.keys()
    assert any(g.abs().max() > 0 for n, g in wanted.items() if n.startswith("encoder."))
    for found, known in ((losses, expected), (gradients, wanted)):
        for name, value in known.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("mode", "pair", "dtype"),
    [
        ("full", "cross-encoder", torch.float32),
        ("full", ["concat", "difference"], torch.float64),
        ("bitfit", ["concat", "difference"], torch.float32),
        ("lora", ["concat", "difference"], torch.float32),
        ("lora", "cross-encoder", torch.float64),
    ],
)
def test_losses_and_gradients_are_those_of_computing_all_layers(
    bert: Path, tmp_path: Path, mode: str, pair: Any, dtype: torch.dtype
) -> None:
    """Dropout is on in the trained layers, the adapters and the heads."""
    kinds: dict[str, Any] = {"mode": mode, "pair": pair, "dtype": dtype}
    cached = build(bert, tmp_path, **kinds)
    assert_same(cached, build(bert, tmp_path, "never", **kinds))
    losses, _ = trained(cached, 3)
    others, _ = trained(cached, 4)
    assert not torch.equal(losses["sst"], others["sst"])  # something still drops
    data = cached.data["para"]["dev"]
    assert np.array_equal(
        infer(cached.forward, data, max_tokens=512),
        infer(PackedForward(cached.model, torch.device("cpu"), dtype), data, max_tokens=512),
    )


@pytest.mark.parametrize("gradients", ["one-pass", "per-task"])
def test_task_gradients_objectives_and_adapters_of_one_task_see_the_same(
    bert: Path, tmp_path: Path, gradients: Any
) -> None:
    """Surgery, SimCSE's two views of a row, Bregman's teacher, and layers that one task alone has."""
    settings: dict[str, Any] = {
        "surgery": SurgeryConfig("pcgrad", gradients=gradients),
        "simcse": SimCseConfig(["sts", "sst"]),
        "bregman": BregmanConfig(["sst"]),
        "pair": ["concat"],
        "model": {"trained_layers": 2, "pals": PalConfig(size=16, heads=1, layers=[2, 3])},
    }
    cached = build(bert, tmp_path, **settings)
    assert_same(cached, build(bert, tmp_path, "never", **settings))
    # A sentence of a pair and its two views are one row of one file.
    files = list((tmp_path / "frozen").glob("*.hidden"))
    assert len(files) < sum(1 for _ in cached.forward._kept)  # type: ignore[attr-defined]


def test_bf16_is_as_near_to_the_truth_as_computing_anew(bert: Path, tmp_path: Path) -> None:
    """Products in bf16 may round a row otherwise in a pass of another size."""
    assembly = build(bert, tmp_path, "never")
    model, data = assembly.model, assembly.data["para"]["train"]
    forward = PrefixForward(
        model, torch.device("cpu"), torch.bfloat16, tmp_path, FrozenCacheConfig(), max_tokens=1024
    )
    forward.keep([data])
    requests = [Request(data, np.array([7, 3, 7, 29]), 0, 1.0)]
    batch = pack(requests)
    found = forward.hidden_states(requests, batch.tokens)
    assert found is not None
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        anew = model.encoder(batch, dtype=torch.bfloat16, layers=2)
        exact = model.encoder(batch, dtype=torch.float32, layers=2)
    bound = 2 * (anew - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (found - exact).abs().max() <= bound


def test_what_the_frozen_layers_drop_is_a_choice_of_its_own(bert: Path, tmp_path: Path) -> None:
    """The cache never changes what is computed: it does not serve layers that drop."""
    drops = build(bert, tmp_path, frozen_dropout=True)
    assert not isinstance(drops.forward, PrefixForward)
    assert describe_frozen(drops.forward) == {"layers": 2, "drop": True, "cached": False}
    still = build(bert, tmp_path)
    assert describe_frozen(still.forward) == {"layers": 2, "drop": False, "cached": True}
    assert not torch.equal(trained(drops)[0]["sst"], trained(still)[0]["sst"])
    none = dataclasses.replace(drops.config.model.dropout, embedding=0.0, attention=0.0, hidden=0.0)
    dry = build(bert, tmp_path, frozen_dropout=True, model={"trained_layers": 2, "dropout": none})
    assert isinstance(dry.forward, PrefixForward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"frozen_dropout": True},
            "the first 2 layers are frozen but drop; possible: model.frozen_dropout false",
        ),
        ({"model": {}}, "mode full trains in the first layer or below it"),
        ({"model": {"trained_layers": 4}}, "trains in the first layer"),
        ({"mode": "lora", "model": {}}, "model.lora.layers"),
        # A layer beside the first for one task is trained, whatever the encoder's own layers are.
        ({"model": {"trained_layers": 2, "pals": PalConfig(size=16, heads=1)}}, "trains in the first layer"),
        ({"smart": SmartConfig(["sst"])}, "smart adds noise to the embeddings"),
    ],
)
def test_always_says_what_stands_against_it(
    bert: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"frozen_cache.use: always is not possible.*{message}"):
        build(bert, tmp_path, "always", **settings)
    assert not isinstance(build(bert, tmp_path, **settings).forward, PrefixForward)


def test_gradual_unfreezing_below_the_trained_layers_leaves_the_prefix(bert: Path, tmp_path: Path) -> None:
    from mtbert.optim.unfreezing import Unfreezing

    assembly = build(bert, tmp_path)
    unfreezing = Unfreezing(assembly.model, UnfreezingConfig(gradual=True, epochs_per_layer=1), 2.0)
    frozen = []
    for epoch in (0.0, 1.0):
        unfreezing.apply(epoch)
        frozen.append(assembly.model.encoder.lowest_trained_layer)
    assert frozen == [3, 2]
    assert_same(assembly, build(bert, tmp_path, "never"))
    with pytest.raises(ConfigError, match=r"layer 3, below 1 layers, would begin to train after 1\.5"):
        Unfreezing(assembly.model, UnfreezingConfig(gradual=True, epochs_per_layer=1.5), 1.2)


def test_the_encoder_refuses_hidden_states_that_are_not_the_batchs(bert: Path, tmp_path: Path) -> None:
    assembly = build(bert, tmp_path, "never")
    encoder, data = assembly.model.encoder, assembly.data["sst"]["train"]
    batch = pack([Request(data, np.arange(3), 0, 1.0)])
    hidden = encoder(batch, dtype=torch.float32, layers=2)
    whole = encoder(batch, dtype=torch.float32)
    assert torch.equal(encoder(batch, dtype=torch.float32, below=Computed(hidden, 2)), whole)
    for wrong in (hidden.double(), hidden[1:]):
        with pytest.raises(ValueError, match=r"the first layers gave torch\.float"):
            encoder(batch, dtype=torch.float32, below=Computed(wrong, 2))
    with pytest.raises(ValueError, match="noise is added to the embeddings"):
        encoder(batch, dtype=torch.float32, below=Computed(hidden, 2), noise=torch.zeros_like(hidden))


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"layers": 0, "drop": True, "cached": False}, None),
        ({"layers": 4, "drop": True, "cached": False}, "the embeddings and the first 4, with dropout"),
        ({"layers": 4, "drop": False, "cached": False}, "the embeddings and the first 4, without dropout"),
        ({"layers": 4, "drop": False, "cached": True}, "without dropout; their outputs are computed once"),
    ],
)
def test_log_and_report_say_what_is_frozen_and_whether_it_drops(
    facts: dict[str, Any], text: str | None
) -> None:
    found = frozen_layers_text(facts)
    assert found == text if found is None or text is None else text in found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tables whose frozen layers are computed."""
    found: list[str] = []
    before = PrefixForward._computed

    def computed(self: PrefixForward, data: Any) -> Any:
        found.append(data.name)
        return before(self, data)

    monkeypatch.setattr(PrefixForward, "_computed", computed)
    return found


def prepared(*args: Any, **settings: Any) -> Assembly:
    assembly = build(*args, **settings)
    assert isinstance(assembly.forward, PrefixForward)
    assembly.forward.open_files()
    return assembly


def test_files_are_reused_until_something_differs_that_they_depend_on(
    bert: Path, tmp_path: Path, passes: list[str]
) -> None:
    prepared(bert, tmp_path)
    assert sorted(passes) == ["para", "para", "sst", "sst", "sts", "sts"]  # train and dev
    # Another seed, mode and head read the same files; the trained layers' weights don't matter either.
    passes.clear()
    prepared(bert, tmp_path, seed=5)
    prepared(bert, tmp_path, mode="lora")
    assert not passes
    for settings in (
        {"dtype": torch.float64},
        {"pair": ["concat"]},
        {"model": {"trained_layers": 1}},
        {"model": {"trained_layers": 2, "attention_heads": 4}},
    ):
        passes.clear()
        prepared(bert, tmp_path, **settings)  # type: ignore[arg-type]
        assert "para" in passes, settings
    other = write_tiny_bert(tmp_path / "other", layers=4, seed=1)
    passes.clear()
    prepared(other, tmp_path)
    assert len(passes) == 6


def test_weights_that_are_loaded_later_are_noticed(bert: Path, tmp_path: Path, passes: list[str]) -> None:
    assembly, other = prepared(bert, tmp_path), build(bert, tmp_path, "never")
    same = {name: value.clone() for name, value in assembly.model.state_dict().items()}
    passes.clear()
    assembly.model.load_state_dict(same)
    assert_same(assembly, other)
    assert not passes
    with torch.no_grad():
        for model in (assembly.model, other.model):
            model.encoder.layers[1].output.weight.mul_(1.1)
    assert_same(assembly, other)
    assert len(passes) == 3


def test_a_thread_may_prepare_steps_while_another_evaluates(
    bert: Path, tmp_path: Path, passes: list[str]
) -> None:
    """None of the files is there yet: each is made once, and every pass has the outputs of its own rows."""
    assembly = build(bert, tmp_path)
    data = assembly.data["para"]["train"]
    requests = [[Request(data, batch, 0, 1.0)] for batch in np.array_split(np.arange(30), 5)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(assembly.forward.prepare, requests * 2))
    assert passes == ["para"]
    for ready, request in zip(found, requests * 2, strict=True):
        assert ready.batch is not None
        assert ready.batch.below is not None
        expected = assembly.forward.prepare(request).batch
        assert expected is not None
        assert expected.below is not None
        assert torch.equal(ready.batch.below.hidden, expected.below.hidden)


def test_a_table_that_is_not_kept_is_computed_whole(bert: Path, tmp_path: Path, passes: list[str]) -> None:
    assembly = prepared(bert, tmp_path)
    plain = PackedForward(assembly.model, torch.device("cpu"), torch.float32)
    fresh = build(bert, tmp_path, "never").data["sst"]["train"]
    passes.clear()
    found = infer(assembly.forward, fresh, max_tokens=512)
    assert np.array_equal(found, infer(plain, fresh, max_tokens=512))
    assert not passes


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, other: b"",
        lambda content, other: content[:50],
        lambda content, other: content[:-1],
        lambda content, other: b"x" * len(content),
        lambda content, other: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content, other: content[:50] + bytes([content[50] ^ 1]) + content[51:],
        lambda content, other: other,
    ],
    ids=["empty", "header cut", "cut", "garbage", "bit of the states", "bit of the header", "another's"],
)
def test_damaged_files_are_recognised(
    tmp_path: Path, damage: Callable[[bytes, bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    keys = [StatesKey(bytes([number]) * 32, 10, 8, torch.float32) for number in range(2)]
    folder = StatesFolder(tmp_path)
    for key in keys:
        folder.store(key, [torch.randn(10, 8)])
    path, other = (tmp_path / f"{key.digest.hex()}.hidden" for key in keys)
    content = path.read_bytes()
    path.write_bytes(damage(content, other.read_bytes()))
    assert folder.load(keys[0], warn=True) is None
    assert str(path) in caplog.text
    assert "computed again" in caplog.text
    path.write_bytes(content)
    assert folder.load(keys[0], warn=True) is not None


def test_a_damaged_file_is_made_again(bert: Path, tmp_path: Path, passes: list[str]) -> None:
    prepared(bert, tmp_path)
    path = sorted((tmp_path / "frozen").glob("*.hidden"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    passes.clear()
    prepared(bert, tmp_path)
    assert len(passes) == 1
    assert path.read_bytes() == content


def test_the_need_is_said_before_and_refused_above_the_limit(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtbert")
    assembly = build(bert, tmp_path)
    distinct = {}
    for splits in assembly.data.values():
        for data in (splits["train"], splits["dev"]):
            apart, _ = distinct_rows(data)
            distinct[data] = int(apart.lengths.sum())
    need = sum(distinct.values()) * 32 * 4
    assert (
        f"the outputs of 2 frozen layers for {sum(distinct.values()):,} tokens take {need:,} bytes"
        in caplog.text
    )
    assert not list(tmp_path.glob("frozen/*.hidden"))
    with pytest.raises(
        ConfigError, match=rf"frozen_cache.most_gib: .* {need:,} bytes .*the limit is 1e-05 GiB"
    ):
        build(bert, tmp_path, "always", most_gib=1e-5)
    small = build(bert, tmp_path, most_gib=1e-5)
    assert isinstance(small.forward, PrefixForward)
    assert not small.forward.serves
    assert "every step computes all layers" in caplog.text
    plain = build(bert, tmp_path, "never")
    assert torch.equal(trained(small)[0]["norm"], trained(plain)[0]["norm"])
    assert not list(tmp_path.glob("frozen/*.hidden"))


def test_a_full_disk_is_said_with_the_bytes_needed(
    bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", size="200k") as disk:
        kept = build(bert, disk, "always")
        with pytest.raises(UserError, match=r"No space left on device; [\d,]+ bytes are needed.*use never"):
            trained(kept)
        assert not list((disk / "frozen").glob("*.partial"))
        auto = build(bert, disk)
        losses, gradients = trained(auto)
        assert "No space left on device" in caplog.text
        assert not auto.forward.serves  # type: ignore[attr-defined]
        expected, wanted = trained(build(bert, tmp_path, "never"))
        assert all(torch.equal(losses[name], value) for name, value in expected.items())
        assert all(torch.equal(gradients[name], value) for name, value in wanted.items())


def test_old_files_and_unfinished_ones_make_room(tmp_path: Path) -> None:
    folder = StatesFolder(tmp_path)
    keys = [StatesKey(bytes([number]) * 32, 10, 8, torch.float32) for number in range(4)]
    states = [torch.randn(10, 8) for _ in keys]
    (tmp_path / "killed.partial").write_bytes(b"1234")
    for age, (key, state) in enumerate(zip(keys, states, strict=True)):
        folder.store(key, iter(state.split(3)))
        path = tmp_path / f"{key.digest.hex()}.hidden"
        os.utime(path, (time.time() - 100 + age, time.time() - 100 + age))
    folder.load(keys[0], warn=True)  # now the one that was used last
    folder.make_room([keys[1]], most=3 * (320 + 128))
    left = [folder.load(key, warn=True) is not None for key in keys]
    assert left == [True, True, False, True]
    assert not (tmp_path / "killed.partial").exists()
    found = folder.load(keys[3], warn=True)
    assert found is not None
    assert found.tobytes() == states[3].numpy().tobytes()


def test_a_wrong_number_of_states_leaves_no_file(tmp_path: Path) -> None:
    key = StatesKey(b"k" * 32, 10, 8, torch.float32)
    with pytest.raises(ValueError, match="hidden states of 288 bytes, expected 320"):
        StatesFolder(tmp_path).store(key, iter([torch.zeros(9, 8)]))
    assert not list(tmp_path.iterdir())


WRITER = """
import sys, torch, time
from pathlib import Path
from mtbert.engine.hidden_states import StatesFolder, StatesKey
folder, key = StatesFolder(Path(sys.argv[1])), StatesKey(b"k" * 32, 1000, 64, torch.float32)
def parts():
    yield torch.ones(100, 64)
    print("computing", flush=True)
    time.sleep(60)
with folder.lock():
    folder.store(key, parts())
"""


def test_a_process_waits_for_another_and_a_killed_one_leaves_nothing_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mtbert")
    key = StatesKey(b"k" * 32, 1000, 64, torch.float32)
    folder, states = StatesFolder(tmp_path), torch.randn(1000, 64)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"computing\n"
        assert folder.load(key, warn=True) is None  # what is half written is not there
        assert list(tmp_path.glob("*.partial"))
        threading.Timer(0.2, other.kill).start()
        with folder.lock():
            assert f"waiting for process {other.pid}" in caplog.text
            assert folder.load(key, warn=True) is None
            folder.make_room([key], 1e9)
            folder.store(key, [states])
    found = folder.load(key, warn=True)
    assert found is not None
    assert found.tobytes() == states.numpy().tobytes()
    assert not list(tmp_path.glob("*.partial"))
