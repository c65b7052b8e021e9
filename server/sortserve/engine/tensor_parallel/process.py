"""The process of one other rank, as rank 0 has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

__all__ = ["RankProcess"]

MAIN = "sortserve.engine.tensor_parallel.rank"


class RankProcess:
    """One other rank, and the socket to it: whoever has the other end of that is gone if it ends.

    So a rank that dies is noticed at once, and one whose parent dies, however that happens, ends.
    """

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self._socket, theirs = socket.socketpair()
        self.connection = Connection(os.dup(self._socket.fileno()))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MAIN, str(folder)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                process_group=0,  # Ctrl-C is for rank 0, which ends the others when it ends
            )

    @property
    def process_id(self) -> int:
        """Of the system."""
        return self._process.pid

    def last_words(self) -> str:
        """Why the socket has closed."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return f"rank {self.rank} has closed its socket"
        return f"rank {self.rank} has ended (exit code {code})"

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def hang_up(self) -> None:
        """Tell it to end, by closing the socket for both; the listening thread may still read."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self, timeout_s: float) -> None:
        """Wait for its end, or end it."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._socket.close()
