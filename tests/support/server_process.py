"""A server process, read by its log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
WAIT_S = 180
"""How long a test waits for what should come at once: a machine may be busy."""


class Server:
    """A running ``sortserve serve`` and its log."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        """Where it listens; waits until it is ready."""
        ready = [event for event in self.events if event["message"] == "ready"]
        return str((ready or [self.wait_for("ready")])[0]["url"])

    def wait_for(self, message: str) -> dict[str, Any]:
        """Read the log up to an event."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.events.append(json.loads(line))
            if self.events[-1]["message"] == message:
                return self.events[-1]
        raise AssertionError(f"the log ended without {message!r}: {self.events}")

    def end(self) -> int:
        """Read the rest of the log; returns the exit code."""
        assert self.process.stderr is not None
        self.events += [json.loads(line) for line in self.process.stderr]
        return self.process.wait(WAIT_S)

    def finished(self) -> list[dict[str, Any]]:
        """The log's events of finished requests."""
        return [event for event in self.events if event["message"] == "request finished"]

    def messages(self) -> list[str]:
        """What the log has said so far."""
        return [event["message"] for event in self.events]


def server_environment() -> dict[str, str]:
    """Ours without settings of a server, but with the tests' cache: compiling takes long."""
    kept = "SORTSERVE_CACHE_DIR"
    return {k: v for k, v in os.environ.items() if k == kept or not k.startswith("SORTSERVE_")}


@contextmanager
def scripted_server(fault: str, *flags: str) -> Iterator[Server]:
    """``support/scripted_server.py`` with a fault, as a process."""
    command = [sys.executable, "-m", "support.scripted_server", fault, "--log-format=json"]
    command += flags if any(flag.startswith("--uds") for flag in flags) else ["--port=0", *flags]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=server_environment(), cwd=TESTS
    ) as process:
        try:
            yield Server(process)
        finally:
            process.kill()
