"""Keys, the body limit, request ids and CORS, on every kind of reply."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from starlette.middleware.base import BaseHTTPMiddleware

from support.http_service import Connection, HttpService, as_json

KEYS = ("first-key", "second-kéy")
GUARDED = [
    ("POST", "/generate"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/exits"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/status"),
    ("GET", "/load"),
    ("GET", "/nothing"),
    ("GET", "/health/../generate"),
    ("GET", "/metrics/x"),
]
BODY = {"prompt": "a", "max_tokens": 1}


@pytest.fixture
def guarded(make: Callable[..., HttpService]) -> HttpService:
    return make(api_keys=KEYS)


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "first-key", "Basic first-key", "Bearer f"],
)
async def test_everything_else_needs_a_key(
    guarded: HttpService, method: str, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    async with guarded.client(**headers) as client:
        reply = await client.request(method, path)

    error = reply.json()["error"]
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


@pytest.mark.parametrize("path", ["/health", "/readyz", "/livez", "/metrics"])
async def test_probes_and_metrics_need_no_key(guarded: HttpService, path: str) -> None:
    assert (await guarded.get(path)).status_code == 200


@pytest.mark.parametrize("key", [key.encode() for key in KEYS])
@pytest.mark.parametrize("scheme", [b"Bearer", b"bearer"])
async def test_each_key_opens_every_door(guarded: HttpService, key: bytes, scheme: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"authorization", scheme + b" " + key)]
    connection = Connection(guarded.app, "/generate", as_json(BODY), headers=headers)

    await connection.open()

    assert connection.status == 200


async def test_open_paths_are_found_below_a_proxys_prefix(
    make: Callable[..., HttpService],
) -> None:
    service = make(api_keys=KEYS, root_path="/llm")

    assert (await service.get("/llm/health")).status_code == 200
    assert (await service.get("/health")).status_code == 200
    assert (await service.get("/llm/version")).status_code == 401


PROMPT = "the same words, " * 8


async def cached_tokens(service: HttpService, key: str | None, salt: str | None) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"prompt": PROMPT, "max_tokens": 1, "cache_salt": salt}
    reply = await service.post("/generate", body, **headers)
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [
        (("k1", None), ("k1", None), True),
        (("k1", None), ("k2", None), False),
        (("k1", "s"), ("k1", "s"), True),
        (("k1", "s"), ("k2", "s"), False),
        (("k1", "s"), ("k1", "t"), False),
        (("k1", None), ("k1", "s"), False),
        (("k1", None), ("k1", ""), True),
        (("a", "bc"), ("ab", "c"), False),
        (("ab", ""), ("a", "b"), False),
    ],
)
async def test_cached_prefixes_are_shared_within_one_key_and_salt_only(
    make: Callable[..., HttpService],
    first: tuple[str, str | None],
    second: tuple[str, str | None],
    is_shared: bool,
) -> None:
    service = make(api_keys=("k1", "k2", "a", "ab"))

    assert await cached_tokens(service, *first) == 0
    assert (await cached_tokens(service, *second) > 0) == is_shared


async def test_without_keys_the_salt_alone_decides(make: Callable[..., HttpService]) -> None:
    service = make()

    assert await cached_tokens(service, None, None) == 0
    assert await cached_tokens(service, None, "s") == 0
    assert await cached_tokens(service, None, None) > 0


@pytest.fixture
def small(make: Callable[..., HttpService]) -> HttpService:
    return make(max_body_bytes=100)


async def test_a_body_over_the_limit_is_refused_by_its_declared_length(
    small: HttpService,
) -> None:
    reply = await small.post("/generate", {"prompt": "a" * 200})

    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "payload_too_large"
    assert "100 bytes" in reply.json()["error"]["message"]


@pytest.mark.parametrize("digits", [3, 19, 5000])
async def test_no_declared_length_is_too_long_to_be_read(small: HttpService, digits: int) -> None:
    headers = ((b"content-type", b"application/json"), (b"content-length", b"9" * digits))
    connection = Connection(small.app, "/generate", b"", headers=headers)

    await connection.open()

    assert connection.status == 413


async def test_a_body_of_unknown_length_is_refused_once_it_passes_the_limit(
    small: HttpService,
) -> None:
    parts_sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal parts_sent
        for _ in range(1000):
            parts_sent += 1
            yield b" " * 10

    async with small.client(**{"content-type": "application/json"}) as client:
        reply = await client.post("/generate", content=body())

    assert reply.status_code == 413
    assert parts_sent == 11


async def test_a_body_at_the_limit_is_read(small: HttpService) -> None:
    content = as_json({"prompt": "a", "max_tokens": 1}).ljust(100)
    async with small.client(**{"content-type": "application/json"}) as client:
        reply = await client.post("/generate", content=content)

    assert len(content) == 100
    assert reply.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/nothing", 404),
        ("GET", "/generate", 405),
        ("POST", "/generate", 400),
    ],
)
async def test_the_request_id_is_echoed_on_every_reply(
    shared: HttpService, method: str, path: str, status: int
) -> None:
    async with shared.client(**{"x-request-id": "trace/1:a.b-c_d=+@"}) as client:
        reply = await client.request(method, path)

    assert reply.status_code == status
    assert reply.headers.get_list("x-request-id") == ["trace/1:a.b-c_d=+@"]


async def test_the_request_id_is_echoed_on_refusals_of_the_outer_layers(
    make: Callable[..., HttpService],
) -> None:
    service = make(api_keys=KEYS, max_body_bytes=10)
    headers = {"x-request-id": "r", "authorization": "Bearer first-key"}

    no_key = await service.get("/version", **{"x-request-id": "r"})
    too_large = await service.post("/generate", BODY, **headers)

    assert (no_key.status_code, too_large.status_code) == (401, 413)
    assert no_key.headers["x-request-id"] == too_large.headers["x-request-id"] == "r"


async def test_a_request_without_an_id_gets_one_of_its_own(shared: HttpService) -> None:
    ids = {(await shared.get("/health")).headers["x-request-id"] for _ in range(3)}

    assert len(ids) == 3


@pytest.mark.parametrize(
    "value", [b"", b"with space", b"x" * 129, b'quote"', b"<b>", b"\xe9t\xe9", b"a,b", b"{1}"]
)
async def test_a_request_with_an_unusual_id_is_served_under_one_of_our_own(
    shared: HttpService, value: bytes
) -> None:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", value)]
    connection = Connection(shared.app, "/generate", as_json(BODY), headers=headers)

    await connection.open()

    [given] = [v for k, v in connection.messages[0]["headers"] if k == b"x-request-id"]
    assert connection.status == 200
    assert re.fullmatch(rb"[0-9a-f]{32}", given)
    assert json.loads(connection.content)["id"] == given.decode()


async def test_the_request_id_becomes_the_replys_id_unless_the_body_has_one(
    shared: HttpService,
) -> None:
    by_header = await shared.post("/generate", BODY, **{"x-request-id": "h1"})
    by_body = await shared.post("/generate", {**BODY, "request_id": "b1"}, **{"x-request-id": "h"})

    assert by_header.json()["id"] == "h1"
    assert (by_body.json()["id"], by_body.headers["x-request-id"]) == ("b1", "h")


async def test_cors_is_off_by_default(shared: HttpService) -> None:
    reply = await shared.get("/health", origin="https://example.com")

    assert "access-control-allow-origin" not in reply.headers


APP, OTHER = "https://app.example", "https://other.example"
PREFLIGHT = {
    "origin": APP,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-slo-ttft-ms",
}


async def test_cors_lets_the_named_origins_in_and_no_others(
    make: Callable[..., HttpService],
) -> None:
    service = make(cors_allow_origins=(APP,), api_keys=KEYS)

    async with service.client() as client:
        allowed = await client.options("/generate", headers=PREFLIGHT)
    same = await service.get("/health", origin=APP)
    other = await service.get("/health", origin=OTHER)

    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == APP
    assert same.headers["access-control-allow-origin"] == APP
    assert "access-control-allow-origin" not in other.headers


async def every_kind_of_error(make: Callable[..., HttpService]) -> list[httpx.Response]:
    """One reply of each status that is no success, as a script of another origin gets it."""
    origin = {"origin": APP, "x-request-id": "no id"}
    options: dict[str, Any] = {"cors_allow_origins": (APP,)}
    guarded = make(api_keys=KEYS, **options)
    small = make(max_body_bytes=10, **options)
    full = make(worker_options={"max_num_queued_reqs": 1}, **options)
    full.runner.gated = True
    first = Connection(full.app, "/generate", as_json(BODY))
    task = first.open()
    for _ in range(20):
        await asyncio.sleep(0)
    loading = make(start=False, **options)
    failing = make(**options)
    failing.runner.fail_next = True
    broken = make(**options)
    broken.tokenizer.encode = None  # type: ignore[method-assign, assignment]
    replies = [
        await guarded.post("/generate", BODY, **origin),
        await small.post("/generate", BODY, **origin),
        await full.post("/generate", BODY, **origin),
        await loading.get("/health", **origin),
        await loading.post("/generate", BODY, **origin),
        await failing.post("/generate", BODY, **origin),
        await broken.post("/generate", BODY, **origin),
        await broken.post("/generate", {}, **origin),
        await broken.get("/generate", **origin),
        await broken.get("/nothing", **origin),
    ]
    full.runner.open()
    await task
    return replies


async def test_browsers_can_read_every_error_and_its_headers(
    make: Callable[..., HttpService],
) -> None:
    replies = await every_kind_of_error(make)

    statuses = [reply.status_code for reply in replies]
    assert statuses == [401, 413, 429, 503, 503, 500, 500, 400, 405, 404]
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == APP
        assert "Origin" in reply.headers["vary"]
        exposed = reply.headers["access-control-expose-headers"].lower().split(", ")
        assert {"x-request-id", "retry-after", "x-should-retry"} <= set(exposed)
        assert reply.headers["x-request-id"]
        assert reply.json()["error"]["message"]


async def test_a_preflight_has_an_id_and_is_counted(make: Callable[..., HttpService]) -> None:
    service = make(cors_allow_origins=(APP,))

    async with service.client() as client:
        reply = await client.options("/generate", headers={**PREFLIGHT, "x-request-id": "p1"})

    assert reply.headers["x-request-id"] == "p1"
    assert 'method="OPTIONS"' in (await service.get("/metrics")).text


def test_no_middleware_hides_a_disconnect(shared: HttpService) -> None:
    classes = [middleware.cls for middleware in shared.app.user_middleware]

    assert classes
    assert not any(issubclass(cls, BaseHTTPMiddleware) for cls in classes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "path",
    [
        "/playground/../app.py",
        "/playground/..%2f..%2fapp.py",
        "/playground/%2e%2e/%2e%2e/app.py",
        "/playground//etc/passwd",
        "/playground/..\\..\\app.py",
        "/docs/../../settings.py",
        "/docs/%2fetc%2fpasswd",
        "/playground/app.js%00.py",
    ],
)
async def test_no_path_leads_out_of_the_pages(shared: HttpService, path: str) -> None:
    for decoded in (path, unquote(path)):  # servers hand paths over decoded
        connection = Connection(shared.app, decoded, b"", method="GET", headers=())

        await connection.open()

        assert connection.status == 404
        assert b"root:" not in connection.content
        assert b"from __future__" not in connection.content
