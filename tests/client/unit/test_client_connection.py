"""Whom the client asks, with which key, by which way, and what it says when that fails."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import pytest

from sortserve_client import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    Client,
    InvalidResponseError,
    SortserveError,
    UnavailableError,
)

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
Ask = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Make a client with these arguments and call one method of it."""

    def sync(method: str, /, *args: Any, handler: Any = None, **config: Any) -> Any:
        if handler is not None:
            config["http_client"] = httpx.Client(transport=httpx.MockTransport(handler))
        with Client(**config, sleep=lambda _: None) as client:
            return getattr(client, method)(*args)

    async def twin(method: str, /, *args: Any, handler: Any = None, **config: Any) -> Any:
        async def sleep(_: float) -> None:
            pass

        if handler is not None:
            config["http_client"] = httpx.AsyncClient(transport=httpx.MockTransport(handler))
        async with AsyncClient(**config, sleep=sleep) as client:
            return await getattr(client, method)(*args)

    if request.param == "sync":
        return sync
    return lambda *args, **config: asyncio.run(twin(*args, **config))


# Keys.


@pytest.mark.parametrize(
    "key",
    [
        "sk-secret\n",
        "sk-secret\r\nX: y",
        " sk-secret",
        "sk secret",
        "sk-secret\0",
        "sk-secret\x7f",
        "sk-secret\xa0",
        "sk-sécret",
        "sk-secret\u2028",
        "sk-secret\ud800",
        "ключ-secret",
    ],
)
def test_a_key_that_no_header_can_carry_is_refused_at_once_and_never_shown(
    ask: Ask, key: str
) -> None:
    with pytest.raises(ValueError, match="api_key") as caught:
        ask("version", api_key=key)

    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert "sk-s" not in shown
    assert "ключ" not in shown


@pytest.mark.parametrize("key", ["", b"sk-secret", 17])
def test_a_key_is_a_text_that_is_not_empty(ask: Ask, key: Any) -> None:
    with pytest.raises(ValueError, match="api_key") as caught:
        ask("version", api_key=key)

    assert "secret" not in str(caught.value)


def test_the_key_is_in_no_repr_of_what_the_client_holds() -> None:
    with Client(api_key="sk-secret") as client:
        shown = repr(client) + repr(vars(client)) + repr(client._request_arguments(CALL))

    assert "sk-secret" not in shown


CALL = inspect.getclosurevars(Client.version).globals["calls"].version()


def test_a_header_of_the_callers_own_client_that_is_no_header_is_not_shown(ask: Ask) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError("Illegal header value b'Bearer sk-secret\\n'")

    with pytest.raises(APIConnectionError, match="not valid HTTP") as caught:
        ask("version", handler=refuse)

    assert caught.value.sent is False
    assert "sk-secret" not in "".join(traceback.format_exception(caught.value))


def test_an_illegal_header_is_found_before_the_first_byte_and_not_tried_again() -> None:
    with Server() as server, httpx.Client(headers={"X-Token": "sk-secret\n"}) as http:
        client = Client(server.url, http_client=http, sleep=lambda _: pytest.fail("retried"))

        with pytest.raises(APIConnectionError) as caught:
            client.version()

        assert caught.value.sent is False
        assert server.seen == []
    assert "sk-secret" not in "".join(traceback.format_exception(caught.value))


# Addresses.


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://h",
        "",
        "http://",
        "http:///path",
        "http://h:99999",
        "http://h:0",
        "http://h:x",
        "http://ho\nst",
        "http://h\0",
        "http://a..b",
        f"http://{'a' * 64}.de",
        "http:// h",
        "http://h/?a=1",
        "http://h/#top",
        "http://[::1",
        "https://xn--/",
        "HTTP:/h",
    ],
)
def test_an_address_that_cannot_be_asked_is_refused_at_once(ask: Ask, url: str) -> None:
    with pytest.raises(ValueError, match="base_url") as caught:
        ask("version", base_url=url)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", [None, b"http://h", 8000])
def test_an_address_is_a_text(ask: Ask, url: Any) -> None:
    with pytest.raises(ValueError, match="base_url"):
        ask("version", base_url=url)


def test_a_password_in_the_address_is_sent_as_a_header_and_shown_nowhere(ask: Ask) -> None:
    seen: list[httpx.Request] = []

    def server(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={})

    with pytest.raises(InvalidResponseError) as caught:
        ask("version", base_url="http://ann:p%40ss-word@host/llm", handler=server)

    assert seen[0].headers["authorization"] == "Basic YW5uOnBAc3Mtd29yZA=="
    assert str(seen[0].url) == "http://host/llm/version"
    with Client("http://ann:p%40ss-word@host") as client:
        shown = repr(client) + repr(vars(client)) + str(caught.value)
    assert "ss-word" not in shown


@pytest.mark.parametrize(
    "url",
    [
        "http://ann:pass-word@h:x",
        "http://ann:pass-word@",
        "ann:pass-word@h",
        "http://ann:pass-word@h?b",
        "http://ann:pass-wo?rd@h:x",
        "ftp://ann:pass-word@h",
    ],
)
def test_a_password_in_a_wrong_address_is_not_shown_either(ask: Ask, url: str) -> None:
    with pytest.raises(ValueError, match="base_url") as caught:
        ask("version", base_url=url)

    assert "pass-wo" not in "".join(traceback.format_exception(caught.value))


def test_a_password_and_a_key_exclude_one_another(ask: Ask) -> None:
    with pytest.raises(ValueError, match="base_url"):
        ask("version", base_url="http://a:b@h", api_key="k")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e300, "5"])
