"""Lines that begin with a slash change what the next answer of a chat may cost."""

from __future__ import annotations

import pytest

from sortserve.commands.chat_state import HELP, ChatState, apply_slash


def after(*lines: str, state: ChatState | None = None) -> ChatState:
    state = state or ChatState()
    for line in lines:
        state, _ = apply_slash(state, line)
    return state


@pytest.mark.parametrize(
    ("line", "budget"),
    [
        ("/exit 24", {"exit_layer": 24}),
        ("/schedule 0:30, 32:27", {"schedule": [[0, 30], [32, 27]]}),
        ("/budget 800ms", {"latency_ms": 800.0}),
        ("/budget 800", {"latency_ms": 800.0}),
        ("/budget 1.5 s", {"latency_ms": 1500.0}),
        ("/ttft 200ms", {"ttft_ms": 200.0}),
        ("/tpot 25ms", {"tpot_ms": 25.0}),
        ("/compute 0.9", {"compute": 0.9}),
        ("/floor 0.6", {"min_quality": 0.6}),
        ("/miss truncate", {"on_miss": "truncate"}),
    ],
)
def test_a_bound_is_a_field_of_the_budget(line: str, budget: dict[str, object]) -> None:
    assert after(line).budget == budget


def test_bounds_combine_and_are_taken_back_one_by_one() -> None:
    state = after("/budget 2s", "/floor 0.6", "/budget off")

    assert state.budget == {"min_quality": 0.6}
    assert after("/floor off", state=state).budget == {}


def test_an_exit_takes_the_place_of_what_would_contradict_it_and_the_other_way_round() -> None:
    assert after("/compute 0.9", "/ttft 90ms", "/exit 24").budget == {
        "ttft_ms": 90.0,
        "exit_layer": 24,
    }
    assert after("/exit 24", "/floor 0.6").budget == {"min_quality": 0.6}
    assert after("/exit 24", "/schedule 0:30").budget == {"schedule": [[0, 30]]}
    assert after("/schedule 0:30", "/ttft 90ms", "/exit 24", "/schedule off").budget == {
        "ttft_ms": 90.0,
        "exit_layer": 24,
    }


def test_exit_auto_leaves_the_choice_to_the_server() -> None:
    state, told = apply_slash(after("/exit 24"), "/exit auto")

    assert state.budget == {}
    assert told == "no budget: the server chooses the exit"


def test_sampling_is_set_and_given_back() -> None:
    state = after("/max 32", "/temperature 0", "/seed 7")

    assert state.options == {"max_tokens": 32, "temperature": 0.0, "seed": 7}
    assert after("/seed off", state=state).options == {"max_tokens": 32, "temperature": 0.0}


def test_a_system_prompt_leads_every_conversation() -> None:
    state = after("/system Be brief.").asked("Why?").answered("So.")

    assert [turn["role"] for turn in state.messages] == ["system", "user", "assistant"]
    assert [turn["role"] for turn in after("/new", state=state).messages] == ["system"]
    assert after("/system", "/new", state=state).messages == []


def test_the_last_question_can_be_asked_again_from_where_it_stood() -> None:
    state = ChatState().asked("One?").answered("1").asked("Two?").answered("2")

    before_and_question = state.last_question()

    assert before_and_question == (ChatState().asked("One?").answered("1"), "Two?")
    assert ChatState().last_question() is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/frobnicate", "/frobnicate is not a command"),
        ("/", "is not a command"),
        ("/exit", "/quit leaves"),
        ("/exit deep", "/exit deep is not allowed: give an integer"),
        ("/schedule", "as in 0:30,32:27; off lifts it"),
        ("/schedule 0:30,32", "'32' should be K:E"),
        ("/schedule 0:24,32:27", "/schedule 0:24,32:27 is not allowed"),
        ("/budget", "'' is not a time: give one such as 800ms or 2s"),
        ("/budget soon", "'soon' is not a time"),
        ("/budget 5 min", "'5 min' is not a time"),
        ("/budget -3ms", "'-3ms' is not a time"),
        ("/budget 0", "'0' is not a time"),
        ("/budget inf", "'inf' is not a time"),
        ("/compute 2", "give a number from 0 to 1"),
        ("/compute nan", "give a number from 0 to 1"),
        ("/miss never", "give one of degrade, truncate, reject"),
        ("/max some", "/max some is not allowed"),
    ],
)
def test_a_mistake_says_what_is_allowed(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        apply_slash(ChatState(), line)

    assert said in str(caught.value)


def test_the_help_names_every_command() -> None:
    from sortserve.commands.chat_state import _COMMANDS

    named = {line.split()[0].lstrip("/") for line in HELP.splitlines() if line.startswith("  /")}

    assert named == {*_COMMANDS, "again", "exits", "quit"}
