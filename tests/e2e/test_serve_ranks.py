"""A server whose model is divided among two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from sortserve import LLM, Budget, SamplingParams
from sortserve_client import Budget as ClientBudget
from sortserve_client import Client, StreamError
from support.processes import has_ended
from support.server_process import Server, server_environment
from support.tiny_models import make_tiny_checkpoint

EXITS = (2, 4, 6)


@contextmanager
def serving(checkpoint: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "sortserve", "serve", str(checkpoint), "--port=0"]
    command += ["--tensor-parallel-size=2", "--log-format=json", "--kv-cache-memory=8MiB"]
    command += ["--num-threads=1", "--dtype=float32", "--device=cpu", "--no-calibrate"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=server_environment()
    ) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


def rank_of(server: Server) -> int:
    server.url  # noqa: B018 (reads the log until the server is ready)
    [event] = [event for event in server.events if event["message"] == "ranks"]
    [process_id] = event["process_ids"]
    return int(process_id)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_checkpoint(folder, "llama-untied", EXITS, {2: "norm", 4: "mlp"})


def test_a_request_over_http_is_answered_as_by_one_process(checkpoint: Path) -> None:
    with LLM(str(checkpoint), dtype="float32", device="cpu", kv_cache_memory=8 << 20) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
        [expected] = llm.generate("The sea is", params, budget=Budget(exit_layer=4))

    with serving(checkpoint) as server, Client(server.url) as client:
        answer = client.generate(
            "The sea is",
            budget=ClientBudget(exit_layer=4),
            temperature=0.0,
            max_tokens=20,
            ignore_eos=True,
        )
        rank = rank_of(server)
        server.process.send_signal(signal.SIGTERM)

        assert answer.text == expected.outputs[0].text
        assert answer.budget is not None
        assert answer.budget.exit_layer == 4
        assert server.end() == 0
        assert has_ended(rank)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_requests_with_an_error_and_the_server(checkpoint: Path) -> None:
    with serving(checkpoint) as server, Client(server.url) as client:
        stream = client.stream("The sea is", max_tokens=200, temperature=0.0, ignore_eos=True)
        next(stream)

        os.kill(rank_of(server), signal.SIGKILL)

        with pytest.raises(StreamError, match="engine has failed"):
            stream.result()
        assert server.end() == 1
    failed = next(e for e in server.events if e["message"].startswith("the engine has failed:"))
    assert "rank 1 has ended (exit code -9)" in json.dumps(failed)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
