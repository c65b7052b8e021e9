"""A trace replayed on a real server: what its requests ask for, and how they are judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lib.budget_classes import CLASSES, Budgeted, Unloaded, plan_budgets
from benchmarks.lib.common import percentile
from benchmarks.lib.grading import Graded, effective_scores, grade
from benchmarks.lib.http_client import HttpClient
from benchmarks.lib.loadgen import Planned, RequestRecord, Run, run_closed_loop
from benchmarks.lib.systems import System
from benchmarks.lib.workload import RequestMaker, RequestSpec

__all__ = [
    "Alone",
    "Crowd",
    "Exits",
    "figures",
    "measure_alone",
    "measure_crowd",
    "measure_slowdown",
    "plan_requests",
    "read_exits",
]

NUM_ALONE_TOKENS = 32
"""Output tokens of a request that is timed alone."""
NUM_PROBES = 4
CROWD = 32
"""Requests that are timed at once."""


@dataclass(frozen=True)
class Exits:
    """What ``GET /exits`` says."""

    layers: Sequence[int]
    scores: Mapping[int, float | None]
    """None: not measured."""

    @property
    def is_measured(self) -> bool:
        """Whether every exit below the deepest has a score: floors need them."""
        return None not in [self.scores[e] for e in self.layers[:-1]]


async def read_exits(client: HttpClient) -> Exits:
    """Ask the server."""
    entries = (await client.request("GET", "/exits")).json()["exits"]
    return Exits([e["exit_layer"] for e in entries], {e["exit_layer"]: e["score"] for e in entries})


@dataclass(frozen=True)
class Alone:
    """What requests take on a server that has nothing else to do, at full depth."""

    first_64_s: float
    first_512_s: float
    """To the first token of a prompt of so many tokens."""
    token_s: float

    @property
    def unloaded(self) -> Unloaded:
        """A line through the first-token times of the two lengths."""
        slope = max(0.0, (self.first_512_s - self.first_64_s) / (512 - 64))
        start = max(0.0, self.first_64_s - 64 * slope)
        return Unloaded(lambda num_tokens: start + slope * num_tokens, self.token_s)


async def measure_alone(client: HttpClient, maker: RequestMaker, full: int) -> Alone:
    """Time a few requests of two prompt lengths, one after the other."""
    short = await _records(client, maker, full, 64, num_requests=6)
    long = await _records(client, maker, full, 512, num_requests=6)
    firsts = [
        percentile([r.ttft_s for r in records[1:] if r.ttft_s is not None], 0.5)
        for records in (short, long)
    ]
    gaps = [r.tpot_s for r in (*short[1:], *long[1:]) if r.tpot_s is not None]
    return Alone(firsts[0], firsts[1], percentile(gaps, 0.5))


@dataclass(frozen=True)
class Crowd:
    """What many requests take at once, at full depth."""

    num_rows: int
    context_len: int
    """Of each, in the middle of its answer."""
    token_s: float


async def measure_crowd(client: HttpClient, maker: RequestMaker, full: int) -> Crowd:
    """Time the steps in which ``CROWD`` answers are made together."""
    spec = RequestSpec(num_prompt_tokens=64, num_output_tokens=2 * NUM_ALONE_TOKENS)
    plans = [iter([Planned(maker.make(spec, full))]) for _ in range(CROWD)]
    run = await run_closed_loop(client, plans, num_requests=CROWD)
    # The median gap: prompts are read beside the first tokens, and some end before others.
    gaps = [gap for record in run.records if record.ok for gap in record.itls_s]
    return Crowd(CROWD, 64 + NUM_ALONE_TOKENS, percentile(gaps, 0.5))


async def measure_slowdown(
    client: HttpClient, maker: RequestMaker, full: int, alone: Alone
) -> tuple[float, float]:
    """How many times as long as then a short request, and a long prompt, take now.

    Machines change their speed: that of their memory and that of their arithmetic, each by itself.
    """
    short = await _records(client, maker, full, 64, num_requests=NUM_PROBES)
    long = await _records(client, maker, full, 512, num_requests=NUM_PROBES, num_tokens=1)
    short_s = percentile([r.e2e_s for r in short if r.e2e_s is not None], 0.5)
    long_s = percentile([r.ttft_s for r in long if r.ttft_s is not None], 0.5)
    alone_s = alone.first_64_s + (NUM_ALONE_TOKENS - 1) * alone.token_s
    return short_s / alone_s, long_s / alone.first_512_s


async def _records(
    client: HttpClient,
    maker: RequestMaker,
    full: int,
    num_prompt: int,
    *,
    num_requests: int,
    num_tokens: int = NUM_ALONE_TOKENS,
) -> list[RequestRecord]:
    """Requests at full depth, one after the other; those that were answered."""
    spec = RequestSpec(num_prompt_tokens=num_prompt, num_output_tokens=num_tokens)

    def plan() -> Iterator[Planned]:
        while True:
            yield Planned(maker.make(spec, full))

    run = await run_closed_loop(client, [plan()], num_requests=num_requests)
    return [record for record in run.records if record.ok]


def plan_requests(
    specs: Sequence[RequestSpec],
    maker: RequestMaker,
    unloaded: Unloaded,
    system: System,
    exits: Exits,
    *,
    seed: int,
    on_miss: str,
    min_quality: float,
) -> tuple[list[Planned], list[Budgeted]]:
    """The requests as one system gets them, and what each is graded by.

    ``min_quality`` is named where the exits have scores, without which no floor can be checked.
    """
    budgets = plan_budgets(
        specs,
        unloaded,
        pinned=system.pinned(exits.layers),
        seed=seed,
        on_miss=on_miss,
        min_quality=min_quality if exits.is_measured else None,
    )
    planned = []
    for spec, own in zip(specs, budgets, strict=True):
        asked = RequestMaker(model=maker.model, prompts=maker.prompts, budget=own.budget)
        planned.append(Planned(asked.make(spec, None), own.budget.get("exit_layer"), spec.due_s))
    return planned, budgets


def figures(
    run: Run,
    specs: Sequence[RequestSpec],
    budgets: Sequence[Budgeted],
    unloaded: Unloaded,
    exits: Exits,
) -> dict[str, Any]:
    """What a run comes to."""
    records = sorted(run.records, key=lambda record: record.due_s)
    requests = [
        _graded(record, spec, own, unloaded)
        for record, spec, own in zip(records, specs, budgets, strict=True)
    ]
    found = grade(requests, effective_scores(exits.scores), [c.name for c in CLASSES])
    return {
        **found,
        "goodput_per_s": round(sum(bool(r.met) for r in requests) / run.wall_s, 3),
        "output_tokens_per_s": round(sum(r.num_output_tokens for r in records) / run.wall_s, 1),
        "refusal_ms_p50": _refusal_ms(records, 0.5),
        "refusal_ms_p99": _refusal_ms(records, 0.99),
        "num_failed": sum(r.error is not None and r.status != 429 for r in records),
        "prediction_error_p50": _prediction_error(records),
        "wall_s": round(run.wall_s, 1),
        "max_send_lag_ms": round(max(r.sent_s - r.due_s for r in records) * 1e3, 1),
        "generator_cpu_share": round(run.cpu_s / run.wall_s, 3),
    }


def _graded(record: RequestRecord, spec: RequestSpec, own: Budgeted, unloaded: Unloaded) -> Graded:
    budget_class = own.budget_class
    assert budget_class is not None, "every request of this benchmark has a class"
    limit_ms = budget_class.latency_ms(unloaded, spec)
    by_exit = (record.budget or {}).get("tokens_by_exit", {})
    return Graded(
        class_name=budget_class.name,
        met=record.ok and record.e2e_s is not None and record.e2e_s * 1e3 <= limit_ms,
        refused=record.status == 429,
        tokens_by_exit={int(e): n for e, n in by_exit.items()},
    )


def _prediction_error(records: Sequence[RequestRecord]) -> float | None:
    """Median of how far the server's predicted time was from its actual one."""
    pairs = [(r.budget or {}) for r in records if r.ok]
    errors = [
        abs(p["predicted_ms"] / p["actual_ms"] - 1.0)
        for p in pairs
        if p.get("predicted_ms") and p.get("actual_ms")
    ]
    return round(percentile(errors, 0.5), 4) if errors else None


def _refusal_ms(records: Sequence[RequestRecord], share: float) -> float | None:
    """From sending to the whole 429, as the client saw it."""
    times = [
        1e3 * (r.answered_s - r.sent_s)
        for r in records
        if r.status == 429 and r.answered_s is not None
    ]
    return round(percentile(times, share), 1) if times else None
