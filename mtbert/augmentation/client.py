"""Asks an OpenAI-compatible server: several requests at once, each answer kept at once, failed requests sent again.

The `openai` client sends a request once; retries are decided here, so that a server's rate limit holds back all
requests together and is not answered by two loops of retries, one within the other.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mtbert.augmentation.cache import AnswerCache, request_key
from mtbert.augmentation.config import ServerConfig
from mtbert.augmentation.rate_limit import asked_for, backoff
from mtbert.errors import ConfigError, UserError

KEY = "OPENAI_API_KEY"
NO_KEY = "none"
"""Sent to a server that needs no key; the client insists on one."""
LONGEST_WAIT = 600.0
"""Seconds: a server that asks for more is not waited for."""
MOST_REFUSED = 3
"""Requests that a server refuses in every form before it counts as one that refuses them all."""
_SCHEMA = "structured output"


class ServerError(UserError):
    """The server cannot be used: the message says what it answered and what is kept."""


@dataclass(frozen=True)
class Reply:
    """What the model wrote, why it stopped (`stop`, `length`, ...), and what the server says it is."""

    text: str
    finish: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


@dataclass(frozen=True)
class Refusal:
    """No answer to this one request: why, in a few words that are counted, and what the server said."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Request:
    """One request in both forms: `free` without, `structured` with a JSON schema, and the number of the attempt."""

    free: Mapping[str, Any]
    structured: Mapping[str, Any]
    attempt: int


@dataclass
class Traffic:
    """What was sent: counts for the record."""

    asked: int = 0
    """Requests that were sent and answered."""
    from_cache: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    models: set[str] = field(default_factory=set)
    """What the server calls the model that answered."""


