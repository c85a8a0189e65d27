"""Small tables of three tasks, and the command line of `python -m mtbert.augment` against a server of this process."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from mtbert.augment import main

SUBJECTS = ("the story", "this film", "an old plot", "her first movie", "the whole cast", "a small drama")
VERBS = (
    "keeps its promise to",
    "wears down",
    "speaks warmly to",
    "never quite reaches",
    "delights",
    "puzzles",
)
OBJECTS = (
    "patient viewers",
    "the back row",
    "everyone in town",
    "fans of the book",
    "two lonely critics",
    "children",
)


def sentence(number: int) -> str:
    a, b, c = number % 6, number // 6 % 6, number // 36 % 6
    return f"In year {1900 + number} {SUBJECTS[a]} {VERBS[b]} {OBJECTS[c]} , as it does n't hurry ."


def write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["", "id", *columns])
        writer.writerows([number, *row] for number, row in enumerate(rows))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


CLASSES = (12, 6, 3, 8, 4)
"""Training rows of each class of SST; to even them out takes 27 more."""


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    labels = [label for label, count in enumerate(CLASSES) for _ in range(count)]
    columns = ["sentence", "sentiment"]
    write(folder / "ids-sst-train.csv", columns, [(f"t{n}", sentence(n), x) for n, x in enumerate(labels)])
    write(folder / "ids-sst-dev.csv", columns, [(f"d{n}", sentence(100 + n), n % 5) for n in range(10)])
    write(
        folder / "ids-sst-test-student.csv", ["sentence"], [(f"e{n}", sentence(150 + n)) for n in range(10)]
    )
    pair = ["sentence1", "sentence2"]
    for name, label, values in (
        ("quora", "is_duplicate", [1.0] * 4 + [0.0] * 10),
        ("sts", "similarity", [5.0, 4.8, 0.2, 2.4, 2.6, 2.4]),
    ):
        rows = [(f"{name}{n}", sentence(2 * n), sentence(2 * n + 1), x) for n, x in enumerate(values)]
        write(folder / f"{name}-train.csv", [*pair, label], rows)
        dev = [(f"d{n}", sentence(100 + 2 * n), sentence(101 + 2 * n), 1.0) for n in range(6)]
        write(folder / f"{name}-dev.csv", [*pair, label], dev)
    return folder


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


Augment = Callable[..., int]


@pytest.fixture
def augment(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Augment:
    """Without the drawing of plots, which takes longer than all else; `test_plot` draws."""

    def drawn(figure: Figure, path: Path) -> Path:
        path.write_bytes(b"")
        return path

    monkeypatch.setattr("mtbert.augmentation.record.added_labels", lambda *_: Figure())
    monkeypatch.setattr("mtbert.augmentation.record.save", drawn)

    def run(task: str, *options: str, url: str | None = None) -> int:
        """The exit code; the table is new.csv in the test's folder."""
        server = [f"--base-url={url}", "--backoff=0.01", "--timeout=5"] if url else []
        try:
            main([task, f"--data={tables}", f"--output={tmp_path / 'new.csv'}", *server, *options])
        except SystemExit as end:
            return int(str(end.code))
        return 0

    return run
