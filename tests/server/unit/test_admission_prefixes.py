"""What the prefix cache holds of a prompt costs no time: forecasts know it, by depth."""

from __future__ import annotations

from typing import Any

import pytest

from sortserve.admission.outlook import Load, Newcomer, Outlook
from sortserve.core.sequence import Sequence
from sortserve.scheduling import prefix_cache
from sortserve.scheduling.columns import Columns
from sortserve.scheduling.demand import demand_of
from sortserve.scheduling.policies.table import get_policy
from sortserve.scheduling.prefix_cache import block_digest
from support.scripted import make_request
from support.timed import COSTS, MODEL, Timed, make_demand, make_timed, timed_request

PROMPT = 200
"""Tokens; those of the first request, at exit 6, are all known but for the last few."""


def after_one_like_it(*requests: Any, exit_layer: int = 6, cached: bool = True) -> Timed:
    """What becomes of requests that begin as one did that is over."""
    timed = make_timed(enable_prefix_caching=cached)
    timed.run([timed_request("first", PROMPT, exit_layer=exit_layer)])
    timed.run([*requests])
    return timed


@pytest.mark.parametrize(
    ("ttft_ms", "unknown", "known"), [(5, 2, 2), (8, 2, 4), (10, 2, 6), (18, 4, 6), (25, 6, 6)]
)
def test_time_that_a_known_prefix_saves_is_spent_on_depth(
    ttft_ms: float, unknown: int, known: int
) -> None:
    second = timed_request("second", PROMPT, at=5.0, ttft_ms=ttft_ms)

    for cached, exit_layer in ((False, unknown), (True, known)):
        timed = after_one_like_it(second, cached=cached)
        assert timed.choices["second"].exit_layer == exit_layer
    assert timed.reports["second"].met is True


def test_a_request_is_not_refused_for_a_prompt_that_need_not_be_read() -> None:
    second = timed_request("second", PROMPT, at=5.0, ttft_ms=10, min_exit_layer=6, on_miss="reject")

    assert "second" not in after_one_like_it(second, cached=False).reports
    assert after_one_like_it(second).reports["second"].met is True


def test_a_prefix_is_of_no_use_at_exits_deeper_than_it_was_computed_for() -> None:
    second = timed_request("second", PROMPT, at=5.0, ttft_ms=10)

    timed = after_one_like_it(second, exit_layer=4)

    assert timed.choices["second"].exit_layer == 4
    held = timed.engine.kv_cache.held_tokens(second, (2, 4, 6))
    assert list(held) == [2, 4]


def test_the_estimate_of_a_known_prompt_is_what_it_takes() -> None:
    second = timed_request("second", PROMPT, at=5.0, ttft_ms=1_000)

    timed = after_one_like_it(second)

    estimate, report = timed.choices["second"].estimate, timed.reports["second"]
    assert estimate is not None
    assert report.ttft_s is not None
    assert estimate.ttft_s == pytest.approx(MODEL.safety * report.ttft_s, rel=0.01)


def test_a_prefix_that_is_gone_when_the_prompt_is_read_makes_the_request_late_and_no_more() -> None:
    timed = make_timed(enable_prefix_caching=True)
    timed.run([timed_request("first", PROMPT, exit_layer=6)])
    held = timed.engine.kv_cache.prefix_cache
    choose = timed.desk.choose

    def and_forget(*args: Any, **options: Any) -> Any:
        choice = choose(*args, **options)
        for digest in list(held._entries):
            held.drop(digest)
        return choice

    timed.desk.choose = and_forget  # type: ignore[method-assign]
    timed.run([timed_request("second", PROMPT, at=5.0, ttft_ms=10)])

    assert timed.choices["second"].exit_layer == 6
    assert timed.reports["second"].met is False
    assert timed.reports["second"].num_output_tokens == 10


def test_a_prompt_is_hashed_once_however_often_its_prefix_is_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed = make_timed(enable_prefix_caching=True)
    timed.run([timed_request("first", PROMPT, exit_layer=6)])
    hashed: list[tuple[int, ...]] = []

    def counted(parent: bytes, token_ids: Any) -> bytes:
        hashed.append(tuple(token_ids))
        return block_digest(parent, token_ids)

    monkeypatch.setattr(prefix_cache, "block_digest", counted)
    second = timed_request("second", PROMPT, at=5.0, ttft_ms=1_000, max_tokens=20)

    timed.run([second])  # at the desk, in the queue, as it enters, and as its blocks are full

    assert timed.reports["second"].num_cached_tokens > PROMPT - 5
    read = [*second.prompt_token_ids, *timed.results["second"].token_ids[:-1]]
    size = timed.engine.kv_cache.block_size
    num_full = len(read) // size
    assert hashed == [tuple(read[i * size : (i + 1) * size]) for i in range(num_full)]


def test_what_waits_counts_what_it_should_find_as_read_and_decodes_not_yet() -> None:
    sequence = Sequence(
        make_request("r", "a" * 65), exit_layer=6, seed=0, stop_token_ids=frozenset()
    )
    sequence.num_found_tokens = 64

    demand = demand_of(sequence, now=0.0, expect=lambda _: 9, costs=COSTS, soft_gap_s=1.0)

    assert (demand.num_pending, demand.context_len) == (1, 64)
    assert not demand.is_decoding
    assert not Columns.of([demand]).is_decoding.any()


def test_a_newcomer_takes_the_pages_of_all_its_tokens_known_or_not() -> None:
    outlook = Outlook(Load(now=0.0, policy=get_policy("deadline")), MODEL, (6,))
    known = make_demand(num_pending=1, context_len=99)
    unknown = make_demand(num_pending=100)

    pages = [outlook.queue.stay_of(demand).pages for demand in (known, unknown)]

    assert pages[0] == pages[1]


def test_reading_is_told_by_exit() -> None:
    newcomer = Newcomer(
        num_prompt_tokens=100, num_output_tokens=5, arrival_s=0.0, cached={2: 96, 4: 64}
    )

    assert [newcomer.reading(e) for e in (2, 4, 6)] == [(4, 96), (36, 64), (100, 0)]
