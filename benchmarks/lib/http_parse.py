"""HTTP/1.1 responses as a pure parser: bytes in, values out. The parsing is httptools'."""

from __future__ import annotations

import httptools

__all__ = ["ResponseParser"]


class ResponseParser:
    """One response, fed in pieces of any size; interim responses before it are skipped.

    The methods whose names begin with ``on_`` are httptools'.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.started = False
        """Whether any byte has come."""
        self.complete = False
        """Whether the whole response has come."""
        self._body: list[bytes] = []
        self._is_head_complete = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes from the socket; returns the body bytes among them."""
        self.started = True
        self._parser.feed_data(data)
        body, self._body = self._body, []
        return b"".join(body)

    def feed_eof(self) -> None:
        """The peer has closed: that ends a body that was announced with no length."""
        is_announced = not self.headers.keys().isdisjoint(("content-length", "transfer-encoding"))
        self.complete = self.complete or (self._is_head_complete and not is_announced)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head, or a trailer."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head, or one of an interim response, is over."""
        self.status = self._parser.get_status_code()
        self._is_head_complete = self.status >= 200

    def on_body(self, piece: bytes) -> None:
        """Some of the body."""
        self._body.append(piece)

    def on_message_complete(self) -> None:
        """The response is over."""
        self.complete = self._is_head_complete
        if not self.complete:
            self.headers = {}
