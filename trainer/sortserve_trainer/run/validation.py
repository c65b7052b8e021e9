"""A command's flags as its frozen settings, mistakes as one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sortserve.core.errors import ConfigError, in_our_words
from sortserve.process.sources import flag_name
from sortserve.process.values import shown

__all__ = ["validated"]

Settings = TypeVar("Settings", bound=BaseModel)


def validated(
    settings: type[Settings], flags: Mapping[str, Any], positional: str = "model"
) -> Settings:
    """``settings`` from ``flags``, by field name; ``positional`` is the one without a flag.

    Raises:
        ConfigError: one line that names the flag, its value and what is allowed.
    """
    try:
        return settings(**flags)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    message = in_our_words(first["msg"]).rstrip(".")
    if not first["loc"]:
        raise ConfigError(f"{message}.")
    flag = flag_name(str(first["loc"][0]), positional)
    param = flag.removeprefix("--").lower()
    if first["type"] == "missing":
        raise ConfigError(f"{flag} is missing.", param=param)
    raise ConfigError(f"{flag}: {shown(first['input'])} is not allowed: {message}.", param=param)
