"""The main module of every rank but the first, which starts it: a socket is its standard input,
its argument the folder in which the ranks meet.

It loads its share, says how many pages it has room for, and then runs the steps that it is sent.
It ends when the socket closes, whatever it is doing: a rank does not outlive rank 0.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import shutil
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from sortserve.core.errors import SortserveError
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

__all__ = ["main"]

logger = logging.getLogger(__name__)

Inbox = queue.SimpleQueue[bytes]


def main() -> None:
    """Serve rank 0 until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a whole container: rank 0 drains first
    connection = Connection(os.dup(sys.stdin.fileno()))
    inbox: Inbox = queue.SimpleQueue()
    folder = Path(sys.argv[1])
    threading.Thread(
        target=_read, args=(connection, inbox, folder), name="rank 0", daemon=True
    ).start()
    try:
        task = pickle.loads(inbox.get())
        assert isinstance(task, Task)
        _serve(task, folder, connection, inbox)
    except BaseException as error:
        known = isinstance(error, SortserveError)
        if not known:
            logger.exception("this rank cannot go on")
        with suppress(OSError):
            connection.send(Failed(str(error) if known else f"{type(error).__name__}: {error}"))
    os._exit(1)


def _read(connection: Connection, inbox: Inbox, folder: Path) -> None:
    """A thread of its own: the end of rank 0 ends this process whatever it is doing.

    What comes is unpickled by the other thread: that of the first message takes torch.
    """
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)


def _serve(task: Task, folder: Path, connection: Connection, inbox: Inbox) -> None:
    # Here, so that rank 0 is listened to while all that loads.
    import torch

    from sortserve.checkpoint.load import load_share
    from sortserve.engine.assemble import context_length, start_threads
    from sortserve.engine.model_parts import make_cache, make_decoder
    from sortserve.engine.runner import ModelRunner
    from sortserve.engine.tensor_parallel.collectives import Group

    logging.getLogger().handlers = [_Forward(connection)]
    start_threads(task.num_threads, num_ranks=task.num_ranks)
    model = load_share(task.source, rank=task.rank, num_ranks=task.num_ranks, **task.loading)
    device = model.weights.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = Group(task.rank, task.num_ranks, device)
    max_model_len = context_length(model, task.options.max_model_len)
    made = make_decoder(model, task.options, max_model_len, group=group, release_weights=True)
    cache = make_cache(made, task.options, max_model_len, num_ranks=task.num_ranks)
    connection.send(LoadedShare(cache.num_pages, made.failed_backends))

    start = pickle.loads(inbox.get())
    assert isinstance(start, Start)
    runner = ModelRunner(made.decoder, num_pages=start.num_pages, block_size=cache.block_size)
    group.meet(folder)
    connection.send(Ready())
    while True:
        step = pickle.loads(inbox.get())
        assert isinstance(step, Step)
        error = None
        try:
            with group.step():
                # It ends with a sampling, of this rank's part of the vocabulary: nobody asks for
                # the tokens, but they are there when all is done, on a GPU, too.
                runner.execute(step.plan)
        except Exception as raised:  # rank 0 finds out whether it did, too
            error = f"{type(raised).__name__}: {raised}"
        connection.send(Done(step.number, group.num_calls, error))


class _Forward(logging.Handler):
    """Sends what is to be logged to rank 0, which knows where and how."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.WARNING)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """See Handler."""
        with suppress(OSError):
            self._connection.send(Log(record.name, record.levelno, record.getMessage()))


if __name__ == "__main__":
    main()
