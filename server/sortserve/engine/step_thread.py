"""A thread that runs steps while the engine's thread plans the next one (no torch)."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from sortserve.core.plan import Pending, RowPlan, Runner, StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken

__all__ = ["StepThread", "frozen", "with_tokens"]

_Results = Sequence[SampledToken | RowFailure]
_Inbox = queue.SimpleQueue[tuple[StepPlan, "Future[_Results]"] | None]


class StepThread:
    """Launches the plans of a runner: they run on one thread, in the order in which they came.

    The thread starts with the first plan, and ends with the last reference to this object.

    Args:
        runner: executes plans, on that thread alone.
    """

    def __init__(self, runner: Runner) -> None:
        self.num_pages, self.block_size = runner.num_pages, runner.block_size
        self.slabs = runner.slabs
        self._runner = runner
        self._inbox: _Inbox = queue.SimpleQueue()
        self._has_started = False

    def launch(self, plan: StepPlan) -> Pending:
        """See ``Launcher``."""
        if not self._has_started:
            self._has_started = True
            threading.Thread(
                target=_run, args=(self._runner, self._inbox), name="steps", daemon=True
            ).start()
            weakref.finalize(self, self._inbox.put, None)
        pending: Future[_Results] = Future()
        self._inbox.put((frozen(plan), pending))
        return pending

    def execute(self, plan: StepPlan) -> _Results:
        """Launch a plan and wait for it."""
        return self.launch(plan).result()


def _run(runner: Runner, inbox: _Inbox) -> None:
    last: _Results = ()
    while (task := inbox.get()) is not None:
        plan, pending = task
        before, last = last, ()
        try:
            last = runner.execute(with_tokens(plan, before))
        except BaseException as error:  # who waits for it raises it
            pending.set_exception(error)
        else:
            pending.set_result(last)
        del task, plan, pending


def frozen(plan: StepPlan) -> StepPlan:
    """The plan with page tables of its own: the scheduler goes on to change those it shows."""
    rows = (replace(row, block_table_SB=row.block_table_SB.copy()) for row in plan.rows)
    return replace(plan, rows=tuple(rows))


def with_tokens(plan: StepPlan, last: _Results) -> StepPlan:
    """The plan with the tokens that its rows take from what the plan before it gave."""
    if all(row.token_from is None for row in plan.rows):
        return plan
    return replace(plan, rows=tuple(_with_token(row, last) for row in plan.rows))


def _with_token(row: RowPlan, last: _Results) -> RowPlan:
    if row.token_from is None:
        return row
    result = last[row.token_from]
    token_id = result.token_id if isinstance(result, SampledToken) else 0  # it ends with an error
    return replace(row, token_ids=[*row.token_ids[:-1], token_id], token_from=None)
