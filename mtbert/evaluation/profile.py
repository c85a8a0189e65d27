"""What a profiled run's report says: where a step's time is, how near to the machine's limits, what is unexplained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtbert.errors import DataError
from mtbert.evaluation.markdown import escape, image_links
from mtbert.evaluation.table import Cell, markdown_table, table
from mtbert.outside_files import own_file, read_json_object
from mtbert.ranges import PHASES

FOLDER = "profile"
"""The folder of a run's profiles in that of the run."""
SUMMARY = "profile.json"
"""What the newest of them came to."""
DIRECTIONS = ("forward", "recompute", "backward")
_SHORT = 8
"""Operations in the table on the console."""


@dataclass(frozen=True)
class OperationTime:
    """One operation in a recorded step, all its calls together; rates are None where they are not known."""

    name: str
    seconds: Mapping[str, float]
    """By direction."""
    share: float
    """Of the step."""
    flops: float | None
    """FLOP a second."""
    bytes: float | None
    """Bytes a second, by the least that the operation has to move."""
    of_products: float | None
    """Its FLOP/s by those of the measured matrix products; for operations that are matrix products."""
    of_copy: float | None
    """Its bytes a second by those of the measured copy."""

    @property
    def total(self) -> float:
        """Seconds in all directions."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class ProfileFacts:
    """profile.json of a run."""

    values: dict[str, Any]

    @property
    def step(self) -> float:
        """Seconds of a recorded step."""
        return float(self.values["step_seconds"])

    @property
    def on_device(self) -> bool:
        """Whether times are those of a GPU's kernels."""
        return bool(self.values["clock"] == "device")

    @property
    def phases(self) -> dict[str, tuple[float, float]]:
        """Seconds a step of each phase, and what of it lies outside of operations; in the order of a step."""
        found = self.values["phases"]
        return {
            name: (found[name]["seconds"], found[name]["outside_operations"])
            for name in PHASES
            if name in found
        }

    @property
    def unexplained(self) -> float:
        """Seconds a step that lie in no phase."""
        return float(self.values["unexplained_seconds"])

    @property
    def operations(self) -> list[OperationTime]:
        """The slowest first."""
        peaks, found = self.values["peaks"], []
        for name, entry in self.values["operations"].items():
            seconds = sum(entry["seconds"].values())
            flops, moved = _rate(entry["flops"], seconds), _rate(entry["bytes"], seconds)
            found.append(
                OperationTime(
                    name,
                    entry["seconds"],
                    seconds / self.step if self.step else 0.0,
                    flops,
                    moved,
                    _rate(flops, peaks["flops"]) if entry["products"] else None,
                    _rate(moved, peaks["bytes"]),
                )
            )
        return sorted(found, key=lambda each: -each.total)

    @property
    def product_flops(self) -> float:
        """FLOPs a step of all operations that are matrix products."""
        return sum(entry["flops"] or 0.0 for entry in self.values["operations"].values() if entry["products"])


def read_profile(folder: Path) -> ProfileFacts | None:
    """The profile of a run; None where it has none. Raises DataError for a file that is damaged."""
    path = own_file(folder, f"{FOLDER}/{SUMMARY}", DataError)
    if not path.is_file():
        return None
    profile = ProfileFacts(read_json_object(path, DataError))
    try:
        profile_section(profile, {}, folder)  # whatever is missing, or of another kind, shows here
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{path}: is no profile ({type(error).__name__}: {error!s:.80})") from None
    return profile


def profile_section(profile: ProfileFacts, plots: Mapping[str, Path], folder: Path) -> str:
    """The report's section in Markdown; `plots` holds the figure `profile`, linked relative to `folder`."""
    trace = f"{FOLDER}/{profile.values['trace']}"
    lines = [*(f"- {line}" for line in _findings(profile)), f"- trace: [{escape(trace)}]({trace})"]
    return "\n\n".join(
        filter(
            None,
            [
                "## Profile",
                "\n".join(lines),
                image_links(plots, folder, ("profile",)),
                markdown_table(*_phase_rows(profile), digits=_digits(profile)),
                markdown_table(*_operation_rows(profile), digits=_digits(profile)),
                _notes(profile),
            ],
        )
    )


def profile_text(profile: ProfileFacts, folder: Path) -> str:
    """The short form for the console."""
    headers, rows = _operation_rows(profile)
    return "\n".join(
        [
            *_findings(profile),
            "",
            table(*_phase_rows(profile), digits=_digits(profile)),
            "",
            table(headers, rows[:_SHORT], digits=_digits(profile)),
            "",
            f"trace: {folder / FOLDER / profile.values['trace']}",
        ]
    )


