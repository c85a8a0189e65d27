"""Models in Python: the same numbers as training's own, whatever comes in, and nothing of the process changed."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.inference import options
from support.naive_bert import _row

import mtbert
from mtbert import api, evaluate, predict, train
from mtbert.api import Model
from mtbert.data.sample import synthetic_tables
from mtbert.data.tables import Table
from mtbert.engine import predictor
from mtbert.errors import ConfigError, DataError, NonFiniteError, UserError
from mtbert.kernels import dispatch

TASKS = ("sst", "para", "sts")


def dev(task: str) -> Table:
    return synthetic_tables(task)["dev"]


def examples(task: str, count: int | None = None) -> list[Any]:
    return [texts if len(texts) == 2 else texts[0] for texts in dev(task).texts[:count]]


def recorded(run: Path, task: str) -> list[dict[str, Any]]:
    """What training's own evaluation has written."""
    lines = (run / "predictions" / f"{task}-dev.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_those_of_the_training(run: Path, model: Model, task: str) -> None:
    lines = recorded(run, task)
    outputs = model.outputs(task, examples(task))
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, [line["outputs"] for line in lines], rtol=2e-5, atol=2e-5)
    predictions = model.predict(task, examples(task))
    np.testing.assert_allclose(predictions, [line["prediction"] for line in lines], rtol=2e-5, atol=2e-5)
    assert predictions.dtype == (np.float32 if task == "sts" else np.int64)
    if task != "sts":
        chances = model.probabilities(task, examples(task))
        np.testing.assert_allclose(chances.sum(axis=1), 1.0)
        assert (chances.argmax(axis=1) == predictions).all()
    answer = next(model.answers(task, examples(task)))
    assert answer.text == dev(task).texts[0]
    assert answer.prediction == pytest.approx(predictions[0])
    assert answer.name == (model.class_names(task)[predictions[0]] if task != "sts" else None)


@pytest.mark.parametrize("task", TASKS)
def test_order_repeats_and_chunks_change_nothing(
    model: Model, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = examples(task, 12)
    expected = model.outputs(task, given)
    order = np.random.default_rng(0).integers(0, len(given), 40)
    shuffled = [given[place] for place in order]
    monkeypatch.setattr(api, "CHUNK", 7)
    model._predictor.max_tokens = 16  # an example that has more is a pass by itself
    for form in (shuffled, (each for each in shuffled), np.array(shuffled), tuple(shuffled)):
        np.testing.assert_allclose(model.outputs(task, form), expected[order], rtol=2e-5, atol=2e-5)
    assert [a.text for a in model.answers(task, shuffled)] == [dev(task).texts[place] for place in order]


def test_a_stream_is_read_only_as_far_as_its_answers_are_asked_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "CHUNK", 8)
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for read in itertools.count(1):
            yield f"sentence {read}"

    assert len(list(itertools.islice(model.answers("sst", endless()), 10))) == 10
    assert read == 16
    assert next(model.encode_blocks(endless())).shape == (8, 20)


def test_vectors_are_those_of_bert_written_out(tiny_bert: Path, run: Path, model: Model) -> None:
    """A bare encoder gives the mean of all tokens, a run the space of the task that compares rows."""
    sentences = ["a cat", "the dog is running fast .", "a cat", "boring story"]

    def rows(which: Model) -> torch.Tensor:
        encoder, tokeniser = which._predictor.model.encoder, which._predictor.tokeniser
        found = []
        for ids in tokeniser.encode(sentences):
            words = torch.tensor([tokeniser.cls_id, *ids, tokeniser.sep_id])
            found.append(_row(encoder, words, torch.zeros_like(words), "", 2, None).mean(dim=0))
        return torch.stack(found)

    bare = mtbert.load(tiny_bert, precision="float32")
    assert not bare.tasks
    np.testing.assert_allclose(bare.encode(sentences), rows(bare), rtol=1e-4, atol=1e-5)
    mean = model.encode(sentences, task="sts", pooling="mean")
    np.testing.assert_allclose(mean, rows(model).detach(), rtol=1e-4, atol=1e-5)
    head = model._predictor.model.head("sts")
    tower = head.activation(head.towers[0](torch.from_numpy(mean))).numpy()
    np.testing.assert_allclose(model.encode(sentences), tower, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.encode(sentences), model.encode(sentences, task="sts"))
    unit = model.encode(sentences, normalise=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, rtol=1e-6)
    similar = model.similarity(sentences, model.encode(sentences[:2]))
    np.testing.assert_allclose(similar, unit @ unit[:2].T, atol=1e-5)
    assert similar.shape == (4, 2)
    assert model.encode([]).shape == (0, 20)
    assert model.predict("sts", []).shape == (0,)
    assert list(model.answers("para", [])) == []


