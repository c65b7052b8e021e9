"""Launchers that run their plans at the two extreme moments: what is between them is a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sortserve.core.plan import Launcher, Runner, StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.engine.step_thread import StepThread, frozen, with_tokens

Results = Sequence[SampledToken | RowFailure]


class Eventual:
    """What a plan gave, or raised."""

    def __init__(self, plan: StepPlan, before: Callable[[Eventual], None] = lambda _: None) -> None:
        self._plan = plan
        self._before = before
        self._error: Exception | None = None
        self.results: Results = ()

    def run(self, runner: Runner, last: Results) -> None:
        try:
            self.results = runner.execute(with_tokens(self._plan, last))
        except Exception as error:
            self._error = error

    def result(self) -> Results:
        self._before(self)
        if self._error is not None:
            raise self._error
        return self.results


class _Launcher:
    def __init__(self, runner: Runner) -> None:
        self.num_pages, self.block_size = runner.num_pages, runner.block_size
        self.slabs = runner.slabs
        self._runner = runner
        self._last: Results = ()
        self.plans: list[StepPlan] = []
        """As they were launched."""

    def _run(self, pending: Eventual) -> None:
        pending.run(self._runner, self._last)
        self._last = pending.results

    def launch(self, plan: StepPlan) -> Eventual:
        self.plans.append(plan)
        return self._start(plan)

    def _start(self, plan: StepPlan) -> Eventual:
        raise NotImplementedError

    def execute(self, plan: StepPlan) -> Results:
        return self.launch(plan).result()


class EarlyLauncher(_Launcher):
    """Has run a plan when the launch returns: before anybody knows what came of the last one."""

    def _start(self, plan: StepPlan) -> Eventual:
        pending = Eventual(plan)
        self._run(pending)
        return pending


class LateLauncher(_Launcher):
    """Runs a plan when its result is asked for: the host has gone on by then."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self._queue: deque[Eventual] = deque()

    def _start(self, plan: StepPlan) -> Eventual:
        pending = Eventual(frozen(plan), before=self._run_up_to)
        self._queue.append(pending)
        return pending

    def _run_up_to(self, wanted: Eventual) -> None:
        while wanted in self._queue:
            self._run(self._queue.popleft())


LAUNCHERS: dict[str, Callable[[Any], Launcher]] = {
    "early": EarlyLauncher,
    "late": LateLauncher,
    "thread": StepThread,
    "own": lambda runner: runner,  # of a runner that is a launcher itself
}
