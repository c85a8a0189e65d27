"""Against a real HTTP server that misbehaves: what is asked, what is asked again, and what is never asked twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chat_server import Behaviour, Call, ChatServer, Send, answer

from mtbert.augmentation.client import ServerError
from mtbert.errors import ConfigError

from .conftest import Augment, read, sentence

WANTED = 27


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer().running() as running:
        yield running


def record(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "new.json").read_text())


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
@pytest.mark.parametrize("structured", ["auto", "never"])
def test_classes_become_even(
    server: ChatServer, augment: Augment, tables: Path, tmp_path: Path, stream: list[str], structured: str
) -> None:
    server.behaviour = lambda call: Send(answer(call), wait=0.02)
    assert augment("sst", "--equalise", f"--structured={structured}", *stream, url=server.url) == 0
    rows = read(tmp_path / "new.csv")
    assert Counter(row["sentiment"] for row in rows) == {"1": 6, "2": 9, "3": 4, "4": 8}
    train = {row["id"]: row for row in read(tables / "ids-sst-train.csv")}
    assert all(train[row["source"]]["sentiment"] == row["sentiment"] for row in rows)
    assert len(
        {row["sentence"] for row in rows} | {row["sentence"] for row in train.values()}
    ) == WANTED + len(train)
    assert len({row["id"] for row in rows} | set(train)) == WANTED + len(train)
    assert len(server.calls) == WANTED
    assert server.most_at_once > 1
    assert all(call.structured == (structured == "auto") for call in server.calls)
    assert (tmp_path / "new-labels.png").is_file()


def test_prompts_show_training_rows_of_every_class_alone(
    server: ChatServer, augment: Augment, tables: Path
) -> None:
    augment("sst", "--equalise", "--shots=2", url=server.url)
    train = {(row["sentence"], row["sentiment"]) for row in read(tables / "ids-sst-train.csv")}
    shown = [
        [tuple(line.split("\t")) for line in call.prompt.split("\n") if "\t" in line] for call in server.calls
    ]
    for lines in shown:
        *examples, rewritten = lines
        assert {label for _, label in examples} == set("01234")
        assert len(examples) == len(set(examples)) == 10
        assert set(lines) <= train
        assert rewritten not in examples
    assert len({tuple(lines[:-1]) for lines in shown}) > WANTED / 2, "examples change from request to request"
    held_out = [sentence(n) for n in (*range(100, 110), *range(150, 160))]
    assert not any(text in call.prompt for call in server.calls for text in held_out)


def test_the_same_command_makes_the_same_table_and_asks_nothing_again(
    server: ChatServer, augment: Augment, tmp_path: Path
) -> None:
    augment("sst", "--equalise", url=server.url)
    first, asked = (tmp_path / "new.csv").read_bytes(), len(server.calls)
    augment("sst", "--equalise", "--overwrite", url=server.url)
    assert (tmp_path / "new.csv").read_bytes() == first
    assert len(server.calls) == asked
    assert record(tmp_path)["requests"]["from_cache"] == asked
    (tmp_path / "new.answers.jsonl").unlink()
    augment("sst", "--equalise", "--overwrite", "--concurrency=1", url=server.url)
    assert (tmp_path / "new.csv").read_bytes() == first, "whoever answers first makes no difference"
    assert server.repeated == asked
    assert server.most_at_once <= 16


def every(number: int, what: Send, *, once: bool = True) -> Behaviour:
    """Every so many calls go wrong; a request that is sent again is answered."""
    return lambda call: what if call.number % number == 1 and not (once and call.repeats) else None


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "trouble",
    [
        Send(status=500),
        Send(status=503, headers={"retry-after": "0.05"}),
        Send(status=429, headers={"retry-after": "0.05"}),
        Send(text="half an answer", half=True),
        Send(text="dropped on its way to you", drop=True),
        Send(text="late", wait=1.2),
    ],
    ids=["500", "503", "429", "half", "dropped", "slow"],
)
def test_trouble_is_met_by_asking_again(
    server: ChatServer,
    augment: Augment,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trouble: Send,
    stream: list[str],
) -> None:
    server.behaviour = every(5, trouble)
    timeout = ["--timeout=0.6", "--concurrency=6"] if trouble.wait else []
    assert augment("sst", "--equalise", "--structured=always", *stream, *timeout, url=server.url) == 0
    assert len(read(tmp_path / "new.csv")) == WANTED
    assert len(server.calls) == WANTED + server.repeated
    assert capsys.readouterr().err.count("trying again") == 1, "said once"
    assert 3 <= server.repeated <= record(tmp_path)["requests"]["retries"]


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_a_server_may_send_anything(server: ChatServer, augment: Augment, stream: list[str]) -> None:
    bodies = [
        "", "null", "7", "[]", "{}", '"text"', "<html>", '{"choices": []}', '{"choices": [7]}', '{"choices": [{}]}',
        '{"choices": [{"message": {"content": ["a"]}, "delta": {"content": ["a"]}, "finish_reason": "stop"}]}',
        '{"choices": [{"message": {"content": {"a": 1}}, "delta": {"content": 7}, "finish_reason": "stop"}]}',
        '{"choices": {"a": 1}, "usage": 3}', '{"error": {"message": "no"}}', '{"error": 3}',
    ]  # fmt: skip
    server.behaviour = lambda call: Send(raw=bodies[call.number]) if call.number < len(bodies) else None
    options = ("--structured=always", "--concurrency=4", "--retries=20", "--backoff=0.001")
    assert augment("sst", "--equalise", *options, *stream, url=server.url) == 0
    assert len(server.calls) == WANTED + len(bodies)


def test_halves_of_characters_are_no_text(server: ChatServer, augment: Augment, tmp_path: Path) -> None:
    server.behaviour = lambda call: (
        answer(call, texts=[call.cells[0] + " \ud800 so there"]) if call.number < 3 else None
    )
    assert augment("sst", "--equalise", url=server.url) == 0
    assert record(tmp_path)["answers_not_used"] == {"control characters or several lines": 3}


def test_a_rate_limit_holds_back_all_requests(server: ChatServer, augment: Augment) -> None:
    times: list[float] = []

    def behaviour(call: Call) -> Send | None:
        times.append(time.monotonic())
        return Send(status=429, headers={"retry-after": "0.4"}) if call.number == 4 else None

    server.behaviour = behaviour
    assert augment("sst", "--equalise", "--structured=always", "--concurrency=2", url=server.url) == 0
    assert times[6] - times[4] > 0.35, "one other may have been under way"
    assert len(times) == WANTED + 1


def test_a_server_without_structured_output_is_asked_for_it_once(
    server: ChatServer, augment: Augment, tmp_path: Path
) -> None:
    server.behaviour = lambda call: (
        Send(status=400, message="response_format is unknown") if call.structured else None
    )
    assert augment("sst", "--equalise", url=server.url) == 0
    assert [call.structured for call in server.calls] == [True] + [False] * WANTED
    assert record(tmp_path)["structured_output"] is False
    assert augment("sst", "--equalise", "--overwrite", "--seed=1", url=server.url) == 0
    assert sum(call.structured for call in server.calls) == 1, "remembered beside the answers"


def test_bad_answers_are_counted_asked_again_and_missed(
    server: ChatServer, augment: Augment, tmp_path: Path
) -> None:
    """What the model does to a row depends on the row's year alone, so that it does it again and again."""
    tries: Counter[str] = Counter()

    def behaviour(call: Call) -> str | Send | None:
        text = call.cells[0]
        year = int(text.split()[2])
        tries[text] += 1
        if year % 10 == 8:
            return answer(call, label="0" if call.cells[1] != "0" else "1")
        if tries[text] > 1:  # the second answer is good
            return None
        return {
            0: answer(call, texts=[text.upper()]),
            1: answer(call, texts=[sentence(104)]),
            2: answer(call, texts=[sentence(2)]),
            3: Send(text='{"sentence": "cut', finish="length"),
            4: answer(call, texts=[text.replace(" ", "\n")]),
            5: "",
            6: "I'm sorry, but I can't help with that.",
            7: answer(call, texts=["Short ."]),
        }.get(year % 10)

    server.behaviour = behaviour
    assert augment("sst", "--equalise", "--attempts=2", url=server.url) == 3
    found = record(tmp_path)
    made, missing = found["rows"]["made"], found["rows"]["missing"]
    assert set(missing) == {"another label"}
    assert made + missing["another label"] == WANTED
    assert made == len(read(tmp_path / "new.csv")) < WANTED
    rejected = found["answers_not_used"]
    assert {
        "another label", "a copy of its original", "a sentence of dev or test", "an answer that was cut off",
        "control characters or several lines", "an empty answer", "the model declined", "too short",
    } <= set(rejected)  # fmt: skip
    assert rejected["another label"] == 2 * missing["another label"]
    assert len(server.calls) == made + sum(rejected.values())
    assert server.repeated == 0, "another attempt is another request"
    assert not {sentence(104), sentence(2)} & {row["sentence"] for row in read(tmp_path / "new.csv")}


