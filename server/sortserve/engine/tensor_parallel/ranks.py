"""The other ranks, seen from rank 0: started, handed their steps, watched, ended."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sortserve.core.errors import ConfigError
from sortserve.core.plan import RunnerLost, StepPlan
from sortserve.engine.tensor_parallel.collectives import Group
from sortserve.engine.tensor_parallel.messages import (
    Done,
    Failed,
    LoadedShare,
    Log,
    Ready,
    Start,
    Step,
    Task,
    without_words,
)
from sortserve.engine.tensor_parallel.process import RankProcess
from sortserve.engine.tensor_parallel.watch import StepWatch
from sortserve.telemetry.logs import fields

if TYPE_CHECKING:
    from sortserve.engine.options import EngineOptions

__all__ = ["Ranks", "other_ranks"]

logger = logging.getLogger(__name__)

CLOSED = "the ranks have been ended"
POLL_S = 0.5
END_S = 5.0
"""Seconds that a rank gets to end by itself."""

Result = TypeVar("Result")


@contextmanager
def other_ranks(
    source: str, loading: Mapping[str, Any], options: EngineOptions, num_threads: int | None
) -> Iterator[Ranks | None]:
    """The ranks that ``options`` ask for beside this one, None if there are none.

    They load while what is inside does, and end if that raises; else they are its own.

    Args:
        source: what all load a share of.
        loading: further arguments of ``load_share``.
        options: choices and limits.
        num_threads: CPU threads of each rank; None: an equal share of the cores.
    """
    if options.tensor_parallel_size == 1:
        yield None
        return
    ranks = Ranks(
        options.tensor_parallel_size,
        source,
        loading,
        options,
        num_threads=num_threads,
        timeout_s=options.step_timeout or None,
    )
    try:
        yield ranks
    except BaseException:
        ranks.close()
        raise


class Ranks:
    """Starts the processes; they load while the caller does.

    One thread of the caller's runs steps; ``watch`` and ``close`` are for any.

    Args:
        num_ranks: with this process, 2 or more.
        source: what all load a share of.
        loading: further arguments of ``load_share``.
        options: the ``EngineOptions``.
        num_threads: CPU threads of each rank; None: an equal share of the cores.
        timeout_s: a rank that is at one step for so long is lost; None: never.

    Attributes:
        num_ranks: with this process.
        failure: why no more steps can be run; None as long as they can.
        failed_backends: names of those that failed their check on any of the others.
    """

    def __init__(
        self,
        num_ranks: int,
        source: str,
        loading: Mapping[str, Any],
        options: EngineOptions,
        *,
        num_threads: int | None,
        timeout_s: float | None,
    ) -> None:
        assert num_ranks > 1
        self.num_ranks = num_ranks
        self.failure: str | None = None
        self.failed_backends: tuple[str, ...] = ()
        self._group: Group | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="sortserve-ranks-"))
        self._changed = threading.Condition()
        self._is_closing = False
        self._on_lost: list[Callable[[str], None]] = []
        self._listening = threading.Thread(target=self._listen, name="ranks", daemon=True)
        self._watch = StepWatch(range(1, num_ranks), timeout_s, POLL_S)
        self._processes: dict[int, RankProcess] = {}
        try:
            for rank in range(1, num_ranks):
                self._processes[rank] = RankProcess(rank, self._folder)
                task = Task(
                    rank=rank,
                    num_ranks=num_ranks,
                    source=source,
                    loading=loading,
                    options=options,
                    num_threads=num_threads,
                )
                self._processes[rank].connection.send(task)
        except BaseException:
            self.close()
            raise

    @property
    def process_ids(self) -> list[int]:
        """Of the others, in the order of their ranks."""
        return [process.process_id for process in self._processes.values()]

    # ---- the start ----

    def group(self, device: torch.device) -> Group:
        """The collectives of rank 0, which work once the ranks have started."""
        self._group = Group(0, self.num_ranks, device)
        return self._group

    def start(self, num_pages: int) -> int:
        """Let all ranks allocate their pages and meet; returns how many pages each has.

        Args:
            num_pages: that rank 0 has room for; the rank with least room decides.

        Raises:
            ConfigError: a rank cannot serve its share.
        """
        assert self._group is not None
        for process in self._processes.values():
            loaded = self._receive(process, LoadedShare)
            num_pages = min(num_pages, loaded.num_pages)
            names = (*self.failed_backends, *loaded.failed_backends)
            self.failed_backends = tuple(dict.fromkeys(names))
        for process in self._processes.values():
            self._send(process, Start(num_pages))
        try:
            self._group.meet(self._folder)
        except RuntimeError as error:
            raise self._refusal(f"the ranks do not find each other: {error}") from error
        for process in self._processes.values():
            self._receive(process, Ready)
        self._listening.start()
        logger.info("ranks", extra=fields(num_ranks=self.num_ranks, process_ids=self.process_ids))
        return num_pages

    def _receive(self, process: RankProcess, kind: type[Result]) -> Result:
        try:
            while isinstance(message := process.connection.recv(), Log):
                _log(process.rank, message)
        except (EOFError, OSError):
            raise self._refusal(process.last_words()) from None
        if isinstance(message, Failed):
            raise self._refusal(f"rank {process.rank} could not start: {message.error}")
        assert isinstance(message, kind)
        return message

    def _send(self, process: RankProcess, message: object) -> None:
        try:
            process.connection.send(message)
        except OSError:
            raise self._refusal(process.last_words()) from None

    def _refusal(self, why: str) -> ConfigError:
        return ConfigError(
            f"--tensor-parallel-size={self.num_ranks}: {why}", param="tensor-parallel-size"
        )

    # ---- steps ----

    def run(self, plan: StepPlan, execute: Callable[[StepPlan], Result]) -> Result:
        """Let all ranks run a plan; this one by ``execute``, whose result is returned.

        Raises:
            RunnerLost: a rank is gone or out of step: nothing can be run any more.
            Exception: what ``execute`` raised, on a plan that failed on all ranks alike.
        """
        assert self._group is not None
        with self._changed:
            self._require()
            number = self._watch.begin()
        step = Step(number, without_words(plan))
        for process in self._processes.values():
            try:
                process.connection.send(step)
            except OSError:
                self._lose(process.last_words())
                raise RunnerLost(self.failure) from None
        try:
            with self._group.step():
                result = execute(plan)
        except Exception as error:
            self._settle(error)
            raise
        with self._changed:
            self._watch.end(self._group.num_calls, failed=False)
        return result

    def _settle(self, error: Exception) -> None:
        """After a failed step: wait until all have left it.

        Raises:
            RunnerLost: they have not, or not at the same place.
        """
        assert self._group is not None
        with self._changed:
            self._watch.end(self._group.num_calls, failed=True)
            self._changed.wait_for(
                lambda: self.failure is not None or self._is_closing or self._watch.is_together
            )
            if self.failure is not None or self._is_closing:
                raise RunnerLost(self.failure or CLOSED) from error

    def _require(self) -> None:
        if self.failure is not None or self._is_closing:
            raise RunnerLost(self.failure or CLOSED)

    # ---- who watches ----

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Have ``on_lost`` called, with the reason, as soon as no more steps can be run."""
        with self._changed:
            self._on_lost.append(on_lost)
            failure = self.failure
        if failure is not None:
            on_lost(failure)

    def _listen(self) -> None:
        """A thread of its own: takes what ranks say, until one is lost or all are told to end."""
        processes = {process.connection: process for process in self._processes.values()}
        while True:
            for connection in wait(list(processes), timeout=POLL_S):
                assert isinstance(connection, Connection)
                if (fault := self._hear(processes[connection])) is not None:
                    self._lose(fault)
                    return
            with self._changed:
                if self._is_closing:
                    return
                fault = self._watch.fault(time.monotonic())
            if fault is not None:
                self._lose(fault)
                return

    def _hear(self, process: RankProcess) -> str | None:
        """Take one message; returns why the rank is lost."""
        try:
            message = process.connection.recv()
        except (EOFError, OSError):
            return process.last_words()
        if isinstance(message, Done):
            with self._changed:
                self._watch.note(process.rank, message)
                self._changed.notify_all()
        elif isinstance(message, Log):
            _log(process.rank, message)
        elif isinstance(message, Failed):
            return f"rank {process.rank} failed: {message.error}"
        return None

    def _lose(self, reason: str) -> None:
        """No rank can go on without the others: end them, and let nobody wait for them."""
        with self._changed:
            if self.failure is not None or self._is_closing:
                return
            logger.error("%s: the other ranks are ended", reason)
            self.failure = reason
            listeners = list(self._on_lost)
            self._changed.notify_all()
        for tell in listeners:  # before anything that may take time
            tell(reason)
        for process in self._processes.values():
            process.kill()
        if self._group is not None:
            self._group.abort()

    # ---- the end ----

    def close(self) -> None:
        """End all ranks. Idempotent; a step under way on another thread raises."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify_all()
        for process in self._processes.values():
            process.hang_up()
        deadline_s = time.monotonic() + END_S
        for process in self._processes.values():
            process.end(max(0.0, deadline_s - time.monotonic()))
        shutil.rmtree(self._folder, ignore_errors=True)


def _log(rank: int, message: Log) -> None:
    logging.getLogger(message.logger).log(message.level, "rank %d: %s", rank, message.message)
