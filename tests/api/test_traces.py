"""Requests as spans: their place in the client's trace, their times, what they say and do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra `otel`")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sortserve.core.api_keys import KeyPolicy, key_digest
from sortserve.core.errors import ConfigError
from sortserve.process.traces import make_tracing, protocol_of
from sortserve.telemetry.traces import Tracing
from support.http_service import Connection, HttpService, as_json
from support.otlp import Received, grpc_receiver, http_receiver
from support.scripted import FakeClock, next_letter

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
UNSAMPLED = f"00-{TRACE_ID}-00f067aa0ba902b7-00"
BODY = {"prompt": "abc", "max_tokens": 4}
LONG = {"prompt": "a", "max_tokens": 200, "stream": True}
CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 4}
RESPONSES = {"input": "abc", "max_output_tokens": 4}
EPOCH_NS = 1_800_000_000 * 10**9


class Traced:
    """A service whose spans are kept in memory."""

    def __init__(self, make: Callable[..., HttpService], **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.clock = FakeClock()
        self.tracing = Tracing(
            provider, clock=self.clock, wall_ns=lambda: EPOCH_NS + round(self.clock() * 1e9)
        )
        engine_options = {"clock": self.clock, **options.pop("engine_options", {})}
        self.service = make(tracing=self.tracing, engine_options=engine_options, **options)

    def spans(self) -> dict[str, ReadableSpan]:
        """All spans by name, once the last one is made."""
        self.tracing.close()
        spans = self.exporter.get_finished_spans()
        assert len({span.name for span in spans}) == len(spans)
        return {span.name: span for span in spans}


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/generate", BODY, "text_completion tiny"),
        ("/v1/completions", BODY, "text_completion tiny"),
        ("/v1/chat/completions", CHAT, "chat tiny"),
        ("/v1/responses", RESPONSES, "chat tiny"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_part_of_its_clients_trace(
    make: Callable[..., HttpService], path: str, body: dict[str, Any], name: str, stream: bool
) -> None:
    traced = Traced(make)

    await traced.service.post(path, {**body, "stream": stream}, traceparent=PARENT)

    spans = traced.spans()
    assert set(spans) == {"queue", "prefill", "decode", name, f"POST {path}"}
    parents = {span_name: span.parent for span_name, span in spans.items()}
    ids = {span_name: span.context.span_id for span_name, span in spans.items()}
    assert parents[f"POST {path}"].span_id == 0x00F067AA0BA902B7
    assert parents[name].span_id == ids[f"POST {path}"]
    assert {parents[phase].span_id for phase in ("queue", "prefill", "decode")} == {ids[name]}
    assert {format(span.context.trace_id, "032x") for span in spans.values()} == {TRACE_ID}


@pytest.mark.parametrize("body", [BODY, {"prompt": 3}])
async def test_the_frameworks_own_telemetry_is_off(
    make: Callable[..., HttpService], monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    """It would trace a server that nobody asked to, and tell of bodies that are refused."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)

    await make().post("/generate", body)

    assert exporter.get_finished_spans() == ()


async def test_a_span_says_what_the_conventions_ask_and_nothing_of_the_texts(
    make: Callable[..., HttpService],
) -> None:
    traced = Traced(make)
    body = {**CHAT, "temperature": 0.5, "top_p": 0.9, "budget": {"exit_layer": 4}}

    await traced.service.post("/v1/chat/completions", body, **{"x-request-id": "r-1"})

    spans = traced.spans()
    said = dict(spans["chat tiny"].attributes or {})
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "sortserve",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "sortserve.exit_layer": 4,
        "sortserve.tokens_by_exit": "4:4",
        "sortserve.budget.exit_layer": 4,
        "sortserve.degraded": False,
    }
    assert {name: said.get(name) for name in expected} == expected
    http = dict(spans["POST /v1/chat/completions"].attributes or {})
    assert http == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "sortserve.request_id": "r-1",
    }
    texts = str([dict(span.attributes or {}) for span in spans.values()])
    assert "abc" not in texts


