"""What each live request still needs, and by when: all that policies see (no torch).

A promise is kept by pacing. The time that a budget leaves is spread over the work in proportion:
the prompt gets its share (``first_due_s``, fixed when the request is admitted), each token its own
(``gap_s``, worked out again after every token). A request that nobody was promised a time for is
*soft*: it is due so seldom that it can only not starve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from sortserve.core.budget import Deadlines
from sortserve.core.schedule import mean_over_tokens
from sortserve.core.sequence import Promise, Sequence, Status

if TYPE_CHECKING:  # the command line reads the table of policies, and need not wait for numpy
    from sortserve.cost.model import CostModel, Line

__all__ = [
    "NO_GAP_S",
    "SOFT_GAP_S",
    "Demand",
    "Pace",
    "StepCosts",
    "demand_of",
    "end_of",
    "plan_pace",
    "targets_of",
]

SOFT_GAP_S = 1.0
"""All soft requests together get at least a step in so many seconds."""
PACE_SHARE = 0.95
"""Times are paced to this share of what the budget allows: what is left covers the noise."""
NO_GAP_S = 1e-6
"""No gap between two tokens counts as shorter, and no time to spread as less."""


@dataclass(frozen=True)
class StepCosts:
    """A cost model taken apart: a step costs ``base_s`` of its depth and ``row_s`` of each row."""

    model: CostModel
    num_rows: int = 1
    """Rows that steps will have, which says whether they are small or large."""
    chunk: int = 1024
    """Most tokens of one step."""
    safety: float = 1.0

    @cached_property
    def _decode_line(self) -> Line:
        c0, a, b, d, h = self.model.line(self.num_rows)
        safety = self.safety
        return safety * c0, safety * a, safety * b, safety * d, safety * h

    def base_s(self, exit_layer: int) -> float:
        """Of any step down to that layer, however many rows."""
        c0, a, _, _, _ = self._decode_line
        return c0 + a * exit_layer

    def row_s(self, exit_layer: int, context_len: int) -> float:
        """Of one more row that decodes."""
        _, _, b, d, h = self._decode_line
        return exit_layer * (b + d * context_len) + h

    @property
    def row_line(self) -> tuple[float, tuple[float, float]]:
        """``row_s`` as a line: at any depth, and per layer: by itself and per token of context."""
        _, _, b, d, h = self._decode_line
        return h, (b, d)

    def token_s(self, exit_layer: int, context_len: int, *, is_scored: bool = False) -> float:
        """Of one more token of a prompt in a large step; one that is scored passes the head."""
        _, _, b, d, h = self.model.large
        return self.safety * (exit_layer * (b + d * context_len) + is_scored * h)

    def large_extra_s(self, exit_layer: int) -> float:
        """What a large step costs more than ``base_s``, whatever it runs."""
        c0, a, _, _, _ = self.model.large
        return max(0.0, self.safety * (c0 + a * exit_layer) - self.base_s(exit_layer))

    def prefill_s(
        self, exit_layer: int, num_tokens: int, start: int = 0, num_scored: int = 0
    ) -> float:
        """Of a prompt by itself, of which so many tokens pass the head as well."""
        at_all, per_layer = self.reading_line(num_tokens, start, num_scored)
        return at_all + exit_layer * per_layer

    def reading_line(self, num_tokens: int, start: int, num_scored: int = 0) -> tuple[float, float]:
        """``prefill_s`` as a line: at any depth, and per layer."""
        if num_tokens <= 0:
            return 0.0, 0.0
        num_steps = -(-num_tokens // self.chunk)
        c0, a, b, d, h = self.model.line(min(num_tokens, self.chunk))
        kv_tokens = num_tokens * (start + num_tokens / 2)
        per_layer = num_steps * a + b * num_tokens + d * kv_tokens
        at_all = num_steps * c0 + h * (1 + num_scored)
        return self.safety * at_all, self.safety * per_layer

    def decode_s(self, exit_layer: int, context_len: int) -> float:
        """Of a step with one decoding row."""
        c0, a, b, d, h = self._decode_line
        return c0 + exit_layer * (a + b + d * context_len) + h


@dataclass(frozen=True, slots=True)
class Demand:
    """What a policy sees of one live request."""

    request_id: str
    exit_layer: int
    floor_layer: int
    """It may not go shallower than this."""
    order: float
    """When it came."""
    num_pending: int
    """Known tokens without KV; of one that runs, ``num_ready`` or fewer mean that it decodes."""
    context_len: int
    """Tokens whose KV exists; of one that waits, those that it should find in the prefix cache."""
    is_waiting: bool
    is_promised: bool
    """Its times were promised and can still be kept."""
    is_hard: bool
    """The next token is due by a promise."""
    due_s: float
    """When its next token should be out."""
    gap_s: float
    """The mean time between two tokens after it."""
    end_s: float
    """When it should be over; infinite where nothing was promised of its end."""
    weight: float = 1.0
    """What its answer is worth beside that of another request."""
    num_left: int = 1
    """Output tokens still to come, as far as can be planned; at least one."""
    num_done: int = 0
    """Output tokens that it has."""
    is_lost: bool = False
    """Its budget of time is missed already, or was never promised: no token of it counts."""
    next_share: float = 1.0
    """What its next token costs beside the mean of those left: above 1 only where a schedule will
    take it shallower. Its gaps are as much longer."""

    num_ready: int = 1
    """Tokens of one decode step: the last sampled one, and those that its grammar forced."""

    num_scored: int = 0
    """Of what is pending, tokens after which the model is to judge the next one of the prompt: they
    pass the head."""

    next_by_s: float = math.inf
    """When its next token must be out, whatever time the answer has as a whole: one with a pace may
    end with any token, and its mean is kept only if it is kept at each of them."""

    def at(self, exit_layer: int) -> Demand:
        """The same, if it goes shallower now."""
        gap_s = self.gap_s / self.next_share  # at least what its tokens need from there on
        return replace(self, exit_layer=exit_layer, gap_s=gap_s, next_share=1.0)

    @property
    def is_decoding(self) -> bool:
        """Whether one more step gives a token."""
        is_read = self.num_pending <= self.num_ready and self.context_len > 0
        return is_read and not self.is_waiting

    def work_s(self, costs: StepCosts) -> float:
        """Predicted seconds to its next token if it were alone."""
        if self.is_decoding:
            more_s = (self.num_pending - 1) * costs.row_s(self.exit_layer, self.context_len)
            return costs.decode_s(self.exit_layer, self.context_len) + more_s
        pending = self.num_pending, self.context_len, self.num_scored
        return costs.prefill_s(self.exit_layer, *pending)


@dataclass(frozen=True)
class Pace:
    """How the time of a budget is spread."""

    first_due_s: float
    gap_s: float


def plan_pace(
    deadlines: Deadlines,
    *,
    now: float,
    num_tokens: int,
    prefill_s: float,
    decode_s: float,
    ease: float = 1.0,
) -> Pace:
    """Spread the time from ``now`` over a prompt and the tokens after the first.

    Args:
        deadlines: absolute times; none at all gives infinities.
        now: when work could start.
        num_tokens: output tokens to plan for.
        prefill_s: predicted seconds of the prompt alone.
        decode_s: predicted seconds of a decode step alone.
        ease: 1 stretches prompt and tokens alike; less lets the tokens hurry, and leaves more time
            for a prompt that must wait for others.
    """
    num_gaps = num_tokens - 1
    first_due, gap = math.inf, math.inf
    if deadlines.e2e_s is not None:
        stretch = (deadlines.e2e_s - now) / max(prefill_s + num_gaps * decode_s, NO_GAP_S)
        wanted_gap = decode_s * max(stretch, NO_GAP_S) ** (ease if stretch > 1.0 else 1.0)
        if deadlines.tpot_s is not None:  # decoding so fast leaves the rest for the prompt
            wanted_gap = min(wanted_gap, deadlines.tpot_s)
        first_due = deadlines.e2e_s - num_gaps * wanted_gap
    if deadlines.ttft_s is not None:
        first_due = min(first_due, deadlines.ttft_s)
    if deadlines.e2e_s is not None and num_gaps:
        gap = (deadlines.e2e_s - first_due) / num_gaps
    if deadlines.tpot_s is not None:
        gap = min(gap, deadlines.tpot_s)
    return Pace(first_due, max(gap, NO_GAP_S))


def targets_of(deadlines: Deadlines, arrival_s: float) -> Deadlines:
    """What is paced to: a little earlier than the client's deadlines."""

    def earlier(deadline_s: float | None) -> float | None:
        return None if deadline_s is None else arrival_s + PACE_SHARE * (deadline_s - arrival_s)

    tpot_s = deadlines.tpot_s
    return Deadlines(
        ttft_s=earlier(deadlines.ttft_s),
        e2e_s=earlier(deadlines.e2e_s),
        tpot_s=None if tpot_s is None else PACE_SHARE * tpot_s,
    )


