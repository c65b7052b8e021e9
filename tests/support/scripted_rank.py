"""A rank that follows a script instead of running a model; it is started as the real one is.

The script is the checkpoint's name in its task: words separated by spaces. ``no-room`` refuses to
load, ``dies-loading`` dies then, ``slow-backend`` says that its own has failed its check; the
others say what it does when it is given a step: ``works``, ``fails`` (as every rank would),
``fails-early`` (before the others do), ``dies``, ``hangs``, ``logs``. After the last word it works.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection

from sortserve.engine.tensor_parallel.messages import (
    Done,
    Failed,
    LoadedShare,
    Log,
    Ready,
    Start,
    Step,
    Task,
)

NUM_CALLS = 7
"""Collectives of a whole step."""


def main() -> None:
    connection = Connection(os.dup(sys.stdin.fileno()))
    try:
        _serve(connection)
    except EOFError:
        os._exit(0)


def _serve(connection: Connection) -> None:
    task = connection.recv()
    assert isinstance(task, Task)
    words = iter(task.source.split())
    word = next(words, "works")
    if word == "dies-loading":
        os._exit(7)
    if word == "no-room":
        connection.send(Failed("there is no room"))
        return
    failed: tuple[str, ...] = ()
    if word == "slow-backend":
        failed = ("triton",)
        connection.send(Log("scripted", 30, "the backend triton is not used"))
    connection.send(LoadedShare(num_pages=100 * task.rank, failed_backends=failed))
    assert isinstance(connection.recv(), Start)
    connection.send(Ready())
    while True:
        step = connection.recv()
        assert isinstance(step, Step)
        num_calls, error = NUM_CALLS, None
        match word:
            case "dies":
                os._exit(7)
            case "hangs":
                threading.Event().wait()
            case "fails":
                num_calls, error = 0, "ScriptedError"
            case "fails-early":
                num_calls, error = NUM_CALLS - 1, "ScriptedError"
            case "logs":
                connection.send(Log("scripted", 30, "something is odd"))
        connection.send(Done(step.number, num_calls, error))
        word = next(words, "works")


if __name__ == "__main__":
    main()
