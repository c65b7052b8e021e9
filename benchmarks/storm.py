"""Hundreds of rude and wrong requests at once: nothing may break, leak or go unexplained.

Sends every case of ``lib/storm_cases.py`` (disconnects mid-stream, before the first byte and
mid-upload; wrong types and values; huge prompts; over-long ``max_tokens``; unknown models; bodies
that are no JSON) at the same time, in random order, and checks that no answer is a 5xx, that every
wrong request is answered 4xx with an ``error.param`` that names the field, that good requests are
served or told to come back (429 with Retry-After), and that afterwards ``/metrics`` shows no
running or waiting request and no KV page in use. One 5xx is right: in a storm of as many requests
as the server's ``--max-connections``, any of them may get the 503 ``too_many_connections`` with
Retry-After. Loopback addresses only. The last line is one JSON document; the exit code is 1 if
anything was violated.

    python -m benchmarks.storm --url http://127.0.0.1:8000 --num-requests 300
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lib.common import environment, metric_total, print_json, print_table
from benchmarks.lib.http_client import HttpClient, HttpConnection, Response, encode_request
from benchmarks.lib.storm_cases import Case, Hangup, Target, all_cases
from sortserve_client._sse import SSEDecoder

__all__ = ["Outcome", "main", "run_case", "violation_of"]

IDLE_METRICS = (
    "sortserve_kv_pages_used",
    "sortserve_num_requests_running",
    "sortserve_num_requests_waiting",
)
IDLE_TIMEOUT_S = 30.0
MAX_DELAY_S = 0.5
"""Latest moment at which an impatient client hangs up."""
MAX_CHUNKS = 20
SERVER_FULL = "too_many_connections"
"""The ``error.code`` of a connection beyond the server's ``--max-connections``."""
LAST_OF_RESPONSES = ("response.completed", "response.incomplete")
"""The last events of a stream of ``/v1/responses``."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one request."""

    case: Case
    status: int = 0
    error: dict[str, Any] | None = None
    """The ``error`` object of a refusal."""
    retry_after: str | None = None
    hung_up: bool = False
    complete: bool = True
    """Of a stream: it ended with ``[DONE]``."""
    failure: str | None = None
    """Why there was no answer."""


def violation_of(outcome: Outcome, *, fills_server: bool = False) -> str | None:
    """What the server did wrong; None if nothing.

    Args:
        outcome: of one request.
        fills_server: the storm has as many connections as the server takes, so that any request
            may be turned away before it is read.
    """
    case, status = outcome.case, outcome.status
    if outcome.hung_up:
        return None
    if outcome.failure is not None:
        return f"no answer: {outcome.failure}"
    if fills_server and status == 503 and (outcome.error or {}).get("code") == SERVER_FULL:
        return None if outcome.retry_after else "HTTP 503 without Retry-After"
    if status >= 500 or status not in case.statuses:
        return f"HTTP {status}, allowed {sorted(case.statuses)}: {outcome.error}"
    if status == 200:
        return None if outcome.complete else f"the stream broke: {outcome.error or 'no [DONE]'}"
    if status == 405:
        return None  # the framework's own answer; there is no field to name
    if not outcome.error or not outcome.error.get("message"):
        return f"HTTP {status} without error.message"
    if status == 429 and outcome.retry_after is None:
        return "HTTP 429 without Retry-After"
    if not case.names_field(outcome.error.get("param")):
        return f"error.param={outcome.error.get('param')!r}, expected {' or '.join(case.params)}"
    return None


