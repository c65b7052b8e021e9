"""One of a table of named things, chosen by its name (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from sortserve.core.errors import ConfigError

__all__ = ["chosen"]

T = TypeVar("T")


def chosen(table: Mapping[str, T], name: str, param: str) -> T:
    """What the table has under a name.

    Args:
        table: by name.
        name: as the user gave it.
        param: the setting that gave it.

    Raises:
        ConfigError: there is nothing of that name; the message lists the others.
    """
    if name not in table:
        raise ConfigError(
            f"{param}={name!r} is not known: choose one of {', '.join(sorted(table))}.",
            param=param,
        )
    return table[name]
