"""HTTP/1.1 on one connection: uvicorn's protocol, with limits on what a client may send and hold.

A connection costs memory and a file descriptor before any key is looked at, so each stage has a
limit of its own: the number of connections, the size, number and duration of headers, the duration
of a body, the time between two requests, and the time a client may leave its answer unread.

What breaks a limit gets the OpenAI error body and ``Connection: close``, unless an earlier answer
is still on its way on the same connection: nothing may be written into the middle of it.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Literal

from starlette.datastructures import Headers
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from sortserve.api.http.http1 import Http1Protocol
from sortserve.api.http.limits import (
    MAX_PIPELINED,
    ConnectionLimits,
    Refusal,
    headers_too_large,
    our_failure,
    probes_only,
    too_many_connections,
    too_many_pipelined,
)
from sortserve.telemetry.logs import fields

__all__ = ["HttpProtocol"]

logger = logging.getLogger(__name__)

RESERVED_CONNECTIONS = 32
"""Connections beyond the cap that may still ask for probes: a crowd must not look like a death."""
PEER_POLL_S = 0.2
"""How often to look whether a client that has finished sending is still there to read."""
MAX_READ_BYTES = 1 << 16
"""Most bytes that are parsed at once. Each chunk of a body is a call, though it be of one byte."""
LINGER_S = 1.0
"""How long a refused client may go on sending: cut off at once, it might not see the refusal."""
INTERIM_REPLY = b"HTTP/1.1 100 Continue\r\n\r\n"


class _RefusedError(Exception):
    """Stops the parser; its argument, a refusal, says why."""


class HttpProtocol(Http1Protocol):
    """One connection of the server."""

    def __init__(
        self,
        *args: Any,
        limits: ConnectionLimits,
        cors_allow_origins: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._cors_allow_origins = cors_allow_origins
        self.timeout_keep_alive = limits.keep_alive_s  # type: ignore[assignment]  # loop.call_later
        self._limits = limits
        self._phase: Literal["idle", "headers", "body"] = "idle"
        self._num_headers = 0
        self._header_bytes = 0
        self._bytes_since_callback = 0
        self._is_over_cap = False
        self._is_refused = False
        self._running: RequestResponseCycle | None = None
        """The request being answered; ``cycle`` is the last received, perhaps in the pipeline."""
        self._receipt_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._peer_timer: asyncio.TimerHandle | None = None

    # ---- the connection ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection; beyond the cap only probes are answered on it."""
        super().connection_made(transport)
        if hasattr(transport, "max_size"):  # asyncio's own; uvloop has none
            transport.max_size = MAX_READ_BYTES
        cap = self._limits.max_connections
        self._is_over_cap = len(self.connections) > cap
        if self._is_over_cap:
            self.app = probes_only(self.app, cap, self._cors_allow_origins)
            self.timeout_keep_alive = self._limits.header_timeout_s  # type: ignore[assignment]
        if len(self.connections) > cap + RESERVED_CONNECTIONS:
            self._refuse(too_many_connections(cap))
        else:
            self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application, and forget the timers: they would keep what the connection held."""
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()
        self._unset_keepalive_if_required()
        for timer in (self._receipt_timer, self._write_timer, self._peer_timer):
            if timer is not None:
                timer.cancel()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, refusal: Refusal) -> None:
        """Answer, if nothing else is being answered, and close."""
        client = self.client[0] if self.client else None
        logger.info("connection refused", extra=fields(reason=refusal.code, client=client))
        if self._may_write_reply():
            if self._is_answering:  # the application still waits for this body: it is told to stop
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.write(
                refusal.reply(
                    Headers(raw=self.headers or []),
                    default_headers=self.server_state.default_headers,
                    cors_allow_origins=self._cors_allow_origins,
                )
            )
            self._linger()
        else:
            self.transport.abort()

    def _linger(self) -> None:
        """Send nothing more, skip what still comes, and close soon."""
        self._is_refused = True
        self._stop_timing_receipt()
        if len(self.connections) <= self._limits.max_connections and self.transport.can_write_eof():
            self.transport.write_eof()
            self._receipt_timer = self.loop.call_later(LINGER_S, self.transport.abort)
        else:
            self._close()

    def _may_write_reply(self) -> bool:
        """Whether the request being received is the one whose answer is next on the wire."""
        if self._is_behind_another():
            return False
        return self._phase != "body" or not self.cycle.response_started

    def _is_behind_another(self) -> bool:
        """Whether an earlier request on this connection has yet to be answered."""
        return self.cycle is not self._running if self._phase == "body" else self._is_answering

    # ---- receiving: the parser calls back ----

    def data_received(self, data: bytes) -> None:
        """Parse what came, and see that it does not go on for ever."""
        if self._is_refused:
            return
        self._bytes_since_callback += len(data)
        super().data_received(data)
        if self._is_refused or self.transport.is_closing():
            return
        if self._bytes_since_callback > self._limits.max_header_bytes:
            self._refuse(headers_too_large(self._limits))  # one field without an end
        elif self._phase == "idle":
            self._wait_for_request()
        elif self._receipt_timer is None:
            self._time_receipt()

    def on_message_begin(self) -> None:
        """The first byte of a request is here."""
        super().on_message_begin()
        self._phase = "headers"
        self._num_headers = self._header_bytes = self._bytes_since_callback = 0

    def on_url(self, url: bytes) -> None:
        """Some of the request's target is here."""
        self._count_header_bytes(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field is whole. Those after the body are counted, and are no headers."""
        self._num_headers += 1
        self._count_header_bytes(len(name) + len(value))
        if self._num_headers > self._limits.max_num_headers:
            raise _RefusedError(headers_too_large(self._limits))
        if self._phase == "headers":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The application takes over."""
        cycle, num_waiting = self.cycle, len(self.pipeline)
        super().on_headers_complete()
        if self.cycle is cycle:
            return  # not taken over
        if len(self.pipeline) == num_waiting:
            self._running = self.cycle
        self._phase = "body"
        self._bytes_since_callback = 0
        self._stop_timing_receipt()
        if self._is_over_cap:
            self.cycle.keep_alive = False
        if len(self.pipeline) > MAX_PIPELINED:
            raise _RefusedError(too_many_pipelined())

    def on_body(self, body: bytes) -> None:
        """Some of the body is here."""
        self._bytes_since_callback = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        super().on_message_complete()
        if self._phase != "body":
            return  # not taken over
        self._phase = "idle"
        self._bytes_since_callback = 0
        self._stop_timing_receipt()

    def callback_failed(self, error: BaseException) -> None:
        """What came is over a limit, or we have failed: there is no memory, for example."""
        if isinstance(error, _RefusedError):
            return self._refuse(*error.args)
        logger.error("a request could not be received", exc_info=error)
        self._refuse(our_failure())

    def send_400_response(self, msg: str) -> None:
        """The parser has stopped: what came is not HTTP."""
        self._refuse(Refusal(HTTPStatus.BAD_REQUEST, "invalid_http", msg))

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._bytes_since_callback = 0
        self._header_bytes += num_bytes
        if self._header_bytes > self._limits.max_header_bytes:
            raise _RefusedError(headers_too_large(self._limits))

    # ---- time ----

    def _wait_for_request(self) -> None:
        if not self._is_answering:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        """No request came: end the connection."""
        if not self.transport.is_closing():
            self._close()

    def _time_receipt(self) -> None:
        limits = self._limits
        timeout_s = limits.header_timeout_s if self._phase == "headers" else limits.body_timeout_s
        self._receipt_timer = self.loop.call_later(timeout_s, self._receipt_timed_out, timeout_s)

    def _stop_timing_receipt(self) -> None:
        if self._receipt_timer is not None:
            self._receipt_timer.cancel()
            self._receipt_timer = None

    def _receipt_timed_out(self, timeout_s: float) -> None:
        self._receipt_timer = None
        if self.transport.is_closing():
            return
        if self._is_behind_another() or self.flow.read_paused:
            self._time_receipt()  # the client may be waiting for us
            return
        part = "headers" if self._phase == "headers" else "body"
        said = f"The {part} of the request did not arrive within {timeout_s:g} seconds."
        self._refuse(Refusal(HTTPStatus.REQUEST_TIMEOUT, f"{part}_timeout", said))

    # ---- answering ----

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        self._time_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._write_timer is not None and not self.transport.is_closing():
            self._write_timer.cancel()
            self._write_timer = None

    def on_response_complete(self) -> None:
        """The answer is written, though perhaps not sent."""
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        if self.transport.is_closing():
            self._time_writing()

    def shutdown(self) -> None:
        """Close when the answer under way is out."""
        super().shutdown()
        if self.transport.is_closing():
            self._time_writing()

    def _close(self) -> None:
        """Close when everything written has been sent, or when nobody takes it."""
        self.transport.close()
        self._time_writing()

    def _time_writing(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self._limits.write_timeout_s, self._writing_timed_out
            )

    def _writing_timed_out(self) -> None:
        client = self.client[0] if self.client else None
        logger.info("connection cut: its answer is not read", extra=fields(client=client))
        self.transport.abort()

    # ---- half-closed clients ----

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. If its request is whole, it may still read the answer.

        A client that has left altogether looks the same until something is sent to it; then its
        system says that nobody is there. Before the answer begins that is an interim reply, which
        every HTTP/1.1 client skips; afterwards it is the next part of the answer.
        """
        is_tls = self.transport.get_extra_info("sslcontext") is not None  # cannot be half-closed
        if self._is_refused or is_tls or self._phase != "idle" or not self._is_answering:
            return False
        self.cycle.keep_alive = False
        is_next = self.cycle is self._running and not self.cycle.response_started
        is_tcp = self._socket.family != socket.AF_UNIX  # a Unix socket knows without being written
        if is_next and is_tcp and self.cycle.scope["http_version"] == "1.1":
            self.transport.write(INTERIM_REPLY)
        self._watch_peer()
        return True

    @property
    def _socket(self) -> socket.socket:
        sock: socket.socket = self.transport.get_extra_info("socket")
        return sock

    def _watch_peer(self) -> None:
        if self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(self._socket.fileno(), 0)  # errors and hang-ups are reported unasked
        if poll.poll(0):
            self.transport.abort()
        else:
            self._peer_timer = self.loop.call_later(PEER_POLL_S, self._watch_peer)
