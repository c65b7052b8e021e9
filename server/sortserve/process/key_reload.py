"""The books of the keys in a server, and reading their file anew while it runs."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sortserve.admission.key_ledger import KeyLedger
from sortserve.core.api_keys import KeyObserver, KeyPolicy
from sortserve.core.errors import ConfigError
from sortserve.core.file_digests import SETTLED_S
from sortserve.process.api_keys import check_exits
from sortserve.process.config import ServeSettings
from sortserve.telemetry.logs import fields

__all__ = ["KeyReloader", "key_ledger", "start_reloading"]

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""How often the file is looked at."""


def key_ledger(settings: ServeSettings, observer: KeyObserver) -> KeyLedger | None:
    """The books of all keys; None: everybody may ask."""
    if not settings.is_guarded:
        return None
    return KeyLedger(settings.key_policies(), observer=observer)


def start_reloading(
    settings: ServeSettings,
    ledger: KeyLedger | None,
    observer: KeyObserver,
    exits: Sequence[int],
    asked: asyncio.Event,
) -> asyncio.Task[None] | None:
    """Watch the file of named keys until the task is cancelled; None if there is no such file.

    Args:
        settings: name the file.
        ledger: gets the keys.
        observer: told how it went.
        exits: of the checkpoint: what a deepest exit may be.
        asked: set to have the file read now.
    """
    path = settings.api_keys_file
    if path is None or ledger is None:
        return None

    def read() -> tuple[KeyPolicy, ...]:
        policies = settings.key_policies()
        check_exits(policies, exits)
        return policies

    return asyncio.create_task(KeyReloader(path, read, ledger, observer).run(asked))


class KeyReloader:
    """Reads the file anew when it has changed, or when told to; what is wrong changes nothing.

    A file that was changed just now is read at the next look, too: two changes within one tick of
    the file system's clock look like one.

    Args:
        path: of the file. It may be replaced, or be a link that moves, as in Kubernetes.
        read: its keys, with those that were given elsewhere; raises ``ConfigError``.
        ledger: gets the keys.
        observer: told how it went.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[], tuple[KeyPolicy, ...]],
        ledger: KeyLedger,
        observer: KeyObserver,
    ) -> None:
        self._path = path
        self._read = read
        self._ledger = ledger
        self._observer = observer
        self._seen: tuple[Any, ...] | None = None
        """Of the file that was read last."""
        self._is_settled = False
        self._refused: tuple[object, str] | None = None

    async def run(self, asked: asyncio.Event) -> None:
        """Look at the file until cancelled: every second, and when ``asked`` is set."""
        while True:
            is_asked = asked.is_set()
            asked.clear()
            try:
                await self.look(is_asked=is_asked)
            except Exception:  # no threads, no memory: a watch that ended would be missed by nobody
                self._observer.on_reloaded("failed")
                logger.exception("API keys not reloaded: the old ones stay")
            waiting = asyncio.create_task(asked.wait())
            try:
                await asyncio.wait([waiting], timeout=POLL_S)
            finally:
                waiting.cancel()

    async def look(self, *, is_asked: bool = False) -> None:
        """Take the file's keys, if it may have changed since it was last read, or somebody asks."""
        seen, is_settled = await asyncio.to_thread(self._look_at)
        is_news = seen != self._seen or is_asked
        if self._is_settled and not is_news:
            return
        self._seen, self._is_settled = seen, False
        try:
            policies = await asyncio.to_thread(self._read)
        except ConfigError as error:
            # A file that could not be opened is the same when it can be.
            self._is_settled = is_settled and not isinstance(error.__cause__, OSError)
            self._refuse((seen, str(error)), is_asked=is_asked)
            return
        self._is_settled, self._refused = is_settled, None
        if policies == self._ledger.policies and not is_asked:
            return
        self._ledger.replace(policies)
        self._observer.on_reloaded("ok")
        logger.info("API keys reloaded", extra=fields(keys=len(policies)))

    def _refuse(self, refused: tuple[object, str], *, is_asked: bool) -> None:
        """Say what is wrong with the file, once; ``refused`` is which file, and what."""
        if refused == self._refused and not is_asked:
            return
        self._refused = refused
        self._observer.on_reloaded("failed")
        logger.error("API keys not reloaded: the old ones stay", extra=fields(reason=refused[1]))

    def _look_at(self) -> tuple[tuple[Any, ...], bool]:
        """What differs when the file does, and whether any later change would differ from it."""
        try:
            status = os.stat(self._path)
        except OSError as error:
            return (error.errno,), True
        facts = (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
        return facts, time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_S
