"""Calls of tools in earlier turns, as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

__all__ = ["with_parsed_arguments"]


def with_parsed_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """The function of a call with its arguments as an object.

    The OpenAI API has them as JSON in a string, templates write an object. What is no JSON, or is
    nested too deep to be parsed, stays as the model wrote it.
    """
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {**function, "arguments": arguments}
