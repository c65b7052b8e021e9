"""The requests of a storm: rude ones, wrong ones, and what a good server answers to each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

__all__ = ["Case", "Hangup", "Target", "all_cases"]

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
SERVED = frozenset({200, 429})
"""A good request is answered, or told to come back later."""


class Hangup(Enum):
    """When a client goes away."""

    NEVER = auto()
    MID_UPLOAD = auto()
    BEFORE_FIRST_BYTE = auto()
    MID_STREAM = auto()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request and what may be answered."""

    name: str
    path: str = COMPLETIONS
    body: bytes = b""
    statuses: frozenset[int] = frozenset({400})
    params: tuple[str, ...] = ()
    """Fields of which ``error.param`` must name one (or a part of it); empty: not checked."""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"
    hangup: Hangup = Hangup.NEVER

    def names_field(self, param: object) -> bool:
        """Whether an error's ``param`` is one of the fields that are wrong here."""
        if not self.params:
            return True
        return isinstance(param, str) and any(
            param == name or param.startswith((f"{name}.", f"{name}[")) for name in self.params
        )


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the cases need to know of the server."""

    model: str
    max_model_len: int
    max_body_bytes: int


def all_cases(target: Target) -> list[Case]:
    """Polite and rude requests several times over, and every kind of wrong one once."""
    return [
        *_polite(target) * 4,
        *_rude(target.model) * 12,
        *_wrong_fields(target.model),
        *_wrong_prompts(target),
        *_wrong_budgets(target.model),
        *_wrong_chats(target.model),
        *_wrong_bodies(target),
    ]


def _body(served_model: str, /, **fields: Any) -> bytes:
    """A good streaming request with ``fields`` replaced; ``...`` leaves a field out."""
    good = {"model": served_model, "prompt": "The storm", "max_tokens": 24, "stream": True}
    merged = good | fields
    return json.dumps({k: v for k, v in merged.items() if v is not ...}).encode()


def _polite(target: Target) -> list[Case]:
    model = target.model
    words = min(200, target.max_model_len // 12)  # a token a letter, in the tiny checkpoint
    chat = {"prompt": ..., "messages": [{"role": "user", "content": "Hello"}]}
    bodies = {
        "stream": (COMPLETIONS, _body(model, ignore_eos=True)),
        "whole": (COMPLETIONS, _body(model, stream=False)),
        "two samples": (COMPLETIONS, _body(model, n=2, seed=1)),
        "long prompt": (COMPLETIONS, _body(model, prompt="storm " * words)),
        "token ids": (COMPLETIONS, _body(model, prompt=[100, 200, 250])),
        "less of the compute": (
            COMPLETIONS,
            _body(model, budget={"compute": 0.75, "min_quality": 0.01}),
        ),
        "truncated": (
            COMPLETIONS,
            _body(model, max_tokens=200, budget={"latency_ms": 200, "on_miss": "truncate"}),
        ),
        "chat": (CHAT, _body(model, **chat)),
        "native": (GENERATE, _body(model, model=...)),
        "null character": (COMPLETIONS, _body(model, prompt="a\x00b")),
        "unknown field on an OpenAI route": (COMPLETIONS, _body(model, load_tool_id=7)),
    }
    headers = {
        "offers h2c": {"Connection": "Upgrade", "Upgrade": "h2c"},
        "offers a websocket": {"Connection": "Upgrade", "Upgrade": "websocket"},
        "unusual request id": {"X-Request-Id": "any words, {even} these"},
    }
    return [
        *(
            Case(name=f"polite: {name}", path=path, body=body, statuses=SERVED)
            for name, (path, body) in bodies.items()
        ),
        *(
            Case(name=f"polite: {name}", body=_body(model), headers=fields, statuses=SERVED)
            for name, fields in headers.items()
        ),
    ]


def _rude(model: str) -> list[Case]:
    body = _body(model, max_tokens=400, ignore_eos=True)
    whole = _body(model, max_tokens=400, ignore_eos=True, stream=False)
    names = {
        "mid-stream": (body, Hangup.MID_STREAM),
        "before the first byte": (body, Hangup.BEFORE_FIRST_BYTE),
        "waiting for a whole answer": (whole, Hangup.BEFORE_FIRST_BYTE),
        "mid-upload": (body, Hangup.MID_UPLOAD),
    }
    return [
        Case(name=f"hangs up {name}", body=body, statuses=SERVED, hangup=hangup)
        for name, (body, hangup) in names.items()
    ]


def _wrong_fields(model: str) -> list[Case]:
    wrong: dict[str, list[Any]] = {
        "max_tokens": [0, -1, 1.5, "many", 10**7, 2**70],
        "min_tokens": [-1, 1000],
        "temperature": [-0.1, "hot", 1e9],
        "top_p": [-0.1, 1.5, []],
        "top_k": [-2, "five"],
        "min_p": [2],
        "repetition_penalty": [0],
        "presence_penalty": [3],
        "frequency_penalty": [-3],
        "logit_bias": [{"abc": 1}, {"5": 1000}, {str(10**9): 1}, 7],
        "seed": ["x", 1.5],
        "stop": [5, [""], ["s"] * 17],
        "stop_token_ids": [[-1], "x"],
        "logprobs": [-1, 1000],
        "grammar": ['root ::= "a"'],
        "mirostat": [2],
        "n": [0, 10**6, "two"],
        "stream": [7],
        "stream_options": ["yes"],
    }
    cases = [
        Case(
            name=f"{name}={value!r}"[:60],
            body=_body(model, **{name: value}),
            params=(name,),
        )
        for name, values in wrong.items()
        for value in values
    ]
    models: list[Any] = ["no-such-model", f"{model}@999", f"{model}@deep", 5]
    return cases + [
        Case(
            name=f"model={value!r}",
            body=_body(model, model=value),
            statuses=frozenset({400, 404}),
            params=("model",),
        )
        for value in models
    ]


def _wrong_prompts(target: Target) -> list[Case]:
    wrong: dict[str, Any] = {
        "missing": ...,
        "null": None,
        "a number": 7,
        "an object": {"text": "x"},
        "an empty list": [],
        "an empty list of ids": [[]],
        "an id beyond the vocabulary": [10**9],
        "a negative id": [-1],
        "a fraction as id": [1.5],
        "text and ids mixed": ["a", 5],
        "huge, as ids": [1000] * (target.max_model_len + 1),
        "huge, as text": "storm " * (target.max_model_len + 1),
    }
    cases = [
        Case(name=f"prompt: {name}", body=_body(target.model, prompt=value), params=("prompt",))
        for name, value in wrong.items()
    ]
    surrogate = _body(target.model, prompt="X").replace(b'"X"', b'"\\ud800"')
    any_answer = frozenset({200, 400, 429})
    return [*cases, Case(name="prompt: half a surrogate", body=surrogate, statuses=any_answer)]


def _wrong_budgets(model: str) -> list[Case]:
    wrong: dict[str, list[Any]] = {
        "exit_layer": [0, 999, 1.5, "deep"],
        "min_exit_layer": [999],
        "compute": [0, 2, "half", 1e-9],
        "min_quality": [1.5],
        "latency_ms": [0, -1, "soon", 86_400_001, 10**310],
        "ttft_ms": [[]],
        "tpot_ms": [{}],
        "on_miss": ["pray"],
        "speed": [11],
    }
    cases = [
        Case(
            name=f"budget.{name}={value!r} on {path}",
            path=path,
            body=_body(model, budget={name: value}, **({"model": ...} if native else {})),
            params=(f"budget.{name}",),
        )
        for path, native in ((COMPLETIONS, False), (GENERATE, True))
        for name, values in wrong.items()
        for value in values
    ]
    both = {"exit_layer": 1, "compute": 0.5}
    unattainable = {"latency_ms": 0.001, "on_miss": "reject"}
    slo = {"x-slo-ttft-ms": ("soon", "budget.ttft_ms"), "x-slo-e2e-ms": ("-5", "budget.latency_ms")}
    return [
        *cases,
        Case(name="budget: text", body=_body(model, budget="cheap"), params=("budget",)),
        Case(name="budget: contradiction", body=_body(model, budget=both), params=("budget",)),
        Case(
            name="budget: unattainable",
            body=_body(model, budget=unattainable),
            statuses=frozenset({429}),
            params=("budget.latency_ms",),
        ),
        Case(
            name="native: unknown field",
            path=GENERATE,
            body=_body(model, model=..., speed=11),
            params=("speed",),
        ),
        *(
            Case(
                name=f"header {name}: {value}",
                body=_body(model),
                headers={name: value},
                params=(name, param),
            )
            for name, (value, param) in slo.items()
        ),
    ]


def _wrong_chats(model: str) -> list[Case]:
    wrong: dict[str, Any] = {
        "missing": ...,
        "empty": [],
        "text": "hello",
        "role is a number": [{"role": 5, "content": "hello"}],
        "content is a number": [{"role": "user", "content": 5}],
        "no role": [{"content": "hello"}],
    }
    return [
        Case(
            name=f"messages: {name}",
            path=CHAT,
            body=_body(model, prompt=..., messages=value),
            params=("messages",),
        )
        for name, value in wrong.items()
    ]


def _wrong_bodies(target: Target) -> list[Case]:
    bodies = {
        "empty": b"",
        "not JSON": b'{"prompt": ',
        "not UTF-8": b'{"prompt": "\xff\xfe"}',
        "a list": b"[]",
        "null": b"null",
        "100,000 brackets": b'{"prompt": ' + b"[" * 100_000,
        "NaN": b'{"prompt": "x", "temperature": NaN}',
    }
    cases = [Case(name=f"body: {name}", body=body) for name, body in bodies.items()]
    too_large = _body(target.model, prompt="x" * (target.max_body_bytes + 1))
    return [
        *cases,
        Case(name="body: too large", body=too_large, statuses=frozenset({413})),
        Case(name="unknown route", path="/v1/storms", body=b"{}", statuses=frozenset({404})),
        Case(name="wrong method", method="GET", statuses=frozenset({405})),
    ]
