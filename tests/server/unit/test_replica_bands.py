"""Where a request is at home among the replicas, by how hurried it is beside the latest others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.replicas.bands import (
    LEAST_NUM,
    MAX_HURRY,
    NUM_LATEST,
    REACH,
    Mix,
    Pace,
    at_home,
    row_of,
)

HURRIED = Pace(hurry=0.6, work_s=0.02)
PATIENT = Pace(hurry=0.1, work_s=0.02)
EQUAL = {f"r{i}": 1.0 for i in range(8)}

paces = st.builds(Pace, hurry=st.floats(0.001, MAX_HURRY), work_s=st.floats(1e-4, 1.0))


def mix_of(*latest: Pace) -> Mix:
    mix = Mix()
    for pace in latest:
        mix.add(pace)
    return mix


# ---- the mix ----


def test_the_most_hurried_stand_at_the_front_and_others_behind_what_those_need() -> None:
    """Steps of the hurried leave 0.4 of a machine for their work, those of the patient 0.9."""
    mix = mix_of(*[HURRIED, PATIENT] * LEAST_NUM)

    assert mix.place(HURRIED) == 0.0
    assert mix.place(PATIENT) == pytest.approx((1 / 0.4) / (1 / 0.4 + 1 / 0.9))


def test_who_is_more_patient_than_all_stands_at_the_end() -> None:
    mix = mix_of(*[HURRIED, PATIENT] * LEAST_NUM)

    assert mix.place(Pace(hurry=0.05, work_s=0.1)) == 1.0


def test_nobody_is_kept_apart_from_those_who_are_as_hurried() -> None:
    assert mix_of(*[HURRIED] * LEAST_NUM).place(HURRIED) is None
    assert mix_of(*[HURRIED] * LEAST_NUM).place(PATIENT) == 1.0


def test_of_few_requests_nothing_is_concluded() -> None:
    assert mix_of(*[HURRIED] * (LEAST_NUM - 1)).place(PATIENT) is None


def test_what_is_long_ago_is_forgotten() -> None:
    mix = mix_of(*[HURRIED] * NUM_LATEST, *[PATIENT] * NUM_LATEST)

    assert mix.place(PATIENT) is None


def test_a_copy_does_not_hear_of_what_comes_later() -> None:
    mix = mix_of(*[HURRIED] * (LEAST_NUM - 1))
    copied = mix.copy()

    mix.add(HURRIED)

    assert (mix.place(PATIENT), copied.place(PATIENT)) == (1.0, None)


@given(st.lists(paces, min_size=LEAST_NUM, max_size=60), paces, paces)
def test_who_is_more_hurried_never_stands_behind(
    latest: list[Pace], one: Pace, other: Pace
) -> None:
    mix = mix_of(*latest)
    first, second = (mix.place(pace) for pace in sorted((one, other), key=lambda p: -p.hurry))

    if first is not None and second is not None:
        assert 0.0 <= first <= second <= 1.0


# ---- the homes ----


def test_home_is_where_it_stands_and_a_little_to_both_sides() -> None:
    assert REACH == 1.5
    assert at_home(0.0, EQUAL) == {"r0", "r1"}
    assert at_home(0.3, EQUAL) == {"r0", "r1", "r2", "r3"}
    assert at_home(1.0, EQUAL) == {"r6", "r7"}


def test_the_most_hurried_are_at_home_at_the_fastest() -> None:
    token_ms = {"slow": 20.0, "slow2": 20.0, "slow3": 20.0, "fast": 10.0}

    assert "fast" in at_home(0.0, row_of(token_ms))
    assert "fast" not in at_home(1.0, row_of(token_ms))


def test_a_little_of_calibration_moves_nobody() -> None:
    noisy = {name: (7.7, 10.0, 11.5)[i % 3] for i, name in enumerate(reversed(EQUAL))}

    assert list(row_of(noisy).items()) == list(EQUAL.items())


@given(
    st.floats(0, 1),
    st.dictionaries(st.text(max_size=3), st.floats(1, 100), min_size=1, max_size=12),
)
def test_everybody_has_a_home(place: float, token_ms: dict[str, float]) -> None:
    home = at_home(place, row_of(token_ms))

    assert home
    assert home <= token_ms.keys()
