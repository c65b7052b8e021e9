"""The HTTP server of a process: uvicorn with our protocol, limits and host check."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from sortserve.api.http.hosts import HostCheckMiddleware
from sortserve.api.http.limits import ConnectionLimits
from sortserve.api.http.protocol import RESERVED_CONNECTIONS, HttpProtocol
from sortserve.process.config import ServeSettings
from sortserve.process.listening import BACKLOG, Listener, allow_open_files, is_loopback
from sortserve.telemetry.logs import fields

__all__ = ["HttpServer", "http_server"]

logger = logging.getLogger(__name__)

LAST_EVENTS_S = 3
"""Seconds that connections get to take the end of their answers after the server has stopped."""
POLL_S = 0.02


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: a signal does not close the socket, we drain first.

    Args:
        config: loaded.
        limits: also of TLS, which comes before the first byte of HTTP: asyncio's own limit is one
            of a minute, during which our protocol does not hear of the connection.
    """

    def __init__(self, config: uvicorn.Config, limits: ConnectionLimits) -> None:
        super().__init__(config)
        self._limits = limits

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are the process's."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on the one socket."""
        assert sockets is not None
        [listener] = sockets
        config, state = self.config, self.server_state

        def protocol() -> asyncio.Protocol:
            kind: Any = config.http_protocol_class
            made: asyncio.Protocol = kind(config=config, server_state=state, app_state={})
            return made

        server = await asyncio.get_running_loop().create_server(
            protocol,
            sock=listener,
            ssl=config.ssl,
            backlog=config.backlog,
            ssl_handshake_timeout=self._limits.header_timeout_s if config.ssl else None,
        )
        self.servers = [server]
        self.started = True

    async def answers_taken(self, timeout_s: float) -> bool:
        """Wait until the clients have taken what is being answered now; whether they have in time.

        What comes meanwhile is not waited for: a server that ends refuses it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        connections: Any = self.server_state.connections
        left = set(connections)
        while left := {own for own in left & connections if own.owes_an_answer}:
            if loop.time() >= deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True


def http_server(
    settings: ServeSettings, door: ASGIApp, listener: Listener, tls: ssl.SSLContext | None
) -> HttpServer:
    """A server for ``door`` on a socket that listens already."""
    limits = _limits(settings)
    if tls is not None:  # who is over the cap can be told so only when TLS is agreed on
        listener.max_open = limits.max_connections + 2 * RESERVED_CONNECTIONS
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    proxies = list(settings.forwarded_allow_ips)
    config = uvicorn.Config(
        _with_host_check(settings, door, listener),
        http=partial(  # type: ignore[arg-type]
            HttpProtocol,
            limits=limits,
            cors_allow_origins=settings.cors_allow_origins,
        ),
        ws="none",
        log_config=None,
        access_log=settings.access_log,
        proxy_headers=bool(proxies),
        forwarded_allow_ips="*" if "*" in proxies else proxies,
        lifespan="off",
        backlog=BACKLOG,
        timeout_graceful_shutdown=LAST_EVENTS_S,
    )
    config.load()
    config.ssl = tls
    return HttpServer(config, limits)


def _with_host_check(settings: ServeSettings, app: ASGIApp, listener: socket.socket) -> ASGIApp:
    """Guard a server that any page in a local browser could otherwise reach, or that is told to."""
    names, on_loopback = settings.allowed_hosts, is_loopback(listener)
    is_needed = bool(names) or (on_loopback and not settings.is_guarded)
    if "*" in names or not is_needed:
        return app
    return HostCheckMiddleware(
        app,
        names=[*names, settings.host],
        any_address=not on_loopback,
        cors_allow_origins=settings.cors_allow_origins,
    )


def _limits(settings: ServeSettings) -> ConnectionLimits:
    max_connections = allow_open_files(settings.max_connections)
    if max_connections < settings.max_connections:
        logger.warning(
            "fewer connections than --max-connections: the system allows too few open files",
            extra=fields(max_connections=max_connections),
        )
    most_s = settings.client_timeout or math.inf
    return ConnectionLimits(
        max_connections=max_connections,
        max_num_headers=settings.max_num_headers,
        max_header_bytes=int(settings.max_header_size),
        keep_alive_s=settings.keep_alive,
        header_timeout_s=min(settings.header_timeout, most_s),
        body_timeout_s=min(settings.body_timeout, most_s),
        write_timeout_s=min(settings.write_timeout, most_s),
    )
