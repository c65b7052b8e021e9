"""A name that a table does not have is refused with those that it has."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sortserve.core.errors import ConfigError
from sortserve.scheduling.objective import OBJECTIVES, get_objective
from sortserve.scheduling.policies.table import POLICIES, get_policy


@pytest.mark.parametrize(
    ("get", "names", "param"),
    [(get_policy, POLICIES, "policy"), (get_objective, OBJECTIVES, "objective")],
)
def test_a_policy_and_an_objective_are_chosen_by_name(
    get: Callable[[str], object], names: dict[str, object], param: str
) -> None:
    assert all(get(name) is thing for name, thing in names.items())

    with pytest.raises(ConfigError, match=f"{param}='no such' is not known") as refusal:
        get("no such")

    assert refusal.value.param == param
    assert all(name in refusal.value.message for name in names)
