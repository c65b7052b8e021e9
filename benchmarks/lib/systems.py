"""What is compared: one exit for everybody, lock-step batches, and the server's own objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["DEFAULT_SYSTEMS", "SYSTEMS", "System"]


@dataclass(frozen=True, kw_only=True)
class System:
    """One way of serving a load."""

    name: str
    label: str
    """In tables and figures."""
    policy: str
    objective: str | None = None
    """None: the server's default."""
    exit_index: float | None = None
    """Every request is pinned to the exit at this share of the way from the shallowest (0) to the
    deepest (1), and has no budget; None: each has its budget, and the server decides."""

    def pinned(self, exits: Sequence[int]) -> int | None:
        """The one exit of all its requests, if it has only one."""
        if self.exit_index is None:
            return None
        return exits[min(int(self.exit_index * len(exits)), len(exits) - 1)]

    @property
    def options(self) -> dict[str, Any]:
        """As ``sortserve.simulation.simulate`` takes them."""
        own = {} if self.objective is None else {"objective": self.objective}
        return {"policy": self.policy, **own}

    @property
    def flags(self) -> list[str]:
        """As ``sortserve serve`` takes them."""
        return [part for name, value in self.options.items() for part in (f"--{name}", value)]


SYSTEMS = {
    system.name: system
    for system in (
        System(name="full", label="full depth always", policy="lockstep", exit_index=1.0),
        System(name="shallow", label="shallowest always", policy="lockstep", exit_index=0.0),
        System(name="middle", label="middle exit always", policy="lockstep", exit_index=0.5),
        System(name="lockstep", label="lock-step, our admission", policy="lockstep"),
        System(name="quality", label="ours: quality", policy="deadline", objective="quality"),
        System(
            name="attainment", label="ours: attainment", policy="deadline", objective="attainment"
        ),
        System(name="depth", label="ours: depth", policy="deadline", objective="depth"),
    )
}
DEFAULT_SYSTEMS = ("full", "shallow", "middle", "lockstep", "quality", "attainment")
