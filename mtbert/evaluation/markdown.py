"""Foreign text (sentences, names, file paths) made safe inside Markdown, tables included; links to images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# Brackets become entities and not backslash pairs: some renderers read "\[" as the start of a formula.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "[": "&#91;", "]": "&#93;", "$": "&#36;", "@": "&#64;"}
_BACKSLASHED = "\\`*_|~#"
_TABLE = str.maketrans(_ENTITIES | {character: "\\" + character for character in _BACKSLASHED})


def escape(text: str, limit: int | None = None) -> str:
    """`text` on one line that Markdown shows as it is: no markup, no HTML, no cell ends.

    White space is collapsed, control characters are dropped; beyond `limit` characters: the head and `…`.
    """
    line = " ".join(text.split())
    line = "".join(character for character in line if character.isprintable())
    if limit is not None and len(line) > limit:
        line = line[: limit - 1].rstrip() + "…"
    return line.translate(_TABLE)


def fenced(text: str, language: str = "") -> str:
    """`text` in a code fence that is longer than any run of backticks in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    body = text.rstrip("\n")
    return f"{fence}{language}\n{body}\n{fence}"


def image_links(paths: Mapping[str, Path], folder: Path, names: Sequence[str]) -> str:
    """The images of those names that there are, linked relative to `folder`, so that it can be moved."""
    return "\n\n".join(
        f"![{escape(name)}]({Path(os.path.relpath(paths[name], folder)).as_posix()})"
        for name in names
        if name in paths
    )
