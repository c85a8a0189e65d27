"""Task tables on disk: tab-separated text in the layout of the CS224N default project.

A table is UTF-8 (a byte order mark is tolerated), tab-separated, with one header line and CSV's default
quoting: a field that begins with a double quote ends at the next lone one and may hold tabs, line ends and
doubled quotes. Columns are read by their header names, so unnamed and additional columns do not matter.

Texts are stripped of white space at both ends and otherwise kept as they are: markup such as `<br />` or
`[math]` stays, because published models of these tasks were trained on it.

A row that cannot be used is never dropped silently: it is kept as a :class:`RowProblem` with its line and the
reason. What makes the whole file doubtful (a label out of range, a missing column, a quote that swallows
rows, more unusable rows than usable ones) is a :class:`~mtbert.errors.DataError`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mtbert.errors import DataError

LABELLED_SPLITS = ("train", "dev")
"""Splits that must have labels; the files of any other split may come without the label column."""

MAX_LINES_PER_FIELD = 50
MAX_SWALLOWED_ROWS = 2


@dataclass(frozen=True)
class ClassLabels:
    """Labels are the classes 0 to `count - 1`; integral decimals such as `1.0` are accepted."""

    count: int

    dtype = np.dtype(np.int64)

    def __str__(self) -> str:
        """What is expected, for messages."""
        return f"a whole number from 0 to {self.count - 1}"

    def allows(self, value: float) -> bool:
        """Whether `value` is one of the classes."""
        return 0 <= value < self.count and value == int(value)


@dataclass(frozen=True)
class ScoreLabels:
    """Labels are real scores from `low` to `high`, both included."""

    low: float
    high: float

    dtype = np.dtype(np.float64)

    def __str__(self) -> str:
        """What is expected, for messages."""
        return f"a number from {self.low:g} to {self.high:g}"

    def allows(self, value: float) -> bool:
        """Whether `value` lies in the range."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class TableLayout:
    """Which columns of a table hold the texts, the label and the id, and which labels there may be."""

    text_columns: tuple[str, ...]
    label_column: str
    labels: ClassLabels | ScoreLabels
    id_column: str = "id"


@dataclass(frozen=True)
class RowProblem:
    """A row that cannot be used: the physical line on which it starts, and why."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        """File, line and reason."""
        return f"{self.path}, line {self.line}: {self.reason}"


@dataclass(frozen=True)
class ExtraRows:
    """A further table whose rows joined a training table: its file, that file's sha256, and what became of its rows."""

    path: Path
    sha256: str
    rows: int
    left_out: int
    labels: np.ndarray
    """Of the rows that joined."""


@dataclass(frozen=True, eq=False)
class Table:
    """The usable rows of one split of one task, by column.

    `texts[i]` has one string per text column of the layout, `labels` is int64 [n] for classes, float64
    [n] for scores and None for an unlabelled table, `lines[i]` is the line of the file on which example i
    starts. Rows of further tables that joined this one have their own files in `files`; `extra` describes
    these tables.
    """

    task: str
    split: str
    path: Path
    ids: list[str]
    texts: list[tuple[str, ...]]
    labels: np.ndarray | None
    lines: list[int]
    problems: list[RowProblem] = field(default_factory=list)
    files: list[Path] | None = None
    extra: tuple[ExtraRows, ...] = ()

    def __len__(self) -> int:
        """Number of usable rows."""
        return len(self.ids)

    @property
    def duplicate_ids(self) -> int:
        """How many rows have an id that an earlier row has too (they are kept)."""
        return len(self.ids) - len(set(self.ids))

    def place(self, example: int) -> str:
        """Where an example stands, for messages: file and line."""
        return f"{self.path if self.files is None else self.files[example]}, line {self.lines[example]}"

    def files_of(self, examples: Sequence[int]) -> list[Path] | None:
        """`files` of a choice of examples."""
        return None if self.files is None else [self.files[example] for example in examples]


