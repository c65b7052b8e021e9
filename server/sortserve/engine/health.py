"""Is it the engine that is broken, or its requests? (no torch)"""

from __future__ import annotations

from collections.abc import Callable

from sortserve.core.plan import Runner
from sortserve.engine.execution import Execution
from sortserve.engine.selftest import runs_a_token
from sortserve.scheduling.kv_cache import KVCacheManager

__all__ = ["Health"]


class Health:
    """Counts the steps that failed with no request to blame.

    A step in which rows failed and none gave a token is followed by one of a plain token: as long
    as that runs, the requests were to blame, and however many of them come, they end nobody but
    themselves. Otherwise the step counts, until the next one that gives a token.

    Args:
        runner: executes plans.
        kv_cache: lends the plain token its pages.
        full_depth: layers of the full model.
        max_failed_steps: so many that count mean that the engine is broken.
        on_start: called before the runner is.
    """

    def __init__(
        self,
        runner: Runner,
        kv_cache: KVCacheManager,
        *,
        full_depth: int,
        max_failed_steps: int,
        on_start: Callable[[], None],
    ) -> None:
        self.failure: str | None = None
        """Why the engine must end; None as long as it need not."""
        self._runner = runner
        self._kv_cache = kv_cache
        self._full_depth = full_depth
        self._max_failed_steps = max_failed_steps
        self._on_start = on_start
        self._num_failed_steps = 0
        self._is_suspect = False

    def note(self, execution: Execution) -> None:
        """A step has run."""
        # A part of a prompt that has been read says nothing: its scores are not looked at.
        if execution.tokens:
            self._num_failed_steps = 0
        self._is_suspect = bool(execution.failures) and not execution.tokens

    def check(self) -> None:
        """Run the plain token if the last step calls for it.

        Where the pages are all taken the step counts for nothing: there will be one whose failure
        has given some back.
        """
        num_pages = self._runner.slabs.count(self._full_depth)
        if not self._is_suspect or num_pages > self._kv_cache.pool.num_free:
            return
        self._is_suspect = False
        if self._self_test(num_pages):
            self._num_failed_steps = 0
            return
        self._num_failed_steps += 1
        if self._num_failed_steps >= self._max_failed_steps:
            self.failure = f"{self._num_failed_steps} steps in a row failed, self-tests included"

    def _self_test(self, num_pages: int) -> bool:
        with self._kv_cache.borrowed(num_pages) as pages:
            self._on_start()
            return runs_a_token(self._runner, self._full_depth, pages)
