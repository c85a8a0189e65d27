"""The recorded activation memory of a device as a page: a table, and a plot against the tokens of a step.

python -m bench.memory_page                     # of every record in bench/results
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import records
from mtbert.evaluation.plots.style import MARKERS, SEQUENCE, Source, legend, panels, save, tidy

COMPARISON = "activation memory"
"""Names of comparisons that this page shows begin with it; each maps a side to [tokens, bytes] points."""


def write_page(path: Path) -> Path | None:
    """Beside the record at `path`: DEVICE-memory.md and DEVICE-memory.png; None where nothing is recorded."""
    record = json.loads(path.read_text(encoding="utf-8"))
    found = {n: c for n, c in record["comparisons"].items() if n.startswith(COMPARISON)}
    if not found:
        return None
    git = next(iter(found.values()))["measured"]["git"]
    figure, axes = panels(len(found), Source(record["device"], git))
    for (name, comparison), panel in zip(found.items(), axes, strict=True):
        for place, (side, points) in enumerate(comparison["points"].items()):
            tokens, mebibytes = [p[0] for p in points], [p[1] / 2**20 for p in points]
            panel.plot(
                tokens, mebibytes, color=SEQUENCE[place], marker=MARKERS[place], markersize=4, label=side
            )
        tidy(panel, name, "useful tokens a step", "activation memory (MiB)")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        legend(panel)
    image = save(figure, path.with_name(f"{path.stem}-memory.png"))
    page = path.with_name(f"{path.stem}-memory.md")
    page.write_text(_text(record["device"], found, image.name), encoding="utf-8")
    return page


def _text(device: str, found: dict[str, dict[str, Any]], image: str) -> str:
    lines = [f"# Activation memory of a training step: {device}", ""]
    lines.append(
        "Written by `python -m bench.memory_page` from the record beside it. The peak of a step's forward and"
    )
    lines.append(
        "backward passes without weights, gradients and optimizer state, in MiB (KiB a useful token)."
    )
    for name, comparison in found.items():
        measured = comparison["measured"]
        counts = [tokens for tokens, _ in next(iter(comparison["points"].values()))]
        lines += ["", f"## {name}", ""]
        lines.append(
            f"{measured['encoder']}, {comparison['dtype']}, {measured['source']}, commit {measured['git']}."
        )
        lines += ["", "| computed again | " + " | ".join(f"{n:,.0f} tokens" for n in counts) + " |"]
        lines.append("| --- |" + " ---: |" * len(counts))
        for side, points in comparison["points"].items():
            cells = [f"{held / 2**20:.0f} ({held / tokens / 2**10:.1f})" for tokens, held in points]
            lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"![Activation memory against tokens a step]({image})", ""])


def main() -> None:
    """Write the pages of all records."""
    for path in sorted(records.RESULTS.glob("*.json")):
        page = write_page(path)
        if page is not None:
            print(page)


if __name__ == "__main__":
    main()