def test_duplicates_among_new_rows_are_asked_for_anew(
    server: ChatServer, augment: Augment, tmp_path: Path
) -> None:
    first: set[str] = set()

    def behaviour(call: Call) -> str | None:
        with server.lock:
            if len(first) < 5:
                first.add(call.cells[0])
                return answer(
                    call, texts=["In year 1950 , all of them were told the very same story again ."]
                )
        return None

    server.behaviour = behaviour
    assert augment("sst", "--equalise", url=server.url) == 0
    assert record(tmp_path)["answers_not_used"] == {"a duplicate of another new row": 4}
    assert len({row["sentence"] for row in read(tmp_path / "new.csv")}) == WANTED


def test_pairs_keep_what_they_should(
    server: ChatServer, augment: Augment, tables: Path, tmp_path: Path
) -> None:
    assert augment("sts", "--equalise", "--rewrite=one", "--structured=never", url=server.url) == 0
    train = {row["id"]: row for row in read(tables / "sts-train.csv")}
    rows = read(tmp_path / "new.csv")
    kept = [[row[c] == train[row["source"]][c] for c in ("sentence1", "sentence2")] for row in rows]
    assert all(sum(pair) == 1 for pair in kept)
    assert len({tuple(pair) for pair in kept}) == 2, "sometimes the first, sometimes the second"
    assert all(row["similarity"] == train[row["source"]]["similarity"] for row in rows)
    assert augment("para", "--multiply=2", "--overwrite", "--stream", url=server.url) == 0
    rows, train = read(tmp_path / "new.csv"), {row["id"]: row for row in read(tables / "quora-train.csv")}
    assert Counter(row["source"] for row in rows) == dict.fromkeys(train, 1)
    assert not any(row[c] == train[row["source"]][c] for row in rows for c in ("sentence1", "sentence2"))


