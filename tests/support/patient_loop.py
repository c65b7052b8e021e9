"""Time-outs of a server and its clients on one event loop, without waiting and without a race.

On a busy machine a loop may get no turn for longer than a short time-out lasts; then a client that
sent its request at once is told that it was too slow. Here the loop's time stands still as long as
there is anything to do.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ParamSpec

__all__ = ["patient"]

UNDER_WAY_S = 0.005
"""Real seconds in which bytes that were sent on the loopback interface arrive."""

P = ParamSpec("P")


def patient(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test, which uses no threads, on a loop of its own, a ``PatientLoop``."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=PatientLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


class PatientLoop(asyncio.SelectorEventLoop):
    """Its clock moves on to the next timer when nothing is ready and no bytes are under way."""

    def __init__(self) -> None:
        self._selector_of_loop = PatientSelector()
        super().__init__(self._selector_of_loop)

    def time(self) -> float:
        """Seconds that were waited for, all in all."""
        return self._selector_of_loop.now


class PatientSelector(selectors.BaseSelector):
    """Waits for files as usual, and for time by counting it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; without anything, ``timeout`` seconds later."""
        if timeout is None:
            return self._real.select()
        found = self._real.select(min(timeout, UNDER_WAY_S))
        if not found:
            self.now += max(0.0, timeout)
        return found

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()