async def test_spans_have_the_times_of_the_report(make: Callable[..., HttpService]) -> None:
    traced = Traced(make)
    runner = traced.service.runner

    def slowly(*arguments: Any) -> int:
        traced.clock.now += 0.5
        return next_letter(*arguments)

    runner.rule = slowly

    await traced.service.post("/generate", BODY)

    spans, [report] = traced.spans(), traced.service.ended.reports
    assert report.first_scheduled_s is not None
    assert report.first_token_s is not None
    assert report.last_token_s is not None

    def at(seconds: float) -> int:
        return EPOCH_NS + round(seconds * 1e9)

    times = {name: (span.start_time, span.end_time) for name, span in spans.items()}
    assert len({time for pair in times.values() for time in pair}) > 2
    assert report.last_token_s - report.first_token_s == pytest.approx(1.5)
    assert times["queue"] == (at(report.arrival_s), at(report.first_scheduled_s))
    assert times["prefill"] == (at(report.first_scheduled_s), at(report.first_token_s))
    assert times["decode"] == (at(report.first_token_s), at(report.last_token_s))
    assert times["text_completion tiny"] == (at(report.arrival_s), at(report.finished_s))


async def test_a_change_of_depth_is_an_event_with_its_reason(
    make: Callable[..., HttpService],
) -> None:
    traced = Traced(make)
    body = {**BODY, "budget": {"schedule": [[0, 6], [2, 4], [3, 2]]}}

    await traced.service.post("/generate", body)

    events = traced.spans()["text_completion tiny"].events
    said = [dict(event.attributes or {}) for event in events]
    assert [event.name for event in events] == ["sortserve.exit_change"] * 2
    assert [
        (s["sortserve.exit.from"], s["sortserve.exit.to"], s["sortserve.output_tokens"])
        for s in said
    ] == [(6, 4, 2), (4, 2, 3)]
    assert {s["sortserve.exit.reason"] for s in said} == {"schedule"}


async def test_each_sample_has_a_span_of_its_own(make: Callable[..., HttpService]) -> None:
    traced = Traced(make)

    await traced.service.post("/generate", {**BODY, "n": 2})

    traced.tracing.close()
    names = [span.name for span in traced.exporter.get_finished_spans()]
    assert names.count("text_completion tiny") == names.count("decode") == 2
    assert names.count("POST /generate") == 1


async def test_what_is_not_sampled_leaves_nothing(make: Callable[..., HttpService]) -> None:
    traced = Traced(make)

    await traced.service.post("/generate", BODY, traceparent=UNSAMPLED)

    assert traced.spans() == {}
    assert traced.service.ended.reports[0].trace is None


@pytest.mark.parametrize("header", ["", "x", "00-00-00-01", PARENT[:-1], "ff" + PARENT[2:]])
async def test_a_header_that_is_none_begins_a_trace_of_its_own(
    make: Callable[..., HttpService], header: str
) -> None:
    traced = Traced(make)

    reply = await traced.service.post("/generate", BODY, traceparent=header)

    assert reply.status_code == 200
    assert traced.spans()["POST /generate"].parent is None


async def test_without_a_tracer_no_request_carries_anything(
    make: Callable[..., HttpService],
) -> None:
    service = make()

    await service.post("/generate", BODY, traceparent=PARENT)

    assert service.ended.reports[0].trace is None
    assert "TracingMiddleware" not in str(service.app.user_middleware)


async def test_a_refusal_is_a_span_with_its_status(make: Callable[..., HttpService]) -> None:
    traced = Traced(make)

    await traced.service.post("/generate", {"prompt": 3}, traceparent=PARENT)

    spans = traced.spans()
    assert list(spans) == ["POST /generate"]
    said = dict(spans["POST /generate"].attributes or {})
    assert (said["http.response.status_code"], said["error.type"]) == (400, "400")


async def test_a_failed_step_is_an_error_in_both_spans(make: Callable[..., HttpService]) -> None:
    traced = Traced(make)
    traced.service.runner.fail_next = True

    await traced.service.post("/generate", BODY)

    spans = traced.spans()
    for name in ("text_completion tiny", "POST /generate"):
        assert spans[name].status.status_code.name == "ERROR"
    assert "decode" not in spans