def _findings(profile: ProfileFacts) -> list[str]:
    values, step = profile.values, profile.step
    first, last = values["first_step"], values["last_step"]
    others, memory = values["other_steps"], values["peak_memory"]
    beside = ""
    if others is not None:
        beside = f"; {1e3 * others['median_seconds']:,.1f} ms without a profiler (median of {others['count']} steps)"
    which = f"steps {first} to {last}" if last > first else f"step {first}"
    inside = sum(each.total for each in profile.operations)
    outside = sum(outside for _, outside in profile.phases.values())
    found = [
        f"{which} recorded: {1e3 * step:,.1f} ms a step{beside}",
        f"{_percent(inside, step)} of a step lies in operations, {_percent(outside, step)} in phases but outside of"
        f" operations, {_percent(profile.unexplained, step)} is unexplained"
        + (" (the device waits, or works for none of the ranges)" if profile.on_device else ""),
    ]
    peak = values["peaks"]["flops"]
    if profile.product_flops and step:
        rate = profile.product_flops / step
        of = (
            f", {rate / peak:.0%} of the measured {_giga(peak)} GFLOP/s ({values['peaks']['dtype']})"
            if peak
            else ""
        )
        found.append(
            f"matrix products: {profile.product_flops / 1e9:,.1f} GFLOP a step, {_giga(rate)} GFLOP/s over the whole"
            f" step{of}"
        )
    if values["peaks"]["bytes"]:
        found.append(f"a plain copy reads and writes {_giga(values['peaks']['bytes'])} GB/s here")
    if memory is not None:
        found.append(f"peak memory: {memory['bytes'] / 2**20:,.0f} MiB, {memory['of']}")
    for name, times in values["apart"].items():
        often = "once" if times["count"] == 1 else f"{times['count']} times"
        found.append(f"{name}: {often}, {times['seconds']:,.1f} s together")
    return found


def _phase_rows(profile: ProfileFacts) -> tuple[list[str], list[list[Cell]]]:
    rows: list[list[Cell]] = [
        [name, 1e3 * seconds, _hundred(_rate(seconds, profile.step)), 1e3 * outside]
        for name, (seconds, outside) in profile.phases.items()
    ]
    share = _hundred(_rate(profile.unexplained, profile.step))
    rows.append(["unexplained", 1e3 * profile.unexplained, share, None])
    rows.append(["step", 1e3 * profile.step, 100.0, None])
    return ["phase", "ms a step", "share, %", "outside of operations, ms"], rows


def _operation_rows(profile: ProfileFacts) -> tuple[list[str], list[list[Cell]]]:
    operations = profile.operations
    used = [d for d in DIRECTIONS if d != "recompute" or any(d in each.seconds for each in operations)]
    headers = ["operation", *(f"{direction}, ms" for direction in used)]
    headers += ["share, %", "GFLOP/s", "of products, %", "GB/s", "of copy, %"]
    rows: list[list[Cell]] = [
        [
            each.name,
            *(1e3 * each.seconds[direction] if direction in each.seconds else None for direction in used),
            _hundred(each.share),
            _rate(each.flops, 1e9),
            _hundred(each.of_products),
            _rate(each.bytes, 1e9),
            _hundred(each.of_copy),
        ]
        for each in operations
    ]
    return headers, rows


def _notes(profile: ProfileFacts) -> str:
    kind = (
        "Times are those of the kernels that each range launched; a step's is that of the host's clock."
        if profile.on_device
        else "Times are those of the host's clock, with what the profiler itself costs in them."
    )
    return (
        f"{kind} A phase within a phase (the passes of an adversarial loss) counts to the outer one, its operations to"
        " theirs. FLOP and bytes are the least that an operation needs, by formula: an operation that stays below both"
        " limits has time to gain, one whose data stay in a cache may be above that of the copy. `gradient sums`:"
        " what autograd itself adds up, the gradients of what is used twice and those of several passes."
    )


def _rate(amount: float | None, by: float | None) -> float | None:
    return None if amount is None or not by else amount / by


def _hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _digits(profile: ProfileFacts) -> int:
    """Of milliseconds: a GPU's step has few of them."""
    return 1 if profile.step >= 0.1 else 2


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _giga(rate: float) -> str:
    return f"{rate / 1e9:,.1f}" if rate < 1e12 else f"{rate / 1e9:,.0f}"
