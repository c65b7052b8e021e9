"""The client against a scripted transport: what it sends, reads, retries and raises.

Each test runs the sync and the async client.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import sortserve_client
from sortserve.core import errors
from sortserve_client import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncClient,
    AsyncGenerationStream,
    AuthenticationError,
    BadRequestError,
    Budget,
    BudgetUnattainableError,
    Client,
    GenerationStream,
    InvalidResponseError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    SamplingOptions,
    ServerError,
    UnavailableError,
)
from sortserve_client._exceptions import status_error_class

Handler = Callable[[httpx.Request], httpx.Response]
REPLY: dict[str, Any] = {
    "id": "gen-1",
    "model": "tiny",
    "choices": [
        {
            "index": 0,
            "text": "Hello.",
            "finish_reason": "stop",
            "logprobs": None,
            "budget": {"exit_layer": 18, "tokens_by_exit": {"18": 2}},
            "new_field": 1,
        }
    ],
    "usage": {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4, "new_field": 1},
    },
    "budget": {
        "exit_layer": 18,
        "tokens_by_exit": {"18": 90, "12": 38},
        "compute": 0.57,
        "predicted_ms": 760.0,
        "actual_ms": 741.0,
        "met": True,
        "new_field": 1,
    },
    "new_field": 1,
}


class Server:
    """Answers with each of ``script`` in turn (the last for ever) and remembers the requests."""

    def __init__(self, *script: httpx.Response | Exception) -> None:
        self.script = list(script)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(answer, Exception):
            raise answer
        # A fresh one each time: a response belongs to the client that got it.
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)


class Runner:
    """Calls one method of a fresh client; ``sleeps`` are the waits it asked for."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.sleeps: list[float] = []

    def __call__(self, server: Handler, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.configured(server, {}, method, *args, **kwargs)

    def configured(
        self, server: Handler, config: dict[str, Any], method: str, *args: Any, **kwargs: Any
    ) -> Any:
        if self.kind == "async":
            return asyncio.run(self._run_async(server, config, method, *args, **kwargs))
        with httpx.Client(transport=httpx.MockTransport(server)) as http:
            client = Client(http_client=http, sleep=self.sleeps.append, **config)
            return getattr(client, method)(*args, **kwargs)

    async def _run_async(
        self, server: Handler, config: dict[str, Any], method: str, *args: Any, **kwargs: Any
    ) -> Any:
        async def sleep(seconds: float) -> None:
            self.sleeps.append(seconds)

        async with httpx.AsyncClient(transport=httpx.MockTransport(server)) as http:
            client = AsyncClient(http_client=http, sleep=sleep, **config)
            return await getattr(client, method)(*args, **kwargs)


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param)


def ok(body: Any) -> httpx.Response:
    return httpx.Response(200, json=body)


def refusal(status: int, *, headers: dict[str, str] | None = None, **error: Any) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "No.", **error}}, headers=headers)


# What is sent and read.


def test_generate_sends_only_what_was_given(run: Runner) -> None:
    server = Server(ok(REPLY))

    run(server, "generate", "Hi", max_tokens=8, temperature=0, top_p=None)

    request = server.requests[0]
    assert (request.method, str(request.url)) == ("POST", "http://127.0.0.1:8000/generate")
    assert server.body == {"prompt": "Hi", "max_tokens": 8, "temperature": 0}
    assert request.headers["user-agent"].startswith("sortserve-client/")
    assert "authorization" not in request.headers


def test_generate_sends_messages_budgets_biases_and_any_extra_field(run: Runner) -> None:
    server = Server(ok(REPLY))

    run(
        server,
        "generate",
        messages=({"role": "user", "content": "Hi"},),
        budget=Budget(latency_ms=800, on_miss="reject"),
        stop=("a", "b"),
        logit_bias={7: -1.5},
        extra={"brand_new": [1], "stop": None},
    )

    assert server.body == {
        "messages": [{"role": "user", "content": "Hi"}],
        "budget": {"latency_ms": 800, "on_miss": "reject"},
        "stop": None,
        "logit_bias": {"7": -1.5},
        "brand_new": [1],
    }


def test_a_prompt_may_be_token_ids(run: Runner) -> None:
    server = Server(ok(REPLY))

    run(server, "generate", (1, 2, 3))

    assert server.body == {"prompt": [1, 2, 3]}


