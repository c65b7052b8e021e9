"""What a server says before it has a model, and where it says that it is."""

from __future__ import annotations

import asyncio
import shlex
import socket
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse

from sortserve.banner import base_url, curl
from sortserve.config import ServeSettings, load_settings
from sortserve.errors import ConfigError
from sortserve.serve import FrontDoor, listen


def client_of(door: FrontDoor) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://server")


async def test_a_loading_server_is_alive_but_not_ready() -> None:
    async with client_of(FrontDoor()) as client:
        live = await client.get("/livez")
        health = await client.get("/health")

    assert live.status_code == 200
    assert (health.status_code, health.json()["status"]) == (503, "loading")


async def test_a_loading_server_refuses_work_and_says_when_to_come_back() -> None:
    async with client_of(FrontDoor()) as client:
        reply = await client.post("/v1/completions", json={"prompt": "Hi"})

    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "5"
    assert reply.json()["error"]["type"] == "unavailable_error"
    assert reply.json()["error"]["code"] == "loading"


async def test_a_loaded_server_answers_itself() -> None:
    door = FrontDoor()
    door.app = PlainTextResponse("here")

    async with client_of(door) as client:
        assert (await client.get("/health")).text == "here"


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ({}, "http://127.0.0.1:81"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:81"),
        ({"host": "::1"}, "http://[::1]:81"),
        ({"host": "::"}, "http://[::1]:81"),
        ({"host": "box.lan"}, "http://box.lan:81"),
    ],
)
def test_the_address_shown_is_one_that_a_client_can_use(flags: dict[str, str], url: str) -> None:
    assert base_url(load_settings(flags), 81) == url


def test_tls_is_part_of_the_address(tmp_path: Path) -> None:
    pem = tmp_path / "both.pem"
    pem.write_text("")

    settings = load_settings({"ssl_certfile": str(pem), "ssl_keyfile": str(pem)})

    assert base_url(settings, 81) == "https://127.0.0.1:81"


def test_the_command_to_try_is_one_that_a_shell_understands() -> None:
    settings = load_settings({"uds": "server.sock", "api_key": ["secret"]})

    command = curl(settings, base_url(settings, None))

    words = shlex.split(command)
    assert words[:4] == ["curl", "--unix-socket", "server.sock", "http://localhost/generate"]
    assert '"budget": {"latency_ms": 2000}' in words[-1]
    assert "Authorization: Bearer $SORTSERVE_API_KEY" in words
    assert "secret" not in command


def test_port_0_takes_a_free_one() -> None:
    with listen(load_settings({"port": 0})) as listener:
        assert listener.getsockname()[1] > 0


async def test_small_packets_leave_at_once() -> None:
    accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.Future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set_result(writer)

    with listen(load_settings({"port": 0})) as listener:
        address = listener.getsockname()
        async with await asyncio.start_server(accept, sock=listener):
            _, client = await asyncio.open_connection(*address)
            server = (await accepted).get_extra_info("socket")

            assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0

            for writer in (client, accepted.result()):
                writer.close()
                await writer.wait_closed()


def test_an_address_that_is_taken_is_refused_by_name() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        with pytest.raises(ConfigError, match=f"cannot listen on --host 127.0.0.1 --port {port}"):
            listen(load_settings({"port": port}))


def test_a_socket_file_left_behind_is_replaced_but_a_live_one_is_not(tmp_path: Path) -> None:
    settings = ServeSettings(uds=str(tmp_path / "server.sock"))
    with listen(settings):
        pass  # ends without removing its file, as a killed server does

    with listen(settings) as listener:
        listener.listen()
        with pytest.raises(ConfigError, match="cannot listen on --uds"):
            listen(settings)
