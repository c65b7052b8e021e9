"""The async client: the sync one with ``await``. A test holds the two together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from sortserve_client import _calls as calls
from sortserve_client._base import (
    DEFAULT_BASE_URL,
    DEFAULT_TIMEOUT,
    BaseClient,
    raise_translated,
    read_answer,
    status_error,
)
from sortserve_client._budget import Budget
from sortserve_client._calls import Call, Messages, Prompt, SamplingOptions
from sortserve_client._exceptions import APIConnectionError, APIStatusError
from sortserve_client._retry import RetryPolicy
from sortserve_client._stream import AsyncGenerationStream
from sortserve_client._types import (
    ExitInfo,
    Generation,
    Health,
    ModelInfo,
    ScheduleInfo,
    Tokenization,
)

__all__ = ["AsyncClient"]

T = TypeVar("T")


class AsyncClient(BaseClient):
    """A connection pool to one sortserve server, for asyncio. Arguments as for ``Client``."""

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        max_retry_wait_s: float = 30.0,
        http_client: httpx.AsyncClient | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        policy = RetryPolicy(max_retries=max_retries, max_wait_s=max_retry_wait_s)
        super().__init__(base_url, api_key, timeout, policy)
        self._owns_http = http_client is None
        self._http = http_client or self._own_http(httpx.AsyncClient, httpx.AsyncHTTPTransport)
        self._sleep = sleep

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections, unless they are the caller's own."""
        if self._owns_http:
            await self._http.aclose()

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        budget: Budget | None = None,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """Generate, and wait for the whole answer. Arguments as for ``Client.generate``."""
        return await self._run(calls.generate(prompt, messages, budget, extra, options))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        budget: Budget | None = None,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncGenerationStream:
        """Generate, and hand over each piece as it comes. Arguments as for ``generate``."""
        call = calls.generate(prompt, messages, budget, extra, options, stream=True)
        return AsyncGenerationStream(lambda: self._send(call, stream=True))

    async def exits(self) -> list[ExitInfo]:
        """The sub-models of the served checkpoint, shallowest first."""
        return await self._run(calls.exits())

    async def schedules(self) -> list[ScheduleInfo]:
        """The depth schedules that the evaluation of the served checkpoint measured."""
        return await self._run(calls.schedules())

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        add_special_tokens: bool = True,
    ) -> Tokenization:
        """A text or a conversation as token ids."""
        return await self._run(calls.tokenize(prompt, messages, add_special_tokens))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Token ids as text."""
        return await self._run(calls.detokenize(tokens))

    async def health(self) -> Health:
        """Whether the server takes requests. Not retried; raises if there is no server."""
        return await self._run(calls.health())

    async def version(self) -> str:
        """The server's version."""
        return await self._run(calls.version())

    async def metrics(self) -> str:
        """The server's metrics in Prometheus' text format."""
        return await self._run(calls.metrics())

    async def models(self) -> list[ModelInfo]:
        """The names that the server answers to."""
        return await self._run(calls.models())

    async def _run(self, call: Call[T]) -> T:
        return read_answer(call, await self._send(call))

    async def _send(self, call: Call[Any], *, stream: bool = False) -> httpx.Response:
        """An answer with a status that the call reads, after as many attempts as are allowed."""
        for attempt in count():
            try:
                return await self._attempt(call, stream)
            except (APIConnectionError, APIStatusError) as error:
                wait_s = self._retry_policy.wait_s(error, attempt) if call.retry else None
                if wait_s is None:
                    raise
            await self._sleep(wait_s)
        raise AssertionError("count() does not end")

    async def _attempt(self, call: Call[Any], stream: bool) -> httpx.Response:
        request = self._http.build_request(**self._request_arguments(call))
        try:
            response = await self._http.send(request, stream=stream)
            if response.status_code in call.answers:
                return response
            await response.aread()  # an error is never a stream; reading it frees the connection
        except httpx.HTTPError as error:
            raise_translated(self, error)
        raise status_error(response)
