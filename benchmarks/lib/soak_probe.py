"""The fixed request of a soak, and a fixed computation of our own beside it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from benchmarks.lib.http_client import HttpClient
from sortserve_client._sse import SSEDecoder

__all__ = ["Probe", "probe", "spin_ms"]

NUM_TOKENS = 24
SPIN_LOOPS = 200_000


@dataclass(frozen=True)
class Probe:
    """One probe request, and how fast the machine was just then."""

    at_s: float
    ttft_ms: float
    tpot_ms: float
    spin_ms: float


def spin_ms() -> float:
    """How long a fixed computation takes on the clock; neighbours make it longer."""
    started_s = time.perf_counter()
    total = 0
    for number in range(SPIN_LOOPS):
        total += number
    return (time.perf_counter() - started_s) * 1e3


async def probe(client: HttpClient, model: str, at_s: float) -> Probe | None:
    """Send it; None if it was told to come back later.

    Raises:
        OSError: there was no answer.
    """
    body = {
        "model": model,
        "prompt": "The probe of a soak: always the same words.",
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "cache_salt": f"{at_s}",  # never a cached prefix
    }
    decoder, times_s = SSEDecoder(), list[float]()

    def on_body(piece: bytes) -> None:
        now = time.perf_counter()
        times_s.extend(now for event in decoder.feed(piece) if event.data != "[DONE]")

    before_ms = spin_ms()
    started_s = time.perf_counter()
    response = await client.request(
        "POST", "/v1/completions", json.dumps(body).encode(), on_body=on_body
    )
    if response.status != 200 or len(times_s) < 3:
        return None
    after_ms = spin_ms()
    return Probe(
        at_s=at_s,
        ttft_ms=(times_s[0] - started_s) * 1e3,
        tpot_ms=(times_s[-1] - times_s[0]) * 1e3 / (NUM_TOKENS - 1),
        spin_ms=(before_ms + after_ms) / 2,
    )
