"""A page whose name was pointed at this machine gets nothing."""

from __future__ import annotations

import httpx
import pytest
from starlette.responses import PlainTextResponse

from sortserve.api.http.hosts import HostCheckMiddleware


async def status(host: str | None, *, any_address: bool = False) -> int:
    app = HostCheckMiddleware(
        PlainTextResponse("secret"), names=["Box.lan:8000", "127.0.0.1"], any_address=any_address
    )
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [] if host is None else [(b"host", host.encode("latin-1"))],
    }
    statuses: list[int] = []

    async def send(message: dict[str, object]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(int(str(message["status"])))

    async def receive() -> dict[str, object]:
        return {"type": "http.request"}

    await app(scope, receive, send)  # type: ignore[arg-type]
    return statuses[0]


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "localhost.:8000",
        "127.0.0.1",
        "127.0.0.1:8000",
        "127.0.0.2:1",
        "[::1]",
        "[::1]:8000",
        "box.lan",
        "BOX.lan:1",
        None,  # HTTP/1.0; browsers always send one
    ],
)
async def test_own_names_and_loopback_addresses_are_answered(host: str | None) -> None:
    assert await status(host) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "evil.example#localhost",
        "box.lan.evil.example",
        "[::1].evil.example",
        "[::1",
        "",
        ":8000",
        "10.0.0.1:8000",
        "[::2]:8000",
        "0.0.0.0",
        "\xe9vil",
    ],
)
async def test_every_other_name_is_not(host: str) -> None:
    assert await status(host) == 421


async def test_on_a_network_every_address_is_answered_but_no_foreign_name() -> None:
    assert await status("10.0.0.1:8000", any_address=True) == 200
    assert await status("evil.example", any_address=True) == 421


async def test_of_two_hosts_both_must_be_ours() -> None:
    app = HostCheckMiddleware(
        PlainTextResponse("secret"), any_address=False, cors_allow_origins=["https://app.example"]
    )
    headers = [("host", "localhost"), ("host", "evil.example"), ("origin", "https://app.example")]

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost"
    ) as client:
        reply = await client.get("/", headers=headers)

    assert reply.status_code == 421
    assert reply.json()["error"]["code"] == "host_not_allowed"
    assert "--allowed-hosts" in reply.json()["error"]["message"]
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert reply.headers["x-request-id"]
