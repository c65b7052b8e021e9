"""The life of a server process: listen, load, serve, drain, end.

The socket opens first, so that probes get an answer while the model loads. On SIGTERM or SIGINT
``/health`` turns 503, new work is refused, running requests finish up to ``--shutdown-timeout``,
the rest end with ``finish_reason: "abort"``, and the process ends with 0. A second signal ends it
now.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sortserve import __version__
from sortserve.api.app import create_app
from sortserve.api.problems import unavailable_response
from sortserve.api.settings import ApiSettings
from sortserve.banner import banner, base_url
from sortserve.config import ServeSettings
from sortserve.errors import ConfigError
from sortserve.logs import fields, logging_to

if TYPE_CHECKING:
    from sortserve.build import Serving

__all__ = ["FrontDoor", "serve"]

logger = logging.getLogger(__name__)

LAST_EVENTS_S = 5
"""Seconds that connections get to take the end of their answers after the engine has stopped."""
HEALTH_POLL_S = 1.0


def serve(settings: ServeSettings) -> int:
    """Run a server until a signal ends it; returns the process's exit code.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        ConfigError: the address cannot be listened on, or settings do not fit the checkpoint.
    """
    with logging_to(level=settings.log_level, log_format=settings.log_format):
        given = {k: v for k, v in settings.masked().items() if v not in (None, "", [])}
        logger.info("configuration", extra=fields(version=__version__, **given))
        process = ServerProcess(settings)
        exit_code = asyncio.run(process.run())
    if process.is_loading:
        os._exit(exit_code)  # a thread inside a download or a compiler cannot be cancelled
    return exit_code


class FrontDoor:
    """Answers while the model loads; afterwards the loaded app does."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _while_loading(scope["path"])(scope, receive, send)


def _while_loading(path: str) -> Response:
    if path.endswith("/livez"):  # a proxy's prefix may stand before it
        return JSONResponse({"status": "alive"})
    return unavailable_response("loading", "The model is still loading. Come back soon.")


class _HTTPServer(uvicorn.Server):
    """uvicorn, but a signal is told to us and does not close the socket: we drain first."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[int], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal(sig)


class ServerProcess:
    """One server from its socket to its exit code."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.is_loading = False
        self._signals: list[int] = []
        self._door = FrontDoor()

    async def run(self) -> int:
        """Listen, load, serve, drain."""
        self._signalled = asyncio.Event()
        self._signalled_twice = asyncio.Event()
        with listen(self.settings) as listener:
            http = self._http_server()
            serving_http = asyncio.create_task(http.serve(sockets=[listener]))
            try:
                return await self._load_and_serve(listener)
            finally:
                http.force_exit = self._signalled_twice.is_set()
                http.should_exit = True
                await serving_http
                if self.settings.uds is not None:
                    Path(self.settings.uds).unlink(missing_ok=True)

    async def _load_and_serve(self, listener: socket.socket) -> int:
        serving = await self._load()
        if serving is None:
            return 0
        self._door.app = create_app(
            serving.worker,
            serving.tokenizer,
            _api_settings(self.settings, serving),
            serving.metrics,
        )
        _announce(self.settings, serving, listener)
        while not self._signalled.is_set() and serving.worker.state != "failed":
            await _wait(self._signalled, HEALTH_POLL_S)
        if serving.worker.state == "failed":
            logger.error("the engine has failed: ending, so that a supervisor can start anew")
            return 1
        return await self._drain(serving)

    async def _load(self) -> Serving | None:
        """The loaded model; None if a signal came first."""
        loaded: Future[Serving] = Future()
        self.is_loading = True

        def load() -> None:
            try:
                from sortserve.build import build  # torch takes seconds: the socket is open by now

                serving = build(self.settings)
                serving.worker.start(serving.prepare)
                loaded.set_result(serving)
            except BaseException as error:
                loaded.set_exception(error)

        threading.Thread(target=load, name="load", daemon=True).start()
        loading = asyncio.ensure_future(asyncio.wrap_future(loaded))
        await _first(loading, self._signalled)
        if not loading.done():
            logger.info("stopped while loading")
            return None
        self.is_loading = False
        return loading.result()

    async def _drain(self, serving: Serving) -> int:
        worker, timeout_s = serving.worker, self.settings.shutdown_timeout
        stats = worker.stats()
        logger.info(
            "draining",
            extra=fields(running=stats.num_running, waiting=stats.num_waiting, timeout_s=timeout_s),
        )
        draining = asyncio.create_task(worker.drain(timeout_s))
        await _first(draining, self._signalled_twice)
        if not draining.done():
            await asyncio.to_thread(worker.stop)
        clean = await draining
        logger.info("stopped", extra=fields(all_requests_finished=clean))
        return 128 + self._signals[1] if len(self._signals) > 1 else 0

    def _http_server(self) -> _HTTPServer:
        settings = self.settings
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config = uvicorn.Config(
            self._door,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            log_config=None,
            access_log=settings.access_log,
            lifespan="off",
            timeout_graceful_shutdown=LAST_EVENTS_S,
        )
        loop = asyncio.get_running_loop()

        def on_signal(sig: int) -> None:
            loop.call_soon_threadsafe(self._take_signal, sig)

        return _HTTPServer(config, on_signal)

    def _take_signal(self, sig: int) -> None:
        self._signals.append(sig)
        (self._signalled_twice if self._signalled.is_set() else self._signalled).set()


