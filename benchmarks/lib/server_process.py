"""Starts a sortserve server for a benchmark and stops it again."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.lib.http_client import HttpClient

__all__ = ["ServerStartError", "free_port", "serve"]

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


@asynccontextmanager
async def serve(arguments: Sequence[str], *, timeout_s: float = 300.0) -> AsyncIterator[HttpClient]:
    """A server started as ``sortserve serve ARGUMENTS`` on a free loopback port, ready.

    Raises:
        ServerStartError: it ended, or ``/health`` was not 200 within ``timeout_s``.
    """
    port = free_port()
    command = [_executable(), "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        client = HttpClient(f"http://127.0.0.1:{port}")
        try:
            await _wait_until_ready(client, process, log, timeout_s)
            yield client
        finally:
            client.close()
            _stop(process)


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
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:])
    what = "was not ready in time" if process.poll() is None else f"ended ({process.returncode})"
    raise ServerStartError(f"the server {what}; the end of its log:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
