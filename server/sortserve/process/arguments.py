"""The command line's parser: argparse, with mistakes as one line of our own kind."""

from __future__ import annotations

import argparse
import difflib
import math
from typing import TYPE_CHECKING, Any, NoReturn

from sortserve.core.errors import ConfigError
from sortserve.core.schedule import DepthSchedule

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["Parser", "finite_number", "integer", "schedule"]

SECRET_FLAG = "--api-key"
MAX_INTEGER = 2**63 - 1
MAX_FLAG = 40
MAX_SHOWN = 60
"""Characters of a wrong value that a message quotes."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that takes no shortened flags and raises ``ConfigError``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help. argparse's own way hides that it could not be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line in one line, with the flag that was perhaps meant.

        Raises:
            ConfigError: always.
        """
        arguments = message.removeprefix("unrecognized arguments: ")
        unknown = arguments.partition("=")[0].split(" ")[0][:MAX_FLAG]
        close = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        if arguments != message and any(flag.startswith(SECRET_FLAG) for flag in (unknown, *close)):
            message = f"unrecognized arguments: {unknown}"  # what follows may be a key
        hint = f"Did you mean {close[0]}?" if close else f"See `{self.prog} --help`."
        raise ConfigError(f"{message}. {hint}")


def finite_number(text: str) -> float:
    """An argument's type: neither NaN nor infinite.

    Raises:
        ArgumentTypeError: it is something else.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a finite number")
    return value


def integer(text: str) -> int:
    """An argument's type: an integer of 64 bits, which any server can read.

    Raises:
        ArgumentTypeError: it is something else.
    """
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not an integer") from None
    if abs(value) > MAX_INTEGER:
        raise argparse.ArgumentTypeError(
            f"{_shown(text)} is out of range: at most {MAX_INTEGER} in size"
        )
    return value


def schedule(text: str) -> list[list[int]]:
    """An argument's type: a depth schedule as ``K:E,K:E``; its pairs [k, E].

    Raises:
        ArgumentTypeError: it is something else.
    """
    try:
        return DepthSchedule.parse(text).document
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{_shown(text)} is not a schedule: {error}") from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")