def test_cleaning_keeps_rows_ids_and_labels(
    server: ChatServer, augment: Augment, tables: Path, tmp_path: Path
) -> None:
    def behaviour(call: Call) -> str | None:
        year = int(call.cells[0].split()[2])
        if year % 3 == 0:
            return answer(call, texts=["Something else entirely , written by a model that was told not to ."])
        return answer(call, texts=call.cells[:-1]) if year % 3 == 1 else None

    server.behaviour = behaviour
    assert augment("sst", "--clean", "--attempts=1", url=server.url) == 0
    before, after = read(tables / "ids-sst-train.csv"), read(tmp_path / "new.csv")
    assert [(row["id"], row["sentiment"]) for row in after] == [
        (row["id"], row["sentiment"]) for row in before
    ]
    for old, new in zip(before, after, strict=True):
        repaired = int(old["sentence"].split()[2]) % 3 == 2
        text = old["sentence"].replace(" n't", "n't").replace(" .", ".").replace(" ,", ",")
        assert new["sentence"] == (text if repaired else old["sentence"])
        assert new["source"] == (old["id"] if repaired else "original")
    assert record(tmp_path)["answers_not_used"] == {"says something else": 11}
    assert not (tmp_path / "new-labels.png").exists()


def test_no_prompt_holds_a_sentence_of_dev(
    server: ChatServer, augment: Augment, tables: Path, tmp_path: Path
) -> None:
    """Not even one that is half of a training pair, or of a row to be repaired."""
    folder = tmp_path / "tables"
    shutil.copytree(tables, folder)
    with (folder / "sts-train.csv").open("a") as file:
        file.write(f"6\thalf\tWhat nobody else says here .\t{sentence(103).upper()}\t2.4\n")
    data = f"--data={folder}"
    assert augment("sts", "--multiply=2", data, url=server.url) == 0
    assert augment("sts", "--clean", "--overwrite", data, url=server.url) == 0
    assert server.calls
    assert not any("nobody else" in call.prompt for call in server.calls)
    rows = {row["id"]: row for row in read(tmp_path / "new.csv")}
    assert (rows["half"]["sentence2"], rows["half"]["source"]) == (sentence(103).upper(), "original")
    assert record(tmp_path)["rows"]["not_rewritten_because_in_dev_or_test"] == 1


