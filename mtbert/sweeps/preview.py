"""What a search space comes to, before anything is run."""

from __future__ import annotations

import random
from collections import Counter

from mtbert.engine.effect import check_effect
from mtbert.errors import ConfigError
from mtbert.evaluation.table import table
from mtbert.sweeps.space import Read, Scalar, Space
from mtbert.sweeps.trial import trial_name

_SHOWN = 10
_TRIED = 60


def preview(space: Space, read: Read) -> str:
    """The parameters, how many trials there are, the first of them, and combinations that would be refused."""
    rows = [[p.name, p.describe(), ", ".join(p.fields)] for p in space.parameters]
    parts = [table(["parameter", "values", "fields"], rows)]
    if space.method == "grid":
        combinations = space.grid()
        parts.append(f"method grid: {len(combinations)} trials, every combination once")
        tried = combinations[:_TRIED]
    else:
        parts.append(f"method {space.method}: {space.total} trials, seed {space.seed}; pruner {space.pruner}")
        chance = random.Random(space.seed)
        tried = [_drawn(space, chance) for _ in range(_TRIED)]
    shown = [trial_name(number, space.tags(values)) for number, values in enumerate(tried[:_SHOWN])]
    kind = "the first" if space.method == "grid" else "such as"
    parts.append(f"{kind}:\n" + "\n".join(f"  {name}" for name in shown))
    refused: Counter[str] = Counter()
    for values in tried:
        try:
            check_effect(read(space.options(values)))
        except ConfigError as error:
            refused[str(error)] += 1
    if refused:
        reasons = "\n".join(f"  {count}: {reason}" for reason, count in refused.most_common(5))
        parts.append(
            f"{sum(refused.values())} of {len(tried)} combinations that were tried would be refused (and recorded as"
            f" failed):\n{reasons}"
        )
    return "\n\n".join(parts)


def _drawn(space: Space, chance: random.Random) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {}
    for parameter in space.parameters:
        if not parameter.active(values):
            continue
        if parameter.choices:
            values[parameter.name] = chance.choice(list(parameter.choices))
        else:
            low, high = parameter.low, parameter.high
            number = low * (high / low) ** chance.random() if parameter.log else chance.uniform(low, high)
            values[parameter.name] = round(number) if parameter.whole else number
    return values
