"""What ends a run before its work is done, so that it fits the time that a machine is lent for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from sortserve_trainer.run.duration import duration_text

__all__ = ["RunLimits"]

MAX_STEPS_BETWEEN_LOOKS, SECONDS_BETWEEN_LOOKS = 10, 2.0
"""At the clock, where several processes must agree on what it says: they wait for one another."""


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
        self._next_look, self._between_looks, self._looked_s = 1, 1, started_s
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
        if self._num_steps < self._next_look:
            return False
        # The first process decides: 0 ends training, else so many steps follow until the next look.
        decision = torch.tensor([0 if is_late else self._steps_to_look()], device=args.device)
        torch.distributed.broadcast(decision, 0)
        self._between_looks, self._looked_s = int(decision.item()), self._clock()
        self._next_look += self._between_looks
        return self._between_looks == 0

    def _steps_to_look(self) -> int:
        """As many as pass in the time between two looks; a step of a large model takes longer."""
        if self._num_steps == 1:
            return 1  # what came before it was no step
        step_s = (self._clock() - self._looked_s) / self._between_looks
        return max(1, min(MAX_STEPS_BETWEEN_LOOKS, int(SECONDS_BETWEEN_LOOKS / max(1e-9, step_s))))
