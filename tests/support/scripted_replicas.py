"""Replicas in one process, and a link that tests can cut; messages are pickled on their way."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import sortserve
from sortserve.api.app import create_app
from sortserve.api.settings import ApiSettings
from sortserve.core.budget import Budget
from sortserve.core.errors import UnavailableError
from sortserve.remote.client import RemoteEngines
from sortserve.remote.host import ReplicaHost
from sortserve.remote.link import ReplicaLostError
from sortserve.remote.metrics import RemoteMetrics, RemoteTotals
from sortserve.replicas.directory import Directory
from sortserve.replicas.messages import Accepted, Ask, Handover, Item, Outputs
from sortserve.telemetry.metrics import Metrics
from support.http_service import EXITS, MODEL, AsciiTokenizer, HttpService


class ScriptedLink:
    """Carries messages to hosts of this process as Ray does, and loses them when told."""

    def __init__(self, hosts: dict[str, ReplicaHost], metrics: dict[str, Metrics]) -> None:
        self.hosts = hosts
        self.metrics = metrics
        self.directory = Directory(time.monotonic)
        self.handovers: list[tuple[str, Handover]] = []
        """What was sent where."""
        self.num_closed = 0
        self._dead: set[str] = set()
        self.lost: dict[str, int | None] = {}
        """Replicas that die, after so many messages of outputs; None: before their first word."""
        self.silent: set[str] = set()
        """Replicas that answer no question."""

    def refresh(self) -> None:
        """All replicas report."""
        self.directory.update({name: host.report() for name, host in self.hosts.items()})

    async def open(self, handover: Handover) -> AsyncGenerator[Item, None]:
        names = sorted(self.hosts.keys() - self._dead)
        ranked = self.directory.rank(handover.routed, names, not_to=handover.not_to)
        if not ranked:
            raise UnavailableError("No replica takes the request now.", code="no_replica")
        name, key = ranked[0], handover.requests[0].request_id
        self.handovers.append((name, handover))
        self.directory.begin(key)
        self.directory.send(name, key, handover.routed)
        num_left = self.lost.get(name, -1)
        try:
            if num_left is None:
                self._die(name)
            async with aclosing(self.hosts[name].generate(_carried(handover))) as items:
                async for item in items:
                    if isinstance(item, Outputs) and num_left == 0:
                        self._die(name)
                    if isinstance(item, Outputs) and num_left is not None:
                        num_left -= 1
                    if isinstance(item, Accepted):
                        exit_layer = item.choices[0][0]
                        self.directory.accept(name, key, handover.routed, exit_layer)
                    yield _carried(item)
        finally:
            self.num_closed += 1
            self.directory.end(key)

    def _die(self, name: str) -> None:
        self._dead.add(name)
        self.directory.lose(name)
        raise ReplicaLostError("The replica that worked on this request was lost.")

    async def ask(self, ask: Ask) -> Any:
        name = ask.only or min(self.hosts)
        if name in self.silent:
            raise ReplicaLostError("A replica did not answer.")
        return self.metrics[name].render(None)[0].decode()


def _carried(message: Any) -> Any:
    return pickle.loads(pickle.dumps(message))


class Replicas:
    """An ingress over some services, each of which is a replica."""

    def __init__(
        self,
        services: dict[str, HttpService],
        *,
        unix_clocks: dict[str, Callable[[], float]] | None = None,
        **settings: Any,
    ) -> None:
        self.services = services
        hosts = {
            name: ReplicaHost(
                own.worker,
                compile_grammar=own.tokenizer.grammars.compile,
                totals=own.app.state.service.totals,
                replica_id=name,
                default_budget=Budget(),
                unix_clock=(unix_clocks or {}).get(name, time.time),
            )
            for name, own in services.items()
        }
        metrics = {name: own.app.state.service.metrics for name, own in services.items()}
        self.link = ScriptedLink(hosts, metrics)
        self.link.refresh()
        any_ = next(iter(services.values()))
        self.engines = RemoteEngines(self.link, any_.worker.exits, any_.worker.max_model_len)
        api = ApiSettings(**{"served_model_name": MODEL, "backend": "scripted", **settings})
        own_metrics = Metrics(MODEL, EXITS, version=sortserve.__version__)
        self.tokenizer = AsciiTokenizer()
        app = create_app(
            self.engines,
            self.tokenizer,
            api,
            RemoteMetrics(own_metrics, self.link),
            RemoteTotals(self.link),
        )
        self.http = HttpService(  # its engine is nowhere: only what sends requests is used
            app, any_.worker, any_.engine, any_.runner, self.tokenizer, any_.ended
        )

    def sent_to(self) -> list[str]:
        """The replicas that requests went to, in order."""
        return [name for name, _ in self.link.handovers]

    async def settle(self) -> None:
        """Wait until no request is under way, on any side, and check all books."""
        async with asyncio.timeout(30):
            while self.engines.groups or any(
                own.worker.stats().num_running + own.worker.stats().num_waiting
                for own in self.services.values()
            ):
                await asyncio.sleep(0.01)
        self.engines.check_invariants()
        self.link.directory.check_invariants()
        for own in self.services.values():
            assert own.worker.stats().kv_pages_used == 0
