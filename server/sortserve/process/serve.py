"""The life of a server process: listen, load, serve, drain, end.

The socket opens first, so that probes get an answer while the model loads. On SIGTERM or SIGINT
``/health`` turns 503, new work is refused, running requests finish up to ``--shutdown-timeout``,
the rest end with ``finish_reason: "abort"``, and the process ends with 0. A second signal ends it
now. Whatever hangs meanwhile, a step, the event loop or the reader of the log, the process ends:
``signals.py`` sees to that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from sortserve import __version__
from sortserve.api.app import create_app, create_loading_app
from sortserve.process.api_settings import api_settings
from sortserve.process.banner import banner, base_url
from sortserve.process.config import ServeSettings
from sortserve.process.garbage import calm_garbage_collector
from sortserve.process.http_server import http_server
from sortserve.process.key_reload import key_ledger, start_reloading
from sortserve.process.listening import Listener, is_loopback, listening, tls_context
from sortserve.process.loop_watch import watched_loop
from sortserve.process.notices import warn_of_open_door
from sortserve.process.signals import SignalGuard
from sortserve.telemetry.log_writer import LogWriter
from sortserve.telemetry.logs import fields, logging_to
from sortserve.telemetry.status_line import phase_over
from sortserve.text.template_renderer import shared_renderer

if TYPE_CHECKING:
    from sortserve.process.served import Runner, Served

__all__ = ["FrontDoor", "serve"]

logger = logging.getLogger(__name__)

Build = Callable[[ServeSettings], "Served"]

HEALTH_POLL_S = 0.2
STEP_END_S = 1.0
"""Seconds that the step under way gets to end after a second signal or a failure."""
MAX_END_S = 9.0
"""Seconds after ``--shutdown-timeout``, or after a failure, at which the process is gone: the
engine's last step and the last events take less unless something hangs."""
MAX_FORCED_END_S = 3.0
"""The same after a second signal."""
LAST_WORDS_S = 0.5
"""Seconds that the log gets to say that the process was ended by force."""


def build_here(settings: ServeSettings) -> Served:
    """An engine in this process; raises as ``build``."""
    from sortserve.process.build import build  # torch takes seconds: the socket is open by now

    return build(settings)


def serve(settings: ServeSettings, build: Build = build_here) -> int:
    """Run a server until a signal ends it; returns the process's exit code.

    Args:
        settings: of the server.
        build: makes what runs the model, on a thread, while the socket is open already.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        ConfigError: the address cannot be listened on, or settings do not fit the checkpoint.
    """
    with logging_to(level=settings.log_level, log_format=settings.log_format) as log:
        given = {k: v for k, v in settings.masked().items() if v not in (None, "", [])}
        logger.info("configuration", extra=fields(version=__version__, **given))
        process = ServerProcess(settings, log, build)
        exit_code = process.run()
    if not (process.has_ended and log.is_complete):
        # A thread that is stuck, in a download, a compiler, a step or a write to a pipe, cannot be
        # cancelled, and the interpreter's own end would wait for it or change the exit code.
        os._exit(exit_code)
    return exit_code