def test_a_timeout_that_no_socket_takes_is_refused_at_once(ask: Ask, timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout"):
        ask("version", timeout=timeout)


# Proxies.


class Server:
    """Answers any request with a version, and remembers what it was asked, as a proxy would."""

    def __init__(self) -> None:
        self.seen: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            outer: ClassVar = self

            def do_GET(self) -> None:
                self.outer.seen.append(self.path)
                body = json.dumps({"version": "1.2.3"}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "127.1", "0.0.0.0"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY", "http_proxy"])
def test_a_server_on_this_machine_is_asked_without_a_proxy(
    ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")  # nobody listens there

    assert ask("version", base_url=f"http://{host}:{server.port}") == "1.2.3"
    assert server.seen == ["/version"]


@pytest.mark.parametrize(
    "host", ["127.8.9.10", "[::1]", "[::ffff:127.0.0.1]", "a.localhost", "localhost.", "[::]"]
)
def test_whatever_names_this_machine_is_loopback(host: str) -> None:
    with Client(f"http://{host}:8000") as client:
        assert client._address.is_loopback


@pytest.mark.parametrize("host", ["10.0.0.1", "localhost.de", "notlocalhost", "128.0.0.1", "[::2]"])
def test_other_hosts_are_not(host: str) -> None:
    with Client(f"http://{host}:8000") as client:
        assert not client._address.is_loopback


def test_other_hosts_are_asked_through_the_proxy_of_the_environment(
    ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url)

    assert ask("version", base_url="http://llm.invalid:8000") == "1.2.3"
    assert server.seen == ["http://llm.invalid:8000/version"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks9://ann:pass-word@h"),
        ("HTTP_PROXY", "http://ann:pass-word@h:x"),
        ("NO_PROXY", "http://[::1"),
        ("SSL_CERT_FILE", "/no/such/pass-word.pem"),
    ],
)
def test_an_environment_that_cannot_be_used_is_said_without_its_secrets(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(ValueError, match=variable) as caught:
        ask("version", base_url="http://llm.invalid")

    assert "pass-word" not in "".join(traceback.format_exception(caught.value))


# Whether the request was sent.


@pytest.mark.parametrize(
    ("error", "kind", "sent", "attempts"),
    [
        (httpx.ConnectError("refused"), APIConnectionError, False, 3),
        (httpx.ConnectTimeout("slow"), APITimeoutError, False, 3),
        (httpx.PoolTimeout("busy"), APITimeoutError, False, 3),
        (httpx.ProxyError("407"), APIConnectionError, False, 3),
        (httpx.UnsupportedProtocol("x://"), APIConnectionError, False, 1),
        (httpx.LocalProtocolError("bad header"), APIConnectionError, False, 1),
        (httpx.WriteError("broken"), APIConnectionError, True, 1),
        (httpx.WriteTimeout("slow"), APITimeoutError, True, 1),
        (httpx.ReadError("reset"), APIConnectionError, True, 1),
        (httpx.ReadTimeout("slow"), APITimeoutError, True, 1),
        (httpx.CloseError("reset"), APIConnectionError, True, 1),
        (httpx.NetworkError("lost"), APIConnectionError, True, 1),
        (httpx.RemoteProtocolError("cut"), APIConnectionError, True, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_says_whether_the_server_can_have_seen_the_request(
    ask: Ask, error: httpx.HTTPError, kind: type[APIConnectionError], sent: bool, attempts: int
) -> None:
    asked = []

    def fail(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        raise error

    with pytest.raises(kind) as caught:
        ask("version", handler=fail)

    assert type(caught.value) is kind
    assert caught.value.sent is sent
    assert len(asked) == attempts


def test_a_fault_in_a_running_http2_connection_may_have_come_after_the_request() -> None:
    error = httpx.LocalProtocolError("bad frame")
    error.__cause__ = RuntimeError()
    error.__cause__.__context__ = type("ProtocolError", (Exception,), {"__module__": "h2.x"})()

    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    http = httpx.Client(transport=httpx.MockTransport(fail))
    with pytest.raises(APIConnectionError) as caught:
        Client(http_client=http).version()

    assert caught.value.sent is True


@pytest.mark.parametrize(
    "error", [httpx.DecodingError("bad gzip"), httpx.TooManyRedirects("round and round")]
)
def test_an_answer_that_cannot_be_read_was_an_answer(ask: Ask, error: httpx.HTTPError) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(InvalidResponseError):
        ask("version", handler=fail)


def test_a_body_that_is_not_what_its_encoding_says_was_an_answer(ask: Ask) -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Bytes(b"no gzip"))

    with pytest.raises(InvalidResponseError):
        ask("version", handler=broken)


class Bytes(httpx.ByteStream):
    """A body that httpx does not decode before it is read."""


def test_a_hook_of_the_callers_that_raises_for_a_status_does_not_change_the_error() -> None:
    def busy(_: httpx.Request) -> httpx.Response:
        return httpx.Response(503, headers={"X-Request-Id": "r7"}, stream=Bytes(b"{}"))

    def raise_for_status(response: httpx.Response) -> None:
        response.raise_for_status()

    http = httpx.Client(
        transport=httpx.MockTransport(busy), event_hooks={"response": [raise_for_status]}
    )
    with pytest.raises(UnavailableError) as caught:
        Client(http_client=http, max_retries=0).version()

    assert (caught.value.status, caught.value.request_id) == (503, "r7")


def test_every_error_of_httpx_has_one_of_ours(ask: Ask) -> None:
    kinds = [kind for _, kind in inspect.getmembers(httpx, inspect.isclass)]
    for kind in kinds:
        if not issubclass(kind, httpx.RequestError):
            continue

        def fail(request: httpx.Request, kind: type[httpx.RequestError] = kind) -> httpx.Response:
            raise kind("x", request=request)

        with pytest.raises(SortserveError):
            ask("version", handler=fail)
