"""The load generator and its figures: what a client saw must be what is reported."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from benchmarks.lib.http_client import HttpClient, NoResponseError, encode_request
from benchmarks.lib.loadgen import (
    EventReader,
    Planned,
    RequestRecord,
    Run,
    run_closed_loop,
    run_open_loop,
)
from benchmarks.lib.report import met_budget, report
from benchmarks.mixed_depth import mixed_figures

from support.scripted_http import USAGE, answer, scripted_server, token


def record(*, exit_layer: int | None = None, times: tuple[float, ...] = (), **fields: Any) -> Any:
    defaults: dict[str, Any] = {"due_s": 0.0, "sent_s": 0.0, "num_output_tokens": len(times)}
    return RequestRecord(exit_layer=exit_layer, chunk_times_s=list(times), **(defaults | fields))


def run_of(*records: RequestRecord, wall_s: float = 10.0) -> Run:
    return Run(records=records, started_s=0.0, ended_s=wall_s, cpu_s=0.1)


# Figures


def test_times_count_from_when_the_request_was_due() -> None:
    late = record(times=(3.0, 3.5, 4.0), due_s=1.0, sent_s=2.0)

    assert (late.ttft_s, late.tpot_s, late.e2e_s) == (2.0, 0.5, 3.0)
    assert late.itls_s == [0.5, 0.5]


def test_chunks_of_several_tokens_do_not_flatter_the_time_per_token() -> None:
    assert record(times=(1.0, 2.0), num_output_tokens=5).tpot_s == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("budget", "met"),
    [
        pytest.param({"latency_ms": 2000}, True, id="within"),
        pytest.param({"latency_ms": 1999}, False, id="answer-late"),
        pytest.param({"latency_ms": 5000, "ttft_ms": 500}, False, id="first-token-late"),
        pytest.param({"tpot_ms": 1000}, True, id="tokens-in-time"),
        pytest.param({"on_miss": "reject"}, None, id="no-time-is-bounded"),
    ],
)
def test_a_budget_is_met_only_if_every_time_is_kept(
    budget: dict[str, Any], met: bool | None
) -> None:
    assert met_budget(record(times=(1.0, 2.0)), budget) is met


def test_a_failed_request_misses_its_budget() -> None:
    assert met_budget(record(error="HTTP 429"), {"latency_ms": 1e6}) is False


def test_a_report_keeps_classes_apart_and_counts_cut_answers_for_throughput_only() -> None:
    figures = report(
        run_of(
            record(exit_layer=9, times=(1.0, 1.1, 1.2), num_prompt_tokens=7),
            record(exit_layer=30, times=(1.0, 1.4)),
            record(exit_layer=30, times=(2.0, 9.0), cut=True),
            record(budget={"exit_layer": 30}, times=(2.0, 2.4)),
            record(exit_layer=30, error="HTTP 500"),
        )
    )

    assert list(figures["classes"]) == ["exit 9", "exit 30"]
    assert figures["classes"]["exit 9"]["tpot_ms"]["p50"] == pytest.approx(100)
    assert figures["classes"]["exit 30"]["tpot_ms"]["p50"] == pytest.approx(400)
    assert (figures["num_finished"], figures["num_cut"], figures["num_failed"]) == (3, 1, 1)
    assert figures["output_tokens_per_s"] == pytest.approx(0.9)
    assert figures["total_tokens_per_s"] == pytest.approx(1.6)
    assert figures["errors"] == ["HTTP 500"]


def test_mixed_figures_pool_the_rounds_of_a_policy() -> None:
    shallow = [record(exit_layer=9, times=(0.0, step)) for step in (0.1, 0.2, 0.3)]
    deep = [record(exit_layer=30, times=(0.0, 0.5))]

    figures = mixed_figures([run_of(*shallow), run_of(*deep)], shallow=9, deep=30)

    assert figures["tpot_ratio"] == pytest.approx(0.4)
    assert figures["output_tokens_per_s"] == pytest.approx(8 / 20)


def test_mixed_figures_need_both_classes() -> None:
    only_shallow = run_of(record(exit_layer=9, times=(0.0, 0.1)))

    with pytest.raises(ValueError, match="no request at exit 30 finished"):
        mixed_figures([only_shallow], shallow=9, deep=30)


# The generator against a scripted server


@asynccontextmanager
async def connected(reply: bytes | None) -> AsyncIterator[HttpClient]:
    async with scripted_server(reply) as url:
        client = HttpClient(url)
        try:
            yield client
        finally:
            client.close()


async def send_one(reply: bytes | None) -> RequestRecord:
    async with connected(reply) as client:
        run = await run_open_loop(client, [Planned(b"{}", exit_layer=9)])
    return run.records[0]


async def test_a_streamed_answer_is_recorded_with_usage_and_budget() -> None:
    last = token("", budget={"exit_layer": 9, "met": True})
    got = await send_one(answer(token("a"), token("b"), last, USAGE, "[DONE]"))

    assert got.ok
    assert (got.num_prompt_tokens, got.num_output_tokens) == (5, 2)
    assert len(got.chunk_times_s) == 2  # neither the closing chunk nor the usage is a token
    assert got.served_exit == 9


STREAM = b"data: a\n\ndata: b\n\n: waiting\n\ndata: c\ndata: d\n\ndata: e\r\n\r\ndata: f\n\n"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9, 18, len(STREAM)])
def test_events_are_read_alike_wherever_the_stream_is_cut(size: int) -> None:
    events = EventReader()
    pieces = [STREAM[i : i + size] for i in range(0, len(STREAM), size)]

    read = [data for piece in pieces for data in events.feed(piece)]

    assert read == [b"a", b"b", b"c\nd", b"e", b"f"]


async def test_an_error_in_the_stream_is_a_failure() -> None:
    got = await send_one(answer(token("a"), {"error": {"message": "broken"}}, "[DONE]"))

    assert not got.ok
    assert "broken" in str(got.error)


async def test_a_stream_without_usage_is_a_failure() -> None:
    assert "without usage" in str((await send_one(answer(token("a"), "[DONE]"))).error)


async def test_a_refusal_is_a_failure_with_its_status() -> None:
    got = await send_one(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy")

    assert (got.status, got.error) == (429, "HTTP 429: busy")


async def test_a_connection_closed_without_an_answer_is_a_failure() -> None:
    assert str((await send_one(None)).error).startswith(NoResponseError.__name__)


async def test_a_closed_loop_sends_exactly_what_was_asked_over_kept_connections() -> None:
    async with connected(answer(token("a"), token("b"), USAGE, "[DONE]")) as client:
        plans = [itertools.repeat(Planned(b"{}", exit_layer)) for exit_layer in (9, 30)]
        run = await run_closed_loop(client, plans, num_requests=7)

    assert len(run.records) == 7
    assert {r.exit_layer for r in run.records} == {9, 30}
    assert all(r.ok for r in run.records)


async def test_answers_still_coming_at_the_end_are_cut() -> None:
    half = b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\ndata: {}\n\n"
    async with connected(half) as client:
        run = await run_closed_loop(client, [itertools.repeat(Planned(b"{}"))], duration_s=0.05)

    assert [(r.cut, r.ok) for r in run.records] == [(True, False)]


def test_only_plain_http_urls_are_taken() -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        HttpClient("https://127.0.0.1:1")


def test_a_request_can_lie_about_its_length() -> None:
    lines = encode_request("POST", "/x", b"abc", {"content-length": "9"}).split(b"\r\n")

    assert lines[0] == b"POST /x HTTP/1.1"
    assert b"content-length: 9" in lines
    assert lines[-1] == b"abc"
