"""What replies say of the depth that was taken: the model's name, and headers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import pytest

from sortserve.admission.choose import ExitChoice
from sortserve.api.generation import Generation
from sortserve.api.interfaces import Tokenizer
from sortserve.api.replies.formats import ChatFormat, CompletionFormat, GenerateFormat
from sortserve.core.budget import Budget
from sortserve.core.request import Estimate, FinishReason, RequestOutput, RequestReport
from sortserve.core.schedule import DepthSchedule
from sortserve.engine.stream import RequestStream

FORMATS = (GenerateFormat, CompletionFormat, ChatFormat)


@dataclass
class Started:
    """The part of a stream that a generation asks before the first token."""

    choice: ExitChoice


def generation(
    *,
    start: int = 6,
    deepest: int = 6,
    names_exit: bool = True,
    n: int = 1,
    choice: ExitChoice | None = None,
) -> Generation:
    choice = choice or ExitChoice(start, Estimate(0.1, 0.2, 1.5), fits=True)
    return Generation(
        [cast(RequestStream, Started(choice)) for _ in range(n)],
        num_prompt_tokens=[1],
        deepest_layer=deepest,
        names_exit=names_exit,
        field_names={},
        keep=True,
    )


def output(exit_layer: int, *, last: bool = False, **report: Any) -> RequestOutput:
    if not last:
        return RequestOutput(request_id="r", text="x", exit_layer=exit_layer)
    reason = FinishReason.STOP
    return RequestOutput(
        request_id="r",
        exit_layer=exit_layer,
        finish_reason=reason,
        report=RequestReport(
            **{
                "request_id": "r",
                "budget": Budget(),
                "finish_reason": reason,
                "num_prompt_tokens": 1,
                "num_cached_tokens": 0,
                "num_output_tokens": 2,
                "exit_layer": exit_layer,
                "tokens_by_exit": {exit_layer: 2},
                "compute": 0.5,
                "predicted": Estimate(0.1, 0.2, 1.5),
                "arrival_s": 0.0,
                "first_scheduled_s": 0.0,
                "first_token_s": 0.5,
                "last_token_s": 1.0,
                "finished_s": 1.0,
                **report,
            }
        ),
    )


def models(events: str) -> list[str]:
    return [json.loads(line[6:])["model"] for line in events.split("\n\n") if line]


def make(kind: type[GenerateFormat], of: Generation) -> GenerateFormat:
    return kind(generation=of, tokenizer=cast(Tokenizer, None), head={"id": "r", "model": "tiny"})


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_names_the_exit_from_the_token_on_that_was_made_shallower(
    kind: type[GenerateFormat],
) -> None:
    of = generation()
    writer = make(kind, of)

    events = writer.opening()
    for one in (output(6), output(4), output(2, last=True)):
        of.take(0, one)
        events += writer.chunk(0, one)
    events += writer.closing()

    names = models(events)
    assert sorted(set(names), key=names.index) == ["tiny", "tiny@4", "tiny@2"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_reply_names_the_exit_at_the_end(kind: type[GenerateFormat]) -> None:
    of = generation()
    of.take(0, output(6))
    of.take(0, output(4, last=True))

    assert make(kind, of).body()["model"] == "tiny@4"


def test_an_answer_as_deep_as_its_budget_allows_has_the_name_that_was_asked_for() -> None:
    of = generation(start=4, deepest=4)
    of.take(0, output(4, last=True))

    assert make(GenerateFormat, of).body()["model"] == "tiny"


def test_who_bounds_a_time_has_left_the_depth_to_the_server_and_keeps_the_name() -> None:
    of = generation(start=4, names_exit=False)
    of.take(0, output(4, last=True, degraded=True))

    assert make(GenerateFormat, of).body()["model"] == "tiny"
    assert of.last_headers()["x-degraded"] == "true"


def test_the_headers_of_a_stream_tell_what_is_known_at_its_start() -> None:
    assert generation(start=4).first_headers() == {
        "x-exit-layer": "4",
        "x-degraded": "true",
        "x-predicted-ms": "1500.000",
    }


def test_a_stream_whose_depth_will_fall_along_a_schedule_of_the_servers_choice_says_so() -> None:
    falling = DepthSchedule.parse("0:6,10:4")
    choice = ExitChoice(6, Estimate(0.1, 0.2, 1.5), fits=True, schedule=falling)

    assert generation(choice=choice).first_headers()["x-degraded"] == "true"


def test_the_headers_of_a_whole_reply_tell_what_became_of_the_budget() -> None:
    of = generation()
    of.take(0, output(6, last=True, budget=Budget(latency_ms=1e6)))

    assert of.last_headers() == {
        "x-exit-layer": "6",
        "x-degraded": "false",
        "x-predicted-ms": "1500.000",
        "x-budget-met": "true",
    }


def test_of_several_answers_the_shallowest_and_the_one_that_missed_count() -> None:
    of = generation(n=2, deepest=6)
    budget = Budget(latency_ms=1e6)
    of.take(0, output(6, last=True, budget=budget))
    of.take(1, output(4, last=True, budget=Budget(latency_ms=1), degraded=True))

    headers = of.last_headers()

    assert headers["x-exit-layer"] == "4"
    assert headers["x-degraded"] == "true"
    assert headers["x-budget-met"] == "false"
