"""Ray Serve's request router: the directory decides, this hands over what Ray knows.

Ray pickles this module by value: nothing here may be state that others share.
"""

from __future__ import annotations

import logging
import pickle
from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from sortserve.ray.registry import directory_of
from sortserve.replicas.directory import Directory
from sortserve.replicas.messages import Ask, Handover, ReplicaReport

__all__ = ["REPORT", "BudgetRouter"]

logger = logging.getLogger(__name__)

REPORT = "report"
"""Under this name a replica's routing statistics have its ``ReplicaReport``, pickled."""


class BudgetRouter(RequestRouter):  # type: ignore[misc]
    """Sends a request where the deepest exit that fits its budget is reachable."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray once."""
        deployment = self._deployment_id
        self._directory: Directory = directory_of(deployment.app_name, deployment.name)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """There are these replicas now, with their latest reports."""
        super().update_replicas(replicas)
        self._directory.update({own.replica_id.unique_id: _report_of(own) for own in replicas})

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Nothing is sent there any more."""
        super().on_replica_actor_died(replica_id)
        self._directory.lose(replica_id.unique_id)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All candidates, the best first; each is a rank of its own."""
        by_name = {own.replica_id.unique_id: own for own in candidate_replicas}
        message = _message(pending_request)
        if isinstance(message, Ask):
            if message.only is None:
                return [candidate_replicas]
            return [[by_name[message.only]]] if message.only in by_name else []
        if not isinstance(message, Handover):
            return [candidate_replicas]
        ranked = self._directory.rank(message.routed, by_name, not_to=message.not_to)
        if ranked:
            self._directory.send(ranked[0], message.requests[0].request_id, message.routed)
        return [[by_name[name]] for name in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """A request has gone to a replica: perhaps not to the first, if Ray found that one full.

        Who has sent it says when it is over (``RayLink``).
        """
        message = _message(pending_request)
        if isinstance(message, Handover):
            key = message.requests[0].request_id
            if self._directory.place_of(key) != replica_id.unique_id:
                self._directory.send(replica_id.unique_id, key, message.routed)


def _message(pending_request: PendingRequest | None) -> Any:
    return pending_request.args[0] if pending_request and pending_request.args else None


def _report_of(replica: RunningReplica) -> ReplicaReport | None:
    """What it has said; None: nothing yet."""
    try:
        pickled = replica.routing_stats.get(REPORT)
        return None if pickled is None else pickle.loads(pickled)
    except Exception:  # of another version: it is a replica that is silent
        logger.exception("a replica's report cannot be read")
        return None
