"""A server process from its first log line to its exit code."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from sortserve.cli import main
from sortserve.core.api_keys import key_digest
from sortserve_client import Client, SamplingOptions
from support.server_process import WAIT_S, Server, server_environment
from support.tiny_models import make_tiny_checkpoint

LONG: SamplingOptions = {"max_tokens": 400, "temperature": 0.0, "ignore_eos": True}
"""Takes half a second, if eight are answered at once."""
ENDLESS: SamplingOptions = {**LONG, "max_tokens": 8000}
"""Nobody waits for its end."""


@contextmanager
def serving(checkpoint: Path, *flags: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "sortserve", "serve", str(checkpoint), "--port=0"]
    command += [
        "--log-format=json",
        "--kv-cache-memory=64MiB",
        "--num-threads=1",
        "--no-calibrate",
        *flags,
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=server_environment()
    ) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_checkpoint(folder, "llama-tied", (2, 4, 6), max_position_embeddings=8192)


def test_a_terminated_server_finishes_what_runs_and_takes_nothing_new(checkpoint: Path) -> None:
    with (
        serving(checkpoint, "--access-log", "--shutdown-timeout=600") as server,
        Client(server.url) as client,
        httpx.Client(base_url=server.url, timeout=WAIT_S) as http,
    ):
        assert http.get("/health").status_code == 200  # it is connected before time counts
        streams = [client.stream("A secret: xyzzy", **LONG) for _ in range(8)]
        for stream in streams:
            next(stream)

        with ThreadPoolExecutor(8) as readers:  # the last events have little time to be sent
            reading = [readers.submit(stream.result) for stream in streams]
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            health = http.get("/health")
            refused = http.post("/generate", json={"prompt": "Hi"})
        answers = [reader.result() for reader in reading]

        assert (health.status_code, refused.status_code) == (503, 503)
        assert [answer.finish_reason for answer in answers] == ["length"] * 8
        assert server.end() == 0
    log = json.dumps(server.events)
    assert [event["output"] for event in server.finished()] == [400] * 8
    assert "POST /generate" in log
    assert "xyzzy" not in log
    assert answers[0].text not in log


def test_what_outlives_the_shutdown_timeout_ends_as_aborted(checkpoint: Path) -> None:
    with serving(checkpoint, "--shutdown-timeout=0") as server, Client(server.url) as client:
        stream = client.stream("Once upon a time", **ENDLESS)
        next(stream)

        server.process.send_signal(signal.SIGTERM)

        assert stream.result().finish_reason == "abort"
        assert server.end() == 0
    assert server.finished()[0]["finish"] == "abort"


def test_a_second_signal_does_not_wait(checkpoint: Path) -> None:
    with serving(checkpoint) as server, Client(server.url) as client:
        stream = client.stream("Once upon a time", **ENDLESS)
        next(stream)

        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        server.process.send_signal(signal.SIGTERM)

        assert server.end() == 128 + signal.SIGTERM
    assert server.finished()[0]["finish"] == "abort"


def test_a_folder_without_a_model_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path), "--port", "0", "--log-level", "error"]) == 2

    error = capsys.readouterr().err
    assert error.startswith("sortserve: error: ")
    assert error.count("\n") == 1


def write_keys(file: Path, key: str, **limits: int) -> None:
    entry = {"name": "alice", "sha256": key_digest(key), **limits}
    file.write_text(json.dumps({"keys": [entry]}))  # JSON is YAML


@pytest.mark.slow
def test_keys_are_changed_without_a_restart_and_a_broken_file_changes_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    write_keys(file, "old")
    with serving(checkpoint, "--api-keys-file", str(file)) as server:

        def status(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.get(f"{server.url}/exits", headers=headers).status_code

        assert (status("old"), status("new")) == (200, 401)

        write_keys(file, "new", max_exit_layer=3)
        reason = server.wait_for("API keys not reloaded: the old ones stay")["reason"]
        assert "max_exit_layer: 3 is not allowed: it should be one of" in reason
        assert status("old") == 200

        write_keys(file, "new", max_exit_layer=4)
        server.wait_for("API keys reloaded")
        assert (status("old"), status("new")) == (401, 200)

        server.process.send_signal(signal.SIGHUP)
        server.wait_for("API keys reloaded")
        text = httpx.get(f"{server.url}/metrics").text
        assert 'api_key_reloads_total{model_name="tiny",outcome="failed"}' in re.sub(
            r'model_name="[^"]*"', 'model_name="tiny"', text
        )
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


@pytest.mark.slow
def test_a_deepest_exit_that_the_checkpoint_lacks_ends_the_start(
    checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    write_keys(file, "k", max_exit_layer=3)
    command = [sys.executable, "-m", "sortserve", "serve", str(checkpoint), "--port=0"]

    run = subprocess.run([*command, "--api-keys-file", str(file)], capture_output=True, text=True)

    assert run.returncode == 2
    assert "key 'alice', max_exit_layer: 3 is not allowed" in run.stderr.splitlines()[-1]
