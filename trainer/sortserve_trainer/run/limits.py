"""What ends a run before its work is done, so that it fits the time that a machine is lent for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from sortserve_trainer.run.duration import duration_text

__all__ = ["RunLimits"]

STEPS_BETWEEN_LOOKS = 10
"""At the clock, where several processes must agree on what it says."""


class RunLimits(TrainerCallback):  # type: ignore[misc] # transformers has no types here
    """Saves a state and ends training after the step that reaches a limit.

    Args:
        max_time_s: seconds since ``started_s``; None is no limit.
        max_steps: optimiser steps of this run, in all its phases; None is no limit.
        started_s: when the run began, by ``clock``.
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        *,
        max_time_s: float | None,
        max_steps: int | None,
        started_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_time_s, self._max_steps = max_time_s, max_steps
        self._started_s, self._clock = started_s, clock
        self._num_steps = 0
        self.reached: str | None = None
        """The flag and its value that ended training; None while nothing has."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the limits; the last step of all ends training anyway."""
        self._num_steps += 1
        if state.global_step >= state.max_steps:
            return
        if self._max_steps is not None and self._num_steps >= self._max_steps:
            self.reached = f"--max-steps-per-run {self._max_steps}"
        elif self._max_time_s is not None and self._is_late(args):
            self.reached = f"--max-time {duration_text(self._max_time_s)}"
        if self.reached is not None:
            control.should_save = control.should_training_stop = True

    def _is_late(self, args: Any) -> bool:
        assert self._max_time_s is not None
        is_late = self._clock() - self._started_s >= self._max_time_s
        if args.world_size == 1:
            return is_late
        if self._num_steps % STEPS_BETWEEN_LOOKS:
            return False
        decision = torch.tensor([is_late], dtype=torch.uint8, device=args.device)
        torch.distributed.broadcast(decision, 0)
        return bool(decision.item())
