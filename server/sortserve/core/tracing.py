"""What a request carries so that its spans find their place in a trace (no OpenTelemetry)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["TraceParent"]


@dataclass(frozen=True)
class TraceParent:
    """The span that a request's own spans are children of, and what they say of the request."""

    headers: Mapping[str, str]
    """``traceparent`` and ``tracestate``, as W3C's Trace Context has them."""
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    """By their names in OpenTelemetry's conventions; no prompt and no answer is among them."""
