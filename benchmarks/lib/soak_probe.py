"""The fixed request of a soak, and a fixed computation of our own beside it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from benchmarks.lib.faulty_process import FaultyProcess
from benchmarks.lib.process_samples import processor_time
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
    """Of a processor, for a fixed computation of our own."""
    slowdown: float = 1.0
    """What the server's threads ran and waited for a processor, over what they ran."""

    @property
    def machine_ms(self) -> float:
        """How long the fixed computation would have taken in the server's place."""
        return self.spin_ms * self.slowdown


def spin_ms() -> float:
    """How much of a processor's time a fixed computation takes."""
    started_s = time.thread_time()
    total = 0
    for number in range(SPIN_LOOPS):
        total += number
    return (time.thread_time() - started_s) * 1e3


async def probe(server: FaultyProcess, model: str, at_s: float) -> Probe | None:
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
    ran_ns, waited_ns = processor_time(server.pid)
    started_s = time.perf_counter()
    response = await server.client.request(
        "POST", "/v1/completions", json.dumps(body).encode(), on_body=on_body
    )
    if response.status != 200 or len(times_s) < 3:
        return None
    ran_after_ns, waited_after_ns = processor_time(server.pid)
    after_ms = spin_ms()
    ran_ns, waited_ns = max(1, ran_after_ns - ran_ns), max(0, waited_after_ns - waited_ns)
    return Probe(
        at_s=at_s,
        ttft_ms=(times_s[0] - started_s) * 1e3,
        tpot_ms=(times_s[-1] - times_s[0]) * 1e3 / (NUM_TOKENS - 1),
        spin_ms=(before_ms + after_ms) / 2,
        slowdown=(ran_ns + waited_ns) / ran_ns,
    )
