"""What a replica says of itself, so that a router can tell what a request would get (no torch).

A report is a plain value of some kilobytes: it can be pickled, and ``document`` and
``from_document`` carry it as JSON. It is made on demand (``load_of``), from what admission, cost
model and page pool know anyhow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MAX_PREFIXES", "EngineLoad", "ExitLoad"]

MAX_PREFIXES = 256
"""Most prefixes that a report names, the latest used."""


@dataclass(frozen=True, kw_only=True)
class ExitLoad:
    """One exit of a replica: what it is worth, what it costs, and how busy it is."""

    exit_layer: int
    score: float
    """What one of its tokens is worth beside one of the full model (``ExitTable.scores``)."""
    compute: float
    """Share of the full model's FLOPs per token; in (0, 1]."""
    num_rows: int
    """Requests that hold pages and are at this exit now."""
    ttft_ms: float
    """Predicted for a newcomer with ``EngineLoad.typical_tokens`` of prompt and no budget."""
    tpot_ms: float
    """Predicted time per token of the same newcomer."""
    step_ms: float
    """A step to this exit, however many rows."""
    row_ms: float
    """One more row that decodes in such a step, at a typical context."""
    prompt_token_ms: float
    """One more token of a prompt."""
    steps_per_s: float
    """Steps to this exit or deeper that the live promises need each second."""


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """A replica at one moment. Times are predicted with the safety factor of admission."""

    time_s: float
    """When it was made, by the clock that its maker was given."""
    exits: tuple[ExitLoad, ...]
    """Ascending; the last is the full model."""
    min_quality: float = 0.0
    """The floor of requests that name none."""
    typical_tokens: int = 128
    pressure: float = 0.0
    """Share of the machine that the live promises need at their present exits; above 1 some are
    late, or will go shallower."""
    floor_pressure: float = 0.0
    """The same if all of them were as shallow as they may be."""
    waiting_ms: float = 0.0
    """Work of the prompts that are not read yet."""
    num_running: int = 0
    num_waiting: int = 0
    """Requests that hold no pages yet."""
    num_waiting_tokens: int = 0
    """Of their prompts."""
    num_slots: int = 1
    """Requests that may run at once."""
    num_free_pages: int = 0
    """Cached ones included."""
    num_pages: int = 0
    block_size: int = 16
    """Tokens of a page."""
    prefixes: Mapping[str, int] = field(default_factory=dict)
    """Digests (``prefix_digests``) of leading blocks that the cache holds, and the deepest exit
    that it holds them for. At most ``MAX_PREFIXES``."""
    is_calibrated: bool = True
    """Whether the times mean anything: false without a cost model."""
    is_accepting: bool = True
    """Whether it takes new requests: false while it loads, drains or has failed."""

    @property
    def document(self) -> dict[str, Any]:
        """As JSON has it; ``from_document`` reads it."""
        raise NotImplementedError

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> EngineLoad:
        """The load that a document stands for; fields that are not known are left out.

        Raises:
            ValueError: it is no such document.
        """
        raise NotImplementedError
