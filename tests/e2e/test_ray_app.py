"""The Serve application behind Ray's own HTTP proxy, and a new version of it under load."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sortserve import LLM, SamplingParams
from support.otlp import Received, http_receiver
from support.tiny_models import make_tiny_checkpoint

pytest.importorskip("ray.serve", reason="needs the extra `ray`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

EXITS = (2, 4, 6)
TOKENS = 60
BODY = {"model": "m", "prompt": "The sea is", "max_tokens": TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_checkpoint(folder, "llama-untied", EXITS, {2: "norm", 4: "mlp"})


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> str:
    with LLM(str(checkpoint), dtype="float32", device="cpu", kv_cache_memory=8 << 20) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        return llm.generate("The sea is", params)[0].text


def arguments(checkpoint: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(checkpoint),
        "served_model_name": "m",
        "replicas": 2,
        "num_threads": 1,
        "dtype": "float32",
        "device": "cpu",
        "kv_cache_memory": "8MiB",
        "calibrate": False,
        **more,
    }


@pytest.fixture(scope="module")
def collector() -> Iterator[Received]:
    with http_receiver() as received:
        yield received


@pytest.fixture(scope="module")
def url(checkpoint: Path, collector: Received) -> Iterator[str]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    from sortserve.ray import build_app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=8, object_store_memory=100 << 20, include_dashboard=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        traced = arguments(checkpoint, otlp_traces_endpoint=collector.url)
        serve.run(build_app(traced), name="sortserve", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


async def streamed(client: httpx.AsyncClient) -> tuple[str, int]:
    """The text of a stream, and its number of tokens."""
    text, count = "", 0
    body = {**BODY, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                text, count = text + event["choices"][0]["text"], count + 1
    return text, count


async def whole(client: httpx.AsyncClient) -> str:
    reply = await client.post("/v1/completions", json={**BODY, "temperature": 0})
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


async def test_the_application_answers_as_one_engine(url: str, expected: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=400) as client:
        health = await client.get("/health")
        answers = await asyncio.gather(*(whole(client) for _ in range(4)))
        streams = await asyncio.gather(*(streamed(client) for _ in range(4)))
        refused = await client.post("/v1/completions", json={**BODY, "max_tokens": 0.5})

    assert list(health.json()["replicas"].values()) == ["ready", "ready"]
    assert answers == [expected] * 4
    assert [text for text, _ in streams] == [expected] * 4
    assert refused.status_code == 400
    assert len(refused.headers.get_list("x-request-id")) == 1, "Ray's proxy has one, too"


async def test_a_rolling_update_drops_nothing(url: str, checkpoint: Path, expected: str) -> None:
    from ray import serve

    from sortserve.ray import build_app

    is_over = False
    answers: list[str] = []

    async def ask(client: httpx.AsyncClient, is_streamed: bool) -> None:
        while not is_over:
            answers.append((await streamed(client))[0] if is_streamed else await whole(client))

    async with httpx.AsyncClient(base_url=url, timeout=400) as client:
        before = set((await client.get("/health")).json()["replicas"])
        asking = [asyncio.create_task(ask(client, i % 2 == 0)) for i in range(4)]
        app = build_app(arguments(checkpoint, max_num_seqs=99))
        await asyncio.to_thread(serve.run, app, name="sortserve", route_prefix="/")
        now: dict[str, str] = {}
        async with asyncio.timeout(800):
            while now.keys() & before or list(now.values()) != ["ready", "ready"]:
                await asyncio.sleep(0.2)
                now = (await client.get("/health")).json()["replicas"]
        is_over = True
        await asyncio.gather(*asking)

    assert len(answers) >= 8
    assert set(answers) == {expected}


async def test_an_ingress_that_ended_has_sent_its_last_spans(url: str, collector: Received) -> None:
    """The engines' spans are parts of its own; without those nobody sees which request they are."""

    def orphans() -> set[bytes]:
        spans = collector.spans
        of_sequences = [span for span in spans if span.name == f"text_completion {BODY['model']}"]
        assert of_sequences
        return {own.parent_span_id for own in of_sequences} - {own.span_id for own in spans}

    async with asyncio.timeout(120):  # the old one may still be about to end
        while orphans():
            await asyncio.sleep(0.2)
