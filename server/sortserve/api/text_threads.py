"""Threads for what would hold up the event loop: reading, tokenising and writing large texts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sortserve.core.errors import OverloadedError

__all__ = ["TextThreads"]

R = TypeVar("R")

NUM_THREADS = 2
"""Few: they take time from the engine, and each piece of work needs memory."""
MAX_WAITING = 256
"""Pieces of work under way or waiting; each holds a body or a reply in memory."""


class TextThreads:
    """A small pool of its own, so that large texts wait for each other and for nobody else.

    Only the event loop calls it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")
        self._num_waiting = 0

    async def run(self, work: Callable[[], R], *, is_answer: bool = False) -> R:
        """What ``work`` returns or raises, from a thread of the pool.

        Args:
            work: bounded in time and memory, and free of the event loop.
            is_answer: the work for it is done already, so it is never refused.

        Raises:
            OverloadedError: too much waits already; nothing was started.
        """
        if not is_answer and self._num_waiting >= MAX_WAITING:
            raise OverloadedError(
                f"{self._num_waiting} large requests wait to be read. Come back later.",
                retry_after_s=1.0,
            )
        self._num_waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._count_down)
        return await future

    def _count_down(self, _: object) -> None:
        self._num_waiting -= 1