def test_a_folder_may_say_that_its_first_token_is_the_vector(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    found = mtbert.load(folder, precision="float32").encode(["a cat"])
    plain = mtbert.load(tiny_bert, precision="float32")
    np.testing.assert_array_equal(found, plain.encode(["a cat"], pooling="cls"))
    assert np.abs(found - plain.encode(["a cat"])).max() > 0.01
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.warns(UserWarning, match="encode leaves out max_tokens, 2_Dense"):
        mtbert.load(folder)
    for text in ("[" * 100_000, "[1]"):
        (folder / "1_Pooling" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"1_Pooling/config\.json: "):
            mtbert.load(folder)


def test_pairs_of_a_few_sentences_read_each_sentence_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = predictor.pooled_rows
    monkeypatch.setattr(
        predictor, "pooled_rows", lambda f, data, **more: read.append(len(data)) or whole(f, data, **more)
    )
    sentences = examples("sst", 20)
    pairs = list(itertools.product(sentences, sentences))
    scores = model.predict("sts", pairs).reshape(20, 20)
    assert read == [20]
    np.testing.assert_array_equal(scores, scores.T)  # features without an order


def test_text_beyond_the_limit_is_cut_off_as_in_training(model: Model) -> None:
    long = ["the dog " * 40 + end for end in ("good", "bad")]
    outputs = model.outputs("sst", long)
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(model.outputs("sst", ["good", "bad"])[0] - outputs[0]).max() > 1e-4


@pytest.mark.parametrize(
    ("task", "given", "error", "message"),
    [
        ("sst", "one sentence", TypeError, "found one string: put it into a list"),
        ("sst", b"bytes", TypeError, "found a bytes"),
        ("sst", {"text": 1}, TypeError, "found a dict"),
        ("sst", None, TypeError, "found a NoneType"),
        ("sst", ["fine", None], TypeError, "example 1: expected text, found NoneType"),
        ("sst", ["fine", float("nan")], TypeError, "example 1: .* found float nan"),
        ("sst", [("a", "b")], TypeError, "example 0: task sst takes single sentences"),
        ("sst", ["fine", " \t"], DataError, "example 1: a text is empty"),
        ("sst", ["caf\udce9"], DataError, "not valid Unicode"),
        ("para", ["a", "b"], TypeError, "takes pairs of sentences"),
        ("para", [("a", "b"), ("a", "b", "c")], TypeError, "example 1: .* found 3 of them"),
        ("para", [("a", "")], DataError, "example 0: a text is empty"),
        ("cfimdb", ["a"], ConfigError, "trained on sst, para, sts, not on cfimdb"),
    ],
)
def test_what_is_no_example_is_refused(
    model: Model, task: str, given: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.predict(task, given)


def test_other_refusals(model: Model, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scores, not probabilities"):
        model.probabilities("sts", [("a", "b")])
    with pytest.raises(ConfigError, match="unknown pooling 'max'"):
        model.encode(["a"], pooling="max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no run's folder .*did you mean .*run\?"):
        mtbert.load(run.parent / "rum")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        mtbert.load(tmp_path)
    with pytest.raises(ConfigError, match=r"precision: expected auto, .*found 'float64'"):
        mtbert.load(run, precision="float64")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--json is for answers"):
        predict.main([str(run), "--json"])
    with pytest.raises(TypeError, match="found a ndarray"):
        model.predict("sst", np.array("one string"))
    with pytest.raises(ConfigError, match="resamples: expected at least 1"):
        model.evaluate("sst", ["a cat"], [1], resamples=0)
    with pytest.raises(TypeError, match="a table has its own"):
        model.evaluate("sst", dev("sst"), [1, 2])
    with pytest.raises(ConfigError, match="threads: expected at least 1"):
        mtbert.load(run, threads=0)
    with torch.no_grad():
        model._predictor.model.head("sst").output.bias[0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(NonFiniteError, match="the first is example 0"):
        model.predict("sst", ["a"])


def test_nothing_of_the_process_stays_changed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> tuple[object, ...]:
        handlers = [logging.getLogger(name).handlers[:] for name in ("", "mtbert")]
        products = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        return torch.get_num_threads(), dispatch._backend, products, torch.is_grad_enabled(), handlers

    seen: list[tuple[int, str | None]] = []
    whole = predictor.infer

    def infer(*given: Any, **more: Any) -> np.ndarray:
        seen.append((torch.get_num_threads(), dispatch._backend))
        return whole(*given, **more)

    monkeypatch.setattr(predictor, "infer", infer)
    generator = torch.get_rng_state()
    with dispatch.use_backend("reference"):
        before = settings()
        model = mtbert.load(run, threads=torch.get_num_threads() + 1)
        assert settings() == before
        with torch.autocast("cpu", torch.bfloat16):  # the host's own
            inside = model.outputs("sst", ["a good film"])
            assert torch.is_autocast_enabled("cpu")
        with pytest.raises(ConfigError):
            model.predict("cfimdb", ["a"])
        assert settings() == before
    assert seen == [(before[0] + 1, None)]  # type: ignore[operator]
    np.testing.assert_allclose(inside, mtbert.load(run).outputs("sst", ["a good film"]), rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), generator)
    check = (
        "import sys, mtbert; mtbert.load; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_threads_take_turns(model: Model) -> None:
    tasks = 4 * TASKS
    expected = {task: model.outputs(task, examples(task, 30)) for task in TASKS}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda task: model.outputs(task, examples(task, 30)), tasks))
    for task, outputs in zip(tasks, found, strict=True):
        np.testing.assert_array_equal(outputs, expected[task])


def test_a_task_with_adapters_of_its_own_must_be_named(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtbert.evaluation.report.write_plots", lambda *arguments: {})
    more = ["--mode=lora", "--model.lora.per_task=true", "--tasks=[sst,para]", "--curriculum.epoch_length=3"]
    train.main(options(tiny_bert, tmp_path, *more, "--optim.lr=0.05", f"--output={tmp_path / 'run'}"))
    model = mtbert.load(tmp_path / "run")
    with pytest.raises(ConfigError, match="say whose with task=: sst, para"):
        model.encode(["a good film"])
    vectors = [model.encode(["a good film"], task=task) for task in ("sst", "para")]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    np.testing.assert_allclose(
        model.outputs("sst", examples("sst")),
        [r["outputs"] for r in recorded(tmp_path / "run", "sst")],
        atol=2e-5,
    )


def test_a_table_of_ones_own(
    run: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commas, quotes and no ids: the command line and Python agree with each other and with training's table."""
    table = dev("para")
    file = tmp_path / "mine.csv"
    assert table.labels is not None
    lines = [f'"{a}","{b}, no less",{label}' for (a, b), label in zip(table.texts, table.labels, strict=True)]
    file.write_text("\n".join(["sentence1,sentence2,is_duplicate", *lines, "only one cell", ""]))
    evaluate.main([str(run), "--task=para", f"--file={file}", f"--json={tmp_path / 'scores.json'}"])
    captured = capsys.readouterr()
    assert f"left out: {file}, line {len(lines) + 2}: found 1 cells" in captured.err
    assert "With their sentences swapped" in captured.out
    written = json.loads((tmp_path / "scores.json").read_text())
    pairs = [(a, f"{b}, no less") for a, b in table.texts]
    found = model.evaluate("para", pairs, table.labels)
    assert written["left_out"] == 1
    assert written["tasks"]["para"]["accuracy"] == found.scores.accuracy
    assert found.calibration is not None
    assert written["tasks"]["para"]["calibration"]["whole"]["ece"] == pytest.approx(
        found.calibration.whole.ece
    )
    assert found.scores.accuracy == np.mean(model.predict("para", pairs) == table.labels)
    predict.main([str(run), "--task=para", f"--file={file}", "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["id"] for a in answers] == [str(line) for line in range(2, len(lines) + 2)]
    assert [a["prediction"] for a in answers] == model.predict("para", pairs).tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence,label\nfine,1\n", "no column 'sentiment'.*found 'sentence', 'label'"),
        ("sentence,sentiment\nfine,9\n", "sentiment is '9', expected a whole number from 0 to 4"),
        ("sentence;sentiment\nfine;1\n", "separated by semicolons"),
        ("sentence\tsentiment\n", "no row after the header"),
        ("", "the file is empty"),
        ("x" * 200_000, "field larger than field limit"),
    ],
)
def test_unusable_tables_of_ones_own(run: Path, tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        evaluate.main([str(run), "--task=sst", f"--file={file}"])


def test_labels_that_do_not_fit_are_refused(model: Model) -> None:
    with pytest.raises(DataError, match="2 examples need as many labels"):
        model.evaluate("sst", ["a", "b"], [1])
    with pytest.raises(DataError, match="label 1 of task sst is 5, expected a whole number from 0 to 4"):
        model.evaluate("sst", ["a", "b"], [1, 5])
    with pytest.raises(DataError, match="label 0 of task sts is nan"):
        model.evaluate("sts", [("a", "b")], [float("nan")])


def test_a_run_keeps_what_swapped_pairs_show(run: Path, model: Model) -> None:
    """Features without an order: exactly nothing. A row that holds both sentences: something."""
    swaps = json.loads((run / "swapped-pairs.json").read_text())
    assert set(swaps) == {"para", "sts"}
    assert swaps["sts"]["largest_difference"] == 0.0
    assert swaps["sts"]["pairs"] == swaps["sts"]["of"] == len(dev("sts"))
    assert swaps["para"]["largest_difference"] > 0.0
    swapped = [(b, a) for a, b in examples("para")]
    changed = int((model.predict("para", examples("para")) != model.predict("para", swapped)).sum())
    assert swaps["para"]["changed"] == changed
    report = (run / "report.md").read_text()
    assert "nothing changes: the outputs of 200 pairs are exactly the same" in report
    assert "### Calibration" in report