def read_folder(
    folder: Path | str,
    task: str,
    layout: TableLayout,
    files: Mapping[str, str],
    required: Collection[str] = LABELLED_SPLITS,
) -> dict[str, Table]:
    """Reads the splits of a task from `folder`; `files` maps split to file name.

    A missing file is an error for a `required` split; any other split is left out of the result then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}; "
                        f"expected a folder with {', '.join(files.values())}")  # fmt: skip
    tables = {}
    for split, name in files.items():
        path = folder / name
        if not path.exists():
            if split not in required:
                continue
            others = sorted(p.name for p in folder.iterdir() if p.suffix in {".csv", ".tsv", ".txt"})
            found = (
                ", ".join(others[:20]) + (", ..." if len(others) > 20 else "")
                if others
                else "no tables at all"
            )
            raise DataError(
                f"{path}: no such file; task {task} needs it as its {split} table. Found in {folder}: {found}"
            )
        tables[split] = read_table(path, task, split, layout)
    return tables


def read_own_table(path: Path | str, task: str, layout: TableLayout, *, labelled: bool) -> Table:
    """Reads a table of a user's own, of split "own": as `read_table`, but also with commas between the cells.

    Commas are what the header line decides by holding no tab. Without a column of ids, rows are named by their lines.
    """
    path = Path(path)
    text = _decode(path)
    first = io.StringIO(text, newline=None).readline()
    delimiter = "\t" if "\t" in first or "," not in first else ","
    try:
        header = {cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), [])}
    except csv.Error:  # read_table says what is wrong
        header = set()
    if layout.id_column not in header:
        layout = replace(layout, id_column="")
    table = _read(path, text, task, "dev" if labelled else "own", layout, delimiter)
    return replace(table, split="own", labels=table.labels if labelled else None)


def read_table(path: Path | str, task: str, split: str, layout: TableLayout) -> Table:
    """Reads one table; see the module's text for the format and for what happens to rows that cannot be used.

    Line numbers are physical lines of the file, from 1, of the line on which a row starts. Lines without any
    character are no rows. The splits "train" and "dev" must have the label column; without it another split
    is unlabelled. A layout whose id column is empty names each row by its line. Raises DataError, and nothing else,
    whatever the file holds.
    """
    path = Path(path)
    return _read(path, _decode(path), task, split, layout, "\t")


def _read(path: Path, text: str, task: str, split: str, layout: TableLayout, delimiter: str) -> Table:
    lines = list(io.StringIO(text, newline=""))
    rows = _rows(path, lines, delimiter)
    header_line, _, header = next(rows, (0, 0, []))
    if not header:
        raise DataError(f"{path}: the file is empty; expected a header line with {_names(layout, split)}")
    columns = _columns(path, header_line, lines[header_line - 1], header, layout, split)

    table = Table(task, split, path, [], [], None, [])
    labels: list[float] | None = None if columns[-1] is None else []
    for line, last_line, cells in rows:
        swallowed = _swallowed_rows(path, lines, line, last_line, len(header), delimiter)
        try:
            if swallowed:
                raise _UnusableRowError(
                    f"a quoted field that starts here holds {swallowed} more line(s) that look like rows; "
                    "is a quote not closed?"
                )
            row_id, texts, label = _usable(path, line, cells, len(header), columns, layout)
        except _UnusableRowError as problem:
            table.problems.append(RowProblem(path, line, str(problem)))
            continue
        table.ids.append(row_id)
        table.texts.append(texts)
        table.lines.append(line)
        if labels is not None:
            labels.append(label)
    if len(table.problems) > len(table.ids):
        raise DataError(
            f"{path}: {len(table.problems)} of {len(table.problems) + len(table.ids)} rows cannot be used; "
            "the first: "
            + "; ".join(f"line {problem.line}: {problem.reason}" for problem in table.problems[:3])
        )
    if not table.ids:
        raise DataError(f"{path}: there is no row after the header line")
    array = None if labels is None else np.asarray(labels, dtype=layout.labels.dtype)
    return Table(task, split, path, table.ids, table.texts, array, table.lines, table.problems)


def write_table(path: Path | str, table: Table, layout: TableLayout) -> None:
    """Writes a table as `read_table` reads it: row index, id, texts, and the label if there is one."""
    Path(path).write_bytes(table_text(table, layout).encode("utf-8"))


def table_text(table: Table, layout: TableLayout, more: Mapping[str, Sequence[str]] | None = None) -> str:
    """The file of a table as `write_table` writes it, with the additional columns `more` behind the label."""
    more = more or {}
    columns = ["", layout.id_column, *layout.text_columns]
    file = io.StringIO(newline="")
    plain = csv.writer(file, delimiter="\t", lineterminator="\n")
    # Before Python 3.13 the writer leaves a lone carriage return bare, which then ends the line.
    quoting = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow([*columns, *([] if table.labels is None else [layout.label_column]), *more])
    for number, (row_id, texts) in enumerate(zip(table.ids, table.texts, strict=True)):
        label = [] if table.labels is None else [table.labels[number].item()]
        row = [number, row_id, *texts, *label, *(column[number] for column in more.values())]
        (quoting if any("\r" in str(cell) for cell in row) else plain).writerow(row)
    return file.getvalue()


class _UnusableRowError(Exception):
    """The reason why one row cannot be used."""


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: looks like UTF-16; expected UTF-8 text")
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise DataError(
            f"{path}: holds a NUL byte at offset {nul} (line {line}): a binary file? Expected UTF-8 text"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Offsets of the codec do not count the byte order mark.
        offset = error.start + 3 * data.startswith(b"\xef\xbb\xbf")
        line = data.count(b"\n", 0, offset) + 1
        raise DataError(
            f"{path}: byte 0x{data[offset]:02x} at offset {offset} (line {line}) is not UTF-8; "
            "expected UTF-8 text"
        ) from None


def _rows(path: Path, lines: list[str], delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yields (first line, last line, cells) of every row, lines from 1."""
    end = "\u0003end of the table"
    terminated = [*lines[:-1], lines[-1].rstrip("\r\n") + "\n"] if lines else []
    reader = csv.reader([*terminated, end], delimiter=delimiter)
    start = 1
    try:
        for cells in reader:
            if reader.line_num > len(lines):
                # The additional last line is a row of its own, unless a quote is still open.
                if cells != [end]:
                    raise DataError(
                        f"{path}, line {start}: a double quote opens a field here that is never closed; "
                        "close it, or write the field between quotes with its own quotes doubled"
                    )
                return
            if cells:
                yield start, reader.line_num, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}: {error}; expected tab-separated text with at most "
            f"{csv.field_size_limit()} characters in a field (is a double quote not closed?)"
        ) from None


