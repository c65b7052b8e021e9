"""When the client tries again, and how long it waits."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from sortserve_client import (
    APIConnectionError,
    APITimeoutError,
    BadRequestError,
    BudgetUnattainableError,
    OverloadedError,
    ServerError,
    SortserveError,
    StreamError,
    UnavailableError,
)
from sortserve_client._retry import RetryPolicy, parse_retry_after

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)


def overloaded(retry_after_s: float | None = None) -> OverloadedError:
    return OverloadedError("full", status=429, retry_after_s=retry_after_s)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        pytest.param(None, None, id="absent"),
        pytest.param("3", 3.0, id="seconds"),
        pytest.param("0.5", 0.5, id="a-fraction"),
        pytest.param("-4", 0.0, id="the-past-means-now"),
        pytest.param("nan", None, id="not-a-number"),
        pytest.param("soon", None, id="nonsense"),
        pytest.param("Mon, 23 Nov 2026 12:00:07 GMT", 7.0, id="a-date"),
        pytest.param("Mon, 23 Nov 2026 12:00:07 -0000", 7.0, id="a-date-without-a-zone"),
        pytest.param("Mon, 23 Nov 2026 11:59:00 GMT", 0.0, id="a-date-in-the-past"),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(
    header: str | None, seconds: float | None
) -> None:
    assert parse_retry_after(header, NOW) == seconds


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(APIConnectionError("refused", sent=False), id="never-sent"),
        pytest.param(APITimeoutError("connect timeout", sent=False), id="connect-timeout"),
        pytest.param(overloaded(), id="429"),
        pytest.param(UnavailableError("loading", status=503), id="503"),
    ],
)
def test_what_cannot_have_run_is_tried_again(error: SortserveError) -> None:
    assert RetryPolicy().wait_s(error, attempt=0) is not None


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(APIConnectionError("reset", sent=True), id="may-have-run"),
        pytest.param(APITimeoutError("read timeout", sent=True), id="read-timeout"),
        pytest.param(BadRequestError("no", status=400), id="400"),
        pytest.param(ServerError("oops", status=500), id="500"),
        pytest.param(BudgetUnattainableError("no exit fits", status=429), id="budget"),
        pytest.param(StreamError("torn"), id="a-stream-that-had-begun"),
    ],
)
def test_what_may_have_run_or_cannot_get_better_is_not(error: SortserveError) -> None:
    assert RetryPolicy().wait_s(error, attempt=0) is None


def test_the_last_attempt_is_the_last() -> None:
    policy = RetryPolicy(max_retries=2)

    waits = [policy.wait_s(overloaded(), attempt) for attempt in range(3)]

    assert [wait is not None for wait in waits] == [True, True, False]


def test_the_wait_doubles_from_attempt_to_attempt_up_to_the_cap() -> None:
    policy = RetryPolicy(max_retries=9, max_wait_s=3.0, first_wait_s=1.0, jitter=lambda: 1.0)

    assert [policy.wait_s(overloaded(), attempt) for attempt in range(4)] == [1.0, 2.0, 3.0, 3.0]


def test_jitter_spreads_clients_over_the_upper_half_of_the_wait() -> None:
    waits = [
        RetryPolicy(first_wait_s=1.0, jitter=lambda j=j: j).wait_s(overloaded(), 0)  # type: ignore[misc]
        for j in (0.0, 0.5, 1.0)
    ]

    assert waits == [0.5, 0.75, 1.0]


def test_the_server_says_how_long_but_never_longer_than_the_cap() -> None:
    policy = RetryPolicy(max_wait_s=10.0)

    assert policy.wait_s(overloaded(4.0), attempt=1) == 4.0
    assert policy.wait_s(overloaded(3600.0), attempt=0) == 10.0


@pytest.mark.parametrize("values", [{"max_retries": -1}, {"max_wait_s": float("nan")}])
def test_a_policy_that_makes_no_sense_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        RetryPolicy(**values)  # type: ignore[arg-type]
