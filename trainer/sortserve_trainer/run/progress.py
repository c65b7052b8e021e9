"""What a run shows while it runs: a bar in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from sortserve_trainer.commands.console import Console
from sortserve_trainer.run.duration import duration_text

__all__ = ["ProgressDisplay"]

_EXIT = re.compile(r"(?:eval_)?loss_exit_(\d+)")


class ProgressDisplay(TrainerCallback):  # type: ignore[misc] # transformers has no types here
    """Loss per exit, tokens a second, peak memory and the time left."""

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(file=sys.stderr)
        self._clock = clock
        self._first_step, self._started_s = 0, 0.0
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar, from where the run goes on."""
        if not state.is_world_process_zero:
            return
        self._first_step, self._started_s = state.global_step, self._clock()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """The newest losses, beside the bar or as a line of their own."""
        losses = losses_text(logs or {})
        if self._bar is None or not losses:
            return
        text = f"{losses}{speed_text(logs or {})}"
        is_evaluation = any(name.startswith("eval_") for name in logs or {})
        if not is_evaluation:
            self._bar.update(self._task, description=text)
        if is_evaluation or not self._console.is_terminal:
            kind = "held out" if is_evaluation else "training"
            left = "" if is_evaluation else self._time_left(state)
            line = f"step {state.global_step}/{state.max_steps} {kind}: {text}{left}"
            self._console.print(line, soft_wrap=True, highlight=False)

    def _time_left(self, state: Any) -> str:
        """The bar has it in a terminal; a line says it by the mean of the steps of this start."""
        num_steps = state.global_step - self._first_step
        num_left = state.max_steps - state.global_step
        if num_steps <= 0 or num_left <= 0:
            return ""
        left_s = (self._clock() - self._started_s) / num_steps * num_left
        return f" | {duration_text(max(1.0, round(left_s)))} left"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def losses_text(logs: dict[str, float]) -> str:
    """``9 6.21, 18 4.05, 30 1.97``: exit and loss; empty where the log has none."""
    found = [(match[1], value) for name, value in logs.items() if (match := _EXIT.fullmatch(name))]
    return ", ".join(f"exit {exit_layer} {value:.3f}" for exit_layer, value in found)


def speed_text(logs: Mapping[str, float]) -> str:
    """`` | 350 tokens/s | 1.9 GB``: what the log has of it."""
    parts = []
    if "tokens_per_s" in logs:
        parts.append(f"{logs['tokens_per_s']:.0f} tokens/s")
    if "memory_gb" in logs:
        parts.append(f"{logs['memory_gb']:.1f} GB")
    return "".join(f" | {part}" for part in parts)
