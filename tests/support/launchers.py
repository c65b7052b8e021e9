"""Launchers that run their plans at the two extreme moments: what is between them is a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sortserve.core.plan import Launcher, Runner, StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from sortserve.engine.step_thread import StepThread, frozen

Results = Sequence[SampledToken | RowFailure]


class Eventual:
    """What a plan gave, or raised."""

    def __init__(self, plan: StepPlan, before: Callable[[Eventual], None] = lambda _: None) -> None:
        self.plan = plan
        self._before = before
        self._results: Results = ()
        self._error: Exception | None = None

    def run(self, runner: Runner) -> None:
        try:
            self._results = runner.execute(self.plan)
        except Exception as error:
            self._error = error

    def result(self) -> Results:
        self._before(self)
        if self._error is not None:
            raise self._error
        return self._results


class _Launcher:
    def __init__(self, runner: Runner) -> None:
        self.num_pages, self.block_size = runner.num_pages, runner.block_size
        self.slab_size = runner.slab_size
        self.runner = runner

    def launch(self, plan: StepPlan) -> Eventual:
        raise NotImplementedError

    def execute(self, plan: StepPlan) -> Results:
        return self.launch(plan).result()


class EarlyLauncher(_Launcher):
    """Has run a plan when the launch returns: before anybody knows what came of the last one."""

    def launch(self, plan: StepPlan) -> Eventual:
        pending = Eventual(plan)
        pending.run(self.runner)
        return pending


class LateLauncher(_Launcher):
    """Runs a plan when its result is asked for: the host has gone on by then."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self._queue: deque[Eventual] = deque()

    def launch(self, plan: StepPlan) -> Eventual:
        pending = Eventual(frozen(plan), before=self._run_up_to)
        self._queue.append(pending)
        return pending

    def _run_up_to(self, wanted: Eventual) -> None:
        while wanted in self._queue:
            self._queue.popleft().run(self.runner)


LAUNCHERS: dict[str, Callable[[Any], Launcher]] = {
    "early": EarlyLauncher,
    "late": LateLauncher,
    "thread": StepThread,
}
