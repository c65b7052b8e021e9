"""An event loop on a thread of its own, for callers who have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["LoopThread"]

T = TypeVar("T")

LAST_TASKS_S = 5.0
"""Seconds that tasks get to end by themselves."""


class LoopThread:
    """Runs coroutines for threads that wait for them, inside another event loop or not."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin some work; to cancel the future is to cancel the work."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do some work and wait for it; Ctrl-C cancels it."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Let the tasks end, cancel those that do not, and end the thread."""
        if threading.current_thread() is self._thread:  # a finaliser may run anywhere
            self._loop.call_soon(self._loop.stop)
            return
        self.run(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=LAST_TASKS_S)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