class ChatClient:
    """Within `async with`: answers of a server, from the cache where it has them."""

    def __init__(self, config: ServerConfig, cache: AnswerCache) -> None:
        self._config, self._cache = config, cache
        self._library: Any = load_openai()
        self._key = _key_of_environment()
        self.traffic = Traffic()
        self._fresh: set[str] = set()
        """The keys of answers that the server gave this time."""
        self._told: set[str] = set()
        self._schema = {"always": True, "never": False}.get(config.structured)
        self._not_before = 0.0
        self._failures = 0
        """Requests in a row that failed for good."""

    async def __aenter__(self) -> ChatClient:
        self._client = self._library.AsyncOpenAI(
            api_key=self._key, base_url=self._config.base_url, max_retries=0, timeout=self._config.timeout
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    @property
    def structured(self) -> bool | None:
        """Whether the server keeps to a JSON schema; None before it was asked."""
        return self._schema

    async def model(self) -> str:
        """The configured model, or the only one that the server has."""
        if self._config.model is not None:
            return self._config.model
        found = await self._with_retries(self._models)
        if isinstance(found, Refusal):
            raise ServerError(
                f"{self._where}: does not list its models ({found.detail}); name one with --model"
            )
        if len(found) != 1:
            listed = ", ".join(sorted(found)[:20]) or "none"
            raise ConfigError(f"--model: the server has {len(found)} models, name one of them: {listed}")
        return str(found[0])

    async def ask(self, requests: Sequence[Request], title: str) -> list[Reply | Refusal]:
        """The answers in the order of the requests. Raises ServerError where the server is of no use.

        The first requests that the cache does not answer go alone where it is not known yet whether the server
        keeps to a JSON schema.
        """
        if self._schema is None and requests:
            self._schema = self._cache.note(f"{_SCHEMA} of {requests[0].free['model']}")
        with tqdm(total=len(requests), desc=title, unit="row", disable=None) as bar:
            if self._schema is None:
                unknown = (r for r in requests if self._cached(r.structured, r.attempt) is None)
                await self._find_out(list(islice(unknown, MOST_REFUSED)))
            replies: list[Reply | Refusal | None] = [None] * len(requests)
            waiting = iter(enumerate(requests))

            async def work() -> None:
                for place, request in waiting:
                    replies[place] = await self._answer(request)
                    bar.update()

            workers = [asyncio.ensure_future(work()) for _ in range(self._config.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [reply for reply in replies if reply is not None]

    async def _answer(self, request: Request) -> Reply | Refusal:
        """From the cache, else from the server."""
        body = request.free if self._schema is False else request.structured
        found = self._cached(body, request.attempt)
        if found is None:
            return await self._ask_server(body, request.attempt)
        self.traffic.from_cache += _key(body, request.attempt) not in self._fresh
        return found

    def _cached(self, body: Mapping[str, Any], attempt: int) -> Reply | None:
        stored = self._cache.get(_key(body, attempt))
        return None if stored is None else Reply(**stored)

    async def _ask_server(self, body: Mapping[str, Any], attempt: int) -> Reply | Refusal:
        found = await self._with_retries(lambda: self._send(body))
        if isinstance(found, Reply):
            self._keep(body, attempt, found)
        return found

    def _keep(self, body: Mapping[str, Any], attempt: int, reply: Reply) -> None:
        self._cache.put(_key(body, attempt), {k: v for k, v in asdict(reply).items() if v is not None})
        self._fresh.add(_key(body, attempt))
        self.traffic.asked += 1
        self.traffic.prompt_tokens += reply.prompt_tokens or 0
        self.traffic.answer_tokens += reply.answer_tokens or 0
        if reply.model:
            self.traffic.models.add(reply.model)

    async def _find_out(self, requests: Sequence[Request]) -> None:
        """Whether the server takes a JSON schema: where it takes the same request only without one, it does not.

        A request that it takes in neither form says nothing (its text may be what is refused): the next one is asked.
        """
        refusal: Refusal | None = None
        for request in requests:
            found = await self._ask_server(request.structured, request.attempt)
            if isinstance(found, Refusal):
                if found.reason != REFUSED:
                    raise ServerError(f"{self._where}: {found.detail}")
                plain = await self._ask_server(request.free, request.attempt)
                if isinstance(plain, Refusal):
                    refusal = plain
                    continue
            self._schema = isinstance(found, Reply)
            self._cache.put_note(f"{_SCHEMA} of {request.free['model']}", self._schema)
            return
        if refusal is not None:
            raise ServerError(f"{self._where}: {refusal.reason}: {refusal.detail}")

    async def _with_retries(self, send: Any) -> Any:
        """What `send` gives; a Refusal for what no retry mends. Raises ServerError when nothing gets through."""
        tries = 0
        while True:
            await self._wait_for_the_limit()
            try:
                result = await asyncio.wait_for(send(), self._config.timeout)
                self._failures = 0
                return result
            except asyncio.CancelledError:
                raise
            except Exception as error:
                tries += 1
                wait = self._judge(error)
                if isinstance(wait, Refusal):
                    self._failures = 0
                    return wait
                if tries > self._config.retries:
                    return self._given_up(error, tries)
                self.traffic.retries += 1
                self._tell(error)
                await asyncio.sleep(backoff(self._config.backoff, tries) if wait is None else wait)

    def _judge(self, error: Exception) -> float | Refusal | None:
        """Seconds to wait as the server asks, None to wait as long as usual, a Refusal where it is no use to try again.

        Raises ServerError for what would fail for every request, and errors of this program as they are.
        """
        library = self._library
        if isinstance(error, UserError):
            raise error
        if isinstance(error, (asyncio.TimeoutError, library.APIConnectionError, ValueError)):
            return None  # no answer, or half of one: its JSON ends too early
        if not isinstance(error, library.APIError):
            raise error
        status = getattr(error, "status_code", None)
        if status is None:  # within a stream
            return None
        headers = {name.lower(): value for name, value in error.response.headers.items()}
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            raise ServerError(f"{self._where}: {self._said(error)}")
        if (
            headers.get("x-should-retry") != "false"
            and (status in (408, 409, 429) or status >= 500)
            and status != 501
        ):
            wait = asked_for(headers)
            if wait is not None:
                if wait > LONGEST_WAIT:
                    raise ServerError(
                        f"{self._where}: asks to wait {wait:,.0f} seconds ({self._said(error)}); {self._kept}"
                    )
                if status == 429:  # the limit is of all requests
                    self._not_before = max(self._not_before, time.monotonic() + wait)
            return wait
        if status in (401, 403):
            given = "was not accepted" if self._key != NO_KEY else "is not set"
            raise ServerError(f"{self._where}: {self._said(error)}; the environment variable {KEY} {given}")
        if status == 404:
            raise ServerError(
                f"{self._where}: {self._said(error)}; expected an address that ends before /chat/completions, and a"
                " model that the server has"
            )
        return Refusal(REFUSED, self._said(error))

    def _given_up(self, error: Exception, tries: int) -> Refusal:
        self._failures += 1
        detail = f"{self._said(error)}, after {tries} tries"
        if self._failures > self._config.concurrency:
            raise ServerError(
                f"{self._where}: {detail}, for {self._failures} requests in a row; {self._kept}"
            )
        return Refusal(NO_ANSWER, detail)

    def _tell(self, error: Exception) -> None:
        """Say once for each kind of failure that requests are sent again, so that nobody watches a bar that stands."""
        kind = f"{type(error).__name__} {getattr(error, 'status_code', '')}"
        if kind not in self._told:
            self._told.add(kind)
            tqdm.write(f"warning: {self._where}: {self._said(error)}; trying again", file=sys.stderr)

    async def _wait_for_the_limit(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def _send(self, body: Mapping[str, Any]) -> Reply:
        fields = dict(body)
        extra = fields.pop("extra_body", None)
        try:
            answer = await self._client.chat.completions.create(
                **fields, **({"extra_body": dict(extra)} if extra else {}), stream=self._config.stream
            )
            return await _streamed(answer) if self._config.stream else _whole(answer)
        except (AttributeError, LookupError, TypeError):  # the client does not check what a server sends
            raise ValueError("it is no chat completion") from None

    async def _models(self) -> list[str]:
        return [model.id async for model in self._client.models.list()]

    @property
    def _where(self) -> str:
        return f"the server {self._config.base_url}"

    @property
    def _kept(self) -> str:
        return f"{len(self._cache):,} answers are kept in {self._cache.path}, the same command goes on from there"

    def _said(self, error: Exception) -> str:
        """An error in a line, without the key, which some servers repeat."""
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (asyncio.TimeoutError, self._library.APITimeoutError)):
            text = f"no answer within {self._config.timeout:g} seconds"
        elif isinstance(error, self._library.APIConnectionError):
            cause = " ".join(str(error.__cause__ or "").split())
            text = f"no connection ({cause})" if cause else "no connection"
        elif isinstance(error, ValueError):
            text = f"an answer that is not complete ({text})"
        if self._key != NO_KEY:
            text = text.replace(self._key, f"[{KEY}]")
        return text if len(text) <= 300 else text[:297] + "..."


REFUSED = "the server refused the request"
NO_ANSWER = "no answer from the server"


def _key_of_environment() -> str:
    """The key. Raises ConfigError, without it, for what no header can hold: libraries repeat that in their errors."""
    key = os.environ.get(KEY, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"the environment variable {KEY} holds a space or a character that no key has; expected letters, digits"
            " and punctuation"
        )
    return key or NO_KEY


def load_openai() -> Any:
    """The library `openai`. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("openai")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a language model is asked through the library openai ({error}): pip install -e '.[augment]'"
            " (--offline needs none)"
        ) from None


def _key(body: Mapping[str, Any], attempt: int) -> str:
    """Of everything that the answer depends on; streaming and the server's address are not among it."""
    return request_key({"body": body, "attempt": attempt})


def _whole(answer: Any) -> Reply:
    choice = answer.choices[0]
    return _reply(
        choice.message.content or "", choice.finish_reason, answer.model, getattr(answer, "usage", None)
    )


async def _streamed(stream: Any) -> Reply:
    parts: list[str] = []
    finish, model, usage = None, None, None
    async with stream:
        async for chunk in stream:
            model = chunk.model or model
            usage = getattr(chunk, "usage", None) or usage
            if chunk.choices:
                parts.append(chunk.choices[0].delta.content or "")
                finish = chunk.choices[0].finish_reason or finish
    if finish is None:
        raise ValueError("the stream ends before the answer does")
    return _reply("".join(parts), finish, model, usage)


def _reply(text: Any, finish: Any, model: Any, usage: Any) -> Reply:
    """Whatever a server sends may be of any type."""
    if not isinstance(text, str):
        raise TypeError
    read, written = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return Reply(
        text,
        finish if isinstance(finish, str) else None,
        model if isinstance(model, str) else None,
        read if isinstance(read, int) else None,
        written if isinstance(written, int) else None,
    )
