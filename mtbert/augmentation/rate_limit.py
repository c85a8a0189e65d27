"""How long to wait before a request is sent again: as long as the server says, else longer from try to try."""

from __future__ import annotations

import email.utils
import math
import random
import re
import time
from collections.abc import Mapping

MOST_BACKOFF = 60.0
"""Seconds; what a server asks for may be longer."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def asked_for(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """The seconds that a server's headers ask to wait; None where they say nothing.

    `retry-after-ms`, then `retry-after` (seconds or a date), then `x-ratelimit-reset-requests` or `-tokens` (`1m30s`)
    where nothing of that kind remains. headers: with small letters. now: seconds since the epoch.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    after = headers.get("retry-after")
    if after is not None:
        seconds = _number(after)
        if seconds is not None:
            return seconds
        try:
            moment = email.utils.parsedate_to_datetime(after).timestamp()
            return max(0.0, moment - (time.time() if now is None else now))
        except (TypeError, ValueError, OverflowError):
            pass
    waits = []
    for kind in ("requests", "tokens"):
        remaining = headers.get(f"x-ratelimit-remaining-{kind}")
        reset = _duration(headers.get(f"x-ratelimit-reset-{kind}"))
        if reset is not None and remaining is not None and _number(remaining) == 0:
            waits.append(reset)
    return max(waits) if waits else None


def backoff(first: float, tries: int) -> float:
    """Seconds to wait after `tries` failures (from 1): twice as long each time, between half of that and all of it.

    The spread keeps requests that failed together from coming back together.
    """
    longest = min(first * 2.0 ** min(tries - 1, 30), max(MOST_BACKOFF, first))
    return longest * random.uniform(0.5, 1.0)


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _duration(text: str | None) -> float | None:
    """`1m30s`, `20ms`, or plain seconds."""
    if text is None:
        return None
    plain = _number(text)
    if plain is not None:
        return plain
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
