from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtbert.data.tables import (
    ClassLabels,
    ScoreLabels,
    Table,
    TableLayout,
    read_folder,
    read_table,
    write_table,
)
from mtbert.errors import DataError

SINGLE = TableLayout(("sentence",), "sentiment", ClassLabels(5))
PAIR = TableLayout(("sentence1", "sentence2"), "similarity", ScoreLabels(0.0, 5.0))
HEADER = "\tid\tsentence\tsentiment\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(content: str | bytes, name: str = "table.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_rows_by_header_name_stripped_and_with_their_lines(write) -> None:
    path = write(
        "0\t\tid\tsentence\tsentiment\n1\t7.0\ta1\t Good film \t4\n\n"
        '2\t8.0\tb2\t"say ""no""\n<br />"\t1.0\n3\t\tc\tx\t0\n'
    )
    table = read_table(path, "sst", "train", SINGLE)
    assert table.ids == ["a1", "b2", "c"]
    assert table.texts == [("Good film",), ('say "no"\n<br />',), ("x",)]
    assert table.lines == [2, 4, 6]
    assert table.labels is not None
    assert table.labels.dtype == np.int64
    assert table.labels.tolist() == [4, 1, 0]
    assert table.problems == []
    assert (table.task, table.split, table.path, len(table)) == ("sst", "train", path, 3)


def test_byte_order_mark_crlf_and_no_last_line_end(write) -> None:
    table = read_table(
        write(b"\xef\xbb\xbfid\tsentence\tsentiment\r\na\tcaf\xc3\xa9\t2\r\nb\tx\t3"), "sst", "dev", SINGLE
    )
    assert table.texts == [("café",), ("x",)]
    assert table.lines == [2, 3]


def test_scores_are_floats(write) -> None:
    path = write("id\tsentence1\tsentence2\tsimilarity\na\tx\ty\t0\nb\tx\ty\t4.25\n")
    table = read_table(path, "sts", "train", PAIR)
    assert table.labels is not None
    assert table.labels.dtype == np.float64
    assert table.labels.tolist() == [0.0, 4.25]
    assert table.texts[0] == ("x", "y")


def test_unlabelled_test_table(write) -> None:
    path = write("id\tsentence\na\tx\n")
    assert read_table(path, "sst", "test", SINGLE).labels is None
    with pytest.raises(DataError, match="no column 'sentiment'"):
        read_table(path, "sst", "dev", SINGLE)


def test_labelled_test_table_keeps_its_labels(write) -> None:
    table = read_table(write(HEADER + "0\ta\tx\t3\n"), "sst", "test", SINGLE)
    assert table.labels is not None
    assert table.labels.tolist() == [3]


def test_unusable_rows_are_problems_with_line_and_reason(write) -> None:
    good = "".join(f"0\tg{i}\tfine\t1\n" for i in range(9))
    bad = "0\ta\t  \t1\n0\tb\tx\t\n0\tc\tx\tmany\n0\td\tx\n0\te\tx\t1\t2\n0\t\t\tnan\n"
    path = write(HEADER + good + bad)
    table = read_table(path, "sst", "train", SINGLE)
    assert len(table) == 9
    assert [(p.line, p.reason) for p in table.problems] == [
        (11, "no sentence"),
        (12, "no sentiment"),
        (13, "sentiment is 'many', expected a whole number from 0 to 4"),
        (14, "found 3 cells, expected 4"),
        (15, "found 5 cells, expected 4"),
        (16, "no id, no sentence, no sentiment"),
    ]
    assert str(table.problems[0]) == f"{path}, line 11: no sentence"


@pytest.mark.parametrize("label", ["5", "-1", "2.5", "inf", "1e400", "-0.5"])
def test_label_out_of_range_names_everything(write, label: str) -> None:
    path = write(HEADER + f"0\ta\tx\t0\n0\tb\tx\t{label}\n")
    with pytest.raises(DataError) as caught:
        read_table(path, "sst", "train", SINGLE)
    assert str(caught.value) == f"{path}, line 3: sentiment is '{label}', expected a whole number from 0 to 4"


def test_score_out_of_range(write) -> None:
    path = write("id\tsentence1\tsentence2\tsimilarity\na\tx\ty\t5.1\n")
    with pytest.raises(DataError, match=r"line 2: similarity is '5.1', expected a number from 0 to 5"):
        read_table(path, "sts", "train", PAIR)


