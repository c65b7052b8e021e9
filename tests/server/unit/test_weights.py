"""What requests are worth: tiers, priorities, and what a key may ask for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.core.weights import PRIORITY, TIER_WEIGHTS, WEIGHT, KeyWeights, WeightRules

RULES = WeightRules()
WEIGHTS = st.floats(1e-3, 1e3)
TIERS = st.sampled_from([None, "auto", "flex", "default", "priority", "scale", "fast"])


@pytest.mark.parametrize(
    ("tier", "weight", "served_as"),
    [
        (None, 1.0, "default"),
        ("auto", 1.0, "default"),
        ("flex", 0.25, "flex"),
        ("default", 1.0, "default"),
        ("priority", 4.0, "priority"),
        ("ultrafast", 1.0, "default"),
    ],
)
def test_each_tier_has_its_weight_and_unknown_ones_are_the_default(
    tier: str | None, weight: float, served_as: str
) -> None:
    assert RULES.weigh(tier, 0) == (weight, served_as)


def test_a_lower_priority_is_worth_more() -> None:
    weights = [RULES.weigh(None, priority).weight for priority in (100, 5, 0, -5, -100)]

    assert weights == sorted(weights)
    assert weights[2] == 1.0
    assert weights[3] == pytest.approx(1.1**5)
    assert (weights[0], weights[-1]) == (WEIGHT.least, WEIGHT.most) or weights[0] > WEIGHT.least


def test_priorities_can_be_switched_off() -> None:
    rules = WeightRules(priority_base=1.0)

    assert {rules.weigh("flex", priority).weight for priority in (-100, 0, 100)} == {0.25}


@pytest.mark.parametrize(
    ("key", "tier", "weight", "served_as"),
    [
        pytest.param(KeyWeights(default=0.5), None, 0.5, "flex", id="its own default"),
        pytest.param(KeyWeights(default=0.5), "auto", 0.5, "flex", id="auto"),
        pytest.param(KeyWeights(default=0.5), "default", 1.0, "default", id="a tier by name"),
        pytest.param(KeyWeights(default=2.0), None, 2.0, "default", id="between two tiers"),
        pytest.param(KeyWeights(most=1.0), "priority", 1.0, "default", id="cut to a tier"),
        pytest.param(KeyWeights(most=0.5), "priority", 0.5, "flex", id="cut between two"),
        pytest.param(KeyWeights(most=0.1), "flex", 0.1, "flex", id="below all tiers"),
        pytest.param(KeyWeights(most=8.0), "priority", 4.0, "priority", id="within"),
    ],
)
def test_a_key_has_a_default_and_cuts_what_is_above_its_greatest_weight(
    key: KeyWeights, tier: str | None, weight: float, served_as: str
) -> None:
    assert RULES.weigh(tier, 0, key) == (weight, served_as)


def test_a_priority_lifts_nobody_above_what_the_key_may_have() -> None:
    assert RULES.weigh("flex", -100, KeyWeights(most=2.0)).weight == 2.0


@given(
    tiers=st.fixed_dictionaries(dict.fromkeys(TIER_WEIGHTS, WEIGHTS)),
    base=st.floats(1.0, 100.0),
    tier=TIERS,
    priority=st.integers(-100, 100),
    default=st.none() | WEIGHTS,
    most=st.none() | WEIGHTS,
)
def test_whatever_is_configured_a_weight_is_one_and_the_tier_is_worth_no_more_than_was_asked(
    tiers: dict[str, float],
    base: float,
    tier: str | None,
    priority: int,
    default: float | None,
    most: float | None,
) -> None:
    rules = WeightRules(tiers, base)
    assert priority in PRIORITY

    weight, served_as = rules.weigh(tier, priority, KeyWeights(default, most))

    assert weight in WEIGHT
    assert most is None or weight <= most
    assert served_as in tiers
    assert most is None or tiers[served_as] <= most or tiers[served_as] == min(tiers.values())
    if priority < 100:
        assert rules.weigh(tier, priority + 1, KeyWeights(default, most)).weight <= weight
