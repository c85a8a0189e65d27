"""The rows of the papers as they will be run: shortened settings, the options of each run, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtbert.cli import parse_with, preset_path, train_parser
from mtbert.config import TrainConfig, to_dict
from mtbert.engine.reproduction_cost import Cost, CostModel, faster, shortened
from mtbert.evaluation.published import PaperRow
from mtbert.evaluation.reproduction_schedule import Schedule
from mtbert.evaluation.reproduction_table import published_score
from mtbert.evaluation.table import Cell, table


@dataclass(frozen=True)
class Plan:
    """The run of one row, or of several with the same settings: its preset, shortened, and what it costs."""

    preset: str
    config: TrainConfig
    common: tuple[str, ...]
    """The options that all runs share: the data and the encoder."""
    cost: Cost
    lr_factor: float = 1.0
    """What the preset's learning rates were multiplied by."""

    def arguments(self, seed: int, folder: Path, threads: int) -> list[str]:
        """The training options of one run; threads: 0 for torch's choice."""
        config = self.config
        given = ["--preset", self.preset, *self.common, "--seed", str(seed), "--output", str(folder)]
        given += ["--epochs", repr(config.epochs)]
        given += ["--curriculum.epoch_length", str(config.curriculum.epoch_length)]
        if self.lr_factor != 1 and config.mode != "last-linear-layer":
            given += ["--optim.lr", repr(config.optim.lr)]
            if config.optim.head_lr is not None:
                given += ["--optim.head_lr", repr(config.optim.head_lr)]
            if config.pretraining.mlm_epochs:
                given += ["--pretraining.mlm_lr", repr(config.pretraining.mlm_lr)]
        if config.curriculum.start:
            given += ["--curriculum.start", json.dumps(config.curriculum.start)]
        if config.pretraining.active:
            given += ["--pretraining.mlm_epochs", repr(config.pretraining.mlm_epochs)]
            given += ["--pretraining.task_epochs", repr(config.pretraining.task_epochs)]
        return [*given, "--threads", str(threads)] if threads else given


def make_plans(
    rows: Sequence[PaperRow],
    *,
    data: str,
    model: str,
    scale: float,
    max_steps: int | None,
    max_tokens: float | None = None,
    lr_factor: float = 1.0,
) -> dict[str, Plan]:
    """The plans by row, of the rows that can be run; rows with the same run have the same plan.

    max_steps: optimizer steps of a run at most, whatever the scale leaves. max_tokens: training tokens of a run at
    most, each example counted once: rows that differ in the method alone get the same steps, though some take longer. A
    row that trains one task of another row alone gets the steps of that row. lr_factor: multiplies all learning rates.
    """
    parser, costs = train_parser(None), CostModel(data, model)
    common = ("--data", data, "--model.pretrained", model)

    def plan(run: str, limit: int | None) -> Plan:
        config = parse_with(parser, ["--config", str(preset_path(run)), *common])
        config = faster(config, lr_factor)
        short = shortened(config, scale)
        cost = costs.cost(short)
        limits = [] if limit is None else [limit]
        if max_tokens is not None and limit is None and cost.tokens > max_tokens:
            limits.append(max(1, int(cost.steps * max_tokens / cost.tokens)))
        if max_steps is not None:
            limits.append(max_steps)
        if limits and cost.steps > min(limits):
            short = shortened(config, scale, min(limits), cost)
            cost = costs.cost(short)
        return Plan(run, short, common, cost, lr_factor)

    by_run: dict[str, Plan] = {}
    for row in rows:
        if row.impossible is not None or row.run in by_run:
            continue
        limit = None
        if row.single_of is not None:
            whole = by_run.get(row.single_of) or plan(row.single_of, None)
            limit = whole.cost.steps
        by_run[row.run] = plan(row.run, limit)
    return {row.name: by_run[row.run] for row in rows if row.run in by_run}


def total_seconds(plans: Mapping[str, Plan], speed: float) -> float:
    """The time of all runs, those that serve several rows counted once. speed: tokens a second."""
    return sum(plan.cost.seconds(speed) for plan in {plan.preset: plan for plan in plans.values()}.values())


def listing(rows: Sequence[PaperRow], plans: Mapping[str, Plan], speed: float | None) -> str:
    """The rows and what was published; with plans, what each run costs (minutes at `speed` tokens a second)."""
    lines: list[list[Cell]] = []
    for row in rows:
        score, plan = published_score(row), plans.get(row.name)
        line: list[Cell] = [row.name, row.title, score and f"{score} {row.formula}"]
        if row.impossible is not None:
            lines.append([*line, f"not reproducible: {row.impossible}", None, None, None])
            continue
        epochs = f"{row.schedule.epochs:g}"
        if plan is not None:
            epochs = Schedule.of(to_dict(plan.config)).text(row.schedule)
        line.append(f"the run of {row.same_as}" if row.same_as else epochs)
        line += [plan.cost.steps, round(plan.cost.training + plan.cost.evaluation)] if plan else [None, None]
        lines.append([*line, plan.cost.seconds(speed) / 60 if plan and speed else None])
    return table(
        ["row", "what", "published", "epochs", "steps", "work in tokens", "minutes"], lines, digits=1
    )
