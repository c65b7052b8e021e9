"""The sync client."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
from sortserve_client._stream import GenerationStream
from sortserve_client._types import (
    ExitInfo,
    Generation,
    Health,
    ModelInfo,
    ScheduleInfo,
    Tokenization,
)

__all__ = ["Client"]

T = TypeVar("T")


class Client(BaseClient):
    """A connection pool to one sortserve server. Safe to share between threads.

    Args:
        base_url: where the server listens; a path prefix is kept. On this machine (127.0.0.1,
            localhost) it is asked directly, elsewhere through the proxies of the environment.
        api_key: sent as a bearer token; printable ASCII.
        timeout: seconds without a byte from the server, or an ``httpx.Timeout``; None never ends.
        max_retries: how often to try again after a refused connection, 429 or 503.
        max_retry_wait_s: longest wait between two attempts, whatever ``Retry-After`` says.
        http_client: an own httpx client (proxies, certificates, a test transport); the caller
            closes it.
        sleep: waits between attempts.

    Raises:
        ValueError: an argument is wrong; the message never shows a key.

    Every method raises a ``SortserveError``; ``sortserve_client._exceptions`` draws the tree.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        max_retry_wait_s: float = 30.0,
        http_client: httpx.Client | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        policy = RetryPolicy(max_retries=max_retries, max_wait_s=max_retry_wait_s)
        super().__init__(base_url, api_key, timeout, policy)
        self._owns_http = http_client is None
        self._http = http_client or self._own_http(httpx.Client, httpx.HTTPTransport)
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, unless they are the caller's own."""
        if self._owns_http:
            self._http.close()

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        budget: Budget | None = None,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """Generate, and wait for the whole answer.

        Args:
            prompt: text or token ids. Give this or ``messages``.
            messages: a conversation, put into the model's chat template by the server.
            budget: what the answer may cost.
            extra: further fields of the request body; they win over the others.
            **options: sampling, see ``SamplingOptions``.
        """
        return self._run(calls.generate(prompt, messages, budget, extra, options))

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        budget: Budget | None = None,
        extra: Mapping[str, Any] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> GenerationStream:
        """Generate, and hand over each piece as it comes. Arguments as for ``generate``."""
        call = calls.generate(prompt, messages, budget, extra, options, stream=True)
        return GenerationStream(lambda: self._send(call, stream=True))

    def exits(self) -> list[ExitInfo]:
        """The sub-models of the served checkpoint, shallowest first."""
        return self._run(calls.exits())

    def schedules(self) -> list[ScheduleInfo]:
        """The depth schedules that the evaluation of the served checkpoint measured."""
        return self._run(calls.schedules())

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        add_special_tokens: bool = True,
    ) -> Tokenization:
        """A text or a conversation as token ids."""
        return self._run(calls.tokenize(prompt, messages, add_special_tokens))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Token ids as text."""
        return self._run(calls.detokenize(tokens))

    def health(self) -> Health:
        """Whether the server takes requests. Not retried; raises if there is no server."""
        return self._run(calls.health())

    def version(self) -> str:
        """The server's version."""
        return self._run(calls.version())

    def metrics(self) -> str:
        """The server's metrics in Prometheus' text format."""
        return self._run(calls.metrics())

    def models(self) -> list[ModelInfo]:
        """The names that the server answers to."""
        return self._run(calls.models())

    def _run(self, call: Call[T]) -> T:
        return read_answer(call, self._send(call))

    def _send(self, call: Call[Any], *, stream: bool = False) -> httpx.Response:
        """An answer with a status that the call reads, after as many attempts as are allowed."""
        for attempt in count():
            try:
                return self._attempt(call, stream)
            except (APIConnectionError, APIStatusError) as error:
                wait_s = self._retry_policy.wait_s(error, attempt) if call.retry else None
                if wait_s is None:
                    raise
            self._sleep(wait_s)
        raise AssertionError("count() does not end")

    def _attempt(self, call: Call[Any], stream: bool) -> httpx.Response:
        request = self._http.build_request(**self._request_arguments(call))
        try:
            response = self._http.send(request, stream=stream)
            if response.status_code in call.answers:
                return response
            response.read()  # an error is never a stream; reading it frees the connection
        except httpx.HTTPError as error:
            raise_translated(self, error)
        raise status_error(response)
