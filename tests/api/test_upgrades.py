"""A client may offer another protocol with its request; it is answered in HTTP/1.1."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from sortserve.api.http.limits import ConnectionLimits
from sortserve.api.http.protocol import HttpProtocol
from support.http_service import HttpService, as_json, listening

BODY = as_json({"prompt": "a", "max_tokens": 3})
H2C = (
    b"Connection: Upgrade, HTTP2-Settings\r\n"
    b"Upgrade: h2c\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
)
OFFERS = [
    pytest.param(H2C, id="h2c"),
    pytest.param(
        b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
        id="websocket",
    ),
    pytest.param(b"Connection: Upgrade\r\nUpgrade: TLS/1.2, IRC/6.9\r\n", id="several"),
    pytest.param(
        b"Upgrade: never-heard-of\r\nConnection: keep-alive\r\nConnection: UPGRADE\r\n",
        id="unknown",
    ),
]


def post(offer: bytes, body: bytes = BODY, *, is_chunked: bool = False) -> bytes:
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + offer
    if not is_chunked:
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    parts = [body[i : i + 7] for i in range(0, len(body), 7)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks


def get(offer: bytes, path: bytes = b"/version", version: bytes = b"1.1") -> bytes:
    return b"GET " + path + b" HTTP/" + version + b"\r\nHost: a\r\n" + offer + b"\r\n"


# ---- however the bytes are cut ----


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Says what the application was asked."""
    request = Request(scope, receive)
    content = {
        "method": request.method,
        "target": str(request.url.path) + "?" + request.url.query,
        "body": (await request.body()).decode(),
        "names": [name for name, _ in request.headers.items()],
        "connection": request.headers.get("connection"),
    }
    await JSONResponse(content)(scope, receive, send)


class Wire(asyncio.Transport):
    """The other end of a connection: keeps what the protocol writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self._is_closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self._is_closing = True

    def is_closing(self) -> bool:
        return self._is_closing

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def exchange(*pieces: bytes) -> tuple[bytes, bool]:
    """What is answered to the pieces, each of which comes by itself, and whether it is the end."""
    config = uvicorn.Config(echo, log_config=None, ws="none", lifespan="off")
    protocol = HttpProtocol(config, ServerState(), {}, limits=ConnectionLimits())
    wire = Wire()
    protocol.connection_made(wire)
    for piece in pieces:
        protocol.data_received(piece)
        for _ in range(8):
            await asyncio.sleep(0)
    has_ended = wire.is_closing()
    protocol.connection_lost(None)
    return wire.written, has_ended


def answers(written: bytes) -> list[dict[str, Any]]:
    replies = written.split(b"HTTP/1.1 200 OK\r\n")
    assert replies.pop(0) == b""
    return [json.loads(reply.partition(b"\r\n\r\n")[2]) for reply in replies]


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_the_body_arrives_wherever_the_bytes_are_cut(is_chunked: bool) -> None:
    request = post(H2C, is_chunked=is_chunked)
    for cut in range(1, len(request)):
        [answer] = answers((await exchange(request[:cut], request[cut:]))[0])
        assert answer["body"] == BODY.decode()
        assert answer["connection"] is None
        assert not {"upgrade", "http2-settings"} & set(answer["names"])


@pytest.mark.parametrize("offer", OFFERS)
async def test_the_body_arrives_byte_by_byte(offer: bytes) -> None:
    request = post(offer)

    [answer] = answers((await exchange(*(request[i : i + 1] for i in range(len(request)))))[0])

    assert (answer["method"], answer["body"]) == ("POST", BODY.decode())


async def test_requests_behind_an_offer_are_answered_in_turn() -> None:
    target = b"/a/b%20c?q=1&r="
    requests = [post(H2C), get(b"", target), post(H2C, is_chunked=True), get(H2C), post(b"")]

    in_one, one_by_one = await exchange(b"".join(requests)), await exchange(*requests)

    assert answers(in_one[0]) == answers(one_by_one[0])
    assert [(a["method"], len(a["body"])) for a in answers(in_one[0])] == [
        ("POST", len(BODY)),
        ("GET", 0),
        ("POST", len(BODY)),
        ("GET", 0),
        ("POST", len(BODY)),
    ]
    assert answers(in_one[0])[1]["target"] == "/a/b c?q=1&r="


async def test_only_the_offer_is_taken_out_of_the_connection_options() -> None:
    offer = b"Connection: close, Upgrade\r\nUpgrade: h2c\r\nX-Other: upgrade\r\n"

    written, has_ended = await exchange(post(offer))

    [answer] = answers(written)
    assert answer["connection"] == "close"
    assert "x-other" in answer["names"]
    assert has_ended


async def test_an_offer_in_http_1_0_is_ignored_too() -> None:
    written, has_ended = await exchange(get(H2C, version=b"1.0"))

    assert [answer["method"] for answer in answers(written)] == ["GET"]
    assert has_ended


async def test_a_client_that_waits_to_be_told_to_continue_is_told() -> None:
    request = post(H2C + b"Expect: 100-continue\r\n")
    head, body = request[: -len(BODY)], request[-len(BODY) :]

    written, _ = await exchange(head, body)

    interim, rest = written[:25], written[25:]
    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert [answer["body"] for answer in answers(rest)] == [BODY.decode()]


@pytest.mark.parametrize(
    "request_",
    [
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_no_request_is_a_400(request_: bytes) -> None:
    written, has_ended = await exchange(request_)

    assert written.startswith(b"HTTP/1.1 400 ")
    assert has_ended


# ---- over a socket ----


def talk(url: str, request: bytes) -> bytes:
    """Everything the server says to the bytes of one client, which then sends no more."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        written = b""
        while piece := connection.recv(65536):
            written += piece
        return written


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_an_offer_with_a_body_is_served(
    shared: HttpService, offer: bytes, is_chunked: bool
) -> None:
    with listening(shared.app) as url:
        reply = talk(url, post(offer + b"Connection: close\r\n", is_chunked=is_chunked))

    assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"text":"bcd"' in reply


@pytest.mark.parametrize("offer", OFFERS)
def test_an_offer_without_a_body_is_served(shared: HttpService, offer: bytes) -> None:
    with listening(shared.app) as url:
        reply = talk(url, get(offer + b"Connection: close\r\n"))

    assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'{"version":' in reply
