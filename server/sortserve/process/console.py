"""The standard streams of a command: what goes wrong with them is an exit code, never a traceback.

A reader that has gone (``| head -c 5``) ends a command as SIGPIPE ends others: with 141, and
without a word. An interrupt is 130. A disk that is full, a mistake of the user's and a file that
cannot be used are one line on stderr.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from sortserve.core.errors import SortserveError

__all__ = [
    "BROKEN_PIPE",
    "FAILED",
    "INTERRUPTED",
    "MISTAKE",
    "CommandFailedError",
    "complain",
    "one_line",
    "run_command",
]

FAILED = 1
MISTAKE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
MAX_LINE = 1_000
"""Characters of a line on stderr: it may quote what the user gave."""


class CommandFailedError(Exception):
    """A command failed through nobody's mistake here: its text is one line, its exit code 1."""


def run_command(command: Callable[[], int]) -> int:
    """Run a command to the last byte of its output; returns the process's exit code.

    Raises:
        SystemExit: the command raised it, as argparse does after ``--help``.
    """
    try:
        try:
            _print_anything(sys.stdout)
            code = command()
        except SystemExit:
            _flush(sys.stdout)
            raise
        except SortserveError as error:
            complain(error.message)
            code = MISTAKE
        except CommandFailedError as error:
            complain(str(error))
            code = FAILED
        _flush(sys.stdout)
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        return _explain(error)
    except MemoryError:
        complain("there is not enough memory.")
        return FAILED
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                _flush(stream)
            except OSError:
                _discard(stream)


def complain(message: str) -> None:
    """One line on stderr; where nobody reads it, the exit code says enough."""
    with suppress(OSError):
        print(f"sortserve: error: {one_line(message)}", file=sys.stderr)


def one_line(text: str) -> str:
    """``text`` as one printable line of bounded length: what it quotes moves no cursor."""
    if len(text) > MAX_LINE:
        text = f"{text[: MAX_LINE // 2]} ... {text[-MAX_LINE // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _explain(error: OSError) -> int:
    """Say which file or stream failed: a file that was named is the user's to mend."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        complain(f"{reason}: {os.fsdecode(error.filename)}")
        return MISTAKE
    complain(f"input or output failed: {reason}.")
    return FAILED


def _print_anything(stream: TextIO | None) -> None:
    """A character that the terminal's encoding lacks must not end an answer in its middle."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def _flush(stream: TextIO | None) -> None:
    if stream is not None and not stream.closed:  # None: the descriptor was closed at the start
        stream.flush()


def _discard(stream: TextIO) -> None:
    """Let the interpreter's last flush succeed: it would print what we have dealt with."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