def demand_of(
    sequence: Sequence,
    *,
    now: float,
    expect: Callable[[Sequence], int],
    costs: StepCosts,
    soft_gap_s: float,
) -> Demand:
    """The demand of a live sequence.

    Args:
        sequence: waiting or running.
        now: the engine's clock.
        expect: the output tokens to plan for.
        costs: to see whether its promise can still be kept.
        soft_gap_s: what a soft request waits at most between two steps.
    """
    soft_due_s = sequence.last_scheduled_s + soft_gap_s
    due_s = gap_s = end_s = math.inf
    promised = sequence.promise is not None
    num_left = max(1, expect(sequence) - sequence.num_sampled_tokens)
    next_share = _next_share(sequence, num_left, costs) if promised else 1.0
    if promised:
        due_s, gap_s, end_s = _due_times(sequence, num_left, next_share, now)
        bounds_any = math.isfinite(min(due_s, gap_s, end_s))
        gap_s = max(gap_s, costs.decode_s(sequence.floor_layer, sequence.num_tokens))
        promised = bounds_any and not _is_hopeless(sequence, num_left, end_s, now, costs)
    if not promised:
        due_s = gap_s = end_s = math.inf
    is_hard = math.isfinite(due_s)
    num_pending, context_len = sequence.reading
    return Demand(
        request_id=sequence.request_id,
        exit_layer=sequence.exit_layer,
        floor_layer=sequence.floor_layer,
        order=sequence.request.arrival_s,
        num_pending=num_pending,
        context_len=context_len,
        is_waiting=sequence.status is Status.WAITING,
        is_promised=promised,
        is_hard=is_hard,
        due_s=due_s if is_hard else soft_due_s,
        gap_s=min(gap_s, soft_gap_s),
        end_s=end_s,
        weight=sequence.request.weight,
        num_left=num_left,
        num_done=sequence.num_sampled_tokens,
        is_lost=sequence.request.budget.has_latency and not promised,
        next_share=next_share,
        num_ready=sequence.num_ready_tokens,
        num_scored=sequence.num_scored_tokens,
        next_by_s=_next_by_s(sequence, now) if promised else math.inf,
    )


