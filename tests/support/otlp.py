"""Who takes spans: receivers of OTLP over HTTP and gRPC, and Rotel, a collector that others wrote.

The receivers read what comes with the protocol's own messages. `make collector` installs Rotel
beside the virtual environment; tests that need it are skipped without.
"""

from __future__ import annotations

import gzip
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span

COLLECTOR = Path(os.environ.get("COLLECTOR") or Path(sys.prefix) / "collector")
ROTEL = COLLECTOR / "rotel" / "rotel-agent"
WAIT_S = 30

needs_a_collector = pytest.mark.skipif(not ROTEL.is_file(), reason="no Rotel: make collector")


@dataclass
class Received:
    """What a receiver was sent."""

    url: str = ""
    """Where it listens."""
    paths: list[str] = field(default_factory=list)
    """Of each request: its address, or the method of gRPC."""
    resource_spans: list[ResourceSpans] = field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        """All spans so far."""
        scopes = [scope for of_one in self.resource_spans for scope in of_one.scope_spans]
        return [span for scope in scopes for span in scope.spans]

    @property
    def resource(self) -> dict[str, str]:
        """Who sent the first of them."""
        attributes = self.resource_spans[0].resource.attributes
        return {attribute.key: attribute.value.string_value for attribute in attributes}

    def wait_for(self, num_spans: int) -> list[Span]:
        """The spans, once there are so many of them."""
        end = time.monotonic() + WAIT_S
        while len(self.spans) < num_spans and time.monotonic() < end:
            time.sleep(0.05)
        assert len(self.spans) >= num_spans, self.paths
        return self.spans


@contextmanager
def http_receiver() -> Iterator[Received]:
    """A receiver of OTLP over HTTP."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            message = ExportTraceServiceRequest.FromString(content)
            received.paths.append(self.path)
            received.resource_spans.extend(message.resource_spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        received.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def grpc_receiver() -> Iterator[Received]:
    """A receiver of OTLP over gRPC."""
    import grpc  # type: ignore[import-untyped]
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    received = Received()

    class Servicer(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
        def Export(self, request: Any, context: Any) -> Any:
            received.paths.append("Export")
            received.resource_spans.extend(request.resource_spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    with ThreadPoolExecutor(max_workers=1) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), server)
        received.url = f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield received
        finally:
            server.stop(grace=None).wait()


@contextmanager
def rotel(onward: str) -> Iterator[dict[str, str]]:
    """Rotel, which passes on what it gets by OTLP over HTTP; its address for each protocol."""
    ports = {"http": _free_port(), "grpc": _free_port()}
    command = [str(ROTEL), "start", "--exporter=otlp", "--otlp-exporter-protocol=http"]
    command += [f"--otlp-exporter-endpoint={onward}", "--batch-timeout=50ms"]
    command += [f"--otlp-{kind}-endpoint=127.0.0.1:{port}" for kind, port in ports.items()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for port in ports.values():
                _wait_until_open(port, process)
            yield {kind: f"{kind}://127.0.0.1:{port}" for kind, port in ports.items()}
        finally:
            process.kill()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _wait_until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"Rotel does not listen on {port}, exit code {process.returncode}")
