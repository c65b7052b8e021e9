"""What a client may send and hold before its key is looked at: bytes on a real socket.

Time passes only while nobody does anything: see ``support.patient_loop``.
"""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sortserve.api.http.limits import MAX_PIPELINED, ConnectionLimits
from sortserve.api.http.protocol import RESERVED_CONNECTIONS, HttpProtocol
from support.patient_loop import patient
from support.raw_http import RawServer, raw_server

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
SOON_S = 0.02
"""A time-out that a test waits out."""


def protocol_of(server: RawServer) -> HttpProtocol:
    [connection] = server.state.connections
    assert isinstance(connection, HttpProtocol)
    return connection


# ---- size ----


@patient
async def test_a_request_within_all_limits_is_answered_and_the_connection_lives_on() -> None:
    async with (
        raw_server(limits=ConnectionLimits(max_num_headers=4)) as server,
        server.client() as client,
    ):
        for _ in range(2):
            client.send(POST + b"A: 1\r\nB: 2\r\nContent-Length: 2\r\n\r\nhi")
            reply = await client.reply()

            assert (reply.status, reply.body) == (200, b"hi")
            assert "connection" not in reply.headers


@pytest.mark.parametrize(
    "head",
    [
        GET + b"A: 1\r\n" * 200_000,
        GET + b"A: " + b"x" * 1_000_000,
        GET + b"x" * 1_000_000,
        b"GET /" + b"x" * 1_000_000,
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        GET + b"A: " + b"x" * 70_000 + b"\r\n\r\n",
        GET + b"A: 1\r\n" * 200 + b"\r\n",
    ],
    ids=["fields", "endless value", "endless name", "endless url", "url", "value", "many"],
)
@patient
async def test_headers_over_a_limit_are_refused_before_the_application_sees_them(
    head: bytes,
) -> None:
    async with raw_server() as server, server.client() as client:
        client.send(head)
        reply = await client.reply()
        await client.rest()

    assert reply.status == 431
    assert reply.headers["connection"] == "close"
    assert reply.error["code"] == "headers_too_large"
    assert "200 fields and 65536 bytes" in reply.error["message"]
    assert server.app.num_asked == 0


@patient
async def test_no_more_of_an_endless_header_is_held_than_the_limit_and_one_read() -> None:
    async with raw_server() as server, server.client() as client:
        client.send(GET + b"A: ")
        await server.connected(1)
        protocol = protocol_of(server)
        num_read = 0
        while not protocol._is_refused:
            protocol.data_received(b"x" * 65536)
            num_read += 65536

    assert num_read <= 3 * 65536


@patient
async def test_a_client_that_sends_on_can_still_read_why_it_was_refused() -> None:
    async with raw_server() as server, server.client() as client:
        client.send(GET + b"A: 1\r\n" * 300)
        await server.connected(1)
        for _ in range(50):
            client.send(b"A: 1\r\n" * 10_000)
            await client.writer.drain()

        assert (await client.reply()).status == 431
        client.writer.write_eof()
        await server.connected(0)


@patient
async def test_headers_after_the_body_count_too_and_are_no_headers() -> None:
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n"
    async with raw_server() as server, server.client() as client:
        client.send(chunked + b"Authorization: Bearer k\r\n\r\n")
        reply = await client.reply()
        client.send(chunked + b"A: 1\r\n" * 200_000)
        await client.rest()

    assert (reply.status, reply.body) == (200, b"hi")
    assert [name for name, _ in server.app.scopes[0]["headers"]] == [b"host", b"transfer-encoding"]


@patient
async def test_an_endless_chunk_extension_is_refused() -> None:
    async with raw_server() as server, server.client() as client:
        client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 1_000_000)

        assert (await client.reply()).status == 431
        await client.rest()
        await server.app.left.wait()


@pytest.mark.parametrize("callback", ["on_message_begin", "on_header", "on_body"])
@patient
async def test_where_we_fail_it_is_not_called_the_clients_mistake(
    callback: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HttpToolsProtocol, callback, Mock(side_effect=MemoryError))
    async with raw_server() as server, server.client() as client:
        client.send(POST + b"Content-Length: 4\r\n\r\nbody")

        reply = await client.reply()

        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        assert await client.rest() == b""


