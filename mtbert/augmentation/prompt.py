"""The prompts: what a row and its label mean, a few training rows, and the row to be rewritten or repaired.

The paraphrase's prompt is modelled on the one of Peng, Yuan and Wang 2024, "Exploration of Multi-Task Learning ...",
appendix A.4: the meaning of the labels, lines of text and label separated by a tab, and the line to paraphrase.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtbert.augmentation.config import PromptConfig
from mtbert.augmentation.draws import Draws
from mtbert.augmentation.plan import strata
from mtbert.data.tables import Table
from mtbert.evaluation.metrics import class_names
from mtbert.tasks.registry import Task

SHORT_ROW = 60
"""Words of a row that is shown as an example, where the class has rows as short."""
LEAST_SHORT = 10
SCORE_STEPS = 5
"""Examples of scores are drawn from so many equal parts of their range."""

EXAMPLES = """\
You rewrite examples of a data set: {title}. Each line below is one example: {parts}, separated by tabs. {labels}
"""
PARAPHRASE = """\
Write a paraphrase of the example below that has the same label. Say the same in other words and, where you can, with \
another structure; keep its language, its tone and about its length; add nothing and leave nothing out.{relation}
"""
REPAIR = """\
You repair the text of examples of a data set: {title}. An example is one line: {parts}, separated by tabs. {labels}
The text may have been damaged: spaces before punctuation or inside of words and contractions (does n't), brackets as \
-LRB- and -RRB-, quotation marks as `` and '', slashes behind backslashes, missing or wrong capitals, broken \
characters, left-over markup such as <br />, words cut in two or a cut-off end. Repair such damage in the example \
below and change nothing else: no other words, no other order, the same meaning and label. Give an example without \
damage back as it is.
"""
FREE_SINGLE = "Answer with the new sentence alone, on one line, without quotation marks and without comments."
FREE_PAIR = "Answer with two lines and no comments:\n{first}: ...\n{second}: ..."
STRUCTURED = "Answer as JSON: {fields}."

TEMPLATE = {
    "examples": EXAMPLES,
    "paraphrase": PARAPHRASE,
    "repair": REPAIR,
    "free": [FREE_SINGLE, FREE_PAIR],
    "structured": STRUCTURED,
}
"""All of it, for the record."""


class Prompter:
    """Writes the messages for a row, with examples out of `usable` rows of the training table."""

    def __init__(
        self,
        task: Task,
        table: Table,
        usable: Sequence[int],
        config: PromptConfig,
        *,
        repair: bool,
        seed: int,
    ) -> None:
        self._task, self._table, self._config, self._repair, self._seed = task, table, config, repair, seed
        self._shown = self._candidates(usable)

    def messages(self, row: int, draw: int, attempt: int, *, structured: bool) -> list[dict[str, str]]:
        """The request for a row. draw: the number of the row to be made, which chooses the examples with `attempt`.

        It is one message of the user: the templates of some models know no other role.
        """
        task, columns = self._task, self._task.layout.text_columns
        words = {
            "title": task.title,
            "parts": "its sentence and its label" if len(columns) == 1 else "its two sentences and its label",
            "labels": self._labels(),
        }
        line = self._line(row)
        if self._repair:
            text = f"{REPAIR.format(**words)}\n{line}\n"
        else:
            shown = "\n".join(self._line(example) for example in self._examples(row, draw, attempt))
            text = EXAMPLES.format(**words) + (f"Some examples:\n\n{shown}\n\n" if shown else "\n")
            text += f"{PARAPHRASE.format(relation=self._relation(row, draw))}\n{line}\n"
        return [{"role": "user", "content": f"{text}\n{self._ending(structured)}"}]

    def kept_sentence(self, row: int, draw: int) -> int | None:
        """Which of a pair's sentences must stay as it is; None where both are rewritten."""
        if self._repair or self._config.rewrite == "both" or not self._task.is_pair:
            return None
        return Draws(self._seed, self._task.name, "kept", row, draw).below(2)

    def response_format(self) -> dict[str, Any]:
        """The JSON schema of an answer: the texts and the label that the model gives them."""
        task = self._task
        label = {"type": "number" if task.kind == "similarity" else "integer"}
        fields: dict[str, Any] = {column: {"type": "string"} for column in task.layout.text_columns}
        fields[task.layout.label_column] = label
        schema = {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }
        return {"type": "json_schema", "json_schema": {"name": "example", "strict": True, "schema": schema}}

    def _ending(self, structured: bool) -> str:
        columns = self._task.layout.text_columns
        if structured:
            fields = ", ".join(f'"{column}": ...' for column in (*columns, self._task.layout.label_column))
            return STRUCTURED.format(fields=f"{{{fields}}}")
        return FREE_SINGLE if len(columns) == 1 else FREE_PAIR.format(first=columns[0], second=columns[1])

    def _relation(self, row: int, draw: int) -> str:
        if not self._task.is_pair:
            return ""
        kept = self.kept_sentence(row, draw)
        if kept is None:
            return " Rewrite both sentences so that they stand to each other exactly as before."
        columns = self._task.layout.text_columns
        return (
            f" Rewrite {columns[1 - kept]} alone and repeat {columns[kept]} as it is; the two must stand to each other"
            " exactly as before."
        )

    def _labels(self) -> str:
        """What the labels mean."""
        task = self._task
        if task.score_range is not None:
            low, high = task.score_range
            return (
                f"The label {task.layout.label_column} says how similar in meaning the two are, from {low:g} (they have"
                f" nothing to do with each other) to {high:g} (they mean the same)."
            )
        meanings = ", ".join(f"{number} means {name}" for number, name in enumerate(class_names(task)))
        return f"The label is {task.layout.label_column}: {meanings}."

    def _line(self, row: int) -> str:
        assert self._table.labels is not None
        label = self._table.labels[row].item()
        return "\t".join([*(" ".join(text.split()) for text in self._table.texts[row]), f"{label:g}"])

    def _candidates(self, usable: Sequence[int]) -> list[list[int]]:
        """The rows that may be shown, by class (of scores: by fifth of the range), without long ones where possible."""
        labels = self._table.labels
        assert labels is not None
        groups = strata(self._task, labels)
        if self._task.score_range is not None:
            groups = groups * SCORE_STEPS // (int(groups.max()) + 1)
        found: dict[int, list[int]] = {}
        for row in usable:
            found.setdefault(int(groups[row]), []).append(row)
        words = [sum(len(text.split()) for text in texts) for texts in self._table.texts]
        shown = []
        for _, rows in sorted(found.items()):
            short = [row for row in rows if words[row] <= SHORT_ROW]
            shown.append(
                short if len(short) >= LEAST_SHORT else sorted(rows, key=lambda r: words[r])[:LEAST_SHORT]
            )
        return shown

    def _examples(self, row: int, draw: int, attempt: int) -> list[int]:
        """Rows of every class in random order, never the one that is to be rewritten."""
        draws = Draws(self._seed, self._task.name, "examples", draw, attempt)
        chosen = []
        for rows in self._shown:
            picked: dict[int, None] = {}
            for _ in range(20 * self._config.shots):
                if len(picked) == min(self._config.shots, len(rows)):
                    break
                candidate = draws.one(rows)
                if self._table.texts[candidate] != self._table.texts[row]:
                    picked[candidate] = None
            chosen += list(picked)
        return draws.shuffled(chosen)
