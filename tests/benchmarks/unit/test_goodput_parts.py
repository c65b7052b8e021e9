"""Quality-weighted goodput, the search for the load, and the journal of a long run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.lib.grading import Graded, effective_scores, grade
from benchmarks.lib.half_rate import HalfRateSearch
from benchmarks.lib.journal import Journal
from benchmarks.lib.systems import DEFAULT_SYSTEMS, SYSTEMS
from hypothesis import given
from hypothesis import strategies as st

SCORES = {18: 0.2, 24: 0.6, 30: 1.0}


def request(
    met: bool | None = True,
    tokens: dict[int, int] | None = None,
    *,
    name: str = "tight",
    refused: bool = False,
    weight: float = 1.0,
) -> Graded:
    by_exit = {30: 1} if tokens is None else tokens
    return Graded(class_name=name, met=met, refused=refused, tokens_by_exit=by_exit, weight=weight)


# Quality-weighted goodput


def test_an_answer_is_worth_the_mean_score_of_its_tokens() -> None:
    assert request(True, {30: 1, 24: 2, 18: 1}).quality(SCORES) == pytest.approx(0.6)
    assert request(False, {30: 1}).quality(SCORES) == 0.0
    assert request(True, {}).quality(SCORES) == 0.0


def test_all_arrivals_count_by_their_weights() -> None:
    requests = [request(weight=3.0), request(False), request(False, {}, refused=True)]

    found = grade(requests, SCORES, ["tight", "loose"])

    assert found["quality_goodput"] == pytest.approx(3 / 5)
    assert found["goodput_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["met_of_admitted"] == 0.5
    assert found["quality_by_class"] == {"tight": 0.6, "loose": None}


def test_who_has_no_budget_counts_for_the_means_alone() -> None:
    found = grade([request(), request(None, {18: 1}, name="unbudgeted")], SCORES, ["tight"])

    assert (found["quality_goodput"], found["mean_score"]) == (1.0, 0.6)


@given(
    st.lists(
        st.builds(
            request,
            st.booleans(),
            st.dictionaries(st.sampled_from(sorted(SCORES)), st.integers(1, 50), min_size=1),
            weight=st.floats(0.1, 10.0),
        ),
        min_size=1,
    )
)
def test_it_lies_between_nothing_and_the_share_of_weight_that_was_met(
    requests: list[Graded],
) -> None:
    found = grade(requests, SCORES, ["tight"])
    most = sum(r.weight for r in requests if r.met) / sum(r.weight for r in requests)

    assert 0.0 <= found["quality_goodput"] <= most + 1e-4
    everything = grade(requests, dict.fromkeys(SCORES, 1.0), ["tight"])
    assert everything["quality_goodput"] == pytest.approx(most, abs=1e-4)


def test_an_exit_without_a_score_counts_its_share_of_the_layers() -> None:
    assert effective_scores({15: None, 24: 0.7, 30: None}) == {15: 0.5, 24: 0.7, 30: 1.0}


# Systems


def test_pinned_systems_have_one_exit_and_the_others_none() -> None:
    exits = (18, 21, 24, 27, 30)

    pinned = {name: system.pinned(exits) for name, system in SYSTEMS.items()}

    assert (pinned["full"], pinned["middle"], pinned["shallow"]) == (30, 24, 18)
    assert {pinned[name] for name in ("lockstep", "quality", "depth")} == {None}
    assert SYSTEMS["lockstep"].flags == ["--policy", "lockstep"]
    assert set(DEFAULT_SYSTEMS) <= set(SYSTEMS)


# The rate at which full depth meets half


@given(st.floats(0.05, 200.0), st.floats(0.05, 200.0), st.floats(0.3, 4.0))
def test_the_search_ends_where_half_is_met(start: float, half: float, steepness: float) -> None:
    search = HalfRateSearch(start, max_tries=40)

    while not search.is_done:
        search.tell(1.0 / (1.0 + (search.rate / half) ** steepness))

    assert search.rate == pytest.approx(half, rel=0.5)
    assert 1.0 / (1.0 + (search.rate / half) ** steepness) == pytest.approx(0.5, abs=0.04)


def test_a_share_that_jumps_over_one_half_ends_in_a_narrow_bracket() -> None:
    search = HalfRateSearch(1.0, precision=1.05, max_tries=40)

    while not search.is_done:
        search.tell(0.9 if search.rate < 5.0 else 0.1)

    assert search.rate == pytest.approx(5.0, rel=0.05)


def test_a_search_gives_up_after_so_many_tries() -> None:
    search = HalfRateSearch(1.0, max_tries=3)

    while not search.is_done:
        search.tell(1.0)

    assert [rate for rate, _ in search.tried] == [1.0, 2.0, 4.0]


# The journal


def test_a_run_goes_on_with_what_was_done(tmp_path: Path) -> None:
    path, run = tmp_path / "runs" / "journal.jsonl", {"seed": 0, "trace": Path("a.jsonl")}
    Journal(path, run).add("full at 2", {"share": 0.5})
    with path.open("a") as stream:
        stream.write('{"part": "full at 4", "val')  # it was cut off here

    journal = Journal(path, run)

    assert "full at 2" in journal
    assert journal["full at 2"] == {"share": 0.5}
    assert "full at 4" not in journal
    journal.add("full at 4", {"share": 0.25})
    assert Journal(path, run)["full at 4"] == {"share": 0.25}


def test_a_journal_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"seed": 0, "systems": ["full"]})

    with pytest.raises(ValueError, match="other values of seed, systems"):
        Journal(path, {"seed": 1, "systems": ["full", "middle"]})


def test_a_file_that_was_cut_off_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"run": {"see')

    Journal(path, {"seed": 0})

    assert json.loads(path.read_text()) == {"run": {"seed": 0}}


def test_without_a_file_parts_are_kept_for_this_run_alone() -> None:
    journal = Journal(None, {})

    assert journal.add("a", {1: 2.0}) == {"1": 2.0}  # as it would be read back
    assert "a" in journal
