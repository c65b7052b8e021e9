"""Every sampling field: what it allows, and that anything else is an InvalidRequestError."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sortserve.core.errors import InvalidRequestError
from sortserve.core.sampling_params import SamplingParams

INT_FIELDS = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs")
FLOAT_FIELDS = (
    *("temperature", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty"),
)
BOOL_FIELDS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
NO_NUMBERS: list[object] = [math.nan, math.inf, -math.inf, True, False, "1", [1], {}, 1j]
HUGE = [10**400, -(10**400), 10**5000]


@pytest.mark.parametrize("value", [*NO_NUMBERS, None, *HUGE], ids=range(len(NO_NUMBERS) + 4))
@pytest.mark.parametrize("name", [*INT_FIELDS, *FLOAT_FIELDS])
def test_what_is_no_number_or_a_huge_one_is_refused_by_name(name: str, value: object) -> None:
    if value is None and name in {"seed", "logprobs"}:
        return
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
    assert caught.value.message.startswith(f"{name}=")
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("name", INT_FIELDS)
def test_a_count_with_a_fraction_is_refused(name: str) -> None:
    for value in (1.0, 1.5):
        with pytest.raises(InvalidRequestError, match="an integer"):
            SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BOOL_FIELDS)
def test_a_switch_is_true_or_false(name: str) -> None:
    for value in (0, 1, "true", None):
        with pytest.raises(InvalidRequestError, match="true or false"):
            SamplingParams(**{name: value})  # type: ignore[arg-type]


RANGES: list[tuple[str, list[float], list[float]]] = [
    ("max_tokens", [1, 2**31 - 1], [0, -1, 2**31]),
    ("min_tokens", [0, 16], [-1, 17]),
    ("temperature", [0, 0.0, 5e-324, 2, 100.0], [-5e-324, 100.1]),
    ("top_p", [0, 0.0, 5e-324, 1, 1.0], [-5e-324, 1.0000001]),
    ("top_k", [-1, 0, 1, 2**31 - 1], [-2, 2**31]),
    ("min_p", [0, 1.0], [-0.1, 1.1]),
    ("repetition_penalty", [5e-324, 1, 100.0], [0, -1.0, 100.1]),
    ("presence_penalty", [-2, 2.0], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2.0], [-2.1, 2.1]),
    ("seed", [-(2**63), 0, 2**63 - 1], [-(2**63) - 1, 2**63]),
    ("logprobs", [0, 20], [-1, 21]),
]


@pytest.mark.parametrize(("name", "allowed", "refused"), RANGES)
def test_each_number_has_a_range_and_its_ends_are_allowed(
    name: str, allowed: list[float], refused: list[float]
) -> None:
    for value in allowed:
        assert getattr(SamplingParams(**{name: value}), name) == value  # type: ignore[arg-type]
    for value in refused:
        with pytest.raises(InvalidRequestError) as caught:
            SamplingParams(**{name: value})  # type: ignore[arg-type]
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {-1: 1.0}}, "logit_bias.-1"),
        ({"logit_bias": {True: 1.0}}, "logit_bias.true"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias.5"),
        ({"logit_bias": {5: 100.5}}, "logit_bias.5"),
        ({"logit_bias": {5: math.nan}}, "logit_bias.5"),
        ({"logit_bias": {5: True}}, "logit_bias.5"),
        ({"logit_bias": {5: "1"}}, "logit_bias.5"),
        ({"logit_bias": {5: 10**400}}, "logit_bias.5"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"stop": "abc"}, "stop"),
        ({"stop": ("",)}, "stop"),
        ({"stop": (1,)}, "stop"),
        ({"stop": ("a",) * 17}, "stop"),
        ({"stop_token_ids": (3, -1)}, "stop_token_ids.1"),
        ({"stop_token_ids": (3, True)}, "stop_token_ids.1"),
        ({"stop_token_ids": (1.0,)}, "stop_token_ids.0"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
    ],
)
def test_lists_and_maps_are_checked_item_by_item(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**fields)  # type: ignore[arg-type]
    assert caught.value.param == param


_ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(300, 6000).map(lambda digits: 10**digits),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(), st.text(max_size=2), st.floats()), max_size=3),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=2)), st.floats(), max_size=3),
)
_FIELDS = (*INT_FIELDS, *FLOAT_FIELDS, *BOOL_FIELDS, "logit_bias", "stop", "stop_token_ids")


@given(st.dictionaries(st.sampled_from(_FIELDS), _ANYTHING, max_size=4))
def test_any_values_make_parameters_or_an_error_that_names_a_field(
    fields: dict[str, object],
) -> None:
    named: str | None = None
    try:
        SamplingParams(**fields)  # type: ignore[arg-type]
    except InvalidRequestError as error:
        named = str(error.param).split(".")[0]
    assert named in {None, "min_tokens", *fields}  # min_tokens may exceed max_tokens
