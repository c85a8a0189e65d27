"""Aligned tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | int | float | None
MISSING = "-"


def text_of(cell: Cell, digits: int = 3) -> str:
    """A cell as text: floats with `digits` decimals, whole numbers with thousands separated, None as `-`."""
    if cell is None:
        return MISSING
    if isinstance(cell, float):
        return f"{cell:.{digits}f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _columns(
    headers: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int
) -> tuple[list[list[str]], list[bool]]:
    """Cells as text, and for each column whether it holds numbers (set to the right)."""
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(headers)} columns: {row}")
    numeric = [
        any(isinstance(row[place], (int, float)) for row in rows)
        and all(row[place] is None or isinstance(row[place], (int, float)) for row in rows)
        for place in range(len(headers))
    ]
    return [[text_of(cell, digits) for cell in row] for row in rows], numeric


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 3) -> str:
    """A plain table for the terminal: a rule under the headers, numbers to the right."""
    cells, numeric = _columns(headers, rows, digits)
    widths = [max(len(row[place]) for row in [list(headers), *cells]) for place in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 3) -> str:
    """A Markdown table; cells that hold foreign text must have gone through `markdown.escape`."""
    cells, numeric = _columns(headers, rows, digits)
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(headers), rule, *cells])
