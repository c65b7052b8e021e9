"""What a soak sends: good requests of every route and budget, rude ones and wrong ones."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.lib.storm_cases import SERVED, Case, Hangup, Target, all_cases

__all__ = ["KEYS", "keys_file", "pick", "soak_cases"]

KEYS = {"soak": "key-of-the-soak", "small": "key-of-the-soak-that-is-small"}
"""By name. The small one is soon at its limits."""
COMPLETIONS, CHAT, GENERATE, RESPONSES = (
    *("/v1/completions", "/v1/chat/completions"),
    *("/generate", "/v1/responses"),
)
SHARES = {"polite": 0.6, "rude": 0.2, "wrong": 0.2}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def keys_file() -> str:
    """The content of ``--api-keys-file``."""
    digests = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    return (
        f"keys:\n  - name: soak\n    sha256: {digests['soak']}\n"
        f"  - name: small\n    sha256: {digests['small']}\n    requests_per_minute: 5\n"
        "    max_concurrency: 1\n"
    )


def soak_cases(target: Target, exits: Sequence[int]) -> dict[str, list[Case]]:
    """All of them by kind: polite, rude or wrong."""
    others = [case for case in all_cases(target) if not case.name.startswith("polite")]
    return {
        "polite": _polite(target.model, exits),
        "rude": [case for case in others if case.hangup is not Hangup.NEVER],
        "wrong": [case for case in others if case.hangup is Hangup.NEVER],
    }


def pick(cases: dict[str, list[Case]], rng: random.Random) -> Case:
    """The next one."""
    [kind] = rng.choices(list(SHARES), list(SHARES.values()))
    return rng.choice(cases[kind])


def _polite(model: str, exits: Sequence[int]) -> list[Case]:
    base: dict[str, Any] = {"model": model, "max_tokens": 24}
    text = {**base, "prompt": "The long way home"}
    chat = {**base, "messages": [{"role": "user", "content": "Hello there"}]}
    native = {"prompt": "A short way", "max_tokens": 24}
    budgets: list[dict[str, Any]] = [
        {"latency_ms": 5000},
        {"ttft_ms": 2000, "tpot_ms": 500},
        {"latency_ms": 300, "on_miss": "truncate"},
        {"latency_ms": 2000, "on_miss": "reject"},
        {"compute": 0.8, "min_quality": 0.01},
        {"min_quality": 0.3},
        *({"exit_layer": exit_layer} for exit_layer in exits),
    ]
    response = {"model": model, "input": "Go on", "max_output_tokens": 24}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    bodies: list[tuple[str, str, dict[str, Any]]] = [
        ("stream", COMPLETIONS, {**text, "stream": True, "ignore_eos": True}),
        ("whole", COMPLETIONS, text),
        ("samples", COMPLETIONS, {**text, "n": 3, "temperature": 1.2, "seed": 5}),
        ("logprobs", COMPLETIONS, {**text, "logprobs": 3, "echo": True}),
        ("stop strings", COMPLETIONS, {**text, "stop": ["e", "zzz"], "stream": True}),
        ("penalties", COMPLETIONS, {**text, "repetition_penalty": 1.2, "top_k": 20, "min_p": 0.05}),
        ("long prompt", COMPLETIONS, {**text, "prompt": "soak " * 60, "stream": True}),
        ("regex", COMPLETIONS, {**text, "structured_outputs": {"regex": "[a-f]{8}"}}),
        ("chat", CHAT, chat),
        ("chat stream", CHAT, {**chat, "stream": True, "stream_options": {"include_usage": True}}),
        ("schema", CHAT, {**chat, "max_tokens": 40, "response_format": form}),
        ("tools", CHAT, {**chat, "tools": [TOOL], "tool_choice": "required"}),
        ("response", RESPONSES, response),
        ("response stream", RESPONSES, {**response, "stream": True}),
        ("native", GENERATE, native),
        ("native chat", GENERATE, {"max_tokens": 24, "messages": chat["messages"]}),
        ("tokenize", "/tokenize", {"model": model, "prompt": "some words"}),
        ("detokenize", "/detokenize", {"model": model, "tokens": [5, 6, 7]}),
        *((f"budget {b}", GENERATE, {**native, "budget": b, "stream": True}) for b in budgets),
        *((f"{model}@{e}", COMPLETIONS, {**text, "model": f"{model}@{e}"}) for e in exits),
    ]
    cases = [
        Case(name=f"polite: {name}", path=path, body=json.dumps(body).encode(), statuses=SERVED)
        for name, path, body in bodies
    ]
    small = {"authorization": f"Bearer {KEYS['small']}"}
    nobody = {"authorization": "Bearer nobody's"}
    body = json.dumps(text).encode()
    pages = ("/v1/models", "/exits", "/status", "/health", "/version")
    return [
        *cases,
        *(Case(name=f"polite: {page}", path=page, method="GET", statuses=SERVED) for page in pages),
        Case(name="a small key", path=COMPLETIONS, body=body, headers=small, statuses=SERVED),
        Case(
            name="no key of ours",
            path=COMPLETIONS,
            body=body,
            headers=nobody,
            statuses=frozenset({401}),
        ),
    ]