class FrontDoor:
    """Hands connections to ``app``: first to what answers while the model loads, then to the API.

    Args:
        cors_allow_origins: may read even that the model is still loading.
        root_path: path prefix that a reverse proxy strips.
        with_playground: show the page at ``/``, which waits for the model.
    """

    def __init__(
        self,
        cors_allow_origins: Sequence[str] = (),
        *,
        root_path: str = "",
        with_playground: bool = False,
    ) -> None:
        self.app = create_loading_app(
            cors_allow_origins=cors_allow_origins,
            root_path=root_path,
            with_playground=with_playground,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        await self.app(scope, receive, send)


class ServerProcess:
    """One server from its socket to its exit code."""

    def __init__(self, settings: ServeSettings, log: LogWriter, build: Build) -> None:
        self.settings = settings
        self._build = build
        self.has_ended = True
        """Whether no thread of ours is left that may be stuck."""
        self._log = log
        self._signals: list[int] = []
        self._failure: str | None = None  # for the last words; else it is told after the end
        self._door = FrontDoor(
            settings.cors_allow_origins,
            root_path=settings.root_path,
            with_playground=settings.playground,
        )
        also = () if settings.api_keys_file is None else (signal.SIGHUP,)
        self._guard = SignalGuard(self._hear, last_words=self._say_last_words, also=also)

    def run(self) -> int:
        """Listen, load, serve, drain; returns the exit code."""
        tls = tls_context(self.settings)
        with listening(self.settings) as listener, self._guard, asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._signalled = asyncio.Event()
            self._signalled_twice = asyncio.Event()
            self._keys_asked = asyncio.Event()
            return runner.run(self._run(listener, tls))

    async def _run(self, listener: Listener, tls: ssl.SSLContext | None) -> int:
        http = self._http = http_server(self.settings, self._door, listener, tls)
        serving_http = asyncio.create_task(http.serve(sockets=[listener]))
        exit_code = 1
        try:
            exit_code = await self._load_and_serve(listener, serving_http)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._guard.end_within(MAX_END_S, self._exit_code(exit_code))
            http.force_exit = self._signalled_twice.is_set()
            http.should_exit = True
            await asyncio.wait([serving_http])
        return self._exit_code(exit_code)

    def _exit_code(self, otherwise: int) -> int:
        return 128 + self._signals[1] if len(self._signals) > 1 else otherwise

    async def _load_and_serve(self, listener: socket.socket, serving_http: _Task) -> int:
        serving = await self._load(serving_http)
        if serving is None:
            return _report_http(serving_http) if serving_http.done() else 0
        worker = serving.worker
        api = api_settings(self.settings, serving)
        keys = serving.metrics.keys
        ledger = key_ledger(self.settings, keys)
        self._door.app = create_app(
            worker,
            serving.tokenizer,
            api,
            serving.metrics,
            serving.totals,
            ledger,
            serving.tracing,
        )
        exits = serving.exits.layers
        reloading = start_reloading(self.settings, ledger, keys, exits, self._keys_asked)
        calm_garbage_collector()
        self._announce(serving, listener)
        with watched_loop(self.settings.step_timeout or None, self._give_up_loop, self._loop):
            while not (self._signalled.is_set() or serving_http.done() or worker.state == "failed"):
                await _first(self._signalled, serving_http, timeout_s=HEALTH_POLL_S)
        if worker.state == "failed":
            logger.error(
                "the engine has failed: ending, so that a supervisor can start anew",
                extra=fields(reason=worker.failure),
            )
            exit_code = 1
        elif serving_http.done():
            exit_code = _report_http(serving_http)
        else:
            exit_code = await self._drain(serving)
        if reloading is not None:
            reloading.cancel()
        self.has_ended = await asyncio.to_thread(worker.stop, STEP_END_S)
        await asyncio.to_thread(serving.close)
        return exit_code

    async def _load(self, serving_http: _Task) -> Served | None:
        """The loaded model; None if a signal or the end of the HTTP server came first."""
        loaded: Future[Served] = Future()
        self.has_ended = False

        def load() -> None:
            try:
                shared_renderer().start()  # it loads on another core, while torch does on this one
                serving = self._build(self.settings)
                serving.worker.start(serving.prepare)
                loaded.set_result(serving)
            except BaseException as error:
                loaded.set_exception(error)

        threading.Thread(target=load, name="load", daemon=True).start()
        loading = asyncio.ensure_future(asyncio.wrap_future(loaded))
        await _first(self._signalled, loading, serving_http)
        if not loading.done():
            logger.info("stopped while loading")
            return None
        self.has_ended = True
        self._guard.listen_again()
        return loading.result()

    async def _drain(self, serving: Served) -> int:
        worker, timeout_s = serving.worker, self.settings.shutdown_timeout
        stats = worker.stats()
        logger.info(
            "draining",
            extra=fields(running=stats.num_running, waiting=stats.num_waiting, timeout_s=timeout_s),
        )
        draining = asyncio.create_task(self._finish(worker, timeout_s))
        await _first(self._signalled_twice, draining)
        if draining.done():
            clean = draining.result()
        else:
            draining.cancel()
            clean = False
            await asyncio.to_thread(worker.stop, STEP_END_S)
        if worker.state == "failed":
            logger.error("the engine failed while it drained", extra=fields(reason=worker.failure))
            return 1
        logger.info("stopped", extra=fields(all_requests_finished=clean))
        return 0

    async def _finish(self, worker: Runner, timeout_s: float) -> bool:
        """Let what runs end, and its answers be taken; whether all of that was done in time."""
        deadline = self._loop.time() + timeout_s
        clean = await worker.drain(timeout_s)
        if worker.state == "failed":
            return False
        return await self._http.answers_taken(deadline - self._loop.time()) and clean

    def _announce(self, serving: Served, listener: socket.socket) -> None:
        """Say where the server listens, what it serves, and one command to try."""
        settings = self.settings
        is_local = settings.uds is not None or is_loopback(listener)
        warn_of_open_door(is_guarded=settings.is_guarded, is_local=is_local)
        port = None if settings.uds is not None else listener.getsockname()[1]
        cache, exits = serving.cache, serving.exits
        logger.info(
            "ready",
            extra={
                **fields(
                    url=settings.uds or base_url(settings, port),
                    model=serving.model_name,
                    exits=exits.layers,
                    max_model_len=serving.worker.max_model_len,
                    **serving.computed_in,
                    kv_pages=cache.num_pages,
                    kv_cache_mib=round(cache.num_bytes / 2**20),
                ),
                **phase_over(),
            },
        )
        if settings.log_format == "human":
            text = banner(settings, serving, port)
            threading.Thread(target=_print, args=(text,), name="banner", daemon=True).start()

    # ---- on other threads ----

    def _give_up_loop(self) -> None:
        """Nobody is answered any more: end what only a supervisor could end otherwise."""
        logger.error("the event loop has not got on", extra=fields(s=self.settings.step_timeout))
        self._guard.end_within(0.0, exit_code=1)

    def _hear(self, sig: int) -> None:
        """Take a signal: the first drains, the second ends, the third does not even ask."""
        if sig == signal.SIGHUP:
            self._tell(self._keys_asked)
            return
        self._signals.append(sig)
        if len(self._signals) == 1:
            self._guard.end_within(self.settings.shutdown_timeout + MAX_END_S, exit_code=1)
            self._tell(self._signalled)
        else:
            max_end_s = MAX_FORCED_END_S if len(self._signals) == 2 else 0.0
            self._guard.end_within(max_end_s, self._exit_code(1))
            self._tell(self._signalled_twice)

    def _tell(self, event: asyncio.Event) -> None:
        try:
            self._loop.call_soon_threadsafe(event.set)
        except RuntimeError:  # the loop is closed: the end is near
            return

    def _say_last_words(self, exit_code: int) -> None:
        logger.error(
            "the process did not end in time: ended by force",
            extra=fields(exit_code=exit_code, reason=self._failure),
        )
        self._log.wait(LAST_WORDS_S)


_Task = asyncio.Task[None]


def _report_http(serving_http: _Task) -> int:
    logger.error(
        "the HTTP server has ended: ending, so that a supervisor can start anew",
        exc_info=serving_http.exception(),
    )
    return 1


async def _first(
    event: asyncio.Event, *work: asyncio.Future[Any], timeout_s: float | None = None
) -> None:
    """Wait for an event, work or a time, whichever comes first; the work goes on."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait([*work, waiting], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def _print(text: str) -> None:
    """Print on a thread that may wait for its reader, and past a buffer that would outlive it."""
    with suppress(OSError, ValueError, AttributeError):  # no reader, no file, no standard output
        os.write(sys.stdout.fileno(), f"{text}\n".encode())