def _api_settings(settings: ServeSettings, serving: Serving) -> ApiSettings:
    return ApiSettings(
        served_model_name=serving.model_name,
        api_keys=settings.api_keys,
        max_body_bytes=int(settings.max_body_size),
        cors_allow_origins=settings.cors_allow_origins,
        root_path=settings.root_path,
        enable_docs=settings.enable_docs,
        generation_defaults=serving.checkpoint.generation_defaults,
        request_timeout_s=settings.request_timeout,
        log_prompts=settings.log_prompts,
    )


async def _first(work: asyncio.Future[Any], event: asyncio.Event) -> None:
    """Wait for work or an event, whichever comes first; the work goes on."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return


def listen(settings: ServeSettings) -> socket.socket:
    """A bound socket.

    Raises:
        ConfigError: the address is taken, or not ours.
    """
    host, port, uds = settings.host, settings.port, settings.uds
    try:
        if uds is not None:
            return _listen_unix(Path(uds))
        return _bound(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port))
    except OSError as error:
        where = f"--uds {uds}" if uds is not None else f"--host {host} --port {port}"
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {where}: {reason}. Choose another.") from error


def _listen_unix(path: Path) -> socket.socket:
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) != 0:
                path.unlink()  # left behind by a server that was killed
    return _bound(socket.AF_UNIX, str(path))


def _bound(family: socket.AddressFamily, address: tuple[str, int] | str) -> socket.socket:
    # With the protocol named, asyncio switches Nagle's algorithm off for every connection; without,
    # small events wait for the client's delayed acknowledgements, some 40 ms.
    protocol = 0 if family == socket.AF_UNIX else socket.IPPROTO_TCP
    listener = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _announce(settings: ServeSettings, serving: Serving, listener: socket.socket) -> None:
    """Say where the server listens, what it serves, and one command to try."""
    port = None if settings.uds is not None else listener.getsockname()[1]
    cache, exits = serving.cache, serving.checkpoint.exits
    logger.info(
        "ready",
        extra=fields(
            url=settings.uds or base_url(settings, port),
            model=serving.model_name,
            exits=exits.layers,
            max_model_len=serving.worker.max_model_len,
            kv_pages=cache.num_pages,
            kv_cache_mib=round(cache.num_bytes / 2**20),
        ),
    )
    if settings.log_format == "human":
        print(banner(settings, serving, port), flush=True)