def test_an_answer_is_typed_and_fields_of_newer_servers_are_ignored(run: Runner) -> None:
    answer = run(Server(ok(REPLY)), "generate", "Hi")

    assert (answer.id, answer.text, answer.finish_reason) == ("gen-1", "Hello.", "stop")
    assert answer.usage.cached_tokens == 4
    assert answer.budget.tokens_by_exit == {18: 90, 12: 38}
    assert answer.budget.met is True
    assert answer.choices[0].budget.exit_layer == 18


def test_an_answer_without_budget_and_usage_reads_as_unknown(run: Runner) -> None:
    answer = run(Server(ok({"id": "x", "choices": []})), "generate", "Hi")

    assert answer.budget.exit_layer is None
    assert answer.usage.total_tokens == 0
    assert answer.text == ""


@pytest.mark.parametrize(
    "prompts", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}]
)
def test_exactly_one_prompt_is_asked_for_before_anything_is_sent(
    run: Runner, prompts: dict[str, Any]
) -> None:
    server = Server(ok(REPLY))

    for method in ("generate", "tokenize"):
        with pytest.raises(ValueError, match="exactly one"):
            run(server, method, **prompts)

    assert server.requests == []


def test_a_misspelt_option_is_refused_by_name(run: Runner) -> None:
    with pytest.raises(TypeError, match=r"'max_token'.*max_tokens"):
        run(Server(ok(REPLY)), "generate", "Hi", max_token=8)


def test_the_key_and_a_path_in_the_address_are_kept(run: Runner) -> None:
    server = Server(ok({"version": "1.2.3"}))

    version = run.configured(
        server, {"base_url": "https://host/llm/", "api_key": "s3cret"}, "version"
    )

    assert version == "1.2.3"
    assert str(server.requests[0].url) == "https://host/llm/version"
    assert server.requests[0].headers["authorization"] == "Bearer s3cret"


def test_the_key_is_not_in_the_repr() -> None:
    with Client(api_key="s3cret") as client:
        assert "s3cret" not in repr(client)


def test_an_address_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:8000"):
        Client("127.0.0.1:8000")


def test_the_small_routes_are_typed(run: Runner) -> None:
    exit_9 = {"exit_layer": 9, "compute": 0.4, "estimate": {"tpot_ms": 3.5}, "later": 1}
    schedule = {"schedule": [[0, 9], [5, 4]], "score": 0.8, "estimate": {"tpot_ms": 2.5}}
    replies = {
        "/exits": {"exits": [exit_9], "schedules": [schedule]},
        "/v1/models": {"data": [{"id": "tiny@9", "object": "model", "max_model_len": 64}]},
        "/tokenize": {"tokens": [1, 2], "count": 2, "max_model_len": 64},
        "/detokenize": {"prompt": "Hi"},
    }

    def server(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text="sortserve_up 1\n")
        return ok(replies[request.url.path])

    (info,) = run(server, "exits")
    (measured,) = run(server, "schedules")
    (model,) = run(server, "models")
    tokens = run(server, "tokenize", "Hi")

    assert (info.exit_layer, info.compute, info.estimate.tpot_ms) == (9, 0.4, 3.5)
    assert (measured.schedule, measured.score) == (((0, 9), (5, 4)), 0.8)
    assert measured.estimate.tpot_ms == 2.5
    assert (model.id, model.max_model_len) == ("tiny@9", 64)
    assert (tokens.tokens, tokens.count) == ((1, 2), 2)
    assert run(server, "detokenize", [1, 2]) == "Hi"
    assert run(server, "metrics") == "sortserve_up 1\n"


@pytest.mark.parametrize(
    ("reply", "ready", "state"),
    [
        pytest.param(httpx.Response(200, json={"status": "ready"}), True, "ready", id="ready"),
        pytest.param(httpx.Response(503, json={"status": "draining"}), False, "draining", id="503"),
        pytest.param(httpx.Response(503, text="<html>"), False, "unavailable", id="a-proxy"),
        pytest.param(httpx.Response(200, json=[]), True, "ready", id="no-state"),
    ],
)
def test_health_is_an_answer_and_never_retried(
    run: Runner, reply: httpx.Response, ready: bool, state: str
) -> None:
    server = Server(reply)

    health = run(server, "health")

    assert (bool(health), health.state) == (ready, state)
    assert len(server.requests) == 1