@patient
async def test_what_is_not_http_is_refused_in_the_error_format() -> None:
    async with raw_server() as server, server.client() as client:
        client.send(b"\x16\x03\x01\x02\x00\r\n\r\n")
        reply = await client.reply()
        await client.rest()

    assert (reply.status, reply.error["code"]) == (400, "invalid_http")


@pytest.mark.parametrize(
    "head",
    [
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b",
        "GET / HTTP/1.1\r\nHost: a\r\nhost: a",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: Upgrade\r\nUpgrade: h2c",
        "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked",
    ],
)
@patient
async def test_a_request_that_a_proxy_may_read_another_way_is_refused(head: str) -> None:
    async with raw_server() as server, server.client() as client:
        client.send(head.encode() + b"\r\n\r\n0\r\n\r\n")
        reply = await client.reply()
        rest = await client.rest()

    assert (reply.status, reply.error["code"]) == (400, "invalid_http")
    assert rest == b""


# ---- time ----


@pytest.mark.parametrize("sent", [b"G", GET, GET + b"A: 1"])
@patient
async def test_headers_that_do_not_end_are_given_up(sent: bytes) -> None:
    async with (
        raw_server(limits=ConnectionLimits(header_timeout_s=SOON_S)) as server,
        server.client() as client,
    ):
        client.send(sent)
        reply = await client.reply()
        await client.rest()

    assert (reply.status, reply.error["code"]) == (408, "headers_timeout")
    assert server.app.num_asked == 0


@patient
async def test_a_trickle_of_headers_does_not_buy_time() -> None:
    async with (
        raw_server(limits=ConnectionLimits(header_timeout_s=SOON_S)) as server,
        server.client() as client,
    ):
        client.send(GET)
        await server.connected(1)
        while protocol_of(server)._receipt_timer is None:
            await asyncio.sleep(0)
        timer = protocol_of(server)._receipt_timer

        for _ in range(10):
            client.send(b"A: 1\r\n")
            await asyncio.sleep(0)
            assert protocol_of(server)._receipt_timer is timer

        assert (await client.reply()).status == 408


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 5\r\n\r\nab",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nA: 1\r\n",
    ],
)
@patient
async def test_a_body_that_does_not_end_is_given_up(sent: bytes) -> None:
    async with (
        raw_server(limits=ConnectionLimits(body_timeout_s=SOON_S)) as server,
        server.client() as client,
    ):
        client.send(sent)
        reply = await client.reply()
        await client.rest()
        await server.app.left.wait()

    assert (reply.status, reply.error["code"]) == (408, "body_timeout")


@patient
async def test_a_body_that_goes_on_after_its_answer_ends_with_the_connection() -> None:
    async def refuse(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 413, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b""})  # type: ignore[operator]

    async with (
        raw_server(refuse, limits=ConnectionLimits(body_timeout_s=SOON_S)) as server,
        server.client() as client,
    ):
        client.send(POST + b"Content-Length: 1000000\r\n\r\nab")

        assert (await client.reply()).status == 413
        await client.rest()


@patient
async def test_an_idle_connection_is_closed_without_a_word() -> None:
    async with (
        raw_server(limits=ConnectionLimits(keep_alive_s=SOON_S)) as server,
        server.client() as client,
    ):
        assert await client.rest() == b""
        async with server.client() as used:
            used.send(GET + b"\r\n")
            assert (await used.reply()).status == 200
            assert await used.rest() == b""
        async with server.client() as blank:
            blank.send(b"\r\n")
            assert await blank.rest() == b""


@patient
async def test_a_request_that_waits_behind_another_is_not_late() -> None:
    limits = ConnectionLimits(header_timeout_s=SOON_S, body_timeout_s=SOON_S, keep_alive_s=SOON_S)
    async with raw_server(limits=limits) as server, server.client() as client:
        server.app.held = True
        client.send(GET + b"\r\n" + POST + b"Content-Length: 70000\r\n\r\n")
        await server.app.asked.wait()
        await asyncio.sleep(3 * SOON_S)
        server.app.may_answer.set()
        first = await client.reply()
        client.send(b"x" * 70_000)
        second = await client.reply()

    assert (first.status, second.status, len(second.body)) == (200, 200, 70_000)


