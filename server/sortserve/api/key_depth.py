"""The deepest exit of an API key: what it refuses, what it cuts, and what it hides (pure).

It is as with the other bounds of a budget: what a request names and cannot have is refused, with a
message that names the limit, and what the server chooses for it stays within. So a client that asks
for exit 30 and may have 18 is told so, rather than served less than it asked for without a word.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from sortserve.core.budget import Budget, ExitTable
from sortserve.core.errors import PermissionDeniedError, shortened
from sortserve.core.schedule import DepthSchedule

__all__ = ["KeyExits", "refuse_deeper", "within"]


class KeyExits(NamedTuple):
    """The exits that whoever asks may have."""

    layers: tuple[int, ...]
    """Ascending."""
    served_unasked: tuple[int, ...]
    """Those of them that the server chooses from by itself."""

    @classmethod
    def of(cls, exits: ExitTable, most: int | None) -> KeyExits:
        """Those of a checkpoint up to the deepest exit of a key; None: no key bounds it."""
        if most is None:
            return cls(exits.layers, exits.served_unasked)
        layers = tuple(e for e in exits.layers if e <= most)
        return cls(layers, exits.allowed(Budget(max_exit_layer=most)))


def refuse_deeper(named: Budget, most: int, exits: ExitTable) -> None:
    """Refuse a budget that asks for depth beyond ``most``.

    Args:
        named: what the client gave itself.
        most: the deepest exit of its key; an exit of the checkpoint.
        exits: of the checkpoint.

    Raises:
        PermissionDeniedError: ``param`` names the field.
    """
    for name in ("exit_layer", "min_exit_layer"):
        value = getattr(named, name)
        if value is not None and value > most:
            raise _refusal(f"budget.{name}", shortened(value), most)
    if named.schedule is not None and named.schedule.exits[-1] > most:
        raise _refusal("budget.schedule", shortened(named.schedule.document), most)
    if named.min_quality is not None and not _has_quality(named.min_quality, most, exits):
        raise _refusal("budget.min_quality", f"{named.min_quality:g}", most)


def within(budget: Budget, most: int, exits: ExitTable) -> Budget:
    """The budget without what is deeper than ``most``, where the server set it.

    Args:
        budget: what counts for the request; what the client named of it is no deeper.
        most: the deepest exit of its key; an exit of the checkpoint.
        exits: of the checkpoint.
    """
    if budget.exit_layer is not None:
        return replace(budget, exit_layer=min(budget.exit_layer, most))
    if budget.schedule is not None:
        return replace(budget, schedule=_cut(budget.schedule, most))
    floor = budget.min_exit_layer
    if floor is not None:
        budget = replace(budget, min_exit_layer=min(floor, most))
    if budget.min_quality is not None and not _has_quality(budget.min_quality, most, exits):
        budget = replace(budget, min_quality=None, min_exit_layer=most)
    return replace(budget, max_exit_layer=most)


def _has_quality(min_quality: float, most: int, exits: ExitTable) -> bool:
    """Whether an exit up to ``most`` is that good; where it was not measured, others refuse."""
    own = [1.0 if e == exits.full else exits[e].score for e in exits.layers if e <= most]
    return any(score is None or score >= min_quality for score in own)


def _cut(schedule: DepthSchedule, most: int) -> DepthSchedule:
    """The schedule, at ``most`` where it is deeper."""
    parts: list[tuple[int, int]] = []
    for k, exit_layer in schedule.parts:
        part = (k, min(exit_layer, most))
        if not parts or parts[-1][1] > part[1]:
            parts.append(part)
    return DepthSchedule(tuple(parts))


def _refusal(param: str, value: str, most: int) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"{param}={value} asks for more depth than your API key's max_exit_layer={most}: name an "
        f"exit up to {most}, or leave the choice to the server.",
        param=param,
    )
