"""The deployment of engines: each replica is one, in a process of its own."""

from __future__ import annotations

import logging
import pickle
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from ray import serve

from sortserve.core.budget import ExitTable
from sortserve.engine.memory import CacheShape
from sortserve.process.build import Serving, build
from sortserve.process.config import ServeSettings
from sortserve.ray.router import REPORT
from sortserve.remote.host import ReplicaHost
from sortserve.replicas.messages import Ask, Handover, Item
from sortserve.telemetry.logs import logging_to

__all__ = ["EngineReplica", "Facts"]

logger = logging.getLogger(__name__)

STOP_S = 5.0
"""Seconds that the step under way gets to end when the replica does."""
LATELY_S = 60.0
"""Budgets that ended within so many seconds count for the number of replicas."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an ingress needs to know of the model; the same of every replica."""

    model_name: str
    license: str | None
    exits: ExitTable
    max_model_len: int
    generation_defaults: Mapping[str, float]
    computed_in: Mapping[str, str]
    cache: CacheShape


class EngineReplica:
    """One engine, as Ray Serve runs it."""

    def __init__(self, settings: ServeSettings) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(
            logging_to(level=settings.log_level, log_format=settings.log_format)
        )
        self._serving: Serving = build(settings)
        worker = self._serving.worker
        worker.start(self._serving.prepare)
        self._host = ReplicaHost(
            worker,
            compile_grammar=self._serving.tokenizer.grammars.compile,
            totals=self._serving.totals,
            replica_id=serve.get_replica_context().replica_id.unique_id,
            default_budget=settings.budget_by_default,
        )
        self._lately: deque[tuple[float, int, int]] = deque()

    async def generate(self, handover: Handover) -> AsyncGenerator[Item, None]:
        """See ``ReplicaHost.generate``."""
        async with aclosing(self._host.generate(handover)) as items:
            async for item in items:
                yield item

    async def ask(self, ask: Ask) -> Any:
        """The answer to a question."""
        if ask.what == "metrics":
            return self._serving.metrics.render(None)[0].decode()
        assert ask.what == "facts", ask.what
        return self.facts()

    def facts(self) -> Facts:
        """What it serves."""
        own = self._serving
        return Facts(
            model_name=own.model_name,
            license=own.license,
            exits=own.exits,
            max_model_len=own.worker.max_model_len,
            generation_defaults=dict(own.generation_defaults),
            computed_in=dict(own.computed_in),
            cache=own.cache,
        )

    def check_health(self) -> None:
        """Asked by Ray every few seconds: a replica whose engine has failed is started anew.

        Raises:
            RuntimeError: the engine has failed.
        """
        if self._serving.worker.state == "failed":
            raise RuntimeError(f"the engine has failed: {self._serving.worker.failure}")

    def record_routing_stats(self) -> dict[str, Any]:
        """Asked by Ray every second, and told to all routers."""
        return {REPORT: pickle.dumps(self._host.report())}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray where the number of replicas is to follow the load."""
        worker = self._serving.worker
        budgets = self._serving.totals.budgets
        bad = budgets["missed"] + budgets["rejected"]
        now, ended = time.monotonic(), bad + budgets["met"]
        self._lately.append((now, bad, ended))
        while self._lately[0][0] < now - LATELY_S:
            self._lately.popleft()
        _, bad_then, ended_then = self._lately[0]
        return {
            "pressure": worker.admission_stats(self._host.default_budget).pressure,
            "missed_share": (bad - bad_then) / max(1, ended - ended_then),
        }

    def __del__(self) -> None:
        """Called by Ray when nothing runs here any more, or has run for too long."""
        serving = getattr(self, "_serving", None)
        if serving is not None:
            serving.worker.stop(STOP_S)
            serving.close()
        self._stack.close()
