"""A setting that is refused, in one line: where it came from, its value, and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from sortserve.core.errors import ConfigError, in_our_words
from sortserve.process.sources import flag_name, key_name, read_environment, variable_name
from sortserve.process.values import shown

__all__ = ["config_error"]


def config_error(
    error: ValidationError, flags: Mapping[str, Any], names: Collection[str]
) -> ConfigError:
    """The first thing that is wrong.

    Args:
        error: what the settings' model refused.
        flags: what the command line gave, by field name.
        names: all fields.
    """
    first = error.errors(include_url=False)[0]
    message = in_our_words(first["msg"]).rstrip(".")
    if first["type"] in ("too_short", "string_too_short"):
        message = "it must not be empty"
    if not first["loc"]:
        return ConfigError(f"{message}.")
    name = str(first["loc"][0])
    given = "'***'" if name == "api_key" else shown(first["input"])
    return ConfigError(
        f"{_origin(name, flags, names)}: {given} is not allowed: {message}.", param=key_name(name)
    )


def _origin(name: str, flags: Mapping[str, Any], names: Collection[str]) -> str:
    """Where a value came from, in the words the user typed."""
    if name in flags:
        return flag_name(name)
    environment = read_environment(os.environ, names)
    if name in environment:
        return f"environment variable {variable_name(name)}"
    return f"key {key_name(name)!r} in {flags.get('config') or environment.get('config')}"
