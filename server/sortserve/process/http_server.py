"""The HTTP server of a process: uvicorn with our protocol, limits and host check."""

from __future__ import annotations

import logging
import math
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from sortserve.api.http.hosts import HostCheckMiddleware
from sortserve.api.http.limits import ConnectionLimits
from sortserve.api.http.protocol import HttpProtocol
from sortserve.process.config import ServeSettings
from sortserve.process.listening import BACKLOG, allow_open_files, is_loopback
from sortserve.telemetry.logs import fields

__all__ = ["http_server"]

logger = logging.getLogger(__name__)

LAST_EVENTS_S = 3
"""Seconds that connections get to take the end of their answers after the engine has stopped."""


class _HTTPServer(uvicorn.Server):
    """uvicorn without its signal handlers: a signal does not close the socket, we drain first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(
    settings: ServeSettings, door: ASGIApp, listener: socket.socket, tls: ssl.SSLContext | None
) -> uvicorn.Server:
    """A server for ``door`` on a socket that listens already."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    proxies = list(settings.forwarded_allow_ips)
    config = uvicorn.Config(
        _with_host_check(settings, door, listener),
        http=partial(  # type: ignore[arg-type]
            HttpProtocol,
            limits=_limits(settings),
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
    return _HTTPServer(config)


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
