"""A fault: what is done to a server, and what must come of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks.lib.faulty_process import FaultyProcess

__all__ = ["FLAGS", "FOUND_S", "STEP_TIMEOUT_S", "FaultCase", "Outcome", "Strike", "at"]

STEP_TIMEOUT_S = 1.0
FLAGS = (
    *("--dtype", "float32", "--step-timeout", f"{STEP_TIMEOUT_S:g}", "--shutdown-timeout", "10"),
    *("--header-timeout", "1", "--body-timeout", "1", "--write-timeout", "1"),
)
"""Of every server: replies that are the same each time, and waits that are short."""
FOUND_S = 2 * STEP_TIMEOUT_S
"""A hang is found after the time-out, at the next look."""
Strike = Callable[[FaultyProcess], Awaitable[object]]


class Outcome(Enum):
    """What must come of a fault."""

    UNNOTICED = "all answered as without it; healthy"
    ONE_FAILS = "one request gets an error, the others their answers; healthy"
    SOME_FAIL = "errors for those it struck, answers for the others; healthy"
    ENGINE_ENDS = "every live request gets an error; 503; exit code 1"
    PROCESS_GONE = "connections end; exit by the signal; the next start serves"
    DRAINS = "all answered; 503 for newcomers; exit code 0"
    FORCED = "answered or aborted at once; exit code 143"
    LOOP_LOST = "connections end; exit code 1"
    STARTS = "it starts with a warning and serves"
    REFUSED = "one line on stderr; exit code 2"


@dataclass(frozen=True, kw_only=True)
class FaultCase:
    """One fault."""

    name: str
    part: str
    outcome: Outcome
    strike: Strike | None = None
    """Done when all requests are live; None: the fault is in ``orders`` or ``prepare``."""
    found_s: float = 0.0
    """How long it may take until it is noticed; the two seconds of an answer count from there."""
    flags: tuple[str, ...] = ()
    orders: tuple[dict[str, Any], ...] = ()
    """What the server is told before it starts."""
    point: str | None = None
    """Of ``faulty_server.POINTS``: it must have struck."""
    prepare: Callable[[Path], dict[str, str]] | None = None
    """Makes what the start meets in a folder; returns variables of the environment."""
    model: str | None = None
    """A folder of the working folder that ``prepare`` made, instead of the checkpoint."""
    log: str | None = None
    """A path that the log goes to."""
    is_fresh: bool = False
    """The server has had plain requests alone, so that it has not all the threads it may have."""

    @property
    def needs_own_server(self) -> bool:
        """Whether it differs from the first one of its start."""
        return bool(self.flags or self.orders or self.prepare or self.log or self.is_fresh)


def at(
    part: str,
    point: str,
    kind: str,
    outcome: Outcome,
    *,
    times: int | None = 1,
    seconds: float = 0.0,
    name: str | None = None,
    **fields: Any,
) -> FaultCase:
    """A function that raises, hangs or is slow."""
    how = {"raise": "raises", "hang": "hangs", "slow": f"takes {seconds:g} s", "full": "disk full"}
    often = {None: ", always", 1: ""}.get(times, f", {times} times")
    return FaultCase(
        name=name or f"{point} {how.get(kind, kind)}{often}",
        part=part,
        outcome=outcome,
        strike=lambda server: server.arm(point, kind, times, seconds=seconds),
        point=point,
        found_s=FOUND_S if kind == "hang" else seconds,
        **fields,
    )
