"""A full batch as a router sees it: from a report, and with what was sent since."""

from __future__ import annotations

import json
import math

import pytest

from sortserve.core.budget import Budget
from sortserve.replicas.full_batch import FullBatch, OneMore
from sortserve.replicas.load import EngineLoad, ExitLoad
from sortserve.replicas.place import Place
from sortserve.replicas.routed import RoutedRequest

NOW = 100.0
DEEP_MS, ROW_MS = 10.0, 1.0
STEPS = 50


def make_load(**fields: object) -> EngineLoad:
    """One answer of ``STEPS`` steps beside which pacing has no room, and which can spare 200 ms."""
    own = ExitLoad(
        exit_layer=6,
        score=1.0,
        compute=1.0,
        step_ms=DEEP_MS,
        row_ms=ROW_MS,
        prompt_ms=DEEP_MS,
        prompt_token_ms=0.1,
        tpot_ms=DEEP_MS,
        steps_per_s=90.0,
    )
    known = {
        "pressure": 1.2,
        "decode_pressure": 1.2,
        "floor_pressure": 1.2,
        "floor_decode_pressure": 1.2,
        "spare_ms": 200.0,
        "full_batch": ((0.0, 0.0), (float(STEPS), STEPS * (DEEP_MS + ROW_MS))),
        "full_batch_layer": 6,
        **fields,
    }
    return EngineLoad(time_s=NOW, exits=(own,), num_free_pages=9, num_pages=9, **known)  # type: ignore[arg-type]


def make_request(num_output_tokens: int = 20, **budget: float) -> RoutedRequest:
    return RoutedRequest(
        arrival_s=NOW,
        num_prompt_tokens=100,
        num_output_tokens=num_output_tokens,
        budget=Budget(**budget),  # type: ignore[arg-type]
    )


def one_more(num_steps: int = 20, end_s: float = 9.0) -> OneMore:
    return OneMore(
        reading_s=0.01, row_s=1e-3 * ROW_MS, step_s=1e-3 * DEEP_MS, num_steps=num_steps, end_s=end_s
    )


def place(load: EngineLoad, age_s: float = 0.0) -> Place:
    return Place.of(load, age_s, NOW)


def fits(where: Place, request: RoutedRequest) -> bool:
    return where.prospect(request).exit_layer is not None


def test_where_pacing_has_no_room_a_full_batch_may() -> None:
    request = make_request(latency_ms=1000)

    assert fits(place(make_load()), request)
    assert not fits(place(make_load(full_batch=())), request), "of nothing known, none fit"
    assert not fits(place(make_load(spare_ms=20.0)), request), "who is there would be late"
    assert not fits(place(make_load()), make_request(latency_ms=200)), "it would be itself"


def test_who_is_there_is_later_by_a_prompt_and_a_row_in_each_shared_step() -> None:
    full = FullBatch.of(make_load(), 1.0)

    for _ in range(6):  # 10 ms and 20 times 1 ms
        assert full.fits(one_more())
        full.add(one_more())

    assert full.spare_s == pytest.approx(0.2 - 6 * 0.03)
    assert not full.fits(one_more())


def test_one_that_outlasts_them_goes_on_alone() -> None:
    full = FullBatch.of(make_load(spare_ms=None), 1.0)
    shared_s = 0.01 + STEPS * 1e-3 * (DEEP_MS + 2 * ROW_MS)
    alone_s = 10 * 1e-3 * (DEEP_MS + ROW_MS)

    assert full.fits(one_more(STEPS + 10, end_s=shared_s + alone_s + 1e-6))
    assert not full.fits(one_more(STEPS + 10, end_s=shared_s + alone_s - 1e-6))


def test_the_older_a_report_is_the_less_time_it_has_to_spare() -> None:
    request = make_request(latency_ms=1000)

    assert [fits(place(make_load(spare_ms=40.0), age_s), request) for age_s in (0.0, 4.0)] == [
        True,
        False,
    ]


def test_a_pace_says_nothing_of_an_answer_of_one_token() -> None:
    where = place(make_load())

    where.add(make_request(1, tpot_ms=100, ttft_ms=900), 6)

    assert where.full.spare_s == pytest.approx(0.2 - 0.01 - 1e-3 * ROW_MS, abs=1e-3)
    assert fits(where, make_request(latency_ms=1000))


@pytest.mark.parametrize(
    "points",
    [[[0, 0]], [[5, 50]], [[0, 0], [0.5, 9]], [[9, 90], [3, 30]], [[0, 0], [1e400, 1e400]]],
)
@pytest.mark.parametrize("spare_ms", [None, 200.0, -5.0, math.inf])
def test_no_report_is_so_odd_that_a_router_fails(
    points: list[list[float]], spare_ms: float | None
) -> None:
    document = {**make_load().document, "full_batch": points, "spare_ms": spare_ms}
    where = place(EngineLoad.from_document(json.loads(json.dumps(document))))

    for request in (make_request(latency_ms=1000), make_request(1, ttft_ms=300, tpot_ms=50)):
        where.prospect(request)
        where.add(request, 6)


def test_a_report_of_before_full_batches_knows_none() -> None:
    document = make_load().document
    for name in ("spare_ms", "full_batch", "full_batch_layer"):
        del document[name]

    where = place(EngineLoad.from_document(document))

    assert where.full == FullBatch(math.inf, 0.0, [], 0.0)
    assert not fits(where, make_request(latency_ms=1000))
