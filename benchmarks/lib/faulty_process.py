"""A server process that can be made to fail: started, told, watched, ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib.common import ROOT, metric_total
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.server_process import ServerStartError, free_port, tail

__all__ = ["FaultyProcess", "children_of", "open_files", "start_faulty", "start_plain"]

POLL_S = 0.05
START_S = 600.0
IDLE_S = 10.0
IDLE_SERIES = (
    "sortserve_kv_pages_used",
    "sortserve_num_requests_running",
    "sortserve_num_requests_waiting",
)


@dataclass
class FaultyProcess:
    """One server and the way to give it orders."""

    process: subprocess.Popen[bytes]
    client: HttpClient
    control: Path
    log: Path
    command: Sequence[str]
    env: Mapping[str, str]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """Of the server."""
        return self.process.pid

    async def order(self, do: str, **fields: Any) -> dict[str, Any]:
        """Give an order of ``faulty_server.Board.obey``; returns its answer."""
        reader, writer = await asyncio.open_unix_connection(str(self.control))
        try:
            writer.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(await reader.readline())
            return answer
        finally:
            writer.close()

    async def arm(self, point: str, kind: str, times: int | None = None, **fields: Any) -> None:
        """Let a point fail."""
        await self.order("arm", point=point, kind=kind, times=times, **fields)

    async def status(self, path: str, timeout_s: float = 5.0) -> int:
        """The status of a probe; 0 if nobody answers."""
        try:
            async with asyncio.timeout(timeout_s):
                return (await self.client.request("GET", path)).status
        except (OSError, TimeoutError):
            return 0

    async def left_over(self) -> list[str]:
        """What is still held when the server should be idle."""
        end_s = time.monotonic() + IDLE_S
        while True:
            response = await self.client.request("GET", "/metrics")
            text = response.body.decode()
            totals = {name: metric_total(text, name) for name in IDLE_SERIES}
            left = [f"{name}={total:g}" for name, total in totals.items() if total]
            if response.status != 200:
                left = [f"/metrics is {response.status}"]
            if not left or time.monotonic() > end_s:
                return left
            await asyncio.sleep(0.1)

    async def exit_code(self, timeout_s: float) -> int | None:
        """How the process ended; None if it lives on."""
        end_s = time.monotonic() + timeout_s
        while self.process.poll() is None and time.monotonic() < end_s:
            await asyncio.sleep(POLL_S)
        return self.process.poll()

    def end(self) -> None:
        """Kill it, and whatever is left of its group."""
        self.client.close()
        for pid in children_of(self.pid):
            _kill(pid)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


async def start_faulty(
    arguments: Sequence[str],
    *,
    folder: Path,
    orders: Sequence[Mapping[str, Any]] = (),
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    wait: bool = True,
) -> FaultyProcess:
    """Start ``sortserve serve ARGUMENTS`` with faults at hand.

    Args:
        arguments: model and flags.
        folder: for its socket and its log.
        orders: obeyed before it starts.
        env: on top of our own.
        log: where its lines go instead of a file in ``folder``.
        wait: until it is ready.

    Raises:
        ServerStartError: it is to be ready, and ended or was not in time.
    """
    name = f"{time.monotonic_ns():x}"
    control, written = folder / f"{name}.sock", folder / f"{name}.log"
    module = "benchmarks.lib.faulty_server"
    begun = [module, str(control), json.dumps([dict(order) for order in orders])]
    server = _started([*begun, "serve", *arguments], control, written, env or {}, log or written)
    if wait:
        await _until_ready(server)
    return server


async def start_plain(arguments: Sequence[str], *, folder: Path) -> FaultyProcess:
    """Start ``sortserve serve ARGUMENTS`` as it is; it takes no orders.

    Args:
        arguments: model and flags.
        folder: for its log.

    Raises:
        ServerStartError: it ended or was not ready in time.
    """
    log = folder / "server.log"
    server = _started(["sortserve", "serve", *arguments], folder / "none", log, {}, log)
    await _until_ready(server)
    return server


def _started(
    module: Sequence[str], control: Path, written: Path, env: Mapping[str, str], log: Path
) -> FaultyProcess:
    port = free_port()
    address = ("--host", "127.0.0.1", "--port", str(port), "--log-format", "json")
    command = [sys.executable, "-m", *module, *address]
    paths = [str(ROOT), str(ROOT / "server"), str(ROOT / "client"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(path for path in paths if path)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env={**os.environ, "PYTHONPATH": path, **env},
            process_group=0,
            cwd=ROOT,
        )
    client = HttpClient(f"http://127.0.0.1:{port}")
    return FaultyProcess(process, client, control, written, command, env)


async def _until_ready(server: FaultyProcess) -> None:
    end_s = time.monotonic() + START_S
    try:
        while await server.status("/health") != 200:
            code = server.process.poll()
            if code is not None or time.monotonic() > end_s:
                said = tail(server.log) if server.log.exists() else ""
                raise ServerStartError(f"the server ended ({code}); the end of its log:\n{said}")
            await asyncio.sleep(POLL_S)
    except BaseException:
        server.end()
        raise


def children_of(pid: int) -> list[int]:
    """All live processes below one, the nearest first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(child) for child in task.read_text(encoding="ascii").split()]
        except OSError:
            continue
        for child in direct:
            found += [child, *children_of(child)]
    return found


def open_files(pid: int) -> int:
    """How many a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
