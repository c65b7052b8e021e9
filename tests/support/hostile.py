"""Bodies that try to stop a server: every field of every route, filled with too much of something.

A body is made of bytes and not by a JSON library, which would take longer than the server may.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import BaseModel

from sortserve.api.bodies import models

__all__ = ["KINDS", "ROUTES", "HostileBody", "hostile_bodies"]

ROUTES: dict[str, tuple[type[BaseModel], dict[str, object]]] = {
    "/generate": (models.GenerateBody, {"prompt": "a", "max_tokens": 1}),
    "/v1/completions": (models.CompletionBody, {"prompt": "a", "max_tokens": 1}),
    "/v1/chat/completions": (
        models.ChatCompletionBody,
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    ),
    "/tokenize": (models.TokenizeBody, {"prompt": "a"}),
    "/detokenize": (models.DetokenizeBody, {"tokens": [97]}),
}
"""Each route's body, and one that is served."""


@dataclass(frozen=True)
class HostileBody:
    """One field of a route with too much of something; its bytes are made when asked for."""

    path: str
    field: str
    kind: str
    size: int

    def __str__(self) -> str:
        return f"{self.path} {self.field}: {self.size} bytes of {self.kind}"

    @property
    def content(self) -> bytes:
        value = KINDS[self.kind](self.size)
        name = self.field.removeprefix("messages.0.")
        if name != self.field:
            return _with_field(self.path, "messages", _message(name, value))
        return _with_field(self.path, self.field, value)


def _filled(unit: bytes, opening: bytes = b"[", closing: bytes = b"]") -> Callable[[int], bytes]:
    """As many units as fit, with commas between them."""

    def fill(size: int) -> bytes:
        count = max(1, (size - len(opening + closing)) // (len(unit) + 1))
        return opening + b",".join([unit] * count) + closing

    return fill


def _string(unit: bytes, *, end: bytes = b"") -> Callable[[int], bytes]:
    return lambda size: b'"' + unit * ((size - 2 - len(end)) // len(unit)) + end + b'"'


def _keys(size: int) -> bytes:
    count = size // 12
    return b"{" + b",".join(b'"%07x":0' % i for i in range(count)) + b"}"


def _numbers(size: int) -> bytes:
    return b"[" + b",".join(b"%d" % (i % 128) for i in range(size // 4)) + b"]"


KINDS: dict[str, Callable[[int], bytes]] = {
    "letters": _string(b"x"),
    "words": _string(b"x y, "),
    "blanks": _string(b" "),
    "letters and one emoji": _string(b"x", end="😀".encode()),
    "emoji": _string("😀".encode()),
    "escaped line ends": _string(b"\\n"),
    "escaped quotes": _string(b'\\"'),
    "escaped letters": _string(b"\\u0041"),
    "escaped emoji": _string(b"\\ud83d\\ude00"),
    "digits": lambda size: b"9" * size,
    "decimals": lambda size: b"0." + b"9" * (size - 2),
    "an integer of 310 digits": lambda size: b"9" * 310,
    "small numbers": _filled(b"9"),
    "token ids": _numbers,
    "strings": _filled(b'"a"'),
    "lists": _filled(b"[]"),
    "lists of lists": _filled(b"[[]]"),
    "lists of ids": _filled(b"[1,2]"),
    "objects": _filled(b'{"":0}'),
    "messages": _filled(b'{"role":"user","content":""}'),
    "parts": _filled(b'{"type":"text","text":"x"}', b'[{"role":"user","content":[', b"]}]"),
    "names": _keys,
    "one name again": _filled(b'"a":0', b"{", b"}"),
    "depth": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "depth of objects": lambda size: b'{"a":' * (size // 6) + b"0" + b"}" * (size // 6),
    "cut off": lambda size: _filled(b'{"a":[')(size)[:-1],
}
"""Kinds of JSON values, of about so many bytes."""
INSIDE_A_MESSAGE = ("role", "content", "name", "x")


def hostile_bodies(size: int) -> Iterator[HostileBody]:
    """Every kind of value in every field of every route, and inside a message."""
    for path, (schema, _) in ROUTES.items():
        fields = [*schema.model_fields, "x"]
        if "messages" in schema.model_fields:
            fields += [f"messages.0.{name}" for name in INSIDE_A_MESSAGE]
        for kind in KINDS:
            for field in fields:
                yield HostileBody(path, field, kind, size)


def _with_field(path: str, field: str, value: bytes) -> bytes:
    rest = {name: value for name, value in ROUTES[path][1].items() if name != field}
    if field == "messages":
        rest.pop("prompt", None)
    elif field == "chat_template_kwargs" and rest.pop("prompt", None):
        rest["messages"] = [{"role": "user", "content": "a"}]
    members = [as_json(name) + b":" + as_json(rest[name]) for name in rest]
    return b"{" + b",".join([*members, as_json(field) + b":" + value]) + b"}"


def _message(name: str, value: bytes) -> bytes:
    rest = {key: "user" for key in ("role", "content") if key != name}
    return b"[" + as_json(rest)[:-1] + b',"' + name.encode() + b'":' + value + b"}]"


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()
