"""Starts a server for a benchmark, ours or another, and stops it again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.http_client import HttpClient

__all__ = [
    "RunningServer",
    "ServerStartError",
    "free_port",
    "run_server",
    "serve",
    "start_server",
    "stop",
    "tail",
]

POLL_S = 0.2
STOP_S = 60.0
NUM_LOG_LINES = 15


class ServerStartError(RuntimeError):
    """The server ended, or was not ready in time; the message has the end of its log."""


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class RunningServer:
    """A server that answers."""

    client: HttpClient
    pid: int


@asynccontextmanager
async def serve(arguments: Sequence[str], *, timeout_s: float = 300.0) -> AsyncIterator[HttpClient]:
    """``start_server`` for those who only ask.

    Raises:
        ServerStartError: it ended, or ``/health`` was not 200 within ``timeout_s``.
    """
    async with start_server(arguments, timeout_s=timeout_s) as server:
        yield server.client


@asynccontextmanager
async def start_server(
    arguments: Sequence[str], *, timeout_s: float = 300.0
) -> AsyncIterator[RunningServer]:
    """A server started as ``sortserve serve ARGUMENTS`` on a free loopback port, ready.

    Raises:
        ServerStartError: it ended, or ``/health`` was not 200 within ``timeout_s``.
    """
    port = free_port()
    command = [_executable(), "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        async with run_server(command, port=port, log=log, timeout_s=timeout_s) as server:
            yield server


@asynccontextmanager
async def run_server(
    command: Sequence[str],
    *,
    port: int,
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> AsyncIterator[RunningServer]:
    """Any server whose ``/health`` says 200 when it is ready; its children end, too.

    ``env`` comes on top of our own environment.

    Raises:
        ServerStartError: it cannot be started, it ended, or it was not ready within ``timeout_s``.
    """
    try:
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(os.environ) | dict(env or {}),
                process_group=0,  # a session of its own would be scheduled against ours
            )
    except OSError as error:
        raise ServerStartError(f"{command[0]} cannot be started: {error.strerror}.") from error
    client = HttpClient(f"http://127.0.0.1:{port}")
    try:
        await _wait_until_ready(client, process, log, timeout_s)
        yield RunningServer(client, process.pid)
    finally:
        client.close()
        stop(process)


def _executable() -> str:
    beside = Path(sys.executable).with_name("sortserve")
    found = str(beside) if beside.exists() else shutil.which("sortserve")
    if found is None:
        raise ServerStartError("the command sortserve is not installed: pip install -e .[server]")
    return found


async def _wait_until_ready(
    client: HttpClient, process: subprocess.Popen[bytes], log: Path, timeout_s: float
) -> None:
    end_s = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end_s:
        try:
            if (await client.request("GET", "/health")).status == 200:
                return
        except OSError:
            pass  # not listening yet
        await asyncio.sleep(POLL_S)
    what = "was not ready in time" if process.poll() is None else f"ended ({process.returncode})"
    raise ServerStartError(f"the server {what}; the end of its log:\n{tail(log)}")


def tail(log: Path, num_lines: int = NUM_LOG_LINES) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the leader of a process group: politely first, then whatever is left of its group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
