"""Typed client of a sortserve server. Depends on httpx alone.

    from sortserve_client import Budget, Client

    with Client() as client:
        answer = client.generate("Say hello.", max_tokens=32, budget=Budget(latency_ms=500))
        print(answer.text, answer.budget.exit_layer)

``AsyncClient`` has the same methods with ``await``. Every error is a ``SortserveError``.
"""

from __future__ import annotations

from sortserve_client._async_client import AsyncClient
from sortserve_client._budget import Budget, OnMiss
from sortserve_client._calls import SamplingOptions
from sortserve_client._client import Client
from sortserve_client._exceptions import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BudgetUnattainableError,
    InvalidResponseError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    SortserveError,
    StreamError,
    UnavailableError,
)
from sortserve_client._stream import AsyncGenerationStream, GenerationStream
from sortserve_client._types import (
    BudgetReport,
    Choice,
    ExitInfo,
    Generation,
    Health,
    LatencyEstimate,
    ModelInfo,
    ScheduleInfo,
    StreamEvent,
    Tokenization,
    TokenLogprob,
    Usage,
)

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "AsyncGenerationStream",
    "AuthenticationError",
    "BadRequestError",
    "Budget",
    "BudgetReport",
    "BudgetUnattainableError",
    "Choice",
    "Client",
    "ExitInfo",
    "Generation",
    "GenerationStream",
    "Health",
    "InvalidResponseError",
    "LatencyEstimate",
    "ModelInfo",
    "NotFoundError",
    "OnMiss",
    "OverloadedError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "RateLimitError",
    "SamplingOptions",
    "ScheduleInfo",
    "ServerError",
    "SortserveError",
    "StreamError",
    "StreamEvent",
    "TokenLogprob",
    "Tokenization",
    "UnavailableError",
    "Usage",
]
