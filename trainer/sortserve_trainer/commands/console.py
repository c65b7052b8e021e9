"""rich's console, which leaves a reader that has gone to the command line."""

from __future__ import annotations

import rich.console

__all__ = ["Console"]


class Console(rich.console.Console):
    """Raises ``BrokenPipeError`` where rich would end the process with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the error."""
        raise
