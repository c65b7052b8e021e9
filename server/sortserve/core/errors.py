"""Every error a user can meet, in one tree.

    SortserveError
    ├── InvalidRequestError        400  a field has a value that is not allowed
    ├── AuthenticationError        401  no key, or a wrong one
    ├── PermissionDeniedError      403  the API key may not have that
    ├── NotFoundError              404  unknown model or route
    ├── PayloadTooLargeError       413  the body is over the limit
    ├── OverloadedError            429  the queue is over a limit; come back later
    │   ├── BudgetUnattainableError     no allowed exit fits the budget now
    │   └── RateLimitError              the API key is over a limit of its own
    ├── EngineError                500  our fault
    ├── UnavailableError           503  loading or draining
    ├── RequestTimeoutError        504  over the server's --request-timeout
    ├── CheckpointError            (CLI, exit code 2) a checkpoint cannot be served
    └── ConfigError                (CLI, exit code 2) a flag, variable or file is wrong

A message says what was given, what is allowed and what to do. ``param`` is the dotted path of the
field the user typed, as in the OpenAI error body.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

__all__ = [
    "CONTEXT_LENGTH_EXCEEDED",
    "MAX_RETRY_AFTER_S",
    "AuthenticationError",
    "BudgetUnattainableError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "InvalidRequestError",
    "NotFoundError",
    "OverloadedError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestTimeoutError",
    "SortserveError",
    "UnavailableError",
    "in_our_words",
    "shortened",
]

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""OpenAI's code of what the context cannot hold: clients shorten the conversation when they see it.
Some look for OpenAI's words, too: "this model's maximum context length is"."""
MAX_VALUE_CHARS = 100
"""Characters of a value that a message quotes."""
MAX_LINE = 1_000
"""Characters of a message that quotes what others wrote."""


MAX_RETRY_AFTER_S = 3600.0
"""Nobody is told to come back later than in an hour: no forecast reaches further."""


class SortserveError(Exception):
    """Base of all errors meant for a user. ``status`` is the HTTP status it is answered with.

    ``retry_after_s`` is never longer than ``MAX_RETRY_AFTER_S``, whatever was predicted.
    """

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal_error"
    default_code: ClassVar[str | None] = None
    is_final: ClassVar[bool] = False
    """The same request would fail again: clients that retry by status are told not to."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s
        if retry_after_s is not None:  # what is not a number becomes 0 in this order
            self.retry_after_s = min(MAX_RETRY_AFTER_S, max(0.0, retry_after_s))

    def about(self, param: str) -> Self:
        """The same of another field, which the message names where it named the first."""
        assert self.param is not None
        message = re.sub(rf"\b{re.escape(self.param)}\b", param, self.message, count=1)
        return type(self)(
            message, param=param, code=self.code, retry_after_s=self.retry_after_s
        ).with_traceback(self.__traceback__)

    def of_prompt(self, index: int) -> Self:
        """The same of one prompt among several, if it is about the prompt."""
        return self.about(f"prompt.{index}") if self.param == "prompt" else self

    def body(self) -> dict[str, Any]:
        """The OpenAI error body: ``{"error": {"message", "type", "param", "code"}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.error_type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequestError(SortserveError, ValueError):
    """A field is missing, unknown, or has a value that is not allowed."""

    status = 400
    error_type = "invalid_request_error"
    is_final = True


class AuthenticationError(SortserveError):
    """The API key is missing or wrong."""

    status = 401
    error_type = "authentication_error"
    default_code = "invalid_api_key"
    is_final = True


class PermissionDeniedError(SortserveError):
    """The API key is right, but it may not have what the request names."""

    status = 403
    error_type = "permission_error"
    default_code = "exit_not_allowed"
    is_final = True


class NotFoundError(SortserveError):
    """The model or the route does not exist."""

    status = 404
    error_type = "not_found_error"
    default_code = "not_found"
    is_final = True


class PayloadTooLargeError(SortserveError):
    """The request body is over ``--max-body-size``."""

    status = 413
    error_type = "invalid_request_error"
    default_code = "payload_too_large"
    is_final = True


class OverloadedError(SortserveError):
    """The server is over a limit; ``retry_after_s`` says when to come back."""

    status = 429
    error_type = "overloaded_error"
    default_code = "queue_full"


class BudgetUnattainableError(OverloadedError):
    """No allowed exit fits the budget now, and the client asked to be told so.

    Final although it is a 429: by the time it could be met, the answer would come too late.
    """

    default_code = "budget_unattainable"
    is_final = True


class RateLimitError(OverloadedError):
    """The API key is over a limit of its own, which the message names."""

    error_type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class EngineError(SortserveError):
    """The engine failed; the request is lost through no fault of the client."""

    status = 500
    error_type = "internal_error"
    default_code = "engine_error"


class UnavailableError(SortserveError):
    """The server is loading or draining."""

    status = 503
    error_type = "unavailable_error"
    default_code = "not_ready"


class RequestTimeoutError(SortserveError):
    """The request ran longer than ``--request-timeout`` allows; it would again."""

    status = 504
    error_type = "timeout_error"
    default_code = "request_timeout"
    is_final = True


class CheckpointError(SortserveError, ValueError):
    """The checkpoint cannot be served; the command line ends with exit code 2.

    The message is made one line of printable characters: it quotes files and other libraries.
    """

    error_type = "checkpoint_error"

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(_one_line(message), **fields)


class ConfigError(SortserveError, ValueError):
    """A flag, an environment variable or a key of the config file is wrong; exit code 2."""

    error_type = "config_error"


def shortened(value: object) -> str:
    """A value as the client may read it, cut to a hundred characters without writing all of it.

    ``true``, ``false`` and ``null`` are written as in JSON.
    """
    text = repr(_cut(value))
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "..."


class _Word(str):
    """Written without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _cut(value: object) -> object:
    """What a repr of a hundred characters may need of a value, with the words of JSON."""
    if value is None:
        return _Word("null")
    if isinstance(value, bool):
        return _Word("true" if value else "false")
    if isinstance(value, str | bytes):
        return value[:MAX_VALUE_CHARS]
    if isinstance(value, Sequence):
        return [_cut(item) for item in value[:MAX_VALUE_CHARS]]
    if isinstance(value, Mapping):
        return {k: _cut(v) for k, v in itertools.islice(value.items(), MAX_VALUE_CHARS)}
    return value


def _one_line(text: str) -> str:
    """``text`` without line ends, control characters and, where it is long, its middle."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    if len(line) > MAX_LINE:
        line = f"{line[: MAX_LINE * 3 // 4]} ... {line[-MAX_LINE // 4 :]}"
    if line.isprintable():
        return line
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return "".join(escaped)


def in_our_words(message: str) -> str:
    """What pydantic says of a value, as it stands behind "is not allowed": what it should be."""
    said = message.removeprefix("Value error, ")
    said = re.sub(r"^(Input|String|List|Dictionary) should ", "it should ", said)
    return re.sub(r" after validation, not \w+$", "", said)
