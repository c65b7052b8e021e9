"""Two engines under Ray Serve on one machine: as one server, and when one of them is killed.

Ray takes half a minute to start and each replica a few hundred megabytes, so one server does for
all tests, in their order.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from sortserve import LLM, Budget, SamplingParams
from support.processes import has_ended
from support.server_process import Server
from support.tiny_models import make_tiny_checkpoint

pytest.importorskip("ray.serve", reason="needs the extra `ray`")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EXITS = (2, 4, 6)
FLAGS = ("--num-threads=1", "--dtype=float32", "--device=cpu", "--kv-cache-memory=8MiB")
MODEL = "m"
TOKENS = 200
TEXT: dict[str, Any] = {"model": MODEL, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
WAIT_S = 400
"""Ray starts a process and imports torch in it: a minute on two idle cores, many on busy ones."""
PROMPTS = ("The sea is", "In the", "other")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_checkpoint(folder, "llama-untied", EXITS, {2: "norm", 4: "mlp"})


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[tuple[str, int], str]:
    """What one engine says, by prompt and exit."""
    with LLM(str(checkpoint), dtype="float32", device="cpu", kv_cache_memory=8 << 20) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        return {
            (prompt, exit_layer): llm.generate(
                prompt, params, budget=Budget(exit_layer=exit_layer)
            )[0].text
            for prompt in PROMPTS
            for exit_layer in EXITS
        }


def started(checkpoint: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sortserve", "serve", str(checkpoint)]
    command += [*FLAGS, "--port=0", f"--served-model-name={MODEL}", "--no-calibrate"]
    command += ["--log-format=json", "--shutdown-timeout=60", *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SORTSERVE_", "RAY_"))}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with started(checkpoint, "--replicas=2") as process:
        try:
            yield Server(process)
        finally:
            process.kill()


def replicas_of(server: Server) -> dict[str, str]:
    found: dict[str, str] = httpx.get(f"{server.url}/health").json()["replicas"]
    return found


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of a stream, and the error that ended it."""
    text = ""
    error: dict[str, Any] = {}
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                error = event.get("error", error)
                text += event["choices"][0]["text"] if "choices" in event else ""
    return text, error


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    reply = await client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


def series(server: Server, name: str) -> dict[str, float]:
    """The sum of a metric over all labels but the replica."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f"{name}{{"):
            replica = line.split('replica="')[1].split('"')[0]
            found[replica] = found.get(replica, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


async def test_replies_of_both_are_those_of_one_engine(
    server: Server, expected: dict[tuple[str, int], str]
) -> None:
    bodies = [
        ({**TEXT, "prompt": prompt, "budget": {"exit_layer": exit_layer}}, text)
        for (prompt, exit_layer), text in expected.items()
    ]
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        answers = await asyncio.gather(*(whole(client, body) for body, _ in bodies))
        streams = await asyncio.gather(*(streamed(client, body) for body, _ in bodies))

    assert answers == [text for _, text in bodies]
    assert streams == [(text, {}) for _, text in bodies]
    tokens = series(server, "sortserve_generation_tokens_total")
    assert sorted(tokens) == sorted(replicas_of(server)), "one scrape has all"
    assert all(tokens.values()), "both have worked"
    assert sum(tokens.values()) == 2 * len(bodies) * TOKENS


def test_engines_are_as_urgent_as_their_server(server: Server) -> None:
    def niceness(process: int) -> int:
        return os.getpriority(os.PRIO_PROCESS, process)

    processes = engine_processes(server)

    assert [niceness(own) for own in processes] == [niceness(server.process.pid)] * 2


async def test_a_client_that_leaves_frees_the_pages(server: Server) -> None:
    body = {**TEXT, "prompt": "a", "n": 8, "stream": True}
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client,
        client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        async for _ in reply.aiter_lines():
            break

    deadline = time.monotonic() + WAIT_S
    while sum(series(server, "sortserve_kv_pages_used").values()) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert set(series(server, "sortserve_kv_pages_used").values()) == {0.0}
    metric = "sortserve_request_success_total"
    text = httpx.get(f"{server.url}/metrics").text
    aborted = [own for own in text.splitlines() if metric in own and 'reason="abort"' in own]
    assert sum(float(own.rsplit(" ", 1)[1]) for own in aborted) > 0, "it heard of it in time"


async def test_a_killed_replica_loses_only_its_own_streams(
    server: Server, expected: dict[tuple[str, int], str]
) -> None:
    bodies = [
        ({**TEXT, "prompt": prompt, "budget": {"exit_layer": exit_layer}}, text)
        for (prompt, exit_layer), text in expected.items()
    ]
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        streams = [asyncio.create_task(streamed(client, own)) for own, _ in bodies]
        answers = [asyncio.create_task(whole(client, own)) for own, _ in bodies]
        while len(series(server, "sortserve_generation_tokens_total")) < 2 or not all(
            series(server, "sortserve_num_requests_running").values()
        ):
            await asyncio.sleep(0.01)
        os.kill(engine_processes(server)[0], signal.SIGKILL)
        ended = await asyncio.gather(*streams)
        wholes = await asyncio.gather(*answers)

    assert wholes == [text for _, text in bodies], "they are made anew elsewhere"
    for (text, error), (_, right) in zip(ended, bodies, strict=True):
        assert right.startswith(text)
        assert text == right if not error else error["code"] == "replica_lost"
    assert not all(error for _, error in ended), "those of the other replica run on"
    assert "ready" in replicas_of(server).values()


async def test_another_replica_takes_its_place(server: Server) -> None:
    deadline = time.monotonic() + WAIT_S
    while list(replicas_of(server).values()) != ["ready"] * 2 and time.monotonic() < deadline:
        await asyncio.sleep(0.2)

    assert list(replicas_of(server).values()) == ["ready"] * 2


async def test_sigterm_lets_what_runs_end(
    server: Server, expected: dict[tuple[str, int], str]
) -> None:
    processes = engine_processes(server)
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
        body = {**TEXT, "prompt": PROMPTS[0]}
        running = [asyncio.create_task(streamed(client, body)) for _ in range(8)]
        while not sum(series(server, "sortserve_num_requests_running").values()):
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        ended = await asyncio.gather(*running)

    assert ended == [(expected[PROMPTS[0], EXITS[-1]], {})] * 8
    assert await asyncio.to_thread(server.process.wait, WAIT_S) == 0
    assert all(has_ended(process) for process in processes), "and nothing is left"


def engine_processes(server: Server) -> list[int]:
    """The process ids of the replicas of a server."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                name = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::ServeReplica:sortserve:engines"):
                found.append(int(entry.name))
    return sorted(found)


def test_what_no_engine_takes_is_said_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Ray tells it in its status alone, and does not end all of its processes with ours."""
    keys = tmp_path / "keys.yaml"
    entry = {"name": "a", "sha256": "0" * 64, "max_exit_layer": 5}
    keys.write_text(json.dumps({"keys": [entry]}))
    before = ray_processes()

    with started(checkpoint, "--replicas=1", f"--api-keys-file={keys}") as process:
        _, said = process.communicate(timeout=WAIT_S)

    assert process.returncode == 2, said
    assert "max_exit_layer: 5 is not allowed" in said.splitlines()[-1]
    assert ray_processes() <= before


def ray_processes() -> set[int]:
    """The process ids of everything that Ray has started on this machine."""
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and b"ray::" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found