# Retries.


def test_a_full_queue_is_asked_again_after_the_time_the_server_named(run: Runner) -> None:
    server = Server(refusal(429, headers={"Retry-After": "3"}), refusal(503), ok(REPLY))

    answer = run(server, "generate", "Hi")

    assert answer.text == "Hello."
    assert len(server.requests) == 3
    assert run.sleeps[0] == 3.0
    assert 0 < run.sleeps[1] <= 1.0


def test_a_refused_connection_is_tried_again(run: Runner) -> None:
    server = Server(httpx.ConnectError("refused"), ok(REPLY))

    assert run(server, "generate", "Hi").text == "Hello."


def test_after_the_last_retry_the_error_is_raised(run: Runner) -> None:
    server = Server(refusal(429, code="queue_full", headers={"Retry-After": "9000"}))

    with pytest.raises(OverloadedError) as caught:
        run.configured(server, {"max_retries": 2, "max_retry_wait_s": 5.0}, "generate", "Hi")

    assert len(server.requests) == 3
    assert run.sleeps == [5.0, 5.0]
    assert caught.value.retry_after_s == 9000.0


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(httpx.ReadTimeout("slow"), id="it-may-have-run"),
        pytest.param(httpx.RemoteProtocolError("cut"), id="the-connection-was-cut"),
        pytest.param(refusal(500), id="500"),
        pytest.param(refusal(429, code="budget_unattainable"), id="no-exit-fits"),
    ],
)
def test_other_failures_are_not_tried_again(
    run: Runner, failure: httpx.Response | Exception
) -> None:
    server = Server(failure)

    with pytest.raises(sortserve_client.SortserveError):
        run(server, "generate", "Hi")

    assert len(server.requests) == 1
    assert run.sleeps == []


# Errors.


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, None, BadRequestError),
        (422, None, BadRequestError),
        (401, "invalid_api_key", AuthenticationError),
        (403, None, PermissionDeniedError),
        (404, "not_found", NotFoundError),
        (413, "payload_too_large", PayloadTooLargeError),
        (429, "queue_full", OverloadedError),
        (429, "budget_unattainable", BudgetUnattainableError),
        (503, "not_ready", UnavailableError),
        (500, "engine_error", ServerError),
        (504, None, ServerError),
        (418, None, APIStatusError),
        (307, None, APIStatusError),
    ],
)
def test_each_status_is_its_own_error(
    run: Runner, status: int, code: str | None, expected: type[APIStatusError]
) -> None:
    server = Server(refusal(status, code=code))

    with pytest.raises(APIStatusError) as caught:
        run.configured(server, {"max_retries": 0}, "generate", "Hi")

    assert type(caught.value) is expected
    assert (caught.value.status, caught.value.code) == (status, code)


def test_every_error_of_the_server_has_its_twin_here() -> None:
    here = {"InvalidRequestError": "BadRequestError", "EngineError": "ServerError"}
    here["RequestTimeoutError"] = "ServerError"
    never_sent = {"SortserveError", "CheckpointError", "ConfigError"}
    for name in set(errors.__all__) - never_sent:
        kind = getattr(errors, name)
        if not isinstance(kind, type):
            continue
        error = kind("No.")
        twin = status_error_class(error.status, error.code)
        assert twin.__name__ == here.get(name, name)


def test_an_error_says_which_field_was_wrong_and_what_to_quote(run: Runner) -> None:
    server = Server(
        refusal(
            400,
            type="invalid_request_error",
            param="budget.latency_ms",
            headers={"X-Request-Id": "req-7"},
        )
    )

    with pytest.raises(BadRequestError) as caught:
        run(server, "generate", "Hi")

    error = caught.value
    assert (error.param, error.type) == ("budget.latency_ms", "invalid_request_error")
    assert error.request_id == "req-7"
    assert error.body["error"]["message"] == "No."
    assert str(error) == "400: No. (request req-7)"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (httpx.Response(502, text="<html>bad gateway</html>"), "<html>bad gateway</html>"),
        (httpx.Response(502), "Bad Gateway"),
        (httpx.Response(502, json={"error": "flat"}), '{"error":"flat"}'),
        (httpx.Response(502, json=["list"]), '["list"]'),
    ],
)
def test_an_error_page_of_somebody_else_is_still_an_error_with_a_message(
    run: Runner, reply: httpx.Response, message: str
) -> None:
    with pytest.raises(ServerError) as caught:
        run(Server(reply), "generate", "Hi")

    assert caught.value.message == message


