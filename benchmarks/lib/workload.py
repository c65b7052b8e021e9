"""What a load test asks for: lengths, exits and arrival times, all from one seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "ExitMix",
    "PromptMaker",
    "RequestMaker",
    "RequestSpec",
    "fixed_arrivals",
    "load_trace",
    "poisson_arrivals",
]

FIRST_TOKEN_ID = 100
"""Prompts leave out the lowest ids, where tokenizers keep their special tokens."""


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """One request before it has a prompt."""

    num_prompt_tokens: int
    num_output_tokens: int
    due_s: float = 0.0
    """When to send it, from the start of the run (open loop only)."""


@dataclass(frozen=True)
class ExitMix:
    """Which share of the load asks for which exit; no exits at all leaves the choice to the server.

    Raises:
        ValueError: an exit below 1, or a share that is not positive.
    """

    shares: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for exit_layer, share in self.shares:
            if exit_layer < 1 or not share > 0:
                raise ValueError(f"{exit_layer}:{share} is not allowed: give EXIT:SHARE, both > 0.")

    def __str__(self) -> str:
        return ",".join(f"{exit_layer}:{share:g}" for exit_layer, share in self.shares)

    @classmethod
    def parse(cls, text: str) -> ExitMix:
        """The mix that ``"9:0.5,30:0.5"`` means; ``"9,30"`` is equal shares.

        Raises:
            ValueError: the text is no such list.
        """
        shares = []
        for part in text.split(","):
            exit_layer, _, share = part.partition(":")
            shares.append((int(exit_layer), float(share or 1.0)))
        return cls(tuple(shares))

    def draw(self, rng: random.Random) -> int | None:
        """A random exit of the mix; None without one."""
        if not self.shares:
            return None
        exits, weights = zip(*self.shares, strict=True)
        return int(rng.choices(exits, weights)[0])

    def spread(self, num: int) -> list[int | None]:
        """``num`` exits in the mix's proportions, evenly interleaved (one per client)."""
        if not self.shares:
            return [None] * num
        total = sum(share for _, share in self.shares)
        counts = dict.fromkeys((exit_layer for exit_layer, _ in self.shares), 0)
        spread: list[int | None] = []
        for position in range(1, num + 1):
            owed = {e: share / total * position - counts[e] for e, share in self.shares}
            exit_layer = max(owed, key=lambda e: owed[e])
            counts[exit_layer] += 1
            spread.append(exit_layer)
        return spread


class PromptMaker:
    """Prompts of exact length as random token ids, each different (no prefix-cache hits).

    ``shared_prefix`` tokens at the start of every prompt are the same, to measure the cache.
    """

    def __init__(self, rng: random.Random, *, vocab_size: int, shared_prefix: int = 0) -> None:
        if vocab_size <= FIRST_TOKEN_ID:
            raise ValueError(f"--vocab-size={vocab_size} must be above {FIRST_TOKEN_ID}.")
        self._rng = rng
        self._ids = range(FIRST_TOKEN_ID, vocab_size)
        self._prefix = self._draw(shared_prefix)

    def make(self, num_tokens: int) -> list[int]:
        """A new prompt of ``num_tokens`` ids."""
        prefix = self._prefix[:num_tokens]
        return prefix + self._draw(num_tokens - len(prefix))

    def _draw(self, num: int) -> list[int]:
        return self._rng.choices(self._ids, k=num)


@dataclass(frozen=True, kw_only=True)
class RequestMaker:
    """Turns specs into bodies of ``POST /v1/completions`` that any OpenAI-like server takes."""

    model: str
    prompts: PromptMaker
    budget: Mapping[str, Any] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def make(self, spec: RequestSpec, exit_layer: int | None) -> bytes:
        """The JSON body of one streaming greedy request that runs to its full length."""
        budget = dict(self.budget)
        if exit_layer is not None:
            budget["exit_layer"] = exit_layer
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": self.prompts.make(spec.num_prompt_tokens),
            "max_tokens": spec.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if budget:
            body["budget"] = budget
        return json.dumps(body | dict(self.extra_body)).encode()


def poisson_arrivals(rate: float, rng: random.Random) -> Iterator[float]:
    """Endless arrival times (s) with exponential gaps, ``rate`` a second."""
    now = 0.0
    while True:
        yield now
        now += rng.expovariate(rate)


def fixed_arrivals(rate: float) -> Iterator[float]:
    """Endless arrival times (s) at equal gaps, ``rate`` a second."""
    position = 0
    while True:
        yield position / rate
        position += 1


def load_trace(
    path: Path,
    *,
    num_requests: int | None = None,
    speed: float = 1.0,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> Sequence[RequestSpec]:
    """The requests of a JSON-lines trace with ``t`` (s), ``prompt_tokens`` and ``output_tokens``.

    ``speed`` 2 replays it twice as fast; lengths above a maximum are cut to it.

    Raises:
        ValueError: a line is not such an object; the message has its number.
    """
    specs: list[RequestSpec] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if num_requests is not None and len(specs) == num_requests:
                break
            if line.strip():
                specs.append(_trace_spec(line, f"{path}:{number}"))
    return [
        RequestSpec(
            due_s=(spec.due_s - specs[0].due_s) / speed,
            num_prompt_tokens=min(spec.num_prompt_tokens, max_prompt_tokens or 1 << 31),
            num_output_tokens=min(spec.num_output_tokens, max_output_tokens or 1 << 31),
        )
        for spec in specs
    ]


def _trace_spec(line: str, where: str) -> RequestSpec:
    try:
        row = json.loads(line)
        return RequestSpec(
            due_s=float(row["t"]),
            num_prompt_tokens=max(1, int(row["prompt_tokens"])),
            num_output_tokens=max(1, int(row["output_tokens"])),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is not a trace line ({error!r}): give JSON with t, prompt_tokens and "
            "output_tokens."
        ) from None
