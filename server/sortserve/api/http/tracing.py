"""The part of a request in a trace: taken from its headers, handed on to what the engine runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sortserve.api.bodies.prompts import ChatPrompt, Prompt
from sortserve.api.http.keys import FREE_METHODS
from sortserve.api.http.security import route_path
from sortserve.core.sampling_params import SamplingParams
from sortserve.core.tracing import TraceParent

__all__ = ["HttpTracer", "TracingMiddleware", "trace_parent"]

HEADERS = ("traceparent", "tracestate")
"""W3C's Trace Context."""


class RequestSpan(Protocol):
    """The part of ``sortserve.telemetry.traces.RequestSpan`` that is needed here."""

    @property
    def headers(self) -> dict[str, str] | None:
        """What names the span to those below it; None: the request is not sampled."""

    def end(self, *, route: str | None, status: int | None, request_id: str) -> None:
        """The reply is over."""


class HttpTracer(Protocol):
    """The part of ``sortserve.telemetry.traces.Tracing`` that the service asks."""

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> RequestSpan:
        """The span of a request that has come."""


class TracingMiddleware:
    """A span around every request that asks for work; it is behind the keys, so nobody else's.

    Routes find what names it in ``scope["state"]["trace_headers"]``, if it is sampled.
    """

    def __init__(self, app: ASGIApp, *, tracer: HttpTracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, within a span."""
        if scope["type"] != "http" or scope["method"] in FREE_METHODS:
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope)
        carried = {name: given[name] for name in HEADERS if name in given}
        span = self._tracer.begin(scope["method"], route_path(scope), carried)
        if (headers := span.headers) is not None:
            scope["state"]["trace_headers"] = headers
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = status or 500  # who stands around this one answers it
            raise
        finally:
            route = getattr(scope.get("route"), "path", None)
            span.end(route=route, status=status, request_id=scope["state"]["request_id"])


def trace_parent(
    state: Any, prompts: Sequence[Prompt], sampling: SamplingParams, model: str
) -> TraceParent | None:
    """What the spans of a request's sequences are a part of; None: it is not traced.

    Args:
        state: of the HTTP request.
        prompts: of the job; conversations are told from texts.
        sampling: what of it has a name in the conventions is told.
        model: as the client named it.
    """
    headers = getattr(state, "trace_headers", None)
    if headers is None:
        return None
    is_chat = any(isinstance(prompt, ChatPrompt) for prompt in prompts)
    return TraceParent(
        headers,
        {
            "gen_ai.operation.name": "chat" if is_chat else "text_completion",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
        },
    )
