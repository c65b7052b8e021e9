"""What a server process needs of whoever runs the model: an engine here, or engines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from sortserve.api.interfaces import EngineClient, HttpMetrics
from sortserve.core.api_keys import KeyObserver
from sortserve.core.budget import ExitTable
from sortserve.telemetry.totals import Totals

if TYPE_CHECKING:
    from sortserve.engine.memory import CacheShape
    from sortserve.telemetry.traces import Tracing
    from sortserve.text.tokenizer import Tokenizer

__all__ = ["Runner", "Served", "ServedMetrics"]


class Runner(EngineClient, Protocol):
    """An ``EngineClient`` with its life; see ``EngineWorker``."""

    @property
    def failure(self) -> str | None:
        """Why it has failed; None as long as it has not."""

    def start(self, prepare: Callable[[], None] | None = None) -> None:
        """Returns when it is ready."""

    async def drain(self, timeout_s: float) -> bool:
        """Take no new work, let live requests finish, end the rest; True if none had to be."""

    def stop(self, timeout_s: float | None = None) -> bool:
        """End; whether nothing is left that may be stuck."""


class ServedMetrics(HttpMetrics, Protocol):
    """The metrics of a server, with those of its keys."""

    @property
    def keys(self) -> KeyObserver:
        """Told of the use of API keys."""


class Served(Protocol):
    """A model that is ready to be served."""

    @property
    def model_name(self) -> str:
        """Its name in the API."""

    @property
    def license(self) -> str | None:
        """Of its weights, if it is known."""

    @property
    def exits(self) -> ExitTable:
        """Its sub-models."""

    @property
    def generation_defaults(self) -> Mapping[str, float]:
        """How the checkpoint recommends to sample."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What its tokens mean."""

    @property
    def worker(self) -> Runner:
        """Runs requests."""

    @property
    def prepare(self) -> Callable[[], None]:
        """For ``worker.start``."""

    @property
    def metrics(self) -> ServedMetrics:
        """Told and asked by the API."""

    @property
    def totals(self) -> Totals:
        """What has been done so far."""

    @property
    def tracing(self) -> Tracing | None:
        """Makes spans; None: nothing is traced."""

    @property
    def cache(self) -> CacheShape:
        """The KV cache, of one engine."""

    @property
    def computed_in(self) -> Mapping[str, str]:
        """What each ``auto`` became."""

    @property
    def close(self) -> Callable[[], None]:
        """End what is not of this process, after the worker's end."""
