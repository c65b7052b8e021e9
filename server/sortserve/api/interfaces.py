"""What the HTTP service needs of the tokenizer and of the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sortserve.core.grammar import Grammar, OutputFormat

__all__ = ["Grammars", "HttpMetrics", "Tokenizer"]


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

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """The exposition text and its content type."""