async def test_a_client_that_leaves_ends_its_spans(make: Callable[..., HttpService]) -> None:
    traced = Traced(make)
    traced.service.runner.gated = True
    connection = Connection(traced.service.app, "/generate", as_json(LONG))
    task = connection.open()
    traced.service.runner.permits.release()
    await connection.wait_for_events(1)

    connection.leave()
    traced.service.runner.open()
    await task
    await traced.service.ended.wait_for(1)

    spans = traced.spans()
    said = dict(spans["text_completion tiny"].attributes or {})
    assert said["gen_ai.response.finish_reasons"] == ("abort",)


@pytest.mark.parametrize("path", ["/health", "/metrics", "/status", "/exits"])
async def test_probes_and_looks_are_not_traced(make: Callable[..., HttpService], path: str) -> None:
    traced = Traced(make)

    await traced.service.get(path, traceparent=PARENT)

    assert traced.spans() == {}


async def test_who_has_no_key_fills_no_collector(make: Callable[..., HttpService]) -> None:
    traced = Traced(make, key_policies=[KeyPolicy(name="a", digests=(key_digest("k"),))])

    await traced.service.post("/generate", BODY, traceparent=PARENT)

    assert traced.spans() == {}


# Where spans go.


@pytest.mark.parametrize(
    ("endpoint", "environ", "protocol"),
    [
        ("http://localhost:4318/v1/traces", {}, "http/protobuf"),
        ("http://collector:4317", {}, "grpc"),
        ("grpc://collector:9999", {}, "grpc"),
        ("https://traces.example/otlp", {}, "http/protobuf"),
        ("http://c:9", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "grpc"),
        ("http://c:4317", {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, "http/protobuf"),
    ],
)
def test_the_protocol_is_the_environments_or_that_of_the_port(
    endpoint: str, environ: dict[str, str], protocol: str
) -> None:
    assert protocol_of(endpoint, environ) == protocol


@pytest.mark.parametrize("endpoint", ["", "localhost:4317", "ftp://x", "http://", "http://x:port"])
def test_what_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
        protocol_of(endpoint, {})


def test_a_protocol_that_nobody_speaks_is_refused() -> None:
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL: 'http/json'"):
        protocol_of("http://c:4318", {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-5"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many"),
    ],
)
def test_a_variable_that_opentelemetry_does_not_take_is_a_mistake_of_who_set_it(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigError, match=r"does not take what a variable OTEL_\* says: \S"):
        make_tracing("http://localhost:4318", clock=FakeClock())


def test_nobody_asked_is_nothing_made() -> None:
    assert make_tracing(None, clock=FakeClock()) is None


@pytest.fixture(params=["http", "grpc"])
def collector(request: pytest.FixtureRequest) -> Iterator[Received]:
    if request.param == "grpc":
        pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="no gRPC exporter")
    with http_receiver() if request.param == "http" else grpc_receiver() as received:
        yield received


async def test_spans_reach_a_collector_over_the_wire(
    make: Callable[..., HttpService], collector: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    clock = FakeClock()
    tracing = make_tracing(collector.url, clock=clock)
    assert tracing is not None
    service = make(tracing=tracing, engine_options={"clock": clock})
    await service.post("/generate", BODY, traceparent=PARENT)

    tracing.close()

    assert collector.paths in (["/v1/traces"], ["Export"])
    said = collector.resource
    assert (said["service.name"], said["deployment.environment.name"]) == ("sortserve", "test")
    assert {span.name for span in collector.spans} == {
        *("queue", "prefill", "decode"),
        *("text_completion tiny", "POST /generate"),
    }
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}


async def test_the_environment_says_how_many_are_sampled(
    make: Callable[..., HttpService], collector: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    tracing = make_tracing(collector.url, clock=FakeClock())
    assert tracing is not None
    service = make(tracing=tracing)

    await service.post("/generate", BODY)

    tracing.close()
    assert collector.spans == []