@patient
async def test_half_a_request_behind_another_does_not_end_the_first_ones_answer() -> None:
    async with (
        raw_server(limits=ConnectionLimits(header_timeout_s=SOON_S)) as server,
        server.client() as client,
    ):
        server.app.held = True
        client.send(GET + b"\r\n" + b"GET / HT")
        await server.app.asked.wait()
        await asyncio.sleep(3 * SOON_S)
        server.app.may_answer.set()

        assert (await client.reply()).status == 200
        assert (await client.reply()).status == 408


@patient
async def test_a_client_that_does_not_read_is_cut_off() -> None:
    async with (
        raw_server(limits=ConnectionLimits(write_timeout_s=SOON_S)) as server,
        server.client() as client,
    ):
        server.app.answer = b"x" * 20_000_000
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(GET + b"\r\n")

        await server.connected(1)
        await server.connected(0)


@patient
async def test_a_closed_connection_whose_last_bytes_nobody_takes_is_cut_off() -> None:
    async with (
        raw_server(limits=ConnectionLimits(write_timeout_s=SOON_S)) as server,
        server.client() as client,
    ):
        server.app.answer = b"x" * 20_000_000
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(GET + b"Connection: close\r\n\r\n")

        await server.connected(1)
        await server.connected(0)


@patient
async def test_a_slow_reader_that_reads_on_gets_it_all() -> None:
    async with (
        raw_server(limits=ConnectionLimits(write_timeout_s=1)) as server,
        server.client() as client,
    ):
        server.app.answer = b"x" * 10_000_000
        client.send(GET + b"\r\n")

        assert len((await client.reply()).body) == 10_000_000
        assert protocol_of(server)._write_timer is None


# ---- number ----


@patient
async def test_beyond_the_cap_only_probes_are_answered_and_connections_closed() -> None:
    async with (
        raw_server(limits=ConnectionLimits(max_connections=1)) as server,
        server.client() as first,
    ):
        await server.connected(1)
        async with server.client() as second, server.client() as third:
            second.send(GET + b"\r\n")
            refused = await second.reply()
            third.send(b"GET /livez HTTP/1.1\r\n\r\n")
            probed = await third.reply()
            await second.rest()
            await third.rest()
        first.send(GET + b"\r\n")

        assert (await first.reply()).status == 200
    assert (refused.status, refused.error["code"]) == (503, "too_many_connections")
    assert refused.headers["retry-after"] == "1"
    assert probed.status == 200
    assert refused.headers["connection"] == probed.headers["connection"] == "close"


@patient
async def test_beyond_the_reserve_for_probes_nothing_is_read() -> None:
    async with raw_server(limits=ConnectionLimits(max_connections=1)) as server:
        clients = [server.client() for _ in range(1 + RESERVED_CONNECTIONS)]
        for client in clients:
            await client.__aenter__()
        await server.connected(1 + RESERVED_CONNECTIONS)

        async with server.client() as last:
            reply = await last.reply()
            await last.rest()
        for client in clients:
            await client.__aexit__(None, None, None)

    assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
    assert (reply.headers["retry-after"], reply.error["type"]) == ("1", "unavailable_error")


@patient
async def test_an_idle_connection_over_the_cap_is_closed_sooner() -> None:
    limits = ConnectionLimits(max_connections=1, header_timeout_s=SOON_S)
    async with raw_server(limits=limits) as server, server.client() as first:
        await server.connected(1)
        async with server.client() as second:
            assert await second.rest() == b""
        assert not first.reader.at_eof()


@patient
async def test_a_connection_that_ends_makes_room() -> None:
    async with raw_server(limits=ConnectionLimits(max_connections=1)) as server:
        async with server.client():
            await server.connected(1)
        await server.connected(0)
        async with server.client() as client:
            client.send(GET + b"\r\n")
            assert (await client.reply()).status == 200


@patient
async def test_a_connection_queues_only_so_many_requests() -> None:
    async with raw_server() as server, server.client() as client:
        server.app.held = True
        client.send((GET + b"\r\n") * 10_000)
        await client.rest()

    assert server.app.num_asked == 1
    assert MAX_PIPELINED < 100


