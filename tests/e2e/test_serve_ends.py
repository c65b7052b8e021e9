"""Whatever hangs, a server ends when it is told to, with the exit code that says why."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.server_process import TESTS, WAIT_S, Server, scripted_server

REQUEST = {"prompt": "a", "max_tokens": 5}
FORCED = "the process did not end in time: ended by force"


def ask_and_forget(server: Server) -> None:
    """Send a request whose answer may never come."""
    url = server.url

    def ask() -> None:
        try:
            httpx.post(f"{url}/generate", json=REQUEST, timeout=WAIT_S)
        except httpx.TransportError:
            return

    threading.Thread(target=ask, daemon=True).start()


def test_who_reads_slowly_gets_all_of_an_answer_that_was_begun_before_the_end() -> None:
    """The engine has long ended the request, but the system holds only some of its answer."""
    body = {"prompt": "a" * 2000, "max_tokens": 1, "n": 16, "echo": True, "logprobs": 20}
    with scripted_server("no time after the end", "--write-timeout=100000") as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
            assert reply.status_code == 200
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            time.sleep(1)  # a server that did not wait would be gone

            assert len(reply.read()) == int(reply.headers["content-length"])
        assert server.wait_for("stopped")["all_requests_finished"] is True
        assert server.end() == 0


def test_a_hung_step_does_not_outlive_the_shutdown_timeout() -> None:
    with scripted_server("step hangs", "--shutdown-timeout=0") as server:
        ask_and_forget(server)
        server.wait_for("the step hangs")

        server.process.send_signal(signal.SIGTERM)

        assert server.end() == 1


@pytest.mark.parametrize(
    "sig", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_hung_step_does_not_survive_a_second_signal(sig: signal.Signals) -> None:
    with scripted_server("step hangs", "--shutdown-timeout=100000") as server:
        ask_and_forget(server)
        server.wait_for("the step hangs")

        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        server.process.send_signal(sig)

        assert server.end() == 128 + sig


@pytest.mark.slow
def test_a_blocked_event_loop_does_not_outlive_the_shutdown_timeout() -> None:
    with scripted_server("loop blocked", "--shutdown-timeout=0") as server:
        server.wait_for("ready")

        server.process.send_signal(signal.SIGTERM)

        assert server.end() == 1
    assert server.messages()[-1] == FORCED


def test_a_blocked_event_loop_does_not_survive_a_second_signal() -> None:
    with scripted_server("loop blocked", "--shutdown-timeout=1e7") as server:
        server.wait_for("ready")

        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)  # two of a kind at once may count as one

        assert server.end() == 128 + signal.SIGINT or server.process.returncode == 143
    assert server.messages()[-1] == FORCED


@pytest.mark.parametrize(
    "fault", ["load hangs", pytest.param("calibration hangs", marks=pytest.mark.slow)]
)
def test_a_server_that_hangs_before_it_is_ready_ends_at_the_first_signal(fault: str) -> None:
    with scripted_server(fault) as server:
        server.wait_for(fault.replace("load ", "loading "))

        server.process.send_signal(signal.SIGTERM)

        assert server.end() == 0
    assert server.messages()[-1] == "stopped while loading"


@pytest.mark.slow
def test_a_thread_that_never_comes_back_does_not_hold_up_a_clean_end() -> None:
    with scripted_server("pool hangs") as server:
        server.wait_for("ready")

        server.process.send_signal(signal.SIGTERM)

        assert server.end() == 0
    assert "stopped" in server.messages()


def test_a_failed_engine_ends_the_process_with_1() -> None:
    with scripted_server("engine fails") as server:
        reply = httpx.post(f"{server.url}/generate", json=REQUEST, timeout=WAIT_S)

        assert reply.status_code == 500
        assert server.end() == 1
    assert "the engine has failed: ending, so that a supervisor can start anew" in server.messages()


def test_a_blocked_event_loop_ends_the_process_with_1() -> None:
    with scripted_server("loop blocked", "--step-timeout=0.3") as server:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{server.url}/status", timeout=WAIT_S)

        assert server.end() == 1
    assert "the event loop has not got on" in server.messages()


def test_a_server_that_nobody_can_reach_any_more_ends_with_1() -> None:
    with scripted_server("http fails") as server:
        assert server.end() == 1
    assert "the accept loop broke" in str(server.events)


def wait_until_healthy(uds: Path) -> None:
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(uds)) == 0:
                break
        threading.Event().wait(0.02)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), timeout=WAIT_S) as client:
        while client.get("http://localhost/health").status_code != 200:
            threading.Event().wait(0.02)


@pytest.mark.parametrize("reader", ["asleep", pytest.param("gone", marks=pytest.mark.slow)])
def test_a_log_that_nobody_reads_blocks_neither_answers_nor_signals(
    tmp_path: Path, reader: str
) -> None:
    uds = tmp_path / "s"
    ours, theirs = os.pipe()
    command = [sys.executable, "-m", "support.scripted_server", "chatter", "--uds", str(uds)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=TESTS) as process:
        os.close(theirs)
        if reader == "gone":
            os.close(ours)
        try:
            wait_until_healthy(uds)
            transport = httpx.HTTPTransport(uds=str(uds))
            with httpx.Client(transport=transport, timeout=WAIT_S) as client:
                assert client.post("http://localhost/generate", json=REQUEST).status_code == 200

            process.send_signal(signal.SIGTERM)

            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
    if reader == "asleep":
        os.close(ours)


@pytest.mark.slow
def test_a_server_without_standard_streams_serves_and_ends(tmp_path: Path) -> None:
    uds = tmp_path / "s"
    command = f"exec {sys.executable} -m support.scripted_server none --uds {uds} >&- 2>&-"
    with subprocess.Popen(["sh", "-c", command], cwd=TESTS) as process:
        try:
            wait_until_healthy(uds)
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()


# ---- one address, two servers ----


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that a server may listen on, and that is given to nobody who asks for any."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_of_two_servers_started_at_once_on_one_port_one_ends_with_2_before_it_loads() -> None:
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(reserved_port())
        flags = ["load hangs", f"--port={port}"]
        servers = [stack.enter_context(scripted_server(*flags)) for _ in range(2)]
        loser = next_to_end(servers)
        [winner] = [server for server in servers if server is not loser]
        winner.wait_for("loading hangs")

        assert loser.process.returncode == 2
        assert loser.process.stderr is not None
        *_, last = loser.process.stderr.read().splitlines()
        assert last.startswith(f"sortserve: error: cannot listen on --host 127.0.0.1 --port {port}")


@pytest.mark.slow
def test_of_two_servers_started_at_once_on_one_path_one_ends_with_2(tmp_path: Path) -> None:
    flags = ["load hangs", f"--uds={tmp_path / 's'}"]
    with scripted_server(*flags) as first, scripted_server(*flags) as second:
        servers = [first, second]
        loser = next_to_end(servers)
        [winner] = [server for server in servers if server is not loser]
        winner.wait_for("loading hangs")

        assert loser.process.returncode == 2
        transport = httpx.HTTPTransport(uds=str(tmp_path / "s"))
        with httpx.Client(transport=transport, timeout=WAIT_S) as client:
            assert client.get("http://localhost/livez").status_code == 200


def next_to_end(servers: list[Server]) -> Server:
    ended: list[Server] = []
    changed = threading.Event()

    def wait(server: Server) -> None:
        server.process.wait()
        ended.append(server)
        changed.set()

    for server in servers:
        threading.Thread(target=wait, args=(server,), daemon=True).start()
    assert changed.wait(WAIT_S)
    return ended[0]
