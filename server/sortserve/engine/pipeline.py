"""Plans on their way to the runner and back: one at a time, or one step of overlap (no torch).

Without overlap a plan is executed when it comes: the host waits for the tokens, then plans on. With
overlap the runner always has a plan to go on with. The host plans step n + 1 while step n is under
way, and launches it before it looks at the tokens of step n: a row that goes on from one of them
names the row that samples it (``RowPlan.token_from``).

What only the tokens tell (a stop token, a stop string, an abort in between) ends a request one step
late: it had a row in the step launched by then, whose token nobody counts. Its pages may be given
away at once, because steps run in the order in which they were launched.

Some things wait until the tokens are known, and cost the overlap of one step: the next step of a
row that needs the tokens themselves (``Sequence.must_be_known``), and all that follows a failure.
A step that fails undoes the one launched after it, and is then planned and run again alone, where
a failure is dealt with as it is without overlap.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NoReturn, cast

from sortserve.core.plan import Launcher, Pending, RowPlan, Runner, StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.core.sequence import Sequence
from sortserve.engine.execution import Execution, execute, outcome
from sortserve.scheduling.launch import Launch
from sortserve.scheduling.scheduler import Scheduler

__all__ = ["Flight", "Landed", "Pipeline"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Landed:
    """A step that is over."""

    launch: Launch
    execution: Execution
    started_s: float
    """When it was launched."""

    def tokens(self) -> list[tuple[RowPlan, SampledToken]]:
        """Rows and what they sampled, but for those of requests that have ended since."""
        sampling = [row for row in self.execution.plan.rows if row.sampling is not None]
        by_request = {
            row.request_id: token
            for row, token in zip(sampling, self.execution.tokens, strict=True)
        }
        return [(row, by_request[row.request_id]) for row, _ in self.launch.live(sampling)]

    def failures(self) -> dict[str, RowFailure]:
        """Why other rows gave none, by request; likewise."""
        failures = self.execution.failures
        failed = [row for row in self.launch.plan.rows if row.request_id in failures]
        return {row.request_id: failures[row.request_id] for row, _ in self.launch.live(failed)}


@dataclass(frozen=True)
class Flight:
    """A step under way."""

    launch: Launch
    pending: Pending
    started_s: float
    """When it was launched."""


class Pipeline:
    """Launches plans and says what has become of them, in their order.

    Args:
        runner: executes plans; for the overlap it must launch them (``Launcher``).
        scheduler: whose plans they are.
        overlap: whether a plan is launched before the one before it has landed.
        sequence_of: a live request's.
        on_start: called before each call of the runner.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        overlap: bool,
        sequence_of: Callable[[str], Sequence],
        on_start: Callable[[], None],
    ) -> None:
        assert hasattr(runner, "launch") or not overlap, "only a launcher can overlap steps"
        self._runner, self._scheduler = runner, scheduler
        self._launcher = cast(Launcher, runner) if overlap else None
        self._sequence_of, self._on_start = sequence_of, on_start
        self._flight: Flight | None = None
        self._has_failed = False

    @property
    def flight(self) -> Flight | None:
        """The step that has been launched and has not landed, if there is one."""
        return self._flight

    @property
    def is_under_way(self) -> bool:
        """Whether a step has been launched and has not landed."""
        return self._flight is not None

    @property
    def must_land(self) -> bool:
        """Whether nothing may be planned before the step under way has landed."""
        flight = self._flight
        return flight is not None and any(s.must_be_known for s in flight.launch.sequences.values())

    def push(self, plan: StepPlan | None, now: float) -> list[Landed]:
        """Launch a plan; with overlap the one before it lands, without it does itself.

        Args:
            plan: what the scheduler has just made; None: nothing, and what is under way lands.
            now: the engine's clock.
        """
        before, self._flight = self._flight, None
        if plan is not None:
            sequences = {row.request_id: self._sequence_of(row.request_id) for row in plan.rows}
            launch = self._scheduler.launch(plan, sequences)
            if self._launcher is None or self._has_failed:
                execution = execute(self._runner, plan, on_start=self._on_start)
                if self._has_failed:
                    execution = replace(execution, was_retried=True)
                self._has_failed = False
                return [Landed(launch, execution, now)]
            self._flight = Flight(launch, self._launch(self._launcher, plan), now)
        return [] if before is None else self._land(before)

    def _launch(self, launcher: Launcher, plan: StepPlan) -> Pending:
        self._on_start()
        try:
            return launcher.launch(plan)
        except Exception as error:
            return _Raised(error)

    def _land(self, flight: Flight) -> list[Landed]:
        plan = flight.launch.plan
        try:
            execution = outcome(plan, flight.pending.result())
        except Exception as error:
            logger.warning(
                "a step of %d rows failed (%s): it is run again without overlap",
                len(plan.rows),
                type(error).__name__,
            )
            self._call_back()
            self._scheduler.undo(flight.launch)
            self._has_failed = True
            return []
        if execution.failures and not execution.tokens:
            self._call_back()  # the engine looks at itself first
        return [Landed(flight.launch, execution, flight.started_s)]

    def _call_back(self) -> None:
        """Undo the step under way, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            flight.pending.result()
        except Exception as error:
            logger.debug("so did the step launched after it", exc_info=error)
        self._scheduler.undo(flight.launch)


class _Raised:
    """A plan that could not be launched."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def result(self) -> NoReturn:
        raise self._error