def end_of(promise: Promise, now: float, num_tokens: int) -> float:
    """When an answer that has no token yet should be over; infinite where nothing says so.

    A pace counts from its first token, which may come at once.
    """
    if num_tokens == 1:
        return promise.first_due_s
    num_gaps, targets = num_tokens - 1, promise.targets
    ends_s = [promise.first_due_s + num_gaps * promise.gap_s]
    if targets.e2e_s is not None:  # it may be planned for more tokens than when it was promised
        ends_s.append(targets.e2e_s)
    if targets.tpot_s is not None:
        ends_s.append(now + num_gaps * targets.tpot_s)
    return min(ends_s)


def _next_share(sequence: Sequence, num_left: int, costs: StepCosts) -> float:
    """What its next token costs beside the mean of those left: above 1 only under a schedule."""
    if sequence.schedule is None:
        return 1.0

    def decode_s(exit_layer: int) -> float:
        return costs.decode_s(exit_layer, sequence.num_tokens)

    start = sequence.num_output_tokens
    mean_s = mean_over_tokens(
        decode_s, sequence.exit_layer, sequence.schedule, start + num_left, start
    )
    return max(decode_s(sequence.exit_layer), NO_GAP_S) / max(mean_s, NO_GAP_S)


def _token_times(sequence: Sequence, now: float) -> tuple[float | None, float | None]:
    """When its first and its latest token came; one of a step under way counts as coming now."""
    first_s, last_s = sequence.first_token_s, sequence.last_token_s
    if sequence.num_unknown_tokens:
        return now if first_s is None else first_s, now
    return first_s, last_s


def _next_by_s(sequence: Sequence, now: float) -> float:
    """See ``Demand.next_by_s``; infinite where its length is certain, or it has no token yet."""
    promise, (first_s, _) = sequence.promise, _token_times(sequence, now)
    tpot_s = None if promise is None else promise.targets.tpot_s
    if tpot_s is None or first_s is None or sequence.request.has_certain_length:
        return math.inf
    return first_s + sequence.num_output_tokens * tpot_s


def _due_times(
    sequence: Sequence, num_left: int, next_share: float, now: float
) -> tuple[float, float, float]:
    """When the next token, each token after it, and the end are due; infinite where nothing is.

    ``next_share`` of the mean gap goes to the next token.
    """
    promise, (first_s, last_s) = sequence.promise, _token_times(sequence, now)
    assert promise is not None
    if first_s is None or last_s is None:
        end_s = end_of(promise, now, num_left)
        return promise.first_due_s, next_share * promise.gap_s, end_s
    targets = promise.targets
    end_s = math.inf if targets.e2e_s is None else targets.e2e_s
    if targets.tpot_s is not None:
        num_gaps = sequence.num_output_tokens - 1 + num_left
        end_s = min(end_s, first_s + num_gaps * targets.tpot_s)
    gap_s = max(next_share * (end_s - last_s) / num_left, NO_GAP_S)
    return last_s + gap_s, gap_s, end_s


def _is_hopeless(
    sequence: Sequence, num_left: int, end_s: float, now: float, costs: StepCosts
) -> bool:
    """Whether even the floor alone on the machine would be late for the client's own deadlines.

    Such a request is relegated: it costs others their promises and can no longer keep its own.
    """
    deadlines, floor = sequence.deadlines, sequence.floor_layer
    if sequence.num_output_tokens == 0:
        ready_s = now + costs.prefill_s(floor, *sequence.reading, sequence.num_scored_tokens)
        if deadlines.ttft_s is not None and ready_s > deadlines.ttft_s:
            return True
        rest_s = (num_left - 1) * costs.decode_s(floor, sequence.num_tokens)
        return deadlines.e2e_s is not None and ready_s + rest_s > deadlines.e2e_s
    ready_s = now + num_left * costs.decode_s(floor, sequence.num_tokens)
    return ready_s > end_s + (1.0 / PACE_SHARE - 1.0) * (end_s - sequence.request.arrival_s)
