"""What an evaluation shows while it runs: a bar in a terminal, a line per phase anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sortserve_trainer.commands.console import Console

__all__ = ["Display"]


class Display:
    """Progress on standard error.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)

    @contextmanager
    def phase(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """One phase of ``total`` parts; call what it gives after each part."""
        started_s = time.monotonic()
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        ) as progress:
            task = progress.add_task(description, total=total)
            yield lambda: progress.advance(task)
        self._console.print(
            f"{description}: {time.monotonic() - started_s:.1f} s", style="dim", highlight=False
        )
