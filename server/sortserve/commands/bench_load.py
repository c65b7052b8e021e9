"""Sends a load to a server, and notes when every token came back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sortserve.commands.bench_figures import Seen
from sortserve.process.console import one_line
from sortserve_client import AsyncClient, Budget, SortserveError

__all__ = ["Load", "arrivals", "prompts", "run_load"]

WORDS = (
    "the sea is wide and at night the city sleeps while rain falls on roofs of slate, and a train "
    "of seven grey cars leaves for the north; somebody counts: one, two, three, five, eight. Why "
    "do birds return each spring? Nobody wrote it down, but every child in that valley knows."
)
"""Its tokens, in any order, are the prompts: every one of them is a token of the server's."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to send."""

    num_requests: int
    num_clients: int | None
    """Closed loop: so many clients, each of which waits for its answer. None: open loop."""
    rate: float | None
    """Open loop: requests a second, at random times (a Poisson process). None: closed loop."""
    budget: Budget
    options: Mapping[str, Any]
    """Sampling fields of every request."""
    seed: int


def arrivals(rate: float, count: int, rng: random.Random) -> list[float]:
    """Times of ``count`` requests that come independently of each other, in seconds from 0.

    Args:
        rate: requests a second, in the mean.
        count: how many.
        rng: the source of chance.
    """
    times, now_s = [], 0.0
    for _ in range(count):
        times.append(now_s)
        now_s += rng.expovariate(rate)
    return times


def prompts(tokens: Sequence[int], length: int, rng: random.Random) -> Iterator[list[int]]:
    """Prompts of ``length`` tokens without end, no two alike: no cache of prefixes helps them.

    Args:
        tokens: ids to draw from.
        length: of each prompt.
        rng: the source of chance.
    """
    while True:
        yield rng.choices(tokens, k=length)


async def run_load(
    client: AsyncClient,
    load: Load,
    prompt_source: Iterator[list[int]],
    on_done: Callable[[int], object] = lambda count: None,
) -> list[Seen]:
    """Send it all; returns what was seen, in the order of sending.

    Args:
        client: of the server. It must not retry: a request that waits for its second attempt
            would look like a slow one.
        load: what to send.
        prompt_source: a prompt for each request.
        on_done: is told how many requests are over.
    """
    records: list[Seen] = []
    num_done = 0

    async def send(due_s: float) -> None:
        nonlocal num_done
        seen = Seen(due_s=due_s)
        records.append(seen)
        await _send(client, load, next(prompt_source), seen)
        num_done += 1
        on_done(num_done)

    async with asyncio.TaskGroup() as group:
        if load.rate is not None:
            started_s = time.perf_counter()
            for offset_s in arrivals(load.rate, load.num_requests, random.Random(load.seed)):
                due_s = started_s + offset_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                group.create_task(send(due_s))
        else:
            assert load.num_clients is not None
            tickets = iter(range(load.num_requests))

            async def one_client() -> None:
                for _ in tickets:
                    await send(time.perf_counter())

            for _ in range(min(load.num_clients, load.num_requests)):
                group.create_task(one_client())
    return records


async def _send(client: AsyncClient, load: Load, prompt: list[int], seen: Seen) -> None:
    """One request, noted whatever becomes of it."""
    try:
        async with client.stream(prompt, budget=load.budget, **load.options) as stream:
            async for event in stream:
                if event.exit_layer is not None:  # an event without one has no token
                    seen.token_times_s.append(time.perf_counter())
            answer = await stream.result()
    except SortserveError as error:
        seen.error = one_line(f"{type(error).__name__}: {error.message}")
        return
    seen.num_prompt_tokens = answer.usage.prompt_tokens
    seen.tokens_by_exit = answer.budget.tokens_by_exit
    seen.met = answer.budget.met
    seen.is_cut = answer.finish_reason == "deadline"
    if not seen.token_times_s:
        seen.error = "an answer without a token"
