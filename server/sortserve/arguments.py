"""The command line's parser: argparse, with mistakes as one line of our own kind."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from sortserve.errors import ConfigError

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that takes no shortened flags and raises ``ConfigError``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line in one line, with the flag that was perhaps meant.

        Raises:
            ConfigError: always.
        """
        unknown = message.removeprefix("unrecognized arguments: ").partition("=")[0].split(" ")[0]
        close = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"See `{self.prog} --help`."
        raise ConfigError(f"{message}. {hint}")
