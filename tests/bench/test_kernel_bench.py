"""The kernel bench: lengths, byte counts, peers that compute the same, goals, and a run at a tiny size."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

from bench import gpu
from bench.kernels import bytes as kernel_bytes
from bench.kernels.calls import OPERATIONS, Setting, linear_bias_gelu
from bench.kernels.comparisons import AIMS, COPY, OWN, Plan, compare, compare_layer
from bench.kernels.peers import PEERS, Parts, _nested, _padded, _padded_first_tokens
from bench.kernels.shapes import BERT_BASE, MINILM, REVIEWS, SENTENCES, Encoder, draw_lengths
from bench.kernels.timing import Stopwatch, fastest_product, timed_side
from bench.measure import Alternation
from bench.workload import MIX, _rows
from mtbert.data.dataset import TaskData
from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.engine.build import form_of
from mtbert.engine.flops import EncoderSizes, training_flops
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.loading import load_tables
from mtbert.tasks.registry import get_task

CPU = torch.device("cpu")
SMALL = Encoder("small", 32, 2, 48, vocabulary=40, positions=32)
SETTING = Setting(SMALL, (5, 1, 9), 16, torch.float32, p=0.0)


@pytest.mark.parametrize("distribution", [SENTENCES, REVIEWS])
def test_lengths_are_drawn_from_the_distribution(distribution: tuple[int, ...]) -> None:
    lengths = draw_lengths(distribution, 500_000)
    assert lengths.sum() == 500_000
    assert lengths.min() >= 1
    assert lengths.max() <= distribution[-1]
    expected = (np.sum(distribution) - (distribution[0] + distribution[-1]) / 2) / (len(distribution) - 1)
    assert np.mean(lengths) == pytest.approx(expected, rel=0.05)
    assert np.median(lengths) == pytest.approx(distribution[len(distribution) // 2], rel=0.1)
    assert np.array_equal(lengths, draw_lengths(distribution, 500_000))
    assert draw_lengths(distribution, 3).tolist() == [3]


def test_the_distributions_are_those_of_the_tables(shared_data: Path, minilm: Path) -> None:
    tokeniser = Tokeniser.from_folder(minilm)
    generator = np.random.default_rng(0)
    tasks = {name: get_task(name) for name in (*MIX, "cfimdb")}
    tables = load_tables(str(shared_data), list(tasks.values()))

    def quantiles(names: dict[str, int], longest: int, each: int) -> np.ndarray:
        drawn = []
        for name, share in names.items():
            table, config = tables[name]["train"], TaskConfig(max_length=longest)
            rows = tokenise(_rows(table, generator.permutation(len(table))[:each], 1), tokeniser)
            data = TaskData(name, rows, form=form_of(tasks[name], config), max_length=longest)
            even = np.quantile(data.lengths, (np.arange(each) + 0.5) / each, method="nearest")
            drawn.append(np.repeat(even, share))
        return np.quantile(np.concatenate(drawn), np.linspace(0, 1, len(SENTENCES)), method="nearest")

    inner = slice(1, -1)  # the extremes are a matter of luck
    found = quantiles(MIX, 128, 1500)
    np.testing.assert_allclose(found[inner], SENTENCES[inner], rtol=0.1, atol=1)
    found = quantiles({"cfimdb": 1}, 512, 500)
    np.testing.assert_allclose(found[inner], REVIEWS[inner], rtol=0.15)


def test_least_bytes_and_flops_by_hand() -> None:
    encoder = Encoder("hand", width=8, heads=2, inner=16, vocabulary=10, positions=6)
    s = Setting(encoder, (3, 2), 16, torch.bfloat16, p=0.1)  # T = 5, sum of squares 13, 2 bytes an element
    x, wide, row = 5 * 8 * 2, 5 * 16 * 2, 8 * 4

    cost = kernel_bytes.least("attention", s)
    assert cost.forward_bytes == 4 * x + 4 * 5 + 4 * 3
    assert cost.backward_bytes == 7 * x + 4 * 5 + 4 * 3
    products = training_flops(EncoderSizes(1, 8, 16), np.array([3, 2]), "full") - 3 * 2 * 5 * (4 * 64 + 256)
    assert cost.flops == products + 2 * 5 * 13 * 2

    cost = kernel_bytes.least("add_layer_norm", s)
    assert cost.forward_bytes == 3 * x + 5 * 4 + 3 * row
    assert cost.backward_bytes == 5 * x + 5 * 4 + 2 * row + 3 * row
    assert (
        kernel_bytes.least("add_layer_norm", replace(s, trained=False)).backward_bytes == 5 * x + 20 + 2 * row
    )
    assert kernel_bytes.least("add_layer_norm", replace(s, groups=4)).backward_bytes == 5 * x + 20 + 14 * row
    assert kernel_bytes.least("add_layer_norm", replace(s, p=0.0)).bytes == 7 * x + 8 * row

    cost = kernel_bytes.least("bias_gelu", s)
    assert cost.bytes == 5 * wide + 3 * 16 * 4

    cost = kernel_bytes.least("embedding", s, words=4)
    read = (4 + 3 + 2 + 2) * row + 5 * (12 + 4)
    assert cost.forward_bytes == read + x
    assert cost.backward_bytes == read + x + (10 + 6 + 2 + 2) * row
    slots = kernel_bytes.least("embedding", replace(s, groups=2, slots=True), words=4)
    assert slots.backward_bytes == read + x + 2 * (4 + 6 + 2 + 2) * row

    cost = kernel_bytes.least("first_token_attention", s)  # of two rows
    assert cost.forward_bytes == (2 * 2 + 2 * 5) * 8 * 2 + 2 * 4 + 3 * 4
    assert cost.backward_bytes == (3 * 2 + 4 * 5) * 8 * 2 + 2 * 4 + 3 * 4
    assert cost.forward_flops == 2 * 2 * 5 * 8 + 5 * 5 * 2
    assert cost.backward_flops == 2 * 4 * 5 * 8 + 5 * 5 * 2

    cost = kernel_bytes.least("softmax", s)
    assert cost.forward_bytes == (13 * 2 + 5 * 2 * 16) * 2 + 5 * 2 * 8
    assert kernel_bytes.least("dropout", s).bytes == 4 * x + 2 * 5 * 4


@pytest.mark.parametrize("operation", ["add_layer_norm", "bias_gelu", "dropout"])
@pytest.mark.parametrize("groups", [0, 3])
def test_moved_bytes_are_those_of_the_tensors_that_the_launches_get(operation: str, groups: int) -> None:
    pytest.importorskip("triton")
    from bench.kernels.cases import launches_of
    from bench.kernels.traffic import moved, partial_sums

    setting = Setting(MINILM, (60, 5, 30) * 20, 64, groups=0 if operation == "dropout" else groups)
    launches = launches_of(operation, setting)
    given = [a for launch in launches for a in launch.arguments if isinstance(a, torch.Tensor)]
    bounds = sum(t.numel() * 4 for t in given if t.shape == (groups + 1,))
    counted = moved(operation, setting, partial_sums=partial_sums(launches)).bytes
    assert counted == sum(t.numel() * t.element_size() for t in given) - bounds
    assert counted >= kernel_bytes.least(operation, setting).bytes


def outputs(forward: Parts) -> list[torch.Tensor]:
    """The output and the gradients of a peer."""
    function, leaves, gradient = forward
    out = function()
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


@pytest.mark.parametrize(
    ("operation", "peer"),
    [
        (o, p.name)
        for o in PEERS
        for p in PEERS[o]
        if "cpu" in p.devices and o not in ("attention", "first_token_attention", "encoder_layer")
    ],
)
def test_a_peer_computes_the_same(operation: str, peer: str) -> None:
    call = {**OPERATIONS, "linear_bias_gelu": linear_bias_gelu}[operation](SETTING)
    (chosen,) = (p for p in PEERS[operation] if p.name == peer)
    own = outputs((call.forward, list(call.leaves), call.gradient))
    for mine, theirs in zip(own, outputs(chosen.build(call)), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-5)


def test_attention_of_first_tokens_in_padded_rows_computes_the_same() -> None:
    call = OPERATIONS["first_token_attention"](SETTING)
    inside = torch.arange(9)[None, :] < call.tensors["lengths"][:, None]
    out, dquery, dkey_value = outputs((call.forward, list(call.leaves), call.gradient))
    padded, query, *gradients = outputs(_padded_first_tokens(SDPBackend.MATH)(call))
    for found, expected in (
        (padded, out),
        (query, dquery),
        (torch.stack([g[inside] for g in gradients], 1), dkey_value),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_padded_and_nested_attention_compute_the_same() -> None:
    call = OPERATIONS["attention"](SETTING)
    inside = torch.arange(9)[None, :] < call.tensors["lengths"][:, None]
    out, dqkv = outputs((call.forward, list(call.leaves), call.gradient))
    padded, *gradients = outputs(_padded(SDPBackend.MATH)(call))
    torch.testing.assert_close(padded[inside], out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack([g[inside] for g in gradients], 1), dqkv, rtol=1e-4, atol=1e-5)
    nested, *gradients = outputs(_nested(SDPBackend.MATH)(call))
    torch.testing.assert_close(nested, out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(gradients, 1), dqkv, rtol=1e-4, atol=1e-5)


def test_every_goal_names_a_peer_that_there_is() -> None:
    for aim in AIMS:
        assert aim.to in (COPY, *(peer.name for peer in PEERS[aim.operation]))
    plan = Plan("add_layer_norm", BERT_BASE, "sentences", 32768, torch.device("cuda"), torch.bfloat16)
    assert {goal.to: goal.at_least for goal in plan.goals()} == {
        COPY: 0.85,
        "eager": 2.0,
        "torch.compile": None,
    }
    assert all(goal.at_least is None for goal in replace(plan, tokens=8192).goals())
    assert all(goal.at_least is None for goal in replace(plan, backward=False).goals())
    assert all(goal.at_least is None for goal in replace(plan, device=CPU).goals())
    assert all(goal.at_least is None for goal in replace(plan, encoder=MINILM).goals())
    assert all(goal.at_least is None for goal in plan.goals(unfair=[goal.to for goal in plan.goals()]))
    reviews = replace(plan, operation="attention", rows="reviews").goals()
    assert sum(goal.at_least == 1.0 for goal in reviews) == len(PEERS["attention"]) - 1  # all but a CPU's


@pytest.mark.parametrize("operation", [*OPERATIONS, "linear_bias_gelu", "encoder_layer"])
def test_a_comparison_at_a_tiny_size(operation: str) -> None:
    plan = Plan(operation, SMALL, "sentences", 24, CPU, torch.float32)
    rounds = 2

    def measure(alternation: Alternation) -> None:
        for _ in range(rounds):
            alternation.round()

    run = compare_layer if operation == "encoder_layer" else compare
    comparison = run(plan, Stopwatch(CPU, 1), measure)
    assert comparison.left_out == []
    cases = {case.name: case for case in comparison.cases}
    peers = {peer.name for peer in PEERS[operation] if "cpu" in peer.devices}
    assert set(cases) == {OWN, *peers, *([COPY] if operation in kernel_bytes.COSTS else [])}
    assert all(case.tokens_per_second.repeats == rounds for case in cases.values())
    own = cases[OWN]
    assert own.figures["microseconds"] > 0
    if COPY in cases:
        assert own.ratio.median > 0
        assert {outcome.goal.to for outcome in comparison.goals} == {COPY, *peers}
        # A copy's rate is that of the bytes which the operation cannot avoid.
        least = 1e3 * own.figures["gigabytes_per_second"] * own.figures["microseconds"]
        copied = 1e9 * cases[COPY].figures["gigabytes_per_second"] / cases[COPY].tokens_per_second.median
        assert copied == pytest.approx(least / 24, rel=0.5)
    if operation == "encoder_layer":
        assert own.limit_share is not None
        assert 0 < own.limit_share.median < 1.5


def test_a_stopwatch_moves_on_by_the_median_of_its_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 10.0, 15.0, 20.0, 22.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    stopwatch = Stopwatch(CPU, 3)
    assert stopwatch.measure(lambda: None) == 2.0
    assert stopwatch() == 2.0


def test_a_side_gives_the_rate_of_what_it_has_to_move() -> None:
    stopwatch = Stopwatch(CPU, 1)
    side = timed_side("one", lambda: None, stopwatch, 10.0, 1e6)
    alternation = Alternation([side], clock=stopwatch)
    alternation.round()
    seconds = side.figures["microseconds"] / 1e6
    assert alternation.rate("one").median == pytest.approx(10.0 / seconds)
    assert side.figures["gigabytes_per_second"] == pytest.approx(1e6 / seconds / 1e9)


def test_the_fastest_product_is_chosen() -> None:
    side = fastest_product("products", Stopwatch(CPU, 1), torch.float32, [(2, 2, 2), (256, 256, 256)])
    assert side.run(0) == 2.0 * 256**3


def test_the_bench_itself_runs_small(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/test_kernels.py", "-q", "-p", "no:cacheprovider"]
    chosen = ["--tokens", "64", "--repeats", "1", "-k", "bias_gelu and both", "--device", "cpu"]
    done = subprocess.run(
        [*command, *chosen, "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bias_gelu, bert-base, sentences, 64 tokens, forward and backward" in done.stdout
    assert list(tmp_path.iterdir()) == []  # a CPU's figures are not recorded


def test_the_script_for_a_gpu_says_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_script_for_a_gpu_goes_on_after_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parts(output: Path, cores: int, chosen: str) -> list[gpu.Part]:
        python = [sys.executable, "-c"]
        return [
            gpu.Part("good", [*python, "print('fine')"], 60),
            gpu.Part("bad", [*python, "raise SystemExit(3)"], 60),
            gpu.Part("told", [*python, "import os; print(os.environ['SAID'])"], 60, {"SAID": "of the part"}),
            gpu.Part("slow", [*python, "import time; time.sleep(60)"], 1),
            gpu.Part("absent", ["no-such-tool"], 60),
        ]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "parts", parts)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "good: ok" in said
    assert "fine" in said
    assert "bad: exit code 3" in said
    assert "of the part" in said
    assert "slow: stopped after 1 s" in said
    assert "absent: no-such-tool cannot be run: No such file" in said
    assert gpu.main(["--output", str(tmp_path), "--only", "good"]) == 0


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("kernels", ["doctor", "tests", "kernels", "report"]),
        ("lora", ["lora-tests", "lora-check", "lora", "lora-memcheck", "lora-racecheck"]),
        ("training", ["training", "speedrun"]),
    ],
)
def test_the_parts_of_the_script_are_there(chosen: str, names: list[str], tmp_path: Path) -> None:
    root = Path(gpu.__file__).resolve().parents[1]
    parts = gpu.parts(tmp_path, 4, chosen)
    assert [part.name for part in parts] == names
    assert sum(part.seconds for part in parts if part.name != "tests") < gpu.SECONDS < 600
    for part in parts:
        # Memcheck can see what lies beside a tensor only where every tensor has memory of its own.
        assert ("PYTORCH_NO_CUDA_MEMORY_CACHING" in part.environment) == ("memcheck" in part.command)
        for word in part.command[2:]:
            if word.startswith(("tests/", "bench/")):
                assert (root / word).exists()
            elif word.startswith(("bench.", "mtbert.")):
                assert importlib.util.find_spec(word) is not None


def test_minilm_is_minilm(minilm: Path) -> None:
    from mtbert.model.pretrained import load_config

    config = load_config(minilm)
    assert (MINILM.width, MINILM.heads, MINILM.inner) == (
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
    )