# ---- half-closed clients ----


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@patient
async def test_a_client_that_has_finished_sending_gets_its_answer(version: bytes) -> None:
    async with raw_server() as server, server.client() as client:
        server.app.held = True
        client.send(b"POST / HTTP/" + version + b"\r\nContent-Length: 2\r\n\r\nhi")
        client.writer.write_eof()
        await server.app.asked.wait()
        await asyncio.sleep(SOON_S)
        server.app.may_answer.set()
        reply = await client.reply()

        assert (reply.status, reply.body) == (200, b"hi")
        assert await client.rest() == b""
    assert server.app.num_left == 0


@patient
async def test_a_client_that_leaves_is_noticed_without_a_word_from_it() -> None:
    async with raw_server() as server:
        server.app.held = True
        async with server.client() as client:
            client.send(GET + b"\r\n")
            await server.app.asked.wait()
            client.writer.close()
            await client.writer.wait_closed()
            await server.app.left.wait()


@patient
async def test_a_client_that_leaves_in_the_middle_of_its_request_is_gone() -> None:
    async with raw_server() as server:
        for part in (GET, POST + b"Content-Length: 5\r\n\r\nab"):
            async with server.client() as client:
                client.send(part)
                client.writer.write_eof()
                assert await client.rest() == b""
        await server.connected(0)


ORIGIN = "https://app.example"
TOO_SOON_S = 0.001


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"a b: c\r\n\r\n", 400),
        (b"", 408),
        (b"content-length: 9\r\n\r\n", 408),
        (b"a: b\r\n" * 300, 431),
    ],
)
@patient
async def test_browsers_can_read_what_is_refused_before_the_application_and_find_its_id(
    sent: bytes, status: int
) -> None:
    limits = ConnectionLimits(header_timeout_s=TOO_SOON_S, body_timeout_s=TOO_SOON_S)
    head = b"GET / HTTP/1.1\r\norigin: %b\r\nx-request-id: r1\r\nx: y\r\n" % ORIGIN.encode()
    async with (
        raw_server(limits=limits, cors_allow_origins=(ORIGIN,)) as server,
        server.client() as client,
    ):
        client.send(head + sent)
        reply = await client.reply()

    assert reply.status == status
    assert reply.headers["x-request-id"] == "r1"
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in reply.headers["access-control-expose-headers"].lower()
    assert reply.headers.get("x-should-retry") == (None if status == 408 else "false")


@patient
async def test_browsers_can_read_that_there_are_too_many_connections() -> None:
    limits = ConnectionLimits(max_connections=1)
    head = b" / HTTP/1.1\r\norigin: %b\r\nx-request-id: r1\r\n\r\n" % ORIGIN.encode()
    async with (
        raw_server(limits=limits, cors_allow_origins=(ORIGIN,)) as server,
        server.client() as first,
    ):
        await server.connected(1)
        async with server.client() as second, server.client() as third:
            second.send(b"GET" + head)
            refused = await second.reply()
            third.send(b"OPTIONS" + head)
            preflight = await third.reply()
        first.writer.close()

    assert (refused.status, refused.headers["access-control-allow-origin"]) == (503, ORIGIN)
    assert refused.headers["x-request-id"] == "r1"
    assert preflight.status == 200  # the application's own


@patient
async def test_scripts_of_other_origins_may_not_read_refusals() -> None:
    async with raw_server(cors_allow_origins=(ORIGIN,)) as server, server.client() as client:
        client.send(b"GET / HTTP/1.1\r\norigin: https://other.example\r\na b: c\r\n\r\n")
        reply = await client.reply()

    assert reply.status == 400
    assert "access-control-allow-origin" not in reply.headers


@patient
async def test_one_read_takes_little_however_small_the_chunks_of_a_body() -> None:
    """Each chunk is a call: 40,000 of them at once would hold the loop for 50 ms."""
    async with raw_server() as server, server.client():
        await server.connected(1)
        transport = protocol_of(server).transport
        assert transport.max_size == 1 << 16  # type: ignore[attr-defined]
