"""What a single setting may be: types of fields, with their limits, for server and trainer."""

from __future__ import annotations

import ipaddress
import json
import reprlib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr

from sortserve.core.budget import Budget
from sortserve.core.weights import TIER_WEIGHTS, WEIGHT, read_weight

__all__ = [
    "MAX_COUNT",
    "MAX_TEXT",
    "MAX_THREADS",
    "Auto",
    "BudgetText",
    "Count",
    "FilePath",
    "Host",
    "Layers",
    "Number",
    "PositiveSeconds",
    "Seconds",
    "Secrets",
    "Share",
    "Size",
    "Strings",
    "Text",
    "TierWeights",
    "budget_of",
    "is_network",
    "shown",
    "tier_weights_of",
]

MAX_TEXT = 800
MAX_SHOWN = 60
MAX_COUNT = 2**31 - 1
MAX_SECONDS = 366 * 24 * 3600
MAX_THREADS = 1024


def _split_commas(value: object) -> object:
    """``"9,18"`` and ``["9,18", "30"]`` as lists of their parts; anything else unchanged."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list | tuple):
        parts = [_split_commas(item) if isinstance(item, str) else [item] for item in value]
        return [part for group in parts if isinstance(group, list) for part in group]
    return value


def _json_text(value: object) -> object:
    """A mapping, as YAML has it, as JSON; anything else unchanged."""
    return json.dumps(value) if isinstance(value, dict) else value


class _Pairs(list[tuple[str, object]]):
    """The fields of a JSON object, as often as they are there."""

    def once(self) -> dict[str, object]:
        """Each once, or a ValueError that names the one that is there twice."""
        for i, (name, _) in enumerate(self):
            if any(name == other for other, _ in self[:i]):
                raise ValueError(f"{name[:MAX_SHOWN]} is given twice")
        return {n: v.once() if isinstance(v, _Pairs) else v for n, v in self}


def _budget(value: str) -> str:
    budget_of(value)
    return value


def budget_of(text: str) -> Budget:
    """The budget that a JSON object says.

    Raises:
        ValueError: it is no JSON object, or no budget; the message says why.
    """
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
        values = pairs.once() if isinstance(pairs, _Pairs) else None
    except (json.JSONDecodeError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError('it should be a JSON object such as {"min_quality": 0.8}')
    return Budget.from_mapping(values)


def _pairs(value: object) -> object:
    """A mapping, as YAML has it, as a list of ``name=value``; else what ``_split_commas`` gives."""
    if isinstance(value, dict):
        return [f"{name}={weight}" for name, weight in value.items()]
    return _split_commas(value)


def _tier_weights(pairs: tuple[str, ...]) -> tuple[str, ...]:
    tier_weights_of(pairs)
    return pairs


def tier_weights_of(pairs: tuple[str, ...]) -> dict[str, float]:
    """The weight of every service tier, from those that are given as ``name=weight``.

    Raises:
        ValueError: there is no such tier, its weight is none, or it is given twice.
    """
    weights: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name.strip() not in TIER_WEIGHTS:
            raise ValueError(f"the tiers are {', '.join(TIER_WEIGHTS)}, each as NAME=WEIGHT")
        if name.strip() in weights:
            raise ValueError(f"{name.strip()} is given twice")
        weight = read_weight(text)
        if weight is None:
            raise ValueError(f"the weight of {name.strip()} should be {WEIGHT.allowed}")
        weights[name.strip()] = weight
    return {**TIER_WEIGHTS, **weights}


def _number(value: object) -> object:
    """Anything but ``true`` and ``false``, which YAML would pass off as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("it should be a number")
    return value


def _auto(value: object) -> object:
    """``auto`` is what a setting without a value is."""
    return None if value == "auto" else value


def _text(value: str) -> str:
    if len(value) > MAX_TEXT:
        raise ValueError(f"it should have at most {MAX_TEXT} characters")
    if not value.isprintable():
        raise ValueError("it should be printable text, without control characters")
    return value


def _path(value: object) -> object:
    if isinstance(value, str):
        if not value:
            raise ValueError("it should name a file")
        _text(value)
    return value


def _secret(value: SecretStr) -> SecretStr:
    _text(value.get_secret_value())
    return value


def _host(value: str) -> str:
    try:
        value.encode("idna")
    except UnicodeError:
        raise ValueError("it should be an address or the name of a host") from None
    return value


Number = BeforeValidator(_number)
Auto = BeforeValidator(_auto)
Count = Annotated[int, Field(ge=1, le=MAX_COUNT), Number]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False), Number]
PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False), Number]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), Number]
Size = Annotated[ByteSize, Field(ge=1, le=2**60), Number]
Text = Annotated[str, AfterValidator(_text)]
FilePath = Annotated[Path, BeforeValidator(_path)]
BudgetText = Annotated[Text, BeforeValidator(_json_text), AfterValidator(_budget)]
"""A budget as JSON: ``budget_of`` reads it."""
Host = Annotated[Text, AfterValidator(_host), Field(min_length=1)]
Layers = Annotated[tuple[Count, ...], BeforeValidator(_split_commas), Field(min_length=1)]
Strings = Annotated[tuple[Text, ...], BeforeValidator(_split_commas)]
TierWeights = Annotated[tuple[Text, ...], BeforeValidator(_pairs), AfterValidator(_tier_weights)]
"""``name=weight`` of service tiers: ``tier_weights_of`` reads them."""
Secrets = Annotated[
    tuple[Annotated[SecretStr, AfterValidator(_secret)], ...], BeforeValidator(_split_commas)
]


def is_network(text: str) -> bool:
    """Whether it is an address or a network."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def shown(value: object) -> str:
    """A wrong value as a message quotes it: cut, however large or deep it is."""
    cut = reprlib.Repr()
    cut.maxlevel, cut.maxstring, cut.maxother, cut.maxlong = 2, MAX_SHOWN, MAX_SHOWN, MAX_SHOWN
    try:
        return cut.repr(value)
    except ValueError:  # YAML's 0xff... may have more digits than Python writes
        return "a number of too many digits"
