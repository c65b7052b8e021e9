"""HTTP/1.1 and nothing else: offers to speak another protocol are not taken up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Http1Protocol"]

UPGRADE_FIELDS = frozenset({b"upgrade", b"http2-settings"})
"""Header fields of an offer, which are options of ``Connection`` too (RFC 9110, 7.8)."""


class Http1Protocol(HttpToolsProtocol):
    """uvicorn's protocol, but a request that offers an upgrade is served as the HTTP/1.1 it is.

    Java's own client offers h2c with its first request. The parser takes every offer for accepted:
    it stops at the end of the headers and skips the body. So the request is read again, by a new
    parser, from a head without the offer. Subclasses are not told of the first reading's end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = self._new_parser()

    @property
    def owes_an_answer(self) -> bool:
        """Whether a request that is whole waits for its answer, or some of that is unsent."""
        cycle = self.cycle
        is_asked = cycle is not None and not (cycle.more_body or cycle.response_complete)
        return is_asked or self.transport.get_write_buffer_size() > 0

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__ or error
            if isinstance(cause, _AmbiguousError):
                self.send_400_response(str(cause))
            else:
                self.callback_failed(cause)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        """Refuse what a proxy before us may have understood otherwise; else take the request on."""
        if reason := _ambiguity(self.headers, self.parser.get_http_version()):
            raise _AmbiguousError(reason)
        super().on_headers_complete()

    def callback_failed(self, error: BaseException) -> None:
        """What the parser called has raised: that is none of the client's mistakes."""
        raise error

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                if self.parser.get_method() == b"CONNECT":
                    self.send_400_response("CONNECT is not served: this is no proxy.")
                    return
                [num_read] = offer.args
                data = self._head_without_offer() + data[num_read:]
                self.parser = self._new_parser()
            else:
                return

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(_Callbacks(self))
        # As uvicorn sets it: what a client sends after `Connection: close` is no error.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode("ascii")
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(o for o in options if o.lower() not in UPGRADE_FIELDS)
            if name not in UPGRADE_FIELDS and (value or name != b"connection"):
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])


class _AmbiguousError(Exception):
    """Stops the parser; its message is for the client."""


def _ambiguity(headers: Sequence[tuple[bytes, bytes]], version: str) -> str | None:
    """How a request may be read in two ways, which lets one be smuggled past a proxy (RFC 9112).

    The parser itself refuses lengths that contradict each other.

    Args:
        headers: names in lower case, and values.
        version: of HTTP, ``"1.1"``.
    """
    if sum(name == b"host" for name, _ in headers) > 1:
        return "The request has more than one Host field."
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if version == "1.0" and codings:
        return "A request of HTTP/1.0 cannot have Transfer-Encoding."
    if any(coding != b"chunked" for coding in codings):  # the parser looks at the last one alone
        return "No Transfer-Encoding but chunked is known here."
    return None


class _Callbacks:
    """What a parser calls: the protocol's methods, but not at the end of what is read again."""

    def __init__(self, protocol: Http1Protocol) -> None:
        self._protocol = protocol
        self.on_message_begin = protocol.on_message_begin
        self.on_url = protocol.on_url
        self.on_header = protocol.on_header
        self.on_body = protocol.on_body

    def on_headers_complete(self) -> None:
        if not self._protocol.parser.should_upgrade():
            self._protocol.on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._protocol.parser.should_upgrade():
            self._protocol.on_message_complete()
