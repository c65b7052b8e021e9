"""The threads of a step: how many there are at a start, and how many a step uses."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from sortserve.core.plan import StepPlan
from sortserve.cost.costs import Costs
from sortserve.cost.model import REGIME_TOKENS, step_shape
from sortserve.engine.cores import allowed_cpus, num_usable_cores
from sortserve.engine.thread_policy import ThreadPolicy

__all__ = ["StepThreads", "limit_threads"]

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def limit_threads(wanted: int | None) -> None:
    """Let the model use so many threads of this process, but no more than there are cores.

    None: as many as can run at once at full speed (``num_usable_cores``), or fewer where PyTorch
    was told so (``OMP_NUM_THREADS``).
    """
    if wanted is None:
        number = min(torch.get_num_threads(), num_usable_cores())
    else:
        number = min(wanted, len(allowed_cpus()))
        if number < wanted:
            logger.warning("--num-threads=%d: only %d are started, one a core.", wanted, number)
    if number != torch.get_num_threads():
        torch.set_num_threads(number)


class StepThreads:
    """Runs steps with as many threads as pays at the moment, small steps and large ones apart.

    Small steps are bound by memory, which one thread may use up; large ones by arithmetic. What was
    found for one of them would halve the speed of the other.

    Args:
        costs: what steps are expected to take; while it does not know, nothing is changed.
        clock: monotonic.
    """

    def __init__(self, costs: Costs, clock: Callable[[], float] = time.perf_counter) -> None:
        self._costs = costs
        self._clock = clock
        self._small, self._large = (ThreadPolicy(torch.get_num_threads()) for _ in range(2))

    def run(self, plan: StepPlan, execute: Callable[[StepPlan], Result]) -> Result:
        """``execute(plan)``; the policy learns from the time it took, unless it raised."""
        model = self._costs.model
        if model is None:
            return execute(plan)
        is_large = plan.num_tokens > REGIME_TOKENS
        policy = self._large if is_large else self._small
        if policy.num_threads != torch.get_num_threads():
            torch.set_num_threads(policy.num_threads)
        started_s = self._clock()
        result = execute(plan)
        now = self._clock()
        before = policy.settled
        policy.observe((now - started_s) / model.step_s(step_shape(plan)), now - started_s, now)
        if policy.settled != before:
            kind = "large" if is_large else "small"
            logger.info("%s steps use %d threads now, %d before", kind, policy.settled, before)
        return result