@pytest.mark.parametrize(
    ("failure", "expected", "sent"),
    [
        (httpx.ConnectError("refused"), APIConnectionError, False),
        (httpx.ConnectTimeout("slow"), APITimeoutError, False),
        (httpx.ReadTimeout("slow"), APITimeoutError, True),
        (httpx.RemoteProtocolError("cut"), APIConnectionError, True),
    ],
)
def test_a_server_that_does_not_answer_is_a_connection_error(
    run: Runner, failure: Exception, expected: type[APIConnectionError], sent: bool
) -> None:
    with pytest.raises(APIConnectionError) as caught:
        run(Server(failure), "generate", "Hi")

    assert type(caught.value) is expected
    assert caught.value.sent is sent
    assert "http://127.0.0.1:8000" in str(caught.value)


@pytest.mark.parametrize("body", ["<html>", "[]", "{}", '{"id": "x", "choices": 3}'])
def test_an_answer_that_is_not_ours_says_so(run: Runner, body: str) -> None:
    with pytest.raises(InvalidResponseError, match="not a sortserve reply"):
        run(Server(httpx.Response(200, text=body)), "generate", "Hi")


# Who owns the connections.


def test_a_client_closes_its_own_connections_and_nobody_elses() -> None:
    with httpx.Client() as http:
        with Client(http_client=http):
            pass
        assert not http.is_closed
    client = Client()
    client.close()

    with pytest.raises(RuntimeError, match="closed"):
        client.version()


async def test_an_async_client_closes_its_own_connections_and_nobody_elses() -> None:
    async with httpx.AsyncClient() as http:
        async with AsyncClient(http_client=http):
            pass
        assert not http.is_closed
    client = AsyncClient()
    await client.close()

    with pytest.raises(RuntimeError, match="closed"):
        await client.version()


# The public surface.


def public_methods(cls: type) -> dict[str, Callable[..., Any]]:
    return {
        name: member
        for name, member in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_") or name == "__init__"
    }


@pytest.mark.parametrize(
    ("sync", "twin"), [(Client, AsyncClient), (GenerationStream, AsyncGenerationStream)]
)
def test_every_sync_method_has_its_async_twin_with_the_same_signature(
    sync: type, twin: type
) -> None:
    ours, theirs = public_methods(sync), public_methods(twin)
    answers_at_once = {"__init__", "stream", "snapshot"}

    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"__init__"}:
        parameters = [inspect.signature(method[name]).parameters for method in (ours, theirs)]
        assert parameters[0] == parameters[1], name
        assert inspect.iscoroutinefunction(theirs[name]) is (name not in answers_at_once), name


def test_the_twins_are_made_with_the_same_arguments() -> None:
    sync, twin = (inspect.signature(cls).parameters for cls in (Client, AsyncClient))
    differ = {"http_client", "sleep"}

    assert list(sync) == list(twin)
    for name in sync.keys() - differ:
        assert sync[name] == twin[name]


def test_the_package_exports_what_all_says_and_nothing_else() -> None:
    public = {
        name
        for name, value in vars(sortserve_client).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }

    assert public == set(sortserve_client.__all__)
    assert sorted(sortserve_client.__all__) == sortserve_client.__all__


def test_the_documentation_names_every_error_and_every_method() -> None:
    page = (Path(__file__).parents[3] / "docs" / "client.md").read_text()
    methods = public_methods(Client).keys() - {"__init__", "close"}

    for name in sortserve_client.__all__:
        assert not name.endswith("Error") or f"`{name}`" in page, name
    for name in methods:
        assert f"`{name}(" in page, name
    for option in SamplingOptions.__annotations__:
        assert f"`{option}`" in page, option


def test_importing_the_client_loads_nothing_of_the_server() -> None:
    code = (
        "import sys, sortserve_client\n"
        "heavy = {'sortserve', 'sortserve_trainer', 'torch', 'transformers', 'fastapi', 'pydantic'}"
        "\nprint(sorted(heavy & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
