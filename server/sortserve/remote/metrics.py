"""One scrape of all replicas: the series of each with the label ``replica``."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from sortserve.remote.link import Link, ReplicaLostError
from sortserve.replicas.exposition import CONTENT_TYPE, merged
from sortserve.replicas.messages import Ask, ReplicaReport
from sortserve.telemetry.metrics import Metrics
from sortserve.telemetry.totals import Totals

__all__ = ["INGRESS", "RemoteMetrics", "RemoteTotals"]

logger = logging.getLogger(__name__)

INGRESS = "ingress"
"""The label of what the process counts that has the HTTP routes."""
OF_INGRESS = ("sortserve_http_", "sortserve_api_key_")
"""Families that replicas have no part in; all others are theirs."""


class RemoteMetrics:
    """Implements ``HttpMetrics`` over replicas.

    Args:
        own: of this process: HTTP and API keys.
        link: asks the replicas for theirs. One that does not answer is left out of the scrape.
    """

    def __init__(self, own: Metrics, link: Link) -> None:
        self.keys = own.keys
        self._own = own
        self._link = link

    def http_request(self, route: str, method: str, status: int) -> None:
        """Count one answered request."""
        self._own.http_request(route, method, status)

    async def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """The exposition text and its content type, which is always Prometheus' text format."""
        names = list(self._link.directory.reports())
        texts = await asyncio.gather(*map(self._text_of, names))
        parts = {INGRESS: self._own.render(None)[0].decode()}
        parts |= {name: text for name, text in zip(names, texts, strict=True) if text is not None}
        text = merged(parts, keeps=_keeps) + self._states(len(parts) - 1)
        return text.encode(), CONTENT_TYPE

    async def _text_of(self, name: str) -> str | None:
        try:
            return str(await self._link.ask(Ask(what="metrics", only=name)))
        except ReplicaLostError as error:
            logger.warning("replica %s is missing from the metrics: %s", name, error)
            return None

    def _states(self, num_scraped: int) -> str:
        states = Counter(self._link.directory.states().values())
        lines = [
            "# HELP sortserve_replicas Replicas by their state",
            "# TYPE sortserve_replicas gauge",
            *(f'sortserve_replicas{{state="{own}"}} {n}' for own, n in sorted(states.items())),
            "# HELP sortserve_replicas_scraped Replicas whose series are in this scrape",
            "# TYPE sortserve_replicas_scraped gauge",
            f"sortserve_replicas_scraped {num_scraped}",
        ]
        return "".join(f"{line}\n" for line in lines)


def _keeps(process: str, family: str) -> bool:
    return (process == INGRESS) == family.startswith(OF_INGRESS)


class RemoteTotals(Totals):
    """The sums over all replicas that there are, a moment ago."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def _reports(self) -> list[ReplicaReport]:
        return [own for own in self._link.directory.reports().values() if own is not None]

    @property
    def tokens_by_exit(self) -> dict[int, int]:
        """Output tokens that each exit has made."""
        total: Counter[int] = Counter()
        for report in self._reports():
            total.update(report.tokens_by_exit)
        return dict(total)

    @property
    def budgets(self) -> dict[str, int]:
        """Requests that bounded a time, by what became of them."""
        total = super().budgets
        for report in self._reports():
            for name, count in report.budgets.items():
                total[name] += count
        return total

    @property
    def layers(self) -> tuple[int, int]:
        """Token-layers run, and those that full depth would have run."""
        pairs = [report.layers for report in self._reports()]
        return sum(run for run, _ in pairs), sum(full for _, full in pairs)
