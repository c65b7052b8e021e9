"""How Prometheus series are made and kept here: quick to reach, and there from the start.

The client library's own look-up of a child by its labels costs microseconds, and its series are
missing until the first event, which ``rate()`` then does not see.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = [
    "BUDGET_OUTCOMES",
    "ERROR_RATIO_BOUNDS",
    "HTTP_METHODS",
    "LENGTH_ERROR_RATIO",
    "QUALITY_BOUNDS",
    "REQUEST_BOUNDS_S",
    "ROWS_BOUNDS",
    "TOKEN_BOUNDS_S",
    "TTFT_BOUNDS_S",
    "Children",
    "Families",
    "WithoutCreated",
]

# vLLM's bounds, with finer ones where a small model on a CPU lives: from 1 ms up.
# fmt: off
TTFT_BOUNDS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
TOKEN_BOUNDS_S = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0,
    10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)
# fmt: on
BUDGET_OUTCOMES = ("met", "missed", "degraded", "truncated", "rejected")
"""Values of the label ``outcome`` where the budget bounds a time."""
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Values of the label ``method``; all others are told as one."""
ERROR_RATIO_BOUNDS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
LENGTH_ERROR_RATIO = (
    "length_error_ratio",
    "Expected over actual output tokens",
    (0.25, 0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, 64.0),
)
"""Name, documentation and bounds."""
QUALITY_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

C = TypeVar("C", Counter, Gauge, Histogram)
Key = int | str | tuple[int | str, ...]


class Children(dict[Key, C]):
    """The children of one family by label values, each made once: a look-up is a dict access."""

    def __init__(self, family: C, model_name: str) -> None:
        super().__init__()
        self._family: C = family
        self._model_name = model_name

    def __missing__(self, key: Key) -> C:
        values = key if isinstance(key, tuple) else (key,)
        child = self[key] = self._family.labels(self._model_name, *map(str, values))
        return child

    def drop(self, key: Key) -> None:
        """Tell a child no more."""
        if self.pop(key, None) is not None:
            values = key if isinstance(key, tuple) else (key,)
            self._family.remove(self._model_name, *map(str, values))


class WithoutCreated(Collector):
    """A registry without the client library's ``_created`` samples, which nobody here reads."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """What the registry has, less those samples."""
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class Families:
    """Makes the families of one server; every series carries ``model_name``.

    Args:
        registry: where they are registered.
        model_name: label of all.
        exits: their series exist from the start, at zero.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str, exits: Sequence[int]) -> None:
        self._registry = registry
        self._model_name = model_name
        self._exits = tuple(exits)

    def gauge(self, name: str, doc: str, *labels: str) -> Children[Gauge]:
        """A family of gauges."""
        return self._children(
            Gauge(*self._head(name, doc, labels), registry=self._registry), labels
        )

    def counter(self, name: str, doc: str, *labels: str) -> Children[Counter]:
        """A family of counters."""
        head = self._head(name, doc, labels)
        return self._children(Counter(*head, registry=self._registry), labels)

    def histogram(
        self, name: str, doc: str, bounds: Sequence[float], *labels: str
    ) -> Children[Histogram]:
        """A family of histograms."""
        head = self._head(name, doc, labels)
        return self._children(Histogram(*head, registry=self._registry, buckets=bounds), labels)

    def _head(self, name: str, doc: str, labels: tuple[str, ...]) -> tuple[str, str, list[str]]:
        return f"sortserve_{name}", doc, ["model_name", *labels]

    def _children(self, family: C, labels: tuple[str, ...]) -> Children[C]:
        """The family's children; those known now start at zero, so that ``rate()`` sees the first.

        Which reasons, kinds and routes there will be is not known here; exits are.
        """
        children = Children(family, self._model_name)
        known: tuple[Key, ...] = ((),) if not labels else ()
        for key in self._exits if labels == ("exit_layer",) else known:
            children[key]
        return children