def test_the_key_is_sent_and_seen_nowhere(
    server: ChatServer,
    augment: Augment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    augment("sst", "--equalise", "--limit=2", url=server.url)
    assert server.calls[0].headers["authorization"] == "Bearer none"
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    augment("sst", "--equalise", "--limit=4", "--overwrite", url=server.url)
    assert server.calls[-1].headers["authorization"] == f"Bearer {secret}"
    server.behaviour = lambda call: Send(status=401, message=f"Incorrect API key provided: {secret}")
    with pytest.raises(ServerError, match="OPENAI_API_KEY was not accepted") as error:
        augment("sst", "--equalise", "--overwrite", url=server.url)
    said = capsys.readouterr()
    written = [path.read_bytes().decode("utf-8", "replace") for path in tmp_path.iterdir()]
    assert not any(secret in text for text in (str(error.value), said.out, said.err, *written))
    for unusable in (f"{secret} 2", f"{secret}\u2019", f"{secret}\r\nx"):
        monkeypatch.setenv("OPENAI_API_KEY", unusable)
        with pytest.raises(ConfigError, match="OPENAI_API_KEY holds") as refused:
            augment("sst", "--equalise", "--overwrite", url=server.url)
        assert secret not in str(refused.value)
    assert str(tmp_path) not in (tmp_path / "new.json").read_text(), "a record holds no path of the machine"


def test_a_server_that_is_of_no_use_ends_the_job_with_what_is_kept(
    server: ChatServer, augment: Augment, tmp_path: Path
) -> None:
    server.behaviour = lambda call: Send(status=500) if call.number >= 10 else None
    options = ("--equalise", "--retries=1", "--concurrency=2", "--structured=always")
    with pytest.raises(
        ServerError, match=r"after 2 tries, for 3 requests in a row; 10 answers are kept in .*jsonl"
    ):
        augment("sst", *options, url=server.url)
    assert not (tmp_path / "new.csv").exists()
    server.behaviour = None
    before = len(server.calls)
    assert augment("sst", *options, url=server.url) == 0
    assert len(server.calls) - before == WANTED - 10
    for status, message, says in ((404, "no such model", "no such model"), (400, "too long", "too long")):
        server.behaviour = lambda call, s=status, m=message: Send(status=s, message=m)  # type: ignore[misc]
        with pytest.raises(ServerError, match=says):
            augment("sst", "--equalise", "--overwrite", f"--seed={status}", "--model=other", url=server.url)
    server.behaviour = lambda call: Send(status=429, headers={"retry-after": "7200"})
    with pytest.raises(ServerError, match="asks to wait 7,200 seconds"):
        augment("sst", "--equalise", "--overwrite", "--seed=5", url=server.url)


@pytest.mark.parametrize("which", [0, 5])
def test_one_request_that_fails_for_good_is_a_missing_row(
    server: ChatServer, augment: Augment, tmp_path: Path, which: int
) -> None:
    """Even the very first one, which is to find out about structured output."""
    poor: set[str] = set()

    def behaviour(call: Call) -> Send | None:
        poor.add(call.cells[0]) if call.number == which else None
        return Send(status=400, message="this prompt is too long") if call.cells[0] in poor else None

    server.behaviour = behaviour
    assert augment("sst", "--equalise", "--attempts=1", url=server.url) == 3
    assert set(record(tmp_path)["rows"]["missing"]) == {"the server refused the request"}


def test_nobody_listens(augment: Augment) -> None:
    with ChatServer().running() as gone:
        url = gone.url
    with pytest.raises(ServerError, match="no connection"):
        augment("sst", "--equalise", "--retries=1", url=url)
    with pytest.raises(ServerError, match="--model"):
        augment("sst", "--equalise", "--retries=0", "--structured=never", url=url)


def test_a_killed_job_goes_on_without_asking_twice(
    server: ChatServer, augment: Augment, tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL while answers come in; what the server had answered before is not asked again."""
    enough, go_on = threading.Event(), threading.Event()

    def behaviour(call: Call) -> None:
        if call.number >= 12:
            enough.set()
            go_on.wait(20)

    server.behaviour = behaviour
    command = [
        sys.executable, "-m", "mtbert.augment", "sst", "--equalise", f"--data={tables}", f"--base-url={server.url}",
        f"--output={tmp_path / 'new.csv'}", "--concurrency=3", "--model=fake-model",
    ]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert enough.wait(60)
        answers = tmp_path / "new.answers.jsonl"
        end = time.monotonic() + 20
        while answers.read_bytes().count(b'"key"') < 12:  # answered, and kept a moment later
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        go_on.set()
    server.behaviour = None
    assert not (tmp_path / "new.csv").exists()
    unanswered = [call for call in server.calls if call.number >= 12]
    assert 0 < len(unanswered) <= 3, "what was under way"
    with answers.open("ab") as file:
        file.write(b'{"key": "half a li')
    assert augment("sst", "--equalise", "--model=fake-model", url=server.url) == 0
    said = capsys.readouterr()
    assert "the last line is incomplete and is cut off" in said.err
    assert f"{WANTED - 12} asked for, 12 from {answers}" in said.out
    assert len(server.calls) == WANTED + len(unanswered)
    assert server.repeated <= len(unanswered), "only what had no answer is asked again"
    assert len(read(tmp_path / "new.csv")) == WANTED


def test_a_dry_run_asks_nothing(
    server: ChatServer, augment: Augment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    augment("sts", "--equalise", "--dry-run", url=server.url)
    assert "5 (they mean the same)" in capsys.readouterr().out
    assert not server.calls
    assert not list(tmp_path.iterdir())


def test_several_models(server: ChatServer, augment: Augment, monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(self: object) -> list[str]:
        return ["big", "small"]

    monkeypatch.setattr("mtbert.augmentation.client.ChatClient._models", two)
    with pytest.raises(ConfigError, match="2 models, name one of them: big, small"):
        augment("sst", "--equalise", url=server.url)
