"""The file of named API keys (``--api-keys-file``): what it may hold, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from sortserve.core.api_keys import (
    LIMIT,
    MAX_KEYS,
    NAME_PATTERN,
    UNNAMED_KEY,
    KeyPolicy,
    weights_for,
)
from sortserve.core.errors import ConfigError, in_our_words
from sortserve.core.weights import PRIORITY
from sortserve.process.sources import read_small_file
from sortserve.process.values import Number, shown
from sortserve.process.yaml_text import parse_yaml

__all__ = ["check_exits", "parse_keys", "read_named_keys"]

FLAG = "--api-keys-file"
MAX_DIGESTS = 8
"""Keys of one name."""


def _digests(value: object) -> object:
    """One or several; a digest of digits alone is a number to YAML, unless it is quoted."""
    return value if isinstance(value, list) else [value]


def _hexadecimal(value: str) -> str:
    if len(value) != 64 or set(value.lower()) - set("0123456789abcdef"):
        raise ValueError(
            "it should be the SHA-256 of a key, 64 hexadecimal digits in quotes, as `sortserve "
            "keys new` prints it"
        )
    return value.lower()


def _name(value: str) -> str:
    if value == UNNAMED_KEY:
        raise ValueError(f"{UNNAMED_KEY} is how metrics call keys without a name")
    return value


_Limit = Annotated[int, Field(ge=int(LIMIT.least), le=int(LIMIT.most or 0)), Number]
_Priority = Annotated[int, Field(ge=int(PRIORITY.least), le=int(PRIORITY.most or 0)), Number]


class _Entry(BaseModel):
    """One name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$"), AfterValidator(_name)]
    sha256: Annotated[
        list[Annotated[str, AfterValidator(_hexadecimal)]],
        BeforeValidator(_digests),
        Field(min_length=1, max_length=MAX_DIGESTS),
    ]
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    max_concurrency: _Limit | None = None
    max_exit_layer: _Limit | None = None
    default_priority: _Priority = 0
    max_priority: _Priority | None = None

    @model_validator(mode="after")
    def _check_priorities(self) -> _Entry:
        if self.max_priority is not None and self.default_priority < self.max_priority:
            raise ValueError(
                f"default_priority={self.default_priority} is earlier than "
                f"max_priority={self.max_priority}: lower numbers go first"
            )
        return self


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: Annotated[list[_Entry], Field(max_length=MAX_KEYS)]


def read_named_keys(
    path: Path, *, base: float, others: Iterable[str] = ()
) -> tuple[KeyPolicy, ...]:
    """The keys of a file, in its order.

    Args:
        path: of the file.
        base: a priority of one less weighs so many times as much (``--priority-base``).
        others: digests of keys that were given elsewhere.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong; the message names the file,
            the field, its value and what is allowed, and never what may be a secret.
    """
    text = read_small_file(path, "api_keys_file")
    return parse_keys(text, f"{FLAG} {path}", base=base, others=others)


def parse_keys(
    text: str, where: str, *, base: float, others: Iterable[str] = ()
) -> tuple[KeyPolicy, ...]:
    """The keys of a file's text; see ``read_named_keys``. ``where`` names it in messages."""
    content = _yaml(text, where)
    try:
        entries = _File.model_validate(content).keys
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first(error, content)}", param="api-keys-file") from None
    taken = dict.fromkeys(others, "--api-key or --api-key-file")
    names: set[str] = set()
    for i, entry in enumerate(entries):
        if entry.name in names:
            raise _refusal(where, f"keys.{i}.name: {entry.name!r} is the name of another key.")
        names.add(entry.name)
        for digest in entry.sha256:
            if digest in taken:
                said = f"keys.{i}.sha256: the key of {entry.name} is that of {taken[digest]}, too."
                raise _refusal(where, said)
            taken[digest] = entry.name
    return tuple(_policy(entry, base) for entry in entries)


def check_exits(policies: Iterable[KeyPolicy], exits: Sequence[int]) -> None:
    """Refuse a deepest exit that the checkpoint does not have.

    Raises:
        ConfigError: with the key's name, the value and the exits.
    """
    for policy in policies:
        most = policy.max_exit_layer
        if most is not None and most not in exits:
            said = (
                f"key {policy.name!r}, max_exit_layer: {most} is not allowed: it should be one of "
                f"this checkpoint's exits, {', '.join(map(str, exits))}."
            )
            raise _refusal(FLAG, said)


def _yaml(text: str, where: str) -> object:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise _refusal(where, f"it is not valid YAML: {error}.") from None


def _refusal(where: str, said: str) -> ConfigError:
    return ConfigError(f"{where}: {said}", param="api-keys-file")


def _first(error: ValidationError, content: object) -> str:
    """The first thing that is wrong: field, value, what is allowed."""
    first = error.errors(include_url=False)[0]
    allowed = in_our_words(first["msg"])
    allowed = allowed[:1].lower() + allowed[1:]
    location = [str(part) for part in first["loc"]]
    if first["type"] == "missing":
        return f"{'.'.join(location)} is missing; it is required."
    if first["type"] == "model_type" or not location:
        return "it should hold `keys:`, a list of entries with `name` and `sha256`."
    if first["type"] == "extra_forbidden":
        known = ", ".join(_Entry.model_fields if len(location) > 1 else _File.model_fields)
        return f"{'.'.join(location)} is not a field: choose among {known}."
    if first["type"] == "value_error" and len(location) == 2:  # of an entry as a whole
        return f"{'.'.join(location)}: {allowed}."
    value = "'***'" if "sha256" in location else shown(first["input"])
    return f"{'.'.join(location)}: {value} is not allowed: {allowed}."


def _policy(entry: _Entry, base: float) -> KeyPolicy:
    return KeyPolicy(
        name=entry.name,
        digests=tuple(entry.sha256),
        requests_per_minute=entry.requests_per_minute,
        tokens_per_minute=entry.tokens_per_minute,
        max_concurrency=entry.max_concurrency,
        max_exit_layer=entry.max_exit_layer,
        default_priority=entry.default_priority,
        weights=weights_for(entry.max_priority, base=base),
    )
