"""Random workloads with all kinds of budgets, and what must hold of each of their answers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from sortserve.core.request import FinishReason, Request, RequestReport
from sortserve.core.schedule import DepthSchedule
from support.timed import Timed, timed_request

EXITS = (2, 4, 6)
MILLISECONDS = st.sampled_from([5, 30, 80, 200, 700, 5000])


@st.composite
def budgets(draw: st.DrawFn) -> dict[str, Any]:
    budget: dict[str, Any] = {}
    for name in ("latency_ms", "ttft_ms", "tpot_ms"):
        if draw(st.booleans()):
            budget[name] = draw(MILLISECONDS)
    if "ttft_ms" in budget and budget["ttft_ms"] > budget.get("latency_ms", math.inf):
        del budget["ttft_ms"]
    depth = draw(st.sampled_from(["none", "exit_layer", "min_exit_layer", "schedule"]))
    if depth == "schedule":
        budget["schedule"] = [[0, 6], [draw(st.integers(1, 12)), 4], [13, 2]]
    elif depth != "none":
        budget[depth] = draw(st.sampled_from(EXITS))
    budget["on_miss"] = draw(st.sampled_from(["degrade", "truncate", "reject"]))
    return budget


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    count = draw(st.integers(1, 14))
    return [
        replace(
            timed_request(
                str(i),
                draw(st.sampled_from([1, 4, 30, 90])),
                max_tokens=draw(st.integers(1, 25)),
                at=draw(st.floats(0.0, 0.3)),
                **draw(budgets()),
            ),
            weight=draw(st.sampled_from([1.0, 1.0, 1e-3, 1e3])),
        )
        for i in range(count)
    ]


def check_schedule(report: RequestReport, schedule: DepthSchedule) -> None:
    """No token deeper than its place; without a time none shallower either."""
    planned = schedule.tokens_by_exit(report.num_output_tokens)
    assert all(e >= schedule.exits[0] for e in report.tokens_by_exit)
    for exit_layer in schedule.exits:
        deeper = sum(n for e, n in report.tokens_by_exit.items() if e >= exit_layer)
        assert deeper <= sum(n for e, n in planned.items() if e >= exit_layer)
    if not report.budget.has_latency:
        assert dict(report.tokens_by_exit) == planned


def check_report(timed: Timed, request: Request) -> None:
    """Every token at an allowed exit, never deeper again; all of them unless a deadline cut it."""
    report, budget = timed.reports[request.request_id], request.budget
    exits = list(report.tokens_by_exit)
    assert exits == sorted(exits, reverse=True)
    if budget.schedule is None:
        assert all(e in timed.engine.exits.allowed(budget) for e in exits)
    else:
        check_schedule(report, budget.schedule)
    if report.finish_reason is FinishReason.LENGTH:
        assert report.num_output_tokens == request.sampling.max_tokens
    else:
        assert budget.on_miss != "degrade"
    if report.finish_reason is FinishReason.DEADLINE:
        assert budget.latency_ms is not None
        assert report.e2e_s <= budget.latency_ms / 1e3 + 0.2
