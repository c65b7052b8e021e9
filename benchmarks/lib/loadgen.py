"""Sends a load, open-loop or closed-loop, and records when every chunk came back."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks.lib.http_client import HttpClient
from sortserve_client._sse import SSEDecoder

__all__ = ["EventReader", "Planned", "RequestRecord", "Run", "run_closed_loop", "run_open_loop"]

COMPLETIONS = "/v1/completions"
DATA, END = b"data: ", b"\n\n"
NUM_LAST_CHUNKS = 3
"""Only these last chunks of an answer are decoded: finish reason, usage and budget."""


@dataclass(frozen=True)
class Planned:
    """A request ready to send."""

    body: bytes
    exit_layer: int | None = None
    due_s: float = 0.0


@dataclass(kw_only=True)
class RequestRecord:
    """What one client saw. Times are seconds on one monotonic clock."""

    exit_layer: int | None
    """The exit that was asked for."""
    due_s: float
    """When the request should have been sent; latencies count from here, so that a generator
    that falls behind does not flatter the server."""
    sent_s: float
    answered_s: float | None = None
    """When the whole response was there; None if there was none."""
    chunk_times_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    status: int = 0
    error: str | None = None
    cut: bool = False
    """The run ended while the answer was coming."""
    budget: dict[str, Any] | None = None
    """What the server reported of the budget, if it knows budgets."""

    @property
    def ok(self) -> bool:
        """Whether the whole answer came."""
        return self.error is None and not self.cut

    @property
    def ttft_s(self) -> float | None:
        """Due time to the first chunk."""
        return self.chunk_times_s[0] - self.due_s if self.chunk_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        if self.num_output_tokens < 2 or len(self.chunk_times_s) < 2:
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (self.num_output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """Due time to the last chunk."""
        return self.chunk_times_s[-1] - self.due_s if self.chunk_times_s else None

    @property
    def itls_s(self) -> list[float]:
        """The gaps between neighbouring chunks."""
        return [late - early for early, late in itertools.pairwise(self.chunk_times_s)]

    @property
    def served_exit(self) -> int | None:
        """The exit that the server says it used."""
        return self.budget.get("exit_layer") if self.budget else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished load."""

    records: Sequence[RequestRecord]
    started_s: float
    ended_s: float
    cpu_s: float
    """CPU time of the load generator itself."""

    @property
    def wall_s(self) -> float:
        """Start to end."""
        return self.ended_s - self.started_s


class EventReader:
    """The data of server-sent events, for as little CPU as can be: it is the server's, too.

    A piece that is nothing but whole events of one line is cut by hand, the rest by the client's
    decoder.
    """

    def __init__(self) -> None:
        self._decoder = SSEDecoder()
        self._is_between_events = True

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that ``piece`` completes, in order."""
        begins_anew, self._is_between_events = self._is_between_events, piece.endswith(END)
        if begins_anew and self._is_between_events and b"\r" not in piece:
            lines = piece[: -len(END)].split(END)
            if all(line.startswith(DATA) and b"\n" not in line for line in lines):
                return [line[len(DATA) :] for line in lines]
        return [event.data.encode() for event in self._decoder.feed(piece)]


async def run_closed_loop(
    client: HttpClient,
    plans: Sequence[Iterator[Planned]],
    *,
    num_requests: int | None = None,
    duration_s: float | None = None,
) -> Run:
    """One client per plan; each sends its next request when its last one is answered.

    Ends after ``num_requests`` in all or ``duration_s``, when answers still coming are cut.
    """
    assert num_requests is not None or duration_s is not None, "a load is bounded"
    tickets = iter(range(num_requests)) if num_requests is not None else itertools.count()
    records: list[RequestRecord] = []

    async def run_client(plan: Iterator[Planned]) -> None:
        for planned, _ in zip(plan, tickets, strict=False):
            record = await _send(client, planned, time.perf_counter(), records)
            if record.status == 0:
                break  # nobody answers: do not hammer

    started_s, cpu_s = time.perf_counter(), time.process_time()
    await _run_bounded([run_client(plan) for plan in plans], duration_s)
    return _finish(records, started_s, cpu_s)


async def run_open_loop(
    client: HttpClient, plan: Iterable[Planned], *, timeout_s: float | None = None
) -> Run:
    """Sends every request when it is due, however many are unanswered."""
    records: list[RequestRecord] = []
    started_s, cpu_s = time.perf_counter(), time.process_time()

    async def send_all() -> None:
        async with asyncio.TaskGroup() as group:
            for planned in plan:
                due_s = started_s + planned.due_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                group.create_task(_send(client, planned, due_s, records))

    await _run_bounded([send_all()], timeout_s)
    return _finish(records, started_s, cpu_s)


async def _run_bounded(work: Sequence[Any], timeout_s: float | None) -> None:
    tasks = [asyncio.ensure_future(part) for part in work]
    done, running = await asyncio.wait(tasks, timeout=timeout_s)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for task in done:
        task.result()  # a bug in the generator must not look like a quiet server


def _finish(records: Sequence[RequestRecord], started_s: float, cpu_s: float) -> Run:
    return Run(
        records=records,
        started_s=started_s,
        ended_s=time.perf_counter(),
        cpu_s=time.process_time() - cpu_s,
    )


async def _send(
    client: HttpClient, planned: Planned, due_s: float, records: list[RequestRecord]
) -> RequestRecord:
    """One request, recorded whatever becomes of it."""
    record = RequestRecord(exit_layer=planned.exit_layer, due_s=due_s, sent_s=time.perf_counter())
    records.append(record)
    events, last_chunks = EventReader(), list[bytes]()

    def on_body(piece: bytes) -> None:
        now = time.perf_counter()
        for data in events.feed(piece):
            if data != b"[DONE]":
                record.chunk_times_s.append(now)
                last_chunks.append(data)
        del last_chunks[:-NUM_LAST_CHUNKS]

    try:
        response = await client.request("POST", COMPLETIONS, planned.body, on_body=on_body)
    except asyncio.CancelledError:
        record.cut = True
        record.num_output_tokens = len(record.chunk_times_s)
        raise
    except OSError as error:
        record.error = f"{type(error).__name__}: {error}"
        return record
    record.status, record.answered_s = response.status, time.perf_counter()
    if response.status != 200:
        record.error = f"HTTP {response.status}: {response.body[:200].decode(errors='replace')}"
    else:
        _read_last_chunks(record, last_chunks)
    return record


def _read_last_chunks(record: RequestRecord, payloads: Sequence[bytes]) -> None:
    """Takes usage and budget from the last chunks; chunks that carry no token are not timed."""
    chunks = list[Any]()
    for payload in payloads:
        with suppress(ValueError):
            chunks.append(json.loads(payload))
    for chunk in chunks:
        if "error" in chunk:
            record.error = f"in the stream: {chunk['error']}"
        if chunk.get("budget"):
            record.budget = chunk["budget"]
        if usage := chunk.get("usage"):
            record.num_output_tokens = usage["completion_tokens"]
            record.num_prompt_tokens = usage["prompt_tokens"]
    num_without_token = sum(not _has_text(chunk) for chunk in chunks)
    surplus = len(record.chunk_times_s) - record.num_output_tokens
    del record.chunk_times_s[len(record.chunk_times_s) - min(num_without_token, max(surplus, 0)) :]
    if record.error is None and not record.num_output_tokens:
        record.error = "the stream ended without usage"


def _has_text(chunk: dict[str, Any]) -> bool:
    choices = chunk.get("choices") or [{}]
    return bool(choices[0].get("text"))
