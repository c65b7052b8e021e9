"""What a server says of its exits when it starts."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from sortserve.core.budget import ExitInfo, ExitTable
from sortserve.process.notices import tell_of_exits, warn_of_open_door
from support.scripted import make_exits


def told(exits: ExitTable, caplog: pytest.LogCaptureFixture) -> list[tuple[str, object]]:
    """The lines, each with its fields."""
    with caplog.at_level(logging.INFO):
        tell_of_exits(exits)
    return [(r.getMessage(), getattr(r, "fields", None)) for r in caplog.records]


def test_measured_exits_that_are_all_served_are_not_worth_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert told(make_exits(2, 4, 6), caplog) == []


def test_exits_below_the_floor_are_named(caplog: pytest.LogCaptureFixture) -> None:
    ((line, values),) = told(replace(make_exits(2, 4, 6), min_quality=0.5), caplog)

    assert "only to requests that name" in line
    assert values == {"exits": [2], "min_quality": 0.5}


def test_a_checkpoint_without_scores_says_once_what_stands_in_for_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exits = ExitTable(
        tuple(ExitInfo(exit_layer=e, num_parameters=e, compute=e / 6) for e in (3, 6))
    )

    ((line, values),) = told(exits, caplog)

    assert "share of the layers" in line
    assert values == {"scores": "3: 0.50, 6: 1.00"}


def test_a_checkpoint_with_one_exit_needs_no_scores(caplog: pytest.LogCaptureFixture) -> None:
    assert told(ExitTable((ExitInfo(exit_layer=6, num_parameters=6, compute=1.0),)), caplog) == []


def test_exits_that_are_not_usable_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    exits = make_exits(2, 4, 6)
    judged = [replace(i, usable=u) for i, u in zip(exits.exits, (False, None, True), strict=True)]

    ((line, values),) = told(ExitTable(tuple(judged)), caplog)

    assert "not usable" in line
    assert values == {"exits": [2]}
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("is_guarded", [False, True])
@pytest.mark.parametrize("is_local", [False, True])
def test_a_door_that_is_open_to_the_network_is_a_warning(
    is_guarded: bool, is_local: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_open_door(is_guarded=is_guarded, is_local=is_local)

    warned = [record.levelname for record in caplog.records]
    assert warned == ["WARNING"] * (not is_guarded and not is_local)
