"""What a server says before it has a model, and where it says that it is."""

from __future__ import annotations

import shlex
import socket
from functools import partial
from pathlib import Path

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sortserve.process.banner import base_url, curl
from sortserve.process.config import load_settings
from sortserve.process.http_server import http_server
from sortserve.process.listening import listening
from sortserve.process.serve import FrontDoor


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


async def test_browsers_can_read_that_a_server_is_loading() -> None:
    async with client_of(FrontDoor(("https://app.example",))) as client:
        reply = await client.get("/v1/models", headers={"origin": "https://app.example"})

    assert reply.status_code == 503
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert "Retry-After" in reply.headers["access-control-expose-headers"]


async def test_a_loading_server_echoes_request_ids_and_answers_head() -> None:
    async with client_of(FrontDoor()) as client:
        live = await client.head("/livez", headers={"x-request-id": "r1"})
        health = await client.head("/health")

    assert (live.status_code, live.content, live.headers["x-request-id"]) == (200, b"", "r1")
    assert (health.status_code, health.content) == (503, b"")


async def test_the_playground_is_there_while_the_model_loads() -> None:
    door = FrontDoor(root_path="/llm", with_playground=True)
    async with client_of(door) as client:
        replies = [await client.get(path) for path in ("/", "/llm/", "/playground/app.js")]
        refused = [await client.get("/exits"), await client.post("/"), await client.get("/x/")]

    assert [reply.status_code for reply in replies] == [200] * 3
    assert [reply.json()["error"]["code"] for reply in refused] == ["loading"] * 3


async def test_a_playground_that_is_off_is_off_while_the_model_loads() -> None:
    async with client_of(FrontDoor()) as client:
        assert (await client.get("/")).status_code == 503


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
        ({"host": "[::1]"}, "http://[::1]:81"),
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


# ---- what stands before the application ----


async def tell_client(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what the access log would say of the client."""
    client, scheme = scope["client"], scope["scheme"]
    await JSONResponse({"client": client[0], "scheme": scheme})(scope, receive, send)


def front(flags: dict[str, object]) -> ASGIApp:
    """What a server started with these flags puts before its application."""
    settings = load_settings({"port": 0, **flags})
    with listening(settings) as listener:
        app: ASGIApp = http_server(settings, tell_client, listener, None).config.loaded_app
    return app


async def ask(app: ASGIApp, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get("/", headers={k.replace("_", "-"): v for k, v in headers.items()})


@pytest.mark.parametrize(
    ("flags", "client", "scheme"),
    [
        ({}, "127.0.0.1", "http"),
        ({"forwarded_allow_ips": "10.0.0.0/8"}, "127.0.0.1", "http"),
        ({"forwarded_allow_ips": "127.0.0.1"}, "6.6.6.6", "https"),
        ({"forwarded_allow_ips": "10.0.0.1,127.0.0.0/8"}, "6.6.6.6", "https"),
        ({"forwarded_allow_ips": "*"}, "6.6.6.6", "https"),
    ],
)
async def test_only_a_proxy_that_is_named_may_say_who_asks(
    flags: dict[str, object], client: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # uvicorn's own variable is not one of ours

    reply = await ask(front(flags), x_forwarded_for="6.6.6.6", x_forwarded_proto="https")

    assert reply.json() == {"client": client, "scheme": scheme}


@pytest.mark.parametrize(
    ("flags", "is_guarded"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "127.0.0.2"}, True),
        ({"api_key": ["k"]}, False),
        ({"host": "0.0.0.0"}, False),
        ({"host": "0.0.0.0", "allowed_hosts": "box.lan"}, True),
        ({"api_key": ["k"], "allowed_hosts": "box.lan"}, True),
        ({"allowed_hosts": "*"}, False),
    ],
)
async def test_a_server_that_only_this_machine_reaches_answers_to_no_foreign_name(
    flags: dict[str, object], is_guarded: bool
) -> None:
    app = front(flags)

    assert (await ask(app, host="evil.example:8000")).status_code == (421 if is_guarded else 200)
    assert (await ask(app, host="localhost:8000")).status_code == 200
    if "allowed_hosts" in flags:
        assert (await ask(app, host="box.lan:8000")).status_code == 200


async def test_a_unix_socket_answers_to_any_name(tmp_path: Path) -> None:
    assert (await ask(front({"uds": str(tmp_path / "s")}), host="evil.example")).status_code == 200


async def test_a_server_under_a_name_answers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)

    assert (await ask(front({"host": "box.lan"}), host="box.lan")).status_code == 200


@pytest.mark.parametrize(
    ("flags", "times"),
    [
        ({}, (10.0, 60.0, 60.0)),
        ({"client_timeout": "20"}, (10.0, 20.0, 20.0)),
        ({"client_timeout": "20", "write_timeout": "5"}, (10.0, 20.0, 5.0)),
        ({"client_timeout": "2"}, (2.0, 2.0, 2.0)),
    ],
)
def test_one_time_bounds_all_that_a_client_may_take(
    flags: dict[str, str], times: tuple[float, float, float]
) -> None:
    settings = load_settings({"port": "0", **flags})
    with listening(settings) as listener:
        config = http_server(settings, FrontDoor(), listener, None).config
    assert isinstance(config.http, partial)
    limits = config.http.keywords["limits"]

    assert (limits.header_timeout_s, limits.body_timeout_s, limits.write_timeout_s) == times
