"""Where a server listens, taken before the model is loaded: a socket or Unix socket, and TLS.

A mistake here is one line and exit code 2 at once, and of two servers that are started together on
one address exactly one gets it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from sortserve.core.errors import ConfigError
from sortserve.process.config import ServeSettings
from sortserve.process.folder_lock import folder_lock

__all__ = ["Listener", "allow_open_files", "is_loopback", "listening", "tls_context"]

BACKLOG = 2048
"""Connections that the system holds for us until we take them."""
SPARE_FILES = 256
"""Open files of a server beside its connections."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_SILENT_S = 0.5
"""After one of these; asyncio comes back after a second."""


class Listener(socket.socket):
    """Takes no more connections than it may, and says once that the system gives no file for one.

    asyncio does not stop at that error: it asks on as often as its backlog is long, writes a
    traceback each time, and plans as many new starts a second later. With a backlog of thousands
    that keeps the event loop busy for as long as there are no files.
    """

    max_open: int | None = None
    """Most connections that are open at once; one more is closed unheard. None: no limit here."""
    _silent_until_s = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._open: WeakSet[_Connection] = WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            BlockingIOError: there is none, or none can be taken, as was said a moment ago.
            ConnectionAbortedError: there is one, and there are too many; asyncio asks again.
            OSError: none can be taken.
        """
        if time.monotonic() < self._silent_until_s:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        try:
            plain, address = super().accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._silent_until_s = time.monotonic() + _SILENT_S
            raise
        if self.max_open is not None and len(self._open) >= self.max_open:
            plain.close()
            raise ConnectionAbortedError(errno.ECONNABORTED, "too many connections")
        return _Connection(plain, self._open), address


class _Connection(socket.socket):
    """A connection that is in a set until it is closed."""

    def __init__(self, plain: socket.socket, those_open: WeakSet[_Connection]) -> None:
        super().__init__(plain.family, plain.type, plain.proto, fileno=plain.detach())
        self._those_open = those_open
        those_open.add(self)

    def close(self) -> None:
        """Close it, once or more often."""
        super().close()
        self._those_open.discard(self)


@contextmanager
def listening(settings: ServeSettings) -> Iterator[Listener]:
    """A socket that takes connections, and whose file, if it has one, is removed at the end.

    Raises:
        ConfigError: the address is taken, is not ours, or is none.
    """
    path = None if settings.uds is None else Path(settings.uds)
    listener = _listen(settings)
    identity = None if path is None else _identity(path)
    try:
        yield listener
    finally:
        listener.close()
        if path is not None:
            _remove(path, identity)


def _listen(settings: ServeSettings) -> Listener:
    host, port, uds = settings.host, settings.port, settings.uds
    try:
        if uds is not None:
            return _listen_unix(uds)
        return _listen_tcp(host, port)
    except (OSError, ValueError) as error:
        where = f"--uds {uds}" if uds is not None else f"--host {host} --port {port}"
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ConfigError(f"cannot listen on {where}: {reason}. Choose another.") from error


def _listen_tcp(host: str, port: int) -> Listener:
    host = host.strip().removeprefix("[").removesuffix("]")
    if not host:
        raise ValueError("the host is empty (0.0.0.0 is every interface)")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    found.sort(key=lambda info: info[0] != socket.AF_INET)  # of the addresses of a name, IPv4 first
    family, _, _, _, address = found[0]
    # With the protocol named, asyncio switches Nagle's algorithm off for every connection; without,
    # small events wait for the client's delayed acknowledgements, some 40 ms.
    listener = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # only now is the port ours: two may be bound to it
    except OSError:
        listener.close()
        raise
    return listener


# Unix sockets


def _listen_unix(uds: str) -> Listener:
    if not uds:
        raise ValueError("the path is empty")
    path = Path(uds)
    listener = Listener(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with folder_lock(path.parent):
            _remove_stale(path)
            listener.bind(uds)
            listener.listen(BACKLOG)
    except (OSError, ValueError):
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket that a killed server left behind; leave everything else where it is."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "something that is not a socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if (
            probe.connect_ex(str(path)) == errno.ECONNREFUSED
        ):  # all else means that somebody is there
            path.unlink()


Identity = tuple[int, int, int]


def _identity(path: Path) -> Identity | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _remove(path: Path, identity: Identity | None) -> None:
    """Remove our own socket's file, and not that of a server which has taken its place."""
    with suppress(OSError), folder_lock(path.parent):
        if _identity(path) == identity:
            path.unlink()


# TLS


def tls_context(settings: ServeSettings) -> ssl.SSLContext | None:
    """What connections are encrypted with; None without TLS.

    Raises:
        ConfigError: certificate or key cannot be used.
    """
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    if certificate is None or key is None:
        return None
    for flag, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        if not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"{flag} {path} is not a file. Give a PEM file.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConfigError(
            f"cannot serve TLS with --ssl-certfile {certificate} and --ssl-keyfile {key}: "
            f"{_tls_reason(error)}."
        ) from error
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted: decrypt it with `openssl pkey -in KEY -out PLAIN`")


def _tls_reason(error: OSError | ValueError) -> str:
    if not isinstance(error, ssl.SSLError):
        return (isinstance(error, OSError) and error.strerror) or str(error)
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return f"one of them is not valid PEM ({error.reason or error})"


# Other limits of the system


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches a socket over the network."""
    if listener.family == socket.AF_UNIX:
        return False
    address = ipaddress.ip_address(str(listener.getsockname()[0]).partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def allow_open_files(num_connections: int) -> int:
    """Raise the process's limit of open files for so many connections; returns how many fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return num_connections
    return max(1, soft - SPARE_FILES)
