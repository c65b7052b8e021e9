"""Server-sent events: bytes in, events out. Pure; correct for chunks cut anywhere.

Follows the event stream format of the WHATWG HTML standard: lines end with LF, CR or CRLF, a line
starting with a colon is a comment, several ``data`` lines are joined with LF, an empty line
dispatches the event, and an event without its empty line is dropped at the end of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SSEDecoder", "ServerSentEvent"]

_BOM = "\ufeff"


@dataclass(frozen=True)
class ServerSentEvent:
    """One dispatched event."""

    data: str
    event: str = "message"


class SSEDecoder:
    """Feed it chunks as they come; each call returns the events that the chunk completed.

    Bytes are only decoded a whole line at a time, so a character cut in two is never a problem.
    """

    def __init__(self) -> None:
        self._begun: list[bytes] = []
        """The pieces of a line whose end has not come."""
        self._ended_with_cr = False
        self._first_line = True
        self._data: list[str] = []
        self._event = ""

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """The events that ``chunk`` completes, in order."""
        events = []
        for line in self._lines(chunk):
            event = self._take(line)
            if event is not None:
                events.append(event)
        return events

    def _lines(self, chunk: bytes) -> list[str]:
        """Whole lines, without their ends.

        A CR ends its line at once, so that no event waits for the next chunk; an LF at the start
        of that chunk then belongs to it and is skipped.
        """
        if not chunk:
            return []
        if self._ended_with_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._ended_with_cr = chunk.endswith(b"\r")
        lines = chunk.splitlines()  # of bytes: at LF, CR and CRLF alone
        rest = [] if chunk.endswith((b"\n", b"\r")) else lines[-1:]
        if len(lines) > len(rest):
            lines[0] = b"".join([*self._begun, lines[0]])
            self._begun = []
        self._begun += rest
        whole = lines[: len(lines) - len(rest)]
        return [self._without_bom(line.decode("utf-8", errors="replace")) for line in whole]

    def _without_bom(self, line: str) -> str:
        if self._first_line:
            self._first_line = False
            return line.removeprefix(_BOM)
        return line

    def _take(self, line: str) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")  # a comment has the empty name
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        data, event = self._data, self._event
        self._data, self._event = [], ""
        return ServerSentEvent("\n".join(data), event or "message") if data else None
