"""Where work is done that would hold up the event loop: reading, tokenising and writing texts.

What is large has threads; of what is small, but may come in crowds, the loop does a piece a round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sortserve.core.errors import OverloadedError

__all__ = ["TextThreads", "compiler_threads"]

R = TypeVar("R")

NUM_THREADS = 2
"""Few: they take time from the engine, and each piece of work needs memory."""
NUM_COMPILERS = 1
"""A grammar takes some ten milliseconds of a core: a crowd of them leaves the others free."""
MAX_WAITING = 256
"""Pieces of work under way or waiting; each holds a body or a reply in memory."""


class TextThreads:
    """A small pool of its own, so that large texts wait for each other and for nobody else.

    Only the event loop calls it.

    Args:
        num_threads: of the pool.
        name: of its threads.
        what: waits, for the error where too much does.
    """

    def __init__(
        self,
        num_threads: int = NUM_THREADS,
        *,
        name: str = "text",
        what: str = "large requests wait to be read",
    ) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._what = what
        self._num_waiting = 0
        self._turn = asyncio.Lock()

    async def in_turn(self, work: Callable[[], R]) -> R:
        """What ``work`` returns or raises, on the event loop: one piece in each round of it.

        A hundred newcomers that come at once are then read one after the other, and whoever asks
        for something else meanwhile is answered between two of them.
        """
        async with self._turn:
            await asyncio.sleep(0)
            return work()

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
                f"{self._num_waiting} {self._what}. Come back later.",
                retry_after_s=1.0,
            )
        # It raises where the system gives no thread: then nothing waits that could be counted down.
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        self._num_waiting += 1
        future.add_done_callback(self._count_down)
        return await future

    def _count_down(self, _: object) -> None:
        self._num_waiting -= 1


def compiler_threads() -> TextThreads:
    """Those that compile grammars: texts do not wait for these, nor the other way round."""
    return TextThreads(NUM_COMPILERS, name="grammars", what="formats wait to be compiled")
