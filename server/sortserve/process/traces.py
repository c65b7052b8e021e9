"""Where traces go: OpenTelemetry's exporter and sampler, as settings and ``OTEL_*`` say."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sortserve import __version__
from sortserve.core.errors import ConfigError

if TYPE_CHECKING:
    from sortserve.telemetry.traces import Tracing

__all__ = ["make_tracing", "protocol_of"]

FLAG = "--otlp-traces-endpoint"
PROTOCOLS = ("grpc", "http/protobuf")
GRPC_PORT = 4317
"""Where collectors take OTLP over gRPC; over HTTP it is 4318."""
TRACES_PATH = "/v1/traces"
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def protocol_of(endpoint: str, environ: dict[str, str]) -> str:
    """The protocol of an endpoint: what the environment says, else what its address suggests.

    Raises:
        ConfigError: it is no address of a collector, or no protocol that we speak.
    """
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https", "grpc") or not parts.hostname:
        raise ConfigError(
            f"{FLAG}: {endpoint!r} is not allowed: it should be an address such as "
            "http://localhost:4318/v1/traces or grpc://localhost:4317.",
            param="otlp-traces-endpoint",
        )
    for variable in PROTOCOL_VARIABLES:
        if given := environ.get(variable):
            if given not in PROTOCOLS:
                raise ConfigError(
                    f"environment variable {variable}: {given!r} is not allowed: it should be one "
                    f"of {', '.join(PROTOCOLS)}.",
                    param=variable,
                )
            return given
    return "grpc" if parts.scheme == "grpc" or port == GRPC_PORT else "http/protobuf"


def make_tracing(endpoint: str | None, *, clock: Callable[[], float]) -> Tracing | None:
    """What makes and sends spans; None if nobody wants any, and then nothing is imported.

    Sampler, resource, batches, headers, time-outs and certificates are read from ``OTEL_*`` by
    OpenTelemetry itself.

    Args:
        endpoint: of ``--otlp-traces-endpoint``.
        clock: the engine's.

    Raises:
        ConfigError: the endpoint or a variable cannot be used, or the extra is not installed.
    """
    if endpoint is None:
        return None
    protocol = protocol_of(endpoint, dict(os.environ))
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from sortserve.telemetry.traces import Tracing

        provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(_exporter(endpoint, protocol)))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "sortserve":
            raise
        extra = "opentelemetry-exporter-otlp-proto-grpc" if "grpc" in str(error.name) else None
        raise ConfigError(
            f"{FLAG} needs {error.name}, which is not installed: "
            f"pip install {extra or repr('sortserve[otel]')}",
            param="otlp-traces-endpoint",
        ) from error
    except Exception as error:  # of classes of its own, too
        raise ConfigError(
            f"{FLAG}: OpenTelemetry does not take what a variable OTEL_* says: {error}",
            param="otlp-traces-endpoint",
        ) from error
    return Tracing(provider, clock=clock)


def _exporter(endpoint: str, protocol: str) -> Any:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as GrpcExporter,
        )

        parts = urlsplit(endpoint)
        return GrpcExporter(endpoint=parts.netloc, insecure=parts.scheme != "https")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    path = urlsplit(endpoint).path
    return OTLPSpanExporter(endpoint if path.strip("/") else endpoint.rstrip("/") + TRACES_PATH)


def _resource() -> Any:
    """Who sends: ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` win."""
    from opentelemetry.sdk.resources import Resource

    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    is_named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in given
    name = {} if is_named else {"service.name": "sortserve"}
    return Resource.create({**name, "service.version": __version__})