def test_duplicate_ids_are_kept_and_counted(write) -> None:
    table = read_table(write(HEADER + "0\ta\tx\t0\n0\ta\ty\t1\n0\tb\tz\t1\n"), "sst", "train", SINGLE)
    assert len(table) == 3
    assert table.duplicate_ids == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        (HEADER, "no row after the header"),
        ("\tid\ttext\tsentiment\n0\ta\tx\t1\n", "no column 'sentence'; found '', 'id', 'text', 'sentiment'"),
        ("id,sentence,sentiment\na,x,1\n", "separated by commas; expected tabs"),
        ("id;sentence;sentiment\na;x;1\n", "separated by semicolons; expected tabs"),
        ("id sentence sentiment\na x 1\n", "separated by spaces; expected tabs"),
        ("id\tsentence\tsentence\tsentiment\na\tx\ty\t1\n", "column 'sentence' occurs 2 times"),
        (HEADER.encode() + b"0\ta\tx\0y\t1\n", r"NUL byte at offset 28 \(line 2\)"),
        (HEADER.encode() + b"0\ta\tcaf\xe9\t1\n", r"byte 0xe9 at offset 30 \(line 2\) is not UTF-8"),
        (b"\xef\xbb\xbf" + HEADER.encode() + b"\xff", r"byte 0xff at offset 26 \(line 2\)"),
        (HEADER.encode("utf-16"), "looks like UTF-16"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "NUL byte"),
        (HEADER + "0\ta\tx\t1\n" + "0\tb\t\t1\n" * 2, "2 of 3 rows .* first: line 3: no sentence; line 4"),
        (HEADER + "0\ta\t" + "x" * 140_000 + "\t1\n", "line 2: field larger than field limit"),
        (HEADER + '0\ta\tx\t1\n0\tb\t"open\t1\n0\tc\tx\t1\n', "line 3: a double quote .* is never closed"),
        (HEADER + '0\ta\t"open\t1\n', "line 2: a double quote .* is never closed"),
        (HEADER + '0\ta\t"open\t1\n' + "0\tb\tx\t1\n" * 5 + '0\tc\t"x"\t1\n', "line 2: .* runs to line 8"),
        (HEADER + '0\ta\t"' + "line\n" * 60 + '"\t1\n', "line 2: .* runs to line 62"),
    ],
)  # fmt: skip
def test_broken_files_are_errors_that_name_the_file_and_the_place(
    write, content: str | bytes, message: str
) -> None:
    path = write(content)
    with pytest.raises(DataError, match=message) as caught:
        read_table(path, "sst", "train", SINGLE)
    assert str(caught.value).startswith(str(path))


def test_a_quote_that_joins_two_rows_is_a_problem(write) -> None:
    # Line 3 opens a quote that the field on line 4 closes, so that the reader sees one row with four cells.
    path = write(HEADER + '0\ta\tx\t1\n0\tb\t"It was\t1\n0\tc\t"fine" too\t2\n0\td\ty\t3\n')
    table = read_table(path, "sst", "train", SINGLE)
    assert table.ids == ["a", "d"]
    assert table.lines == [2, 5]
    assert [(p.line, p.reason) for p in table.problems] == [
        (
            3,
            "a quoted field that starts here holds 1 more line(s) that look like rows; "
            "is a quote not closed?",
        )
    ]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: no such file"):
        read_table(tmp_path / "nowhere.csv", "sst", "train", SINGLE)
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path, "sst", "train", SINGLE)
    with pytest.raises(DataError, match=r"no such folder; expected a folder with a\.csv"):
        read_folder(tmp_path / "none", "sst", SINGLE, {"train": "a.csv"})


def test_read_folder(write, tmp_path: Path) -> None:
    write(HEADER + "0\ta\tx\t1\n", "train.csv")
    files = {"train": "train.csv", "dev": "dev.csv", "test": "test.csv"}
    with pytest.raises(
        DataError, match=r"dev\.csv: no such file; task sst .* dev table\. Found in .*: train\.csv"
    ):
        read_folder(tmp_path, "sst", SINGLE, files)
    write(HEADER + "0\ta\tx\t1\n", "dev.csv")
    assert list(read_folder(tmp_path, "sst", SINGLE, files)) == ["train", "dev"]
    write("id\tsentence\na\tx\n", "test.csv")
    tables = read_folder(tmp_path, "sst", SINGLE, files)
    assert {split: table.split for split, table in tables.items()} == {s: s for s in files}
    assert tables["test"].labels is None


def test_write_table_is_read_back(tmp_path: Path) -> None:
    texts = [('a "quoted"\ttab', "line\nend"), ('"', "é — «x» a\rb")]
    table = Table("sts", "train", tmp_path / "t.csv", ["1", "2"], texts, np.array([0.1, 5.0]), [2, 4])
    write_table(table.path, table, PAIR)
    again = read_table(table.path, "sts", "train", PAIR)
    assert (again.ids, again.texts, again.lines) == (table.ids, table.texts, table.lines)
    np.testing.assert_array_equal(again.labels, table.labels)