def _swallowed_rows(path: Path, lines: list[str], first: int, last: int, width: int, delimiter: str) -> int:
    """How many lines within one row look like rows themselves, because a lone quote joined them."""
    if first == last:
        return 0
    complete = sum(line.count(delimiter) == width - 1 for line in lines[first - 1 : last])
    swallowed = max(0, complete - 1) if width > 1 else 0
    if swallowed > MAX_SWALLOWED_ROWS or last - first > MAX_LINES_PER_FIELD:
        raise DataError(
            f"{path}, line {first}: a double quote opens a field here that runs to line {last} and takes in "
            f"{swallowed} lines that look like rows; "
            "close the quote, or write the field between quotes with its own quotes doubled"
        )
    return swallowed


def _names(layout: TableLayout, split: str) -> str:
    names = _needed(layout)
    return ", ".join([*names, layout.label_column] if split in LABELLED_SPLITS else names)


def _needed(layout: TableLayout) -> list[str]:
    return [*filter(None, [layout.id_column]), *layout.text_columns]


def _columns(
    path: Path, line: int, text: str, header: Sequence[str], layout: TableLayout, split: str
) -> tuple[int | None, tuple[int, ...], int | None]:
    """The places of the id (None: rows have none), of the texts and of the label (None: unlabelled)."""
    names = [cell.strip() for cell in header]
    needed = _needed(layout)
    if split in LABELLED_SPLITS or layout.label_column in names:
        needed.append(layout.label_column)
    missing = [name for name in needed if name not in names]
    if missing:
        hint = ""
        for delimiter, title in (
            (",", "commas"),
            (";", "semicolons"),
            ("|", "vertical bars"),
            (None, "spaces"),
        ):
            cells = {cell.strip().strip('"') for cell in text.split(delimiter)}
            if len(header) == 1 and len(cells) > 1 and cells.issuperset(needed):
                hint = f" The columns seem to be separated by {title}; expected tabs."
        raise DataError(
            f"{path}, line {line}: no column {' and no column '.join(map(repr, missing))}; "
            f"found {', '.join(repr(_short(name)) for name in names[:20])}; "
            f"expected {_names(layout, split)}.{hint}"
        )
    twice = [name for name in needed if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}, line {line}: the column {twice[0]!r} occurs {names.count(twice[0])} times")
    places = tuple(names.index(name) for name in layout.text_columns)
    label = names.index(layout.label_column) if layout.label_column in names else None
    return names.index(layout.id_column) if layout.id_column else None, places, label


def _usable(
    path: Path,
    line: int,
    cells: list[str],
    width: int,
    columns: tuple[int | None, tuple[int, ...], int | None],
    layout: TableLayout,
) -> tuple[str, tuple[str, ...], float]:
    if len(cells) != width:
        raise _UnusableRowError(f"found {len(cells)} cells, expected {width}")
    id_place, text_places, label_place = columns
    row_id = str(line) if id_place is None else cells[id_place].strip()
    texts = tuple(cells[place].strip() for place in text_places)
    label_text = "" if label_place is None else cells[label_place].strip()
    reasons = [f"no {layout.id_column}"] * (not row_id)
    reasons += [f"no {name}" for name, text in zip(layout.text_columns, texts, strict=True) if not text]
    label = 0.0
    if label_place is not None:
        try:
            label = float(label_text)
        except ValueError:
            label = math.nan
        if not label_text or (math.isnan(label) and label_text.lower() in {"nan", "na", "none", "null"}):
            reasons.append(f"no {layout.label_column}")
        elif math.isnan(label):
            reasons.append(f"{layout.label_column} is {_short(label_text)!r}, expected {layout.labels}")
        elif not math.isfinite(label) or not layout.labels.allows(label):
            raise DataError(
                f"{path}, line {line}: {layout.label_column} is {_short(label_text)!r}, "
                f"expected {layout.labels}"
            )
    if reasons:
        raise _UnusableRowError(", ".join(reasons))
    return row_id, texts, label


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
