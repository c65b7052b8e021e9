"""No body, whatever is in it, holds up the event loop, takes much memory or meets a 500.

Time is counted in processor time of this process: a busy machine adds none.
"""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
import tracemalloc
from asyncio import events
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from sortserve.process.garbage import calm_garbage_collector
from support.hostile import KINDS, HostileBody, hostile_bodies
from support.http_service import Connection, HttpService

LIMIT_BYTES = 4 << 20
LONGEST_ON_LOOP_S = 0.05
LONGEST_PAUSE_S = 0.1
ATTEMPTS = 4
"""The machine may be busy: of several the best one counts."""


@pytest.fixture(autouse=True, scope="module")
def _calm() -> Iterator[None]:
    """As in a server: what the tests have loaded is not walked again and again, now or later."""
    thresholds = gc.get_threshold()
    calm_garbage_collector()
    yield
    gc.set_threshold(*thresholds)


class Pauses:
    """What a thread of the process had to wait for: processor time between two of its turns."""

    def __init__(self) -> None:
        self.longest_on_loop_s = 0.0
        """One callback of the event loop."""
        self.longest_s = 0.0
        """All threads together, while this one wanted a turn: one of them held the interpreter."""

    @property
    def are_short(self) -> bool:
        return self.longest_on_loop_s < LONGEST_ON_LOOP_S and self.longest_s < LONGEST_PAUSE_S

    @contextmanager
    def watched(self) -> Iterator[None]:
        run_callback = events.Handle._run

        def timed(handle: events.Handle) -> None:
            start = time.thread_time()
            run_callback(handle)
            self.longest_on_loop_s = max(self.longest_on_loop_s, time.thread_time() - start)

        stop = threading.Event()

        def tick() -> None:
            before = time.process_time()
            while not stop.wait(0.001):
                now = time.process_time()
                self.longest_s = max(self.longest_s, now - before)
                before = now

        ticker = threading.Thread(target=tick)
        events.Handle._run = timed  # type: ignore[method-assign, assignment]
        ticker.start()
        try:
            yield
        finally:
            stop.set()
            ticker.join()
            events.Handle._run = run_callback  # type: ignore[method-assign]


async def answer(service: HttpService, body: HostileBody, content: bytes) -> int:
    """Send it, and check that the answer is a reply or an error that names something."""
    connection = Connection(service.app, body.path, content)
    await connection.open()
    assert connection.status is not None
    if connection.status != 200:
        error = json.loads(connection.content)["error"]
        assert len(error["message"]) < 1100
        assert error["param"] is not None or error["code"] in ("invalid_json", "queue_full"), error
    return connection.status


async def try_all(service: HttpService, bodies: Iterable[HostileBody]) -> None:
    """Each one is answered without a 5xx; pauses are told with the body that made them."""
    await service.post("/generate", {"prompt": "a", "max_tokens": 1})  # what is made once
    for body in bodies:
        attempts = [await try_one(service, body)]
        while len(attempts) < ATTEMPTS and not attempts[-1].are_short:
            attempts.append(await try_one(service, body))
        assert attempts[-1].are_short, f"{body}: {[vars(attempt) for attempt in attempts]}"


async def try_one(service: HttpService, body: HostileBody) -> Pauses:
    pauses, content = Pauses(), body.content
    with pauses.watched():
        status = await answer(service, body, content)
        await asyncio.sleep(0)
    assert status < 500, str(body)
    return pauses


def each_kind_once(size: int) -> Iterator[HostileBody]:
    """Of all bodies one of each kind, routes and fields taking turns."""
    by_kind: dict[str, list[HostileBody]] = {kind: [] for kind in KINDS}
    for body in hostile_bodies(size):
        by_kind[body.kind].append(body)
    for turn, bodies in enumerate(by_kind.values()):
        yield bodies[7 * turn % len(bodies)]


async def test_a_small_hostile_body_holds_up_nobody(shared: HttpService) -> None:
    await try_all(shared, each_kind_once(8000))


async def test_a_hostile_body_of_the_largest_size_holds_up_nobody(shared: HttpService) -> None:
    size = LIMIT_BYTES - 200
    kinds = ["messages", "parts", "names", "lists", "token ids", "escaped emoji"]
    worst = [HostileBody("/v1/chat/completions", "messages", kind, size) for kind in kinds]
    await try_all(shared, [*worst, *each_kind_once(size)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [6000, 60_000, 600_000, LIMIT_BYTES - 200])
async def test_no_hostile_body_holds_up_anybody(shared: HttpService, size: int) -> None:
    await try_all(shared, hostile_bodies(size))


async def check_memory(service: HttpService, bodies: Iterable[HostileBody]) -> None:
    """What Python allocates for a request, its body included."""
    await service.post("/generate", {"prompt": "a", "max_tokens": 1})
    for body in bodies:
        content = body.content
        tracemalloc.start()
        await answer(service, body, content)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(content) + peak < 3 * LIMIT_BYTES, str(body)


async def test_a_hostile_body_takes_at_most_three_times_its_memory(shared: HttpService) -> None:
    path, size = "/v1/completions", LIMIT_BYTES - 200
    kinds = ["letters and one emoji", "escaped emoji", "escaped quotes", "token ids", "lists"]
    await check_memory(shared, [HostileBody(path, "prompt", kind, size) for kind in kinds])


@pytest.mark.slow
async def test_what_is_read_takes_at_most_three_times_the_limit(shared: HttpService) -> None:
    """Bodies that are no larger than what is let through to the parser."""
    bodies = [
        HostileBody("/tokenize", "prompt", "letters", 524_000),
        HostileBody("/v1/completions", "prompt", "emoji", 1_300_000),
        HostileBody("/v1/completions", "prompt", "letters and one emoji", 524_000),
        HostileBody("/v1/completions", "prompt", "token ids", 1_000_000),
        HostileBody("/v1/completions", "x", "names", 48_000),
        HostileBody("/v1/completions", "x", "lists", 12_000),
        HostileBody("/v1/chat/completions", "messages", "objects", 220_000),
        HostileBody("/v1/chat/completions", "messages", "messages", 110_000),
        HostileBody("/v1/chat/completions", "messages", "parts", 27_000),
        HostileBody("/detokenize", "tokens", "token ids", 60_000),
    ]
    await check_memory(shared, bodies)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", [60_000, 600_000, 2_100_000, LIMIT_BYTES - 200])
async def test_no_hostile_body_takes_more_than_three_times_the_limit(
    shared: HttpService, size: int
) -> None:
    await check_memory(shared, hostile_bodies(size))


def test_every_kind_is_json_but_the_one_that_is_cut_off() -> None:
    for kind, make in KINDS.items():
        if kind not in ("cut off", "depth", "depth of objects", "digits"):
            json.loads(make(1000))
