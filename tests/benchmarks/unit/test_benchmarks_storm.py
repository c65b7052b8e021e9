"""The storm: its clients are rude, its judge is strict."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.storm_cases import Case, Hangup, Target, all_cases
from benchmarks.storm import Outcome, parse_arguments, run_case, violation_of

from support.scripted_http import answer, scripted_server, token


@asynccontextmanager
async def connected(reply: bytes | None) -> AsyncIterator[HttpClient]:
    async with scripted_server(reply) as url:
        client = HttpClient(url)
        try:
            yield client
        finally:
            client.close()


CASE = Case(name="wrong", params=("max_tokens",))


def refusal(param: str | None, status: int = 400, **fields: Any) -> Outcome:
    error = {"message": "no", "param": param}
    return Outcome(case=fields.pop("case", CASE), status=status, error=error, **fields)


@pytest.mark.parametrize("param", ["max_tokens", "max_tokens.0", "max_tokens[3]"])
def test_a_refusal_that_names_the_field_is_right(param: str) -> None:
    assert violation_of(refusal(param)) is None


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        pytest.param(refusal(None), "error.param=None", id="no-field-named"),
        pytest.param(refusal("max_tokens_x"), "error.param", id="another-field-named"),
        pytest.param(refusal("max_tokens", 500), "HTTP 500", id="server-error"),
        pytest.param(refusal("max_tokens", 404), "HTTP 404", id="another-status"),
        pytest.param(Outcome(case=CASE, status=200), "HTTP 200", id="a-wrong-request-served"),
        pytest.param(Outcome(case=CASE, status=400), "without error.message", id="no-reason"),
        pytest.param(Outcome(case=CASE, failure="closed"), "no answer", id="no-answer"),
        pytest.param(
            refusal(None, 429, case=Case(name="polite", statuses=frozenset({200, 429}))),
            "without Retry-After",
            id="sent-away-without-a-time",
        ),
        pytest.param(
            Outcome(
                case=Case(name="polite", statuses=frozenset({200})), status=200, complete=False
            ),
            "the stream broke",
            id="stream-without-end",
        ),
    ],
)
def test_violations_are_found(outcome: Outcome, problem: str) -> None:
    assert problem in str(violation_of(outcome))


def test_a_full_server_may_turn_any_request_away_if_the_storm_fills_it() -> None:
    error = {"message": "no", "code": "too_many_connections"}
    refused = Outcome(case=CASE, status=503, error=error, retry_after="1")

    assert violation_of(refused, fills_server=True) is None
    assert "HTTP 503" in str(violation_of(refused)), "a small storm fills nothing"
    for wrong, problem in (
        (replace(refused, retry_after=None), "without Retry-After"),
        (replace(refused, error={"message": "no", "code": "failed"}), "HTTP 503"),
    ):
        assert problem in str(violation_of(wrong, fills_server=True))


def test_who_hung_up_is_owed_no_answer() -> None:
    assert violation_of(Outcome(case=CASE, hung_up=True)) is None


class Hasty(random.Random):
    """Leaves at once, or after the first chunk."""

    def uniform(self, a: float, b: float) -> float:
        return a

    def randint(self, a: int, b: int) -> int:
        return a


STALLED = b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\ndata: {}\n\n"


@pytest.mark.parametrize("hangup", [h for h in Hangup if h is not Hangup.NEVER])
async def test_a_rude_client_leaves_a_stream_that_never_ends(hangup: Hangup) -> None:
    case = Case(name="rude", body=b"{}", hangup=hangup, statuses=frozenset({200}))

    async with connected(STALLED) as client:
        outcome = await run_case(client, case, Hasty())

    assert outcome.hung_up


@pytest.mark.parametrize(
    ("reply", "complete"),
    [
        pytest.param(answer(token("a"), "[DONE]"), True, id="ended"),
        pytest.param(answer(token("a")), False, id="no-done"),
        pytest.param(answer({"error": {"message": "x"}}, "[DONE]"), False, id="error-inside"),
    ],
)
async def test_a_stream_is_whole_only_with_its_end(reply: bytes, complete: bool) -> None:
    streamed = reply.replace(b"200 OK\r\n", b"200 OK\r\ncontent-type: text/event-stream\r\n")
    async with connected(streamed) as client:
        outcome = await run_case(client, Case(name="polite", body=b"{}"), Hasty())

    assert (outcome.status, outcome.complete) == (200, complete)


def test_every_kind_of_hang_up_is_in_the_storm() -> None:
    cases = all_cases(Target(model="m", max_model_len=100, max_body_bytes=1000))

    assert {case.hangup for case in cases} == set(Hangup)
    assert len({case.name for case in cases}) > 100
    assert all(case.params for case in cases if case.name.startswith(("prompt: m", "budget.")))


@pytest.mark.parametrize("host", ["10.0.0.1", "example.org", "192.168.1.2"])
def test_a_storm_stays_on_this_machine(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--url", f"http://{host}:8000"])
    assert "not a loopback address" in capsys.readouterr().err
