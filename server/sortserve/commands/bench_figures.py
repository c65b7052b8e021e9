"""From what the clients of a load saw to percentiles and goodput. Plain values, no clock."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Bounds", "Seen", "figures", "figures_text", "percentiles"]

POINTS = (50, 90, 99)
TIMES = ("ttft", "tpot", "ntpot", "itl", "e2e")
MAX_ERRORS = 3
"""Kinds of failures that are told; the rest is counted."""


@dataclass(kw_only=True)
class Seen:
    """What one client saw of one request. Times are seconds on one clock."""

    due_s: float
    """When it should have been sent. Latencies count from here: a generator that falls behind
    flatters nobody."""
    token_times_s: list[float] = field(default_factory=list)
    """When each token came."""
    num_prompt_tokens: int = 0
    tokens_by_exit: Mapping[int, int] = field(default_factory=dict)
    met: bool | None = None
    """What the server says of its budget."""
    is_cut: bool = False
    """Whether the server ended it at its deadline (``on_miss`` is ``truncate``)."""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Due time to the first token."""
        return self.token_times_s[0] - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first, (E2E - TTFT) / (n - 1); None for one token."""
        count = len(self.token_times_s) - 1
        return (self.token_times_s[-1] - self.token_times_s[0]) / count if count else None

    @property
    def ntpot_s(self) -> float:
        """Normalised time per output token: the whole answer over all of its tokens."""
        return self.e2e_s / len(self.token_times_s)

    @property
    def e2e_s(self) -> float:
        """Due time to the last token."""
        return self.token_times_s[-1] - self.due_s

    @property
    def itls_s(self) -> list[float]:
        """Gaps between neighbouring tokens."""
        return [late - early for early, late in itertools.pairwise(self.token_times_s)]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The times of a budget, in milliseconds, as the clients hold the server to them."""

    latency_ms: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def exist(self) -> bool:
        """Whether there is any."""
        return any(bound is not None for bound in (self.latency_ms, self.ttft_ms, self.tpot_ms))

    def are_met(self, seen: Seen) -> bool:
        """Whether a whole answer (none that was cut) kept all of them, on the client's clock."""
        pairs = (
            (seen.e2e_s, self.latency_ms),
            (seen.ttft_s, self.ttft_ms),
            (seen.tpot_s, self.tpot_ms),
        )
        return not seen.is_cut and all(
            bound is None or taken_s is None or taken_s * 1e3 <= bound for taken_s, bound in pairs
        )


def figures(records: Sequence[Seen], *, wall_s: float, cpu_s: float, bounds: Bounds) -> Any:
    """What a load came to, as a JSON object.

    Args:
        records: every request that was sent.
        wall_s: from the first due time to the last answer.
        cpu_s: processor time of the load generator itself.
        bounds: what counts as goodput. Without any there is none.
    """
    done = [seen for seen in records if seen.error is None]
    num_tokens = sum(len(seen.token_times_s) for seen in done)
    tokens_by_exit = sum((Counter(seen.tokens_by_exit) for seen in done), Counter[int]())
    samples = {
        "ttft": [seen.ttft_s for seen in done],
        "tpot": [seen.tpot_s for seen in done if seen.tpot_s is not None],
        "ntpot": [seen.ntpot_s for seen in done],
        "itl": [itl for seen in done for itl in seen.itls_s],
        "e2e": [seen.e2e_s for seen in done],
    }
    met = sum(bounds.are_met(seen) for seen in done)
    return {
        "num_requests": len(records),
        "num_failed": len(records) - len(done),
        "errors": dict(Counter(seen.error for seen in records if seen.error).most_common()),
        "wall_s": wall_s,
        "requests_per_s": len(done) / wall_s,
        "output_tokens_per_s": num_tokens / wall_s,
        "num_prompt_tokens": sum(seen.num_prompt_tokens for seen in done),
        "num_output_tokens": num_tokens,
        "tokens_by_exit": {str(e): tokens_by_exit[e] for e in sorted(tokens_by_exit)},
        "num_cut": sum(seen.is_cut for seen in done),
        "goodput_per_s": met / wall_s if bounds.exist else None,
        "met": met if bounds.exist else None,
        "met_of_arrivals": met / len(records) if bounds.exist and records else None,
        "met_of_answers": met / len(done) if bounds.exist and done else None,
        "met_says_server": sum(seen.met is True for seen in done) if bounds.exist else None,
        "generator_cpu_share": cpu_s / wall_s,
        **{f"{name}_ms": percentiles([1e3 * s for s in samples[name]]) for name in TIMES},
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles (interpolated linearly) and maximum; None of nothing."""
    if not values:
        return None
    # quantiles() wants two values.
    cuts = statistics.quantiles([*values, *values[: len(values) == 1]], n=100, method="inclusive")
    points = {f"p{point}": cuts[point - 1] for point in POINTS}
    return {"mean": statistics.fmean(values), **points, "max": max(values)}


def figures_text(values: Mapping[str, Any]) -> str:
    """The figures for a person."""
    total, failed = values["num_requests"], values["num_failed"]
    lines = [
        f"{total} requests in {values['wall_s']:.1f} s, {failed} failed",
        f"  throughput  {values['requests_per_s']:.2f} requests/s, "
        f"{values['output_tokens_per_s']:.1f} output tokens/s",
    ]
    if values["met"] is not None:
        lines.append(
            f"  goodput     {values['goodput_per_s']:.2f} requests/s met the budget "
            f"({values['met']} of {total}; the server says {values['met_says_server']})"
        )
        of_answers = values["met_of_answers"]
        lines.append(
            f"  share       {values['met_of_arrivals']:.1%} of all requests, "
            f"{'-' if of_answers is None else format(of_answers, '.1%')} of those answered"
        )
    if values["num_cut"]:
        lines.append(f"  cut         {values['num_cut']} answers ended at their deadline")
    if values["tokens_by_exit"]:
        used = ", ".join(f"{e} ({count} tokens)" for e, count in values["tokens_by_exit"].items())
        lines.append(f"  exits       {used}")
    lines.append(f"  generator   {values['generator_cpu_share']:.0%} of a core")
    columns = ("mean", *(f"p{point}" for point in POINTS), "max")
    if failed < total:
        lines.append("  ms      " + "".join(f"{name:>10}" for name in columns))
    for name in TIMES:
        if (row := values[f"{name}_ms"]) is not None:
            cells = "".join(f"{row[column]:>10.1f}" for column in columns)
            lines.append(f"  {name.upper():<8}{cells}")
    errors = list(values["errors"].items())
    lines += [f"  {count} x {error}" for error, count in errors[:MAX_ERRORS]]
    if len(errors) > MAX_ERRORS:
        lines.append(f"  and {len(errors) - MAX_ERRORS} other kinds of failures")
    return "\n".join(lines)
