"""Parts that fail on purpose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken
from support.scripted import ScriptedRunner

HANG_S = 30.0
"""A part that hangs does so until it is let go, and at most so long: a broken test ends."""


class FaultyRunner(ScriptedRunner):
    """Raises on a plan that holds a guilty row; rows named in ``not_finite`` give no token."""

    def __init__(self, *, guilty: Sequence[str] = (), not_finite: Sequence[str] = ()) -> None:
        super().__init__()
        self.guilty = set(guilty)
        self.not_finite = set(not_finite)
        self.is_broken = False
        """Nothing runs any more."""

    def execute(self, plan: StepPlan) -> list[Any]:
        if self.is_broken or any(row.request_id in self.guilty for row in plan.rows):
            self.plans.append(plan)
            raise RuntimeError("a scripted fault")
        results: list[SampledToken | RowFailure] = list(super().execute(plan))
        names = [row.request_id for row in plan.rows if row.sampling is not None]
        for i, name in enumerate(names):
            if name in self.not_finite:
                results[i] = RowFailure("non_finite")
        return results


class Fault:
    """Stands in for a function: passes calls on until it is armed, then raises or hangs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._is_armed = False
        self._hangs = False
        self._let_go = threading.Event()
        self.struck = threading.Event()
        """The fault has happened at least once."""

    def arm(self, *, hangs: bool = False) -> None:
        self._is_armed, self._hangs = True, hangs

    def disarm(self) -> None:
        self._is_armed = False
        self._let_go.set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_armed:
            self.struck.set()
            if not self._hangs:
                raise RuntimeError("a scripted fault")
            assert self._let_go.wait(HANG_S)
        return self._function(*args, **kwargs)
