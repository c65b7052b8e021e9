"""What carries messages between a router and its replicas, as the client of engines needs it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from sortserve.core.errors import EngineError
from sortserve.replicas.directory import Directory
from sortserve.replicas.messages import Ask, Handover, Item

__all__ = ["Link", "ReplicaLostError"]


class ReplicaLostError(EngineError):
    """The replica that had the request is gone, or cannot be reached."""

    default_code = "replica_lost"


class Link(Protocol):
    """Carries requests to replicas. Its choice of the replica goes by ``directory.rank``."""

    @property
    def directory(self) -> Directory:
        """Kept up to date by the link."""

    def open(self, handover: Handover) -> AsyncGenerator[Item, None]:
        """Send a request to a replica, and give what comes back; closing it ends the request there.

        Raises:
            ReplicaLostError: the replica was lost before the last output.
            UnavailableError: no replica was there to take it.
        """

    async def ask(self, ask: Ask) -> Any:
        """The answer of a replica.

        Raises:
            ReplicaLostError: there is none.
        """
