"""A served request in a collector that others wrote: what it understood of what we sent.

The collector is Rotel, which takes OTLP over HTTP and gRPC and passes on what it read, by its own
code, to a receiver that the tests can ask.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the gRPC exporter")

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from support.otlp import http_receiver, needs_a_collector, rotel
from support.server_process import Server
from support.tiny_models import make_tiny_checkpoint

pytestmark = needs_a_collector

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
BODY = {
    "prompt": "A secret: xyzzy",
    "max_tokens": 6,
    "ignore_eos": True,
    "budget": {"schedule": [[0, 6], [3, 2]]},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama-tied", exits=(2, 4, 6))


@contextmanager
def serving(checkpoint: Path, endpoint: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "sortserve", "serve", str(checkpoint), "--port=0"]
    command += ["--log-format=json", "--kv-cache-memory=8MiB", "--num-threads=1", "--no-calibrate"]
    command += ["--served-model-name=tiny", f"--otlp-traces-endpoint={endpoint}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SORTSERVE_", "OTEL_"))}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield Server(process)
        finally:
            process.kill()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_collector_understands_every_span_of_a_request(checkpoint: Path, protocol: str) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{CLIENT_SPAN}-01"}
    with http_receiver() as received, rotel(received.url) as endpoints:
        with serving(checkpoint, endpoints[protocol]) as server:
            httpx.post(f"{server.url}/generate", json=BODY, headers=headers).raise_for_status()
            server.process.terminate()
            assert server.end() == 0
        spans = {span.name: span for span in received.wait_for(5)}

    http, inner = spans["POST /generate"], spans["text_completion tiny"]
    assert received.resource["service.name"] == "sortserve"
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    assert http.parent_span_id.hex() == CLIENT_SPAN
    assert inner.parent_span_id == http.span_id
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {phase.parent_span_id for phase in phases} == {inner.span_id}
    assert http.kind == Span.SPAN_KIND_SERVER
    said = {attribute.key: attribute.value for attribute in inner.attributes}
    assert said["gen_ai.usage.output_tokens"].int_value == 6
    assert said["sortserve.tokens_by_exit"].string_value == "6:3,2:3"
    assert [event.name for event in inner.events] == ["sortserve.exit_change"]
    assert "xyzzy" not in str(spans)