async def run_case(client: HttpClient, case: Case, rng: random.Random) -> Outcome:
    """Sends one request on a connection of its own and goes away when the case says so."""
    headers = {**client.headers, **case.headers}
    data = encode_request(case.method, case.path, case.body, headers)
    if case.hangup is Hangup.MID_UPLOAD:
        data = data[: -len(case.body) // 2]
    num_chunks, delay_s = rng.randint(1, MAX_CHUNKS), rng.uniform(0, MAX_DELAY_S)
    enough = asyncio.Event()
    decoder, payloads = SSEDecoder(), list[str]()
    whole = bytearray()

    def on_body(piece: bytes) -> None:
        whole.extend(piece)
        payloads.extend(event.data for event in decoder.feed(piece))
        if len(payloads) >= num_chunks:
            enough.set()

    try:
        connection = await HttpConnection.open(client.host, client.port)
    except OSError as error:
        return Outcome(case=case, failure=f"{type(error).__name__}: {error}")
    answer = asyncio.ensure_future(connection.request(data, on_body))
    try:
        await _hang_up(case.hangup, answer, enough, delay_s)
        if not answer.done() and case.hangup is not Hangup.NEVER:
            return Outcome(case=case, hung_up=True)
        return _judge(case, await answer, payloads)
    except OSError as error:
        return Outcome(case=case, failure=f"{type(error).__name__}: {error}")
    finally:
        answer.cancel()
        connection.close()


async def _hang_up(
    hangup: Hangup, answer: asyncio.Future[Response], enough: asyncio.Event, delay_s: float
) -> None:
    """Waits until it is time to go (or the answer is here)."""
    if hangup is Hangup.NEVER:
        return
    waited: set[asyncio.Future[Any]] = {answer}
    if hangup is Hangup.MID_STREAM:
        waited.add(asyncio.ensure_future(enough.wait()))
    timeout_s = None if hangup is Hangup.MID_STREAM else delay_s
    _, pending = await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for future in pending - {answer}:
        future.cancel()


def _judge(case: Case, response: Response, payloads: Sequence[str]) -> Outcome:
    if response.status != 200:
        body = response.json()
        error = body.get("error") if isinstance(body, dict) else None
        return Outcome(
            case=case,
            status=response.status,
            error=error if isinstance(error, dict) else None,
            retry_after=response.headers.get("retry-after"),
        )
    streamed = response.headers.get("content-type", "").startswith("text/event-stream")
    broken = any(payload.startswith('{"error"') for payload in payloads)
    complete = not streamed or (bool(payloads) and _is_last(payloads[-1]) and not broken)
    return Outcome(case=case, status=200, complete=complete)


def _is_last(payload: str) -> bool:
    """Whether a stream is whole with this event."""
    return payload == "[DONE]" or json.loads(payload).get("type") in LAST_OF_RESPONSES


async def _describe_server(client: HttpClient, max_body_bytes: int) -> Target:
    response = await client.request("GET", "/v1/models")
    try:
        model = response.json()["data"][0]
    except (TypeError, KeyError, IndexError):
        raise OSError(f"GET /v1/models: HTTP {response.status}") from None
    return Target(
        model=model["id"],
        max_model_len=model.get("max_model_len") or 100_000,
        max_body_bytes=max_body_bytes,
    )


async def _wait_until_idle(client: HttpClient) -> list[str]:
    """Empty once nothing runs, waits or holds a page; else what is left after the time-out."""
    end_s = asyncio.get_running_loop().time() + IDLE_TIMEOUT_S
    while True:
        text = (await client.request("GET", "/metrics")).body.decode()
        totals = {name: metric_total(text, name) for name in IDLE_METRICS}
        left = [f"/metrics: {name} is {total}" for name, total in totals.items() if total != 0.0]
        if not left or asyncio.get_running_loop().time() > end_s:
            return left
        await asyncio.sleep(0.1)


async def _storm(
    arguments: argparse.Namespace, client: HttpClient
) -> tuple[list[Outcome], list[str]]:
    rng = random.Random(arguments.seed)
    target = await _describe_server(client, arguments.max_body_bytes)
    cases = list(itertools.islice(itertools.cycle(all_cases(target)), arguments.num_requests))
    rng.shuffle(cases)

    async def bounded(case: Case) -> Outcome:
        try:
            async with asyncio.timeout(arguments.timeout):
                return await run_case(client, case, rng)
        except TimeoutError:
            return Outcome(case=case, failure=f"nothing within {arguments.timeout:g} s")

    outcomes = list(await asyncio.gather(*(bounded(case) for case in cases)))
    leaks = await _wait_until_idle(client)
    after = await run_case(client, all_cases(target)[0], rng)
    if after.status != 200 or not after.complete:
        leaks.append(f"after the storm a good request got HTTP {after.status}: {after.error}")
    if (await client.request("GET", "/health")).status != 200:
        leaks.append("after the storm /health is not 200")
    return outcomes, leaks


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.storm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="loopback only")
    parser.add_argument("--num-requests", type=int, default=300, help="all at once; at most 2000")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for any answer")
    parser.add_argument("--max-body-bytes", type=int, default=4 << 20, help="the server's limit")
    parser.add_argument("--max-connections", type=int, default=1000, help="the server's limit")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.num_requests <= 2000:
        parser.error(f"--num-requests={arguments.num_requests} must be from 1 to 2000")
    if not _is_loopback(HttpClient(arguments.url).host):
        parser.error(f"--url={arguments.url} is not a loopback address: a storm stays at home")
    return arguments


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str] | None = None) -> int:
    """Runs the storm, prints what came of it; 1 if anything was violated."""
    arguments = parse_arguments(argv)
    described = environment()
    client = HttpClient(arguments.url)
    try:
        outcomes, leaks = asyncio.run(_storm(arguments, client))
    except OSError as error:
        print(f"{arguments.url}: {error}", file=sys.stderr)
        return 1
    answers = Counter("hung up" if o.hung_up else f"HTTP {o.status}" for o in outcomes)
    fills_server = arguments.num_requests >= arguments.max_connections
    judged = ((o.case.name, violation_of(o, fills_server=fills_server)) for o in outcomes)
    violations = [f"{name}: {problem}" for name, problem in judged if problem] + leaks
    print_table(["answer", "requests"], sorted(answers.items()))
    print_table(["checked", "result"], [["violations", len(violations)]])
    for violation in sorted(set(violations)):
        print(f"  {violation}")
    print_json("storm", arguments, described, {"answers": answers, "violations": violations})
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
