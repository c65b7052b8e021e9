"""The use of API keys as Prometheus series, by the names that the operator gave them."""

from __future__ import annotations

from collections.abc import Iterable

from sortserve.core.api_keys import UNNAMED_KEY, KeyObserver
from sortserve.telemetry.series import Families

__all__ = ["KEY_LIMITS", "KeyMetrics"]

KEY_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency", "max_exit_layer")
"""Values of the label ``limit``."""


class KeyMetrics(KeyObserver):
    """The series of all names that there are now; a name that goes takes its series along.

    So there are no more than ``MAX_KEYS`` names, and one for all keys without.
    """

    def __init__(self, families: Families) -> None:
        counter = families.counter
        self._requests = counter("api_key_requests", "Requests let in", "key")
        self._limited = counter(
            "api_key_limited", "Requests refused for a limit of their key", "key", "limit"
        )
        self._prompt = counter("api_key_prompt_tokens", "Prompt tokens", "key")
        self._output = counter("api_key_generation_tokens", "Output tokens", "key")
        self._running = families.gauge("api_key_requests_running", "Requests under way", "key")
        self._reloads = counter(
            "api_key_reloads", "Times that the file of keys was read anew", "outcome"
        )
        for outcome in ("ok", "failed"):
            self._reloads[outcome]
        self._names: frozenset[str] = frozenset()

    def on_names(self, names: Iterable[str]) -> None:
        """Tell of these names, and of no others; their series are there from now on."""
        new = frozenset(names) | {UNNAMED_KEY}
        for name in self._names - new:
            for family in (self._requests, self._prompt, self._output):
                family.drop(name)
            self._running.drop(name)
            for limit in KEY_LIMITS:
                self._limited.drop((name, limit))
        for name in new - self._names:
            for family in (self._requests, self._prompt, self._output):
                family[name]
            self._running[name]
            for limit in KEY_LIMITS:
                self._limited[(name, limit)]
        self._names = new

    def on_begun(self, name: str) -> None:
        """Count a request that was let in."""
        self._requests[name].inc()
        self._running[name].inc()

    def on_limited(self, name: str, limit: str) -> None:
        """Count a request that was refused for its key's sake."""
        self._limited[(name, limit)].inc()

    def on_ended(self, name: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Count what a request has used."""
        self._running[name].dec()
        self._prompt[name].inc(num_prompt_tokens)
        self._output[name].inc(num_output_tokens)

    def on_reloaded(self, outcome: str) -> None:
        """Count a reading of the file."""
        self._reloads[outcome].inc()
