"""Slots and KV pages: what requests take up while they run (pure, no torch)."""

from __future__ import annotations

from dataclasses import dataclass

from sortserve.core.slabs import Slabs

__all__ = ["UNLIMITED", "Room"]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What requests take up while they run."""

    num_slots: int
    """Most that run at once."""
    num_pages: int
    """Of the KV cache."""
    num_free_pages: int
    """Now, cached ones included."""
    block_size: int
    """Tokens of a page."""
    slabs: Slabs
    """What a page holds."""

    def pages(self, num_tokens: int, exit_layer: int) -> int:
        """Those that hold so many tokens at an exit."""
        return -(-num_tokens // self.block_size) * self.slabs.count(exit_layer)

    def is_ample(self, num_requests: int, num_tokens: int, exit_layer: int) -> bool:
        """Whether so many requests could all run now, and grow to so many tokens together.

        Args:
            num_requests: running and waiting ones.
            num_tokens: of all of them, at their ends.
            exit_layer: the deepest.
        """
        num_blocks = num_tokens // self.block_size + 2 * num_requests
        return (
            num_requests <= self.num_slots
            and num_blocks * self.slabs.count(exit_layer) <= self.num_pages
        )


UNLIMITED = Room(
    num_slots=1 << 60, num_pages=1 << 60, num_free_pages=1 << 60, block_size=1, slabs=Slabs(1)
)
