"""The reader against arbitrary texts, written by Python's csv module, and against arbitrary bytes."""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mtbert.data.tables import ClassLabels, TableLayout, read_table
from mtbert.errors import DataError

LAYOUT = TableLayout(("sentence1", "sentence2"), "label", ClassLabels(3))
COLUMNS = ["", "id", "sentence1", "sentence2", "label"]

# Few tabs beside line ends: a text with whole table rows in it is taken for a quote that was not closed.
text = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\t") | st.sampled_from("\"'\n\r ,;é<"), max_size=30
)
tabbed = st.builds(
    "\t".join, st.lists(text.filter(lambda t: not set(t) & set("\n\r")), min_size=1, max_size=3)
)
cell = text | tabbed


def read_bytes(content: bytes, split: str = "train"):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        path.write_bytes(content)
        return read_table(path, "task", split, LAYOUT)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(cell, cell, st.integers(0, 2)), min_size=1, max_size=8), st.booleans(), st.booleans()
)
def test_round_trip(rows: list[tuple[str, str, int]], mark: bool, quote_all: bool) -> None:
    file = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    writer = csv.writer(file, delimiter="\t", quoting=quoting)
    writer.writerow(COLUMNS)
    lines = []
    # Two good rows stand for every one, so that empty texts never are the majority.
    for number, (first, second, label) in enumerate(rows):
        for texts in ((first, second), ("good", "good"), ("good", "good")):
            lines.append(len(io.StringIO(file.getvalue(), newline="").readlines()) + 1)
            writer.writerow([number, f"id{len(lines)}", *texts, label])
    table = read_bytes((b"\xef\xbb\xbf" if mark else b"") + file.getvalue().encode())

    expected = []
    for number, (first, second, label) in enumerate(rows):
        for k, texts in enumerate(((first.strip(), second.strip()), ("good", "good"), ("good", "good"))):
            if all(texts):
                place = 3 * number + k
                expected.append((f"id{place + 1}", texts, label, lines[place]))
    assert table.labels is not None
    assert list(zip(table.ids, table.texts, table.labels.tolist(), table.lines, strict=True)) == expected
    assert len(table) + len(table.problems) == 3 * len(rows)
    assert sorted([*table.lines, *(problem.line for problem in table.problems)]) == lines


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200) | st.text(st.sampled_from('\t\t\n\r"a1. ,é\ufeff'), max_size=120).map(str.encode),
    st.booleans(),
    st.sampled_from(["train", "test"]),
)
def test_garbage_raises_nothing_but_data_errors(content: bytes, with_header: bool, split: str) -> None:
    header = b"\tid\tsentence1\tsentence2\tlabel\n" if with_header else b""
    try:
        table = read_bytes(header + content, split)
    except DataError:
        return
    assert len(table) >= max(1, len(table.problems))
    assert len(table.ids) == len(table.texts) == len(table.lines)
    assert all(len(texts) == 2 and all(texts) for texts in table.texts)
