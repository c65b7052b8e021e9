"""HTTP/1.1 responses and server-sent events as pure parsers: bytes in, values out."""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["ResponseParser", "SseReader"]


class SseReader:
    """Splits a byte stream into the ``data`` payloads of its events."""

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The payloads of the events that ``piece`` completes, in order."""
        lines = (self._tail + piece).split(b"\n")
        self._tail = lines.pop()
        payloads = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                payloads.append(b"\n".join(self._data))
                self._data = []
        return payloads


class _State(Enum):
    HEAD = auto()
    LENGTH = auto()  # a body of known length
    UNTIL_CLOSE = auto()
    CHUNK_SIZE = auto()
    CHUNK_DATA = auto()
    CHUNK_END = auto()
    TRAILERS = auto()
    DONE = auto()


class ResponseParser:
    """One HTTP/1.1 response, fed in pieces of any size."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._state = _State.HEAD
        self._buffer = b""
        self._remaining = 0

    @property
    def complete(self) -> bool:
        """Whether the whole response has come."""
        return self._state is _State.DONE

    @property
    def started(self) -> bool:
        """Whether any byte of the response has come."""
        return self._state is not _State.HEAD or bool(self._buffer)

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes from the socket; returns the body bytes among them."""
        self._buffer += data
        body = b""
        while True:
            state, size = self._state, len(self._buffer)
            body += self._advance()
            if self._state is state and len(self._buffer) == size:
                return body

    def feed_eof(self) -> None:
        """The peer has closed: that ends a body that was announced with no length."""
        if self._state is _State.UNTIL_CLOSE:
            self._state = _State.DONE

    def _advance(self) -> bytes:
        if self._state is _State.HEAD:
            self._read_head()
        elif self._state in (_State.LENGTH, _State.CHUNK_DATA):
            return self._read_counted()
        elif self._state is _State.UNTIL_CLOSE:
            body, self._buffer = self._buffer, b""
            return body
        elif self._state is not _State.DONE:
            self._read_chunk_line()
        return b""

    def _read_head(self) -> None:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        self._buffer = rest
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split(" ", 2)[1])
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if 100 <= self.status < 200:
            return  # an interim response: the real head follows
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._state = _State.CHUNK_SIZE
        elif "content-length" in self.headers:
            self._remaining = int(self.headers["content-length"])
            self._state = _State.LENGTH if self._remaining else _State.DONE
        else:
            self._state = _State.DONE if self.status in (204, 304) else _State.UNTIL_CLOSE

    def _read_counted(self) -> bytes:
        body, self._buffer = self._buffer[: self._remaining], self._buffer[self._remaining :]
        self._remaining -= len(body)
        if self._remaining == 0:
            self._state = _State.DONE if self._state is _State.LENGTH else _State.CHUNK_END
        return body

    def _read_chunk_line(self) -> None:
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return
        self._buffer = rest
        if self._state is _State.CHUNK_END:
            self._state = _State.CHUNK_SIZE
        elif self._state is _State.CHUNK_SIZE:
            self._remaining = int(line.split(b";", 1)[0], 16)
            self._state = _State.CHUNK_DATA if self._remaining else _State.TRAILERS
        elif not line:  # the empty line after the trailers
            self._state = _State.DONE
