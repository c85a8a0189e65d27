"""What a server's headers ask for."""

from __future__ import annotations

import pytest

from mtbert.augmentation.rate_limit import asked_for, backoff


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 1970 00:16:50 GMT"}, 10),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:50 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}, 90),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "garbage"}, None),
        ({"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "20s"}, None),
    ],
)
def test_headers(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_for(headers, now=1000.0) == seconds


def test_backoff_doubles_with_a_spread_and_ends_at_a_minute() -> None:
    for tries, longest in ((1, 2.0), (2, 4.0), (5, 32.0), (9, 60.0), (2000, 60.0)):
        waits = [backoff(2.0, tries) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
