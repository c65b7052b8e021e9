"""Requests made up from the server's own OpenAPI document, and clients that leave at any byte.

The model is a real one, tiny and random: what a request asks of the sampler is really done.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sortserve.api.app import create_app
from sortserve.api.settings import ApiSettings
from sortserve.engine.engine import Engine
from sortserve.engine.worker import EngineWorker
from support.http_service import WAIT_S, as_json, listening
from support.serving import Served, serve
from support.tiny_models import make_tiny_checkpoint

if TYPE_CHECKING:  # importing it takes seconds, which only those who run these tests shall pay
    import schemathesis

MAX_QUEUED = 300
PATIENCE_S = 600.0
"""For a reply: on a machine that others keep busy too, one of thousands takes long."""
NUM_REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "10000"))
NUM_DISCONNECTS = int(os.environ.get("FUZZ_DISCONNECTS", "5000"))
"""Of the slow tests."""
GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "the", "max_tokens": 3},
    "/v1/completions": {"prompt": "the", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the"}], "max_tokens": 3},
    "/v1/responses": {"input": "the", "max_output_tokens": 3},
    "/tokenize": {"prompt": "the"},
    "/detokenize": {"tokens": [5, 6]},
}


@dataclass(frozen=True)
class Whole:
    """A server of which nothing may be left hanging."""

    app: FastAPI
    engine: Engine
    worker: EngineWorker

    def drain(self) -> None:
        """Stop, and see that no page, no place in the queue and no request is left."""
        assert asyncio.run(self.worker.drain(WAIT_S))
        stats = self.worker.stats()
        self.engine.check_invariants()
        assert (stats.num_running, stats.num_waiting, stats.kv_pages_used) == (0, 0, 0)
        assert not self.engine.has_work
        with self.worker._limits.reserve(MAX_QUEUED, 10**6, retry_after_s=lambda *over: 1.0):
            pass  # an empty queue holds as much as a queue can


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    path: Path = make_tiny_checkpoint(tmp_path_factory.mktemp("m"), "llama-tied", exits=(2, 4, 6))
    return serve(path)


@pytest.fixture
def whole(served: Served) -> Iterator[Whole]:
    engine = served.engine()
    worker = EngineWorker(engine, max_num_queued_reqs=MAX_QUEUED, max_num_queued_tokens=10**6)
    worker.start()
    yield Whole(
        create_app(worker, served.tokenizer, ApiSettings(served_model_name="m")), engine, worker
    )
    worker.stop()


# ---- requests made up from the document ----


def cases(app: FastAPI) -> st.SearchStrategy[tuple[schemathesis.Case[Any], random.Random]]:
    """A request of any operation, right or wrong, and dice."""
    import schemathesis
    from schemathesis.core.result import Ok

    document = schemathesis.openapi.from_dict(app.openapi())
    operations = [r.ok() for r in document.get_all_operations() if isinstance(r, Ok)]
    made_up = st.one_of(
        [
            operation.as_strategy(generation_mode=mode)
            for operation in operations
            for mode in schemathesis.GenerationMode
        ]
    )
    return st.tuples(made_up, st.randoms(use_true_random=False))


def mend(case: schemathesis.Case[Any], rng: random.Random) -> None:
    """Of every other body keep only some fields, in a good one: so they are looked at at all."""
    good = GOOD.get(case.operation.path)
    if good is None or not isinstance(case.body, dict) or rng.random() < 0.5:
        return
    names = sorted(set(case.body) - {"model"})
    kept = rng.sample(names, min(len(names), rng.randint(1, 3)))
    case.body = {**good, **{name: case.body[name] for name in kept}}


def check(case: schemathesis.Case[Any], reply: schemathesis.Response) -> None:
    """The reply is one that the document announces, and an error says what is wrong."""
    from schemathesis.specs.openapi import checks

    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert reply.status_code < 500, error
        assert error["message"].endswith((".", "?", "..."))
    wanted = [checks.status_code_conformance, checks.content_type_conformance]
    if "text/event-stream" not in reply.headers["content-type"][0]:
        wanted.append(checks.response_schema_conformance)
    case.validate_response(reply, checks=wanted)


@pytest.mark.parametrize(
    "count",
    [50, pytest.param(NUM_REQUESTS, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
@pytest.mark.filterwarnings("ignore")  # of the generator, about its own schemas
def test_whatever_the_document_allows_or_forbids_leaves_the_server_whole(
    whole: Whole, count: int
) -> None:
    statuses: Counter[int] = Counter()

    with listening(whole.app) as url:

        @seed(12)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases(whole.app))
        def send(made_up: tuple[schemathesis.Case[Any], random.Random]) -> None:
            case, rng = made_up
            mend(case, rng)
            reply = case.call(base_url=url, timeout=PATIENCE_S)
            statuses[reply.status_code] += 1
            check(case, reply)

        send()

    whole.drain()
    assert statuses.total() >= count
    assert {200, 400} <= set(statuses)


# ---- clients that leave ----


def any_bytes(rng: random.Random) -> bytes:
    """A good request."""
    path = rng.choice(["/generate", "/v1/completions", "/v1/chat/completions"])
    fields = {"max_tokens": rng.randint(1, 80), "stream": rng.random() < 0.7, "ignore_eos": True}
    if rng.random() < 0.3:
        fields["n"] = rng.randint(1, 3)
    body = as_json({**GOOD[path], **fields})
    offer = rng.choice(["", "", "Connection: Upgrade\r\nUpgrade: h2c\r\n"])
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{offer}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def leave_at_any_byte(host: str, port: int, rng: random.Random) -> str:
    """One client: sends some of its request, reads some of the answer, and is gone."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        request = any_bytes(rng)
        if rng.random() < 0.3:
            writer.write(request[: rng.randrange(len(request))])
            await writer.drain()
            return "while it sent"
        writer.write(request)
        await writer.drain()
        if rng.random() < 0.3:
            return "before the answer"
        await reader.read(rng.randint(1, 2000))
        return "in the answer"
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()  # a reset, without a word
        else:
            writer.close()


async def storm(url: str, count: int, at_once: int = 60) -> Counter[str]:
    """So many clients, some of them at once; when they left."""
    host, _, port = url.removeprefix("http://").partition(":")
    places = asyncio.Semaphore(at_once)

    async def client(number: int) -> str:
        async with places:
            return await leave_at_any_byte(host, int(port), random.Random(number))

    async with asyncio.timeout(7000):
        return Counter(await asyncio.gather(*(client(number) for number in range(count))))


@pytest.mark.parametrize(
    "count",
    [100, pytest.param(NUM_DISCONNECTS, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_clients_that_leave_at_any_byte_leave_nothing_behind(whole: Whole, count: int) -> None:
    with listening(whole.app) as url:
        left = asyncio.run(storm(url, count))

    whole.drain()
    assert left.total() == count
    assert min(left.values()) > count / 10
