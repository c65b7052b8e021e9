"""Probes, metrics, exits, tokenisation and the OpenAPI document."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fastapi.routing import APIRoute

import sortserve
from sortserve.api.routes import native, openai, operations, responses_api
from sortserve.api.routes import status as status_route
from sortserve.api.settings import ApiSettings
from sortserve.core import budget, sampling_params
from sortserve.core.errors import InvalidRequestError
from sortserve.core.schedule import DepthSchedule, ScheduleInfo
from sortserve.cost.model import CostModel, RowShape, StepShape
from support.http_service import Connection, HttpService, as_json, make_service


def cost_model() -> CostModel:
    """A step takes a millisecond a layer."""
    shapes = [
        StepShape.of([RowShape(exit_layer, tokens, 100, samples=True)])
        for exit_layer in (2, 4, 6)
        for tokens in (1, 8, 64)
    ]
    samples = [(shape, 1e-3 * shape.num_layers) for shape in shapes]
    return CostModel.fit(samples)


async def test_a_service_is_healthy_from_start_to_drain(
    make: Callable[..., HttpService],
) -> None:
    service = make(start=False)
    states = []

    async def probe() -> None:
        ready, alive = await service.get("/health"), await service.get("/livez")
        assert (await service.get("/readyz")).status_code == ready.status_code
        states.append((ready.status_code, ready.json()["status"], alive.status_code))

    await probe()
    service.worker.start()
    await probe()
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({"prompt": "a", "stream": True}))
    task = connection.open()
    service.runner.permits.release()
    await connection.wait_for_events(1)
    draining = asyncio.create_task(service.worker.drain(60))
    await asyncio.sleep(0)
    await probe()
    refused = await service.post("/generate", {"prompt": "a"})
    service.runner.open()
    assert await draining
    await task
    await probe()

    assert states == [
        (503, "loading", 200),
        (200, "ready", 200),
        (503, "draining", 200),
        (503, "stopped", 200),
    ]
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "draining"
    assert connection.content.endswith(b"data: [DONE]\n\n")


async def test_a_failed_engine_is_neither_ready_nor_alive(
    make: Callable[..., HttpService], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make()

    def fail() -> list[Any]:
        raise RuntimeError("broken")

    monkeypatch.setattr(service.engine, "step", fail)
    reply = await service.post("/generate", {"prompt": "a"})

    assert reply.status_code == 500
    assert (await service.get("/health")).status_code == 503
    assert (await service.get("/livez")).status_code == 503
    assert (await service.post("/generate", {"prompt": "a"})).status_code == 503


async def test_version(shared: HttpService) -> None:
    assert (await shared.get("/version")).json() == {
        "version": sortserve.__version__,
        "backend": "scripted",
    }


GET_ROUTES = [
    *("/health", "/readyz", "/livez", "/version", "/metrics", "/exits", "/tokenizer_info"),
    *("/v1/models", "/v1/models/tiny@2", "/status", "/load", "/docs", "/openapi.json"),
]


def test_the_list_of_get_routes_is_whole(shared: HttpService) -> None:
    paths = {
        path.replace("{model_id}", "tiny@2")
        for path, operations in shared.app.openapi()["paths"].items()
        if "get" in operations
    }

    assert paths | {"/docs", "/openapi.json"} == set(GET_ROUTES)


@pytest.mark.parametrize("path", GET_ROUTES)
async def test_head_is_get_without_the_body(shared: HttpService, path: str) -> None:
    async with shared.client() as client:
        get, head = await client.get(path), await client.head(path)

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # it has counted the first of the two
        assert head.headers["content-length"] == str(len(get.content))


async def test_head_of_an_error_is_the_error_without_the_body(
    make: Callable[..., HttpService],
) -> None:
    service = make(api_keys=("k",))
    async with service.client(authorization="Bearer k") as client:
        missing, wrong = await client.head("/nothing"), await client.head("/generate")
    async with service.client() as client:
        no_key = await client.head("/version")

    assert [r.status_code for r in (missing, wrong, no_key)] == [404, 405, 401]
    assert [r.content for r in (missing, wrong, no_key)] == [b"", b"", b""]
    assert wrong.headers["allow"] == "POST"


async def test_head_is_counted_under_its_own_name_and_route(service: HttpService) -> None:
    async with service.client() as client:
        await client.head("/version")
        await client.head("/nothing")

    metrics = (await service.get("/metrics")).text
    assert 'method="HEAD",model_name="tiny",route="/version",status="200"' in metrics
    assert 'method="HEAD",model_name="tiny",route="unmatched",status="404"' in metrics


@pytest.mark.parametrize(("path", "allowed"), [("/generate", "POST"), ("/health", "GET, HEAD")])
@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "BREW"])
async def test_every_other_method_is_told_the_right_ones(
    shared: HttpService, path: str, allowed: str, method: str
) -> None:
    async with shared.client() as client:
        reply = await client.request(method, path)

    assert reply.status_code == 405
    assert reply.headers["allow"] == allowed
    assert method in reply.json()["error"]["message"]


async def test_metrics_count_requests_by_route_and_status(
    make: Callable[..., HttpService],
) -> None:
    service = make(api_keys=("k",))
    async with service.client(authorization="Bearer k") as client:
        await client.post("/generate", json={"prompt": "a", "max_tokens": 1})
        await client.post("/generate", json={})
        await client.get("/v1/models/tiny")
        await client.get("/secret/path")
    await service.get("/version")

    reply = await service.get("/metrics")

    counts = re.findall(
        r'sortserve_http_requests_total\{method="(\w+)",model_name="tiny",'
        r'route="([^"]+)",status="(\d+)"\} (\d)',
        reply.text,
    )
    assert reply.headers["content-type"].startswith("text/plain")
    assert sorted(counts) == [
        ("GET", "/v1/models/{model_id:path}", "200", "1"),
        ("GET", "unmatched", "401", "1"),
        ("GET", "unmatched", "404", "1"),
        ("POST", "/generate", "200", "1"),
        ("POST", "/generate", "400", "1"),
    ]


async def test_a_client_that_left_counts_as_499(service: HttpService) -> None:
    service.runner.gated = True
    connection = Connection(service.app, "/generate", as_json({"prompt": "a"}))
    task = connection.open()
    connection.leave()
    service.runner.open()
    await task

    assert 'route="/generate",status="499"' in (await service.get("/metrics")).text


async def test_a_client_that_leaves_while_it_sends_is_no_error(
    service: HttpService, caplog: pytest.LogCaptureFixture
) -> None:
    connection = Connection(service.app, "/generate", b"")
    connection._is_body_sent = True
    connection.leave()

    await connection.open()

    assert connection.messages == []
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_exits_say_what_each_costs_and_how_good_it_is(shared: HttpService) -> None:
    reply = (await shared.get("/exits")).json()

    assert [entry["exit_layer"] for entry in reply["exits"]] == [2, 4, 6]
    assert reply["exits"][0] == {
        "exit_layer": 2,
        "model": "tiny@2",
        "num_parameters": 2000,
        "compute": 0.5,
        "quality": None,
        "score": pytest.approx(1 / 3),
        "usable": None,
        "served_unasked": True,
        "estimate": None,
    }
    assert reply["min_quality"] == 0.0


async def test_exits_below_the_servers_floor_are_marked_and_only_served_by_name() -> None:
    service = make_service(engine_options={"min_quality": 0.5})
    try:
        reply = (await service.get("/exits")).json()
        refused = await service.post(
            "/generate", {"prompt": "a", "max_tokens": 2, "budget": {"compute": 0.6}}
        )
        named = await service.post("/generate", {"prompt": "a", "max_tokens": 2, "model": "tiny@2"})
    finally:
        service.worker.stop()

    assert [entry["served_unasked"] for entry in reply["exits"]] == [False, True, True]
    assert reply["min_quality"] == 0.5
    assert refused.status_code == 400
    assert "--min-quality=0.5" in refused.json()["error"]["message"]
    assert named.json()["budget"]["exit_layer"] == 2


async def test_a_calibrated_engine_estimates_each_exit(service: HttpService) -> None:
    service.engine.costs.use(cost_model())

    reply = (await service.get("/exits")).json()

    estimates = [entry["estimate"] for entry in reply["exits"]]
    tpots = [estimate["tpot_ms"] for estimate in estimates]
    assert tpots == sorted(tpots)
    assert tpots[0] > 0
    assert all(e["ttft_ms"] > 0 for e in estimates)
    assert reply["estimate_for"] == {"prompt_tokens": 128, "max_tokens": 128}


async def test_exits_tell_the_schedules_that_were_measured(service: HttpService) -> None:
    schedule = DepthSchedule(((0, 6), (32, 2)))
    info = ScheduleInfo(
        schedule=schedule, num_tokens=128, compute=0.6, score=0.9, quality={"loss": 2.5}
    )
    table = replace(service.engine.exits, schedules=(info,))
    service.engine.exits = service.worker.exits = table
    service.engine.costs.use(cost_model())

    reply = (await service.get("/exits")).json()

    [entry] = reply["schedules"]
    deep, shallow = reply["exits"][2]["estimate"], reply["exits"][0]["estimate"]
    tpot_ms = (31 * deep["tpot_ms"] + 96 * shallow["tpot_ms"]) / 127
    assert entry == {
        "schedule": [[0, 6], [32, 2]],
        "compute": (32 * 1.0 + 96 * 0.5) / 128,
        "score": 0.9,
        "quality": {"loss": 2.5},
        "estimate": {
            "ttft_ms": deep["ttft_ms"],
            "tpot_ms": pytest.approx(tpot_ms, abs=1e-2),
            "latency_ms": pytest.approx(deep["ttft_ms"] + 127 * tpot_ms, abs=1),
        },
    }


async def test_a_budget_that_cannot_be_met_is_refused_with_a_time_to_come_back(
    service: HttpService,
) -> None:
    service.engine.costs.use(cost_model())
    body = {"prompt": "a", "max_tokens": 100, "budget": {"latency_ms": 1, "on_miss": "reject"}}

    reply = await service.post("/generate", body)
    by_header = await service.post(
        "/generate", {**body, "budget": {"on_miss": "reject"}}, **{"x-slo-e2e-ms": "1"}
    )

    assert reply.status_code == by_header.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("budget_unattainable", "budget.latency_ms")
    assert by_header.json()["error"]["param"] == "x-slo-e2e-ms"
    assert service.runner.plans == []


async def test_a_refusal_does_not_wait_for_the_step_under_way(service: HttpService) -> None:
    service.engine.costs.use(cost_model())
    service.runner.gated = True
    busy = Connection(service.app, "/generate", as_json({"prompt": "a", "max_tokens": 100}))
    task = busy.open()
    while not service.engine.has_work:  # its first step stands still from here on
        await asyncio.sleep(0)
    body = {"prompt": "a", "max_tokens": 100, "budget": {"latency_ms": 100, "on_miss": "reject"}}

    reply = await service.post("/generate", body)

    assert reply.status_code == 429
    assert service.runner.plans == []
    service.runner.open()
    await task


async def test_a_full_queue_refuses_before_it_tokenises(make: Callable[..., HttpService]) -> None:
    service = make(worker_options={"max_num_queued_reqs": 1})
    service.runner.gated = True
    waiting = Connection(service.app, "/generate", as_json({"prompt": "a"}))
    task = waiting.open()
    for _ in range(20):
        await asyncio.sleep(0)
    service.tokenizer.threads.clear()

    refused = await service.post("/v1/completions", {"prompt": "a"})

    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    assert service.tokenizer.threads == set()
    service.runner.open()
    await task


async def test_tokenize_counts_what_generation_sees(shared: HttpService) -> None:
    text = await shared.post("/tokenize", {"prompt": "abc", "return_token_strs": True})
    chat = await shared.post("/tokenize", {"messages": [{"role": "user", "content": "ab"}]})

    assert text.json() == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [97, 98, 99],
        "token_strs": ["a", "b", "c"],
    }
    assert chat.json() == {"count": 2, "max_model_len": 256, "tokens": [97, 98]}


async def test_detokenize_is_the_way_back(shared: HttpService) -> None:
    reply = await shared.post("/detokenize", {"tokens": [104, 105], "model": "tiny"})

    assert reply.json() == {"prompt": "hi"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"text": "a"}, "text"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "hi"}, "tokens"),
        ("/detokenize", {"tokens": [1, "x"]}, "tokens.1"),
        ("/detokenize", {"tokens": [1, 128]}, "tokens.1"),
    ],
)
async def test_their_errors_name_the_field(
    shared: HttpService, path: str, body: dict[str, Any], param: str
) -> None:
    reply = await shared.post(path, body)

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


async def test_the_openapi_document_knows_every_route_and_every_reference_resolves(
    shared: HttpService,
) -> None:
    document = (await shared.get("/openapi.json")).json()

    routers = (
        *(native.router, openai.router, responses_api.router),
        *(operations.router, status_route.router),
    )
    routes = {r.path for router in routers for r in router.routes if isinstance(r, APIRoute)}
    documented = {path.replace("{model_id}", "{model_id:path}") for path in document["paths"]}
    assert len(routes) >= 13
    assert routes == documented
    for reference in re.findall(r'"\$ref": ?"([^"]+)"', str(document).replace("'", '"')):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
        assert node
    assert "422" not in str(document)


async def test_the_openapi_document_describes_bodies_and_the_budget(shared: HttpService) -> None:
    document = (await shared.get("/openapi.json")).json()

    generate = document["paths"]["/generate"]["post"]
    ref = generate["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][ref.rpartition("/")[2]]
    budget = schema["properties"]["budget"]
    fields = next(option for option in budget["anyOf"] if "properties" in option)["properties"]
    headers = [parameter["name"] for parameter in generate["parameters"]]
    assert {"latency_ms", "exit_layer", "on_miss"} <= set(fields)
    assert schema["additionalProperties"] is False
    assert headers == ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-e2e-ms"]


@pytest.mark.parametrize("model", ["GenerateBody", "CompletionBody", "ChatCompletionBody"])
async def test_the_document_says_which_numbers_the_engine_takes(
    shared: HttpService, model: str
) -> None:
    document = (await shared.get("/openapi.json")).json()

    properties = document["components"]["schemas"][model]["properties"]
    for name, range_ in sampling_params.RANGES.items():
        if name == "seed":  # pydantic's own check, and its words for it
            continue
        if model == "ChatCompletionBody" and name == "logprobs":
            name = "top_logprobs"
        schema = dict(range_.json_schema)
        if model == "CompletionBody" and name == "max_tokens":
            schema["minimum"] = 0  # with echo
        assert schema in properties[name]["anyOf"]
    [parts] = [option for option in properties["budget"]["anyOf"] if "properties" in option]
    for name, range_ in budget.RANGES.items():
        assert range_.json_schema.items() <= parts["properties"][name].items()


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [
        ("post", "/generate", {200, 400, 401, 403, 404, 413, 429, 500, 503, 504}),
        ("post", "/v1/chat/completions", {200, 400, 401, 403, 404, 413, 429, 500, 503, 504}),
        ("post", "/tokenize", {200, 400, 401, 404, 413, 429, 500}),
        ("get", "/v1/models", {200, 401}),
        ("get", "/v1/models/{model_id}", {200, 401, 404}),
        ("get", "/health", {200, 503}),
    ],
)
async def test_the_document_says_how_each_route_may_answer(
    shared: HttpService, method: str, path: str, statuses: set[int]
) -> None:
    responses = (await shared.get("/openapi.json")).json()["paths"][path][method]["responses"]

    assert set(responses) == {str(status) for status in statuses}
    for status in statuses - {200}:
        schema = responses[str(status)]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith("/ErrorResponse")


async def test_the_document_says_that_answers_may_be_streamed(shared: HttpService) -> None:
    paths = (await shared.get("/openapi.json")).json()["paths"]

    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}


async def test_the_document_says_which_routes_need_a_key(make: Callable[..., HttpService]) -> None:
    service = make(api_keys=("k",))

    paths = (await service.get("/openapi.json", authorization="Bearer k")).json()["paths"]

    assert paths["/health"]["get"]["security"] == []
    assert paths["/generate"]["post"]["security"] == [{"key": []}]


async def test_the_documentation_page_needs_nothing_but_this_server(shared: HttpService) -> None:
    reply = await shared.get("/docs")

    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"https?://", reply.text)
    assert "openapi.json" in (await shared.get("/docs/docs.js")).text
    addresses = re.findall(r'(?:src|href)="(?!data:)([^"]+)"', reply.text)
    assert len(addresses) == 4
    for address in addresses:
        file = await shared.get(f"/{address}")
        assert file.status_code == 200
        assert re.match("text/(css|javascript)", file.headers["content-type"])


async def test_the_documentation_page_needs_no_key_and_what_it_asks_for_does(
    make: Callable[..., HttpService],
) -> None:
    service = make(api_keys=("k",))
    files = ("/docs", "/docs/docs.js", "/docs/docs.css", "/docs/swagger-ui.js")

    replies = [(await service.get(path)).status_code for path in (*files, "/openapi.json")]

    assert replies == [200, 200, 200, 200, 401]
    assert 'type="password"' in (await service.get("/docs")).text


@pytest.mark.parametrize("api_keys", [(), ("k",)])
def test_the_document_is_valid_openapi(
    make: Callable[..., HttpService], api_keys: tuple[str, ...]
) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    document = make(api_keys=api_keys, start=False).app.openapi()

    assert [error.message for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


@pytest.mark.parametrize(
    ("path", "exit_layer"),
    [("/generate", 6), ("/v1/completions", 6), ("/v1/chat/completions", 6)],
)
async def test_what_the_documentation_fills_in_is_answered_at_full_depth(
    shared: HttpService, path: str, exit_layer: int
) -> None:
    example = example_of(shared, path)

    reply = await shared.post(path, example)

    assert reply.status_code == 200, reply.text
    assert reply.json()["budget"]["exit_layer"] == exit_layer


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_what_the_documentation_fills_in_is_answered(shared: HttpService, path: str) -> None:
    assert (await shared.post(path, example_of(shared, path))).status_code == 200


def example_of(service: HttpService, path: str) -> dict[str, Any]:
    """The body that Swagger UI puts into the field of a route."""
    document = service.app.openapi()
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rsplit("/", 1)[1]
    example: dict[str, Any] = document["components"]["schemas"][name]["example"]
    return example


async def test_documentation_can_be_switched_off(make: Callable[..., HttpService]) -> None:
    service = make(enable_docs=False)

    assert (await service.get("/docs")).status_code == 404
    assert (await service.get("/openapi.json")).status_code == 404


def test_defaults_of_the_checkpoint_that_make_no_sense_are_refused_at_start() -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        ApiSettings(served_model_name="m", generation_defaults={"temperature": -1.0})


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_and_answers_are_logged_only_if_asked_for(
    make: Callable[..., HttpService], caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level("DEBUG", logger="sortserve")
    body = {"prompt": "xyz", "max_tokens": 3, "stream": stream, "request_id": "r"}

    await make().post("/generate", body)
    silent = [record.getMessage() for record in caplog.records]
    await make(log_prompts=True).post("/generate", body)

    [record] = [record for record in caplog.records if record.name == "sortserve.requests"]
    assert not [line for line in silent if "xyz" in line]
    assert record.fields == {  # type: ignore[attr-defined]
        "id": "r",
        "choice": 0,
        "prompt": "xyz",
        "answer": "abc",
    }
