"""What clients write where an answer must have a form, in the dialects of OpenAI and vLLM.

``{"json": SCHEMA}``, ``{"regex": R}``, ``{"choice": [A, B]}``, ``{"grammar": G}`` and
``{"json_object": true}``, or ``{"type": "json_schema", "json_schema": {"schema": SCHEMA}}`` and
``{"type": "json_object"}``. Only their form is checked here: what they hold is compiled later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sortserve.core.errors import InvalidRequestError, shortened
from sortserve.core.grammar import OutputFormat

__all__ = ["ANY_OBJECT", "read_format", "read_kind", "read_response_format"]

KINDS = ("json", "regex", "choice", "grammar")
MAX_CHOICES = 1024
ANY_OBJECT = '{"type": "object"}'
_OPTIONS = (
    *("disable_fallback", "disable_any_whitespace", "disable_additional_properties"),
    *("whitespace_pattern", "structural_tag", "json_object"),
)
"""Of vLLM; ``json_object`` is honoured, the others only where they ask for nothing."""


def read_format(value: object, param: str) -> OutputFormat | None:
    """A format in either dialect; None where it asks for nothing.

    Raises:
        InvalidRequestError: ``param`` is the place of what is wrong.
    """
    if value is None or isinstance(value, OutputFormat):
        return value
    if not isinstance(value, Mapping):
        raise _not_allowed(param, value, f"an object with one of {', '.join(KINDS)}")
    if "type" in value:
        return read_response_format(value, param)
    given = {name: one for name, one in value.items() if one is not None}
    for name, one in list(given.items()):
        if name in _OPTIONS and (one is False or name == "json_object"):
            del given[name]
        elif name not in KINDS:
            raise InvalidRequestError(
                f"{param}.{name[:100]} is not supported: give one of {', '.join(KINDS)}.",
                param=f"{param}.{name[:100]}",
            )
    if value.get("json_object"):
        given["json"] = json.loads(ANY_OBJECT)
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join(given)
        raise InvalidRequestError(f"{param} has {names}: give one of them.", param=param)
    [(kind, one)] = given.items()
    return read_kind(kind, one, f"{param}.{kind}")


def read_response_format(value: Mapping[str, Any], param: str) -> OutputFormat | None:
    """OpenAI's ``response_format``; None where it is text.

    Raises:
        InvalidRequestError: ``param`` is the place of what is wrong.
    """
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        if value.get("schema") is not None:  # as llama.cpp, Fireworks and Together have it
            return read_kind("json", value["schema"], f"{param}.schema")
        return OutputFormat("json", ANY_OBJECT, param)
    if kind != "json_schema":
        allowed = "text, json_object or json_schema"
        raise _not_allowed(f"{param}.type", kind, allowed)
    described = value.get("json_schema")
    if not isinstance(described, Mapping):
        raise _not_allowed(f"{param}.json_schema", described, "an object with name and schema")
    strict = described.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _not_allowed(f"{param}.json_schema.strict", strict, "true or false")
    return read_kind("json", described.get("schema"), f"{param}.json_schema.schema")


def read_kind(kind: str, value: object, param: str) -> OutputFormat:
    """One kind of format.

    Raises:
        InvalidRequestError: ``param`` is the place of what is wrong.
    """
    if kind == "json":
        return _schema(value, param)
    if kind == "choice":
        return _choices(value, param)
    if not isinstance(value, str) or not value:
        raise _not_allowed(param, value, "a string that is not empty")
    return OutputFormat(kind, value, param)


def _schema(value: object, param: str) -> OutputFormat:
    if isinstance(value, str):  # vLLM takes a schema as a text, too
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InvalidRequestError(f"{param} is not valid JSON: {error}.", param=param) from None
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        raise _not_allowed(param, value, "a JSON schema, which is an object")
    try:
        # The order of properties is that of the document, so it is kept.
        return OutputFormat("json", json.dumps(value, allow_nan=False), param)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{param} is no JSON: {error}.", param=param) from None


def _choices(value: object, param: str) -> OutputFormat:
    allowed = f"a list of 1 to {MAX_CHOICES} texts that are not empty"
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_CHOICES:
        raise _not_allowed(param, value, allowed)
    if not all(isinstance(text, str) and text for text in value):
        raise _not_allowed(param, value, allowed)
    return OutputFormat("choice", json.dumps(list(value)), param)


def _not_allowed(param: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param}={shortened(value)} is not allowed: it must be {allowed}.", param=param
    )
