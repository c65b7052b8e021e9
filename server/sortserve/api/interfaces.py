"""What the HTTP service needs of the engine, the tokenizer and the metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from sortserve.admission.queue_limits import Reservation
from sortserve.core.budget import Budget, ExitTable
from sortserve.core.grammar import Grammar, OutputFormat
from sortserve.core.request import AdmissionStats, EngineStats, Estimate, Request
from sortserve.engine.ledger import State
from sortserve.engine.stream import RequestStream
from sortserve.replicas.load import EngineLoad

__all__ = ["EngineClient", "Grammars", "HttpMetrics", "Tokenizer"]


class EngineClient(Protocol):
    """Whoever runs the requests: the engine of this process, or engines elsewhere.

    All methods are for the event loop's thread. The HTTP service knows no more of an engine.
    """

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic; the times of requests are on it."""

    @property
    def exits(self) -> ExitTable:
        """What is served."""

    @property
    def max_model_len(self) -> int:
        """Prompt and answer together, in tokens."""

    @property
    def state(self) -> State:
        """loading, ready, draining, failed or stopped."""

    @property
    def replica_states(self) -> Mapping[str, str] | None:
        """The state of each engine elsewhere, by name; None: the engine is in this process."""

    def reserve(self, num_requests: int, num_tokens: int) -> Reservation:
        """Take places in the queue, before tokenisation; as ``EngineWorker.reserve``."""

    async def submit_all(
        self,
        requests: Sequence[Request],
        reservation: Reservation,
        *,
        is_streamed: bool,
        num_samples: int,
    ) -> list[RequestStream]:
        """Let in all of them or none; as ``Crowds.submit_all``."""

    def estimate(self, exit_layer: int, num_prompt_tokens: int, max_tokens: int) -> Estimate | None:
        """Predicted times of a newcomer at an exit now; None: nothing is known."""

    def load(self) -> EngineLoad:
        """What it says of itself to routers."""

    def stats(self) -> EngineStats:
        """What runs and waits now."""

    def admission_stats(self, budget: Budget) -> AdmissionStats:
        """What a newcomer would meet now; ``budget`` is that of requests that give none."""


class Grammars(Protocol):
    """The part of ``sortserve.text.grammars.Grammars`` that requests need."""

    def kept(self, format_: OutputFormat) -> Grammar | None:
        """What an answer in that format must match, if it is at hand."""

    def compile(self, format_: OutputFormat) -> Grammar:
        """The same, which may take a while."""


class Tokenizer(Protocol):
    """The part of ``sortserve.text.tokenizer.Tokenizer`` that requests and replies need."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def info(self) -> Mapping[str, Any]:
        """What ``GET /tokenizer_info`` tells of it."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids to text."""

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Messages to token ids."""

    @property
    def tool_dialect(self) -> str | None:
        """The form in which the chat template has tools called; None: it knows none."""

    @property
    def grammars(self) -> Grammars:
        """Compiles what answers must look like."""

    def convert_id_to_token_text(self, token_id: int) -> tuple[str, bytes]:
        """One token as text (which may be half a character, replaced) and as its bytes."""


class HttpMetrics(Protocol):
    """The part of ``sortserve.telemetry.metrics.Metrics`` that the service tells and asks."""

    def http_request(self, route: str, method: str, status: int) -> None:
        """Count one answered request."""

    def render(self, accept: str | None = None) -> tuple[bytes, str] | Awaitable[tuple[bytes, str]]:
        """The exposition text and its content type; awaited where others have a share in it."""
