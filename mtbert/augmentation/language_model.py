"""Rows by a language model: the request of each, and its answer as a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtbert.augmentation.answer import Answer, RejectedError, read_answer
from mtbert.augmentation.client import ChatClient, Refusal, Request
from mtbert.augmentation.config import SamplingConfig
from mtbert.augmentation.draws import Draws
from mtbert.augmentation.plan import Slot
from mtbert.augmentation.prompt import Prompter
from mtbert.data.tables import Table
from mtbert.tasks.registry import Task

CUT_OFF = "an answer that was cut off"
FILTERED = "held back by the server's filter"
TOKENS_A_WORD = 4
LEAST_TOKENS = 160


class LanguageModel:
    """Asks for each row through `client`; the same seed asks the same."""

    def __init__(
        self,
        task: Task,
        table: Table,
        prompter: Prompter,
        client: ChatClient,
        model: str,
        sampling: SamplingConfig,
        seed: int,
        title: str,
    ) -> None:
        self._task, self._table, self._prompter, self._client = task, table, prompter, client
        self._model, self._sampling, self._seed, self._title = model, sampling, seed, title
        self.details: dict[str, str] = {}
        """What the server said, once for each reason why there was no answer."""

    async def answers(self, slots: Sequence[Slot], attempt: int) -> list[Answer | RejectedError]:
        """An answer, or why there is none, for each slot."""
        title = self._title if attempt == 0 else f"{self._title}, attempt {attempt + 1}"
        replies = await self._client.ask([self.request(slot, attempt) for slot in slots], title)
        results: list[Answer | RejectedError] = []
        for reply in replies:
            if isinstance(reply, Refusal):
                self.details.setdefault(reply.reason, reply.detail)
                results.append(RejectedError(reply.reason))
            elif reply.finish == "length":
                results.append(RejectedError(CUT_OFF))
            elif reply.finish == "content_filter":
                results.append(RejectedError(FILTERED))
            else:
                try:
                    results.append(read_answer(reply.text, self._task.layout))
                except RejectedError as reason:
                    results.append(reason)
        return results

    def request(self, slot: Slot, attempt: int) -> Request:
        """The request for a slot's row: a function of the table, the settings and the seed."""
        row = slot.row(attempt)
        sampling = self._sampling
        common: dict[str, Any] = {
            "model": self._model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": Draws(self._seed, "request", slot.number, attempt).below(2**31),
        }
        tokens = sampling.answer_tokens
        if tokens is None:
            words = sum(len(text.split()) for text in self._table.texts[row])
            tokens = max(LEAST_TOKENS, TOKENS_A_WORD * words) * (
                attempt + 1
            )  # the last answer may have been cut off
        if tokens:
            common["max_tokens"] = tokens
        if sampling.extra_body:
            common["extra_body"] = dict(sampling.extra_body)
        free, structured = (
            self._prompter.messages(row, slot.number, attempt, structured=form) for form in (False, True)
        )
        schema = self._prompter.response_format()
        return Request(
            {**common, "messages": free},
            {**common, "messages": structured, "response_format": schema},
            attempt,
        )
