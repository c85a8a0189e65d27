"""What can be set for a language model's paraphrases, beside which rows are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from mtbert.errors import ConfigError

Augmenter = Literal["case", "punctuation", "word-dropout", "swap"]
Structured = Literal["auto", "always", "never"]
Rewrite = Literal["both", "one"]

LOCAL_SERVER = "http://localhost:8000/v1"
"""Where vLLM listens unless it is told otherwise."""


@dataclass(frozen=True)
class ServerConfig:
    """Where the model is, and how it may be asked."""

    base_url: str = LOCAL_SERVER
    model: str | None = None
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    structured: Structured = "auto"
    stream: bool = False

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            found = parts.hostname or "no host"
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError as error:  # of brackets, or of the port; it may repeat what stands before the host
            usable, found = False, "a port" if "ort" in str(error) else "brackets"
            found += " that cannot be"
        if not usable:
            raise ConfigError(f"--base-url: expected an address like {LOCAL_SERVER}, found {found}")
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                "--base-url: holds a user, a password or a query; a key belongs into the environment, as"
                " OPENAI_API_KEY"
            )
        if self.concurrency < 1:
            raise ConfigError(f"--concurrency: expected at least 1, found {self.concurrency}")
        if not self.timeout > 0:
            raise ConfigError(f"--timeout: expected seconds above 0, found {self.timeout:g}")
        if self.retries < 0:
            raise ConfigError(f"--retries: expected 0 or more, found {self.retries}")
        if not self.backoff > 0:
            raise ConfigError(f"--backoff: expected seconds above 0, found {self.backoff:g}")


@dataclass(frozen=True)
class SamplingConfig:
    """How the model draws its answers."""

    temperature: float = 0.9
    top_p: float = 0.95
    answer_tokens: int | None = None
    """Most tokens of an answer; None: by the length of the row; 0: no limit is sent."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request, for what only some servers know."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"--temperature: expected 0 to 2, found {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p: expected a number above 0 and at most 1, found {self.top_p:g}")
        if self.answer_tokens is not None and self.answer_tokens < 0:
            raise ConfigError(f"--answer-tokens: expected 0 or more, found {self.answer_tokens}")
        clash = sorted({"model", "messages", "stream", "n"} & set(self.extra_body))
        if clash:
            raise ConfigError(f"--extra-body: {', '.join(clash)} cannot be given there")


@dataclass(frozen=True)
class PromptConfig:
    """What the model is shown and asked for."""

    shots: int = 2
    """Examples of each class."""
    rewrite: Rewrite = "both"

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ConfigError(f"--shots: expected 0 or more, found {self.shots}")
