"""``POST /generate``: the native route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sortserve.admission.queue_limits import Reservation
from sortserve.core.request import Request
from sortserve.engine.stream import RequestStream
from support.http_service import MODEL, HttpService
from support.scripted import EOS, depth_letter


async def test_an_answer_has_text_usage_and_what_became_of_the_budget(shared: HttpService) -> None:
    reply = await shared.post("/generate", {"prompt": "ab", "max_tokens": 3, "request_id": "r1"})

    body = reply.json()
    assert reply.status_code == 200
    assert (body["id"], body["model"]) == ("r1", MODEL)
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    [choice] = body["choices"]
    assert (choice["index"], choice["text"]) == (0, "cde")
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert "token_ids" not in choice
    assert choice["budget"] == body["budget"]
    assert body["budget"]["exit_layer"] == 6
    assert body["budget"]["tokens_by_exit"] == {"6": 3}
    assert body["budget"]["met"] is None


async def test_messages_go_through_the_chat_template_and_its_variables(
    shared: HttpService,
) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "x"}]
    body = {"messages": messages, "max_tokens": 1, "chat_template_kwargs": {"prefix": "abc"}}

    reply = (await shared.post("/generate", body)).json()

    assert reply["choices"][0]["text"] == "y"
    assert reply["usage"]["prompt_tokens"] == 5


async def test_token_ids_are_a_prompt_and_come_back_on_request(shared: HttpService) -> None:
    body = {"prompt": [97, 98], "max_tokens": 2, "return_token_ids": True}

    reply = (await shared.post("/generate", body)).json()

    assert reply["choices"][0]["token_ids"] == [99, 100]


async def test_null_means_absent(shared: HttpService) -> None:
    fields = ("messages", "temperature", "stop", "n", "logprobs", "budget", "stream", "seed")
    body = {"prompt": "a", "max_tokens": 2, **dict.fromkeys(fields)}

    reply = await shared.post("/generate", body)

    assert reply.json()["choices"][0]["text"] == "bc"


async def test_without_max_tokens_the_answer_fills_the_context(shared: HttpService) -> None:
    reply = (await shared.post("/generate", {"prompt": "a" * 6})).json()

    assert reply["usage"]["completion_tokens"] == 250
    assert reply["choices"][0]["finish_reason"] == "length"


async def test_a_stop_string_cuts_the_text_and_ends_the_answer(shared: HttpService) -> None:
    body = {"prompt": "a", "max_tokens": 9, "stop": "de"}

    choice = (await shared.post("/generate", body)).json()["choices"][0]

    assert (choice["text"], choice["finish_reason"]) == ("bc", "stop")


async def test_logprobs_name_each_token_its_bytes_and_its_rivals(shared: HttpService) -> None:
    body = {"prompt": "a", "max_tokens": 1, "logprobs": 2}

    choice = (await shared.post("/generate", body)).json()["choices"][0]

    assert choice["logprobs"] == [
        {
            "token": "b",
            "logprob": -1.0,
            "bytes": [98],
            "token_id": 98,
            "top_logprobs": [
                {"token": "b", "logprob": -1.0, "bytes": [98], "token_id": 98},
                {"token": "c", "logprob": -2.0, "bytes": [99], "token_id": 99},
            ],
        }
    ]


async def test_n_answers_share_one_prompt_in_the_usage(shared: HttpService) -> None:
    body = {"prompt": "abc", "max_tokens": 2, "n": 3, "budget": {"exit_layer": 2}}

    reply = (await shared.post("/generate", body)).json()

    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in reply["choices"]] == ["de"] * 3
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (3, 6)
    assert reply["budget"]["tokens_by_exit"] == {"2": 6}
    assert reply["budget"]["exit_layer"] == 2
    assert reply["budget"]["compute"] == 0.5


async def test_a_budget_chooses_the_depth_that_the_tokens_are_made_at(
    make: Callable[..., HttpService],
) -> None:
    service = make(rule=depth_letter)
    texts = {}

    for exit_layer in (2, 4, 6):
        body = {"prompt": "a", "max_tokens": 1, "budget": {"exit_layer": exit_layer}}
        texts[exit_layer] = (await service.post("/generate", body)).json()["choices"][0]["text"]

    assert texts == {e: chr(ord("a") + (7 * e + 1) % 26) for e in (2, 4, 6)}


@pytest.mark.parametrize(
    ("budget", "exit_layer"),
    [({"compute": 0.8}, 4), ({"min_quality": 0.5}, 6), ({"compute": 0.5, "min_exit_layer": 1}, 2)],
)
async def test_compute_and_floors_choose_an_exit(
    shared: HttpService, budget: dict[str, object], exit_layer: int
) -> None:
    body = {"prompt": "a", "max_tokens": 1, "budget": budget}

    reply = (await shared.post("/generate", body)).json()

    assert reply["budget"]["exit_layer"] == exit_layer


async def test_a_model_name_may_name_the_exit(shared: HttpService) -> None:
    reply = await shared.post("/generate", {"prompt": "a", "max_tokens": 1, "model": "tiny@4"})

    assert reply.json()["model"] == "tiny@4"
    assert reply.json()["budget"]["exit_layer"] == 4


async def test_a_schedule_gives_each_part_of_the_answer_its_exit(service: HttpService) -> None:
    budget = {"schedule": [[0, 6], [2, 4], [5, 2]]}

    reply = (
        await service.post("/generate", {"prompt": "a", "max_tokens": 9, "budget": budget})
    ).json()

    report = reply["budget"]
    assert report["exit_layer"] == 2
    assert report["tokens_by_exit"] == {"6": 2, "4": 3, "2": 4}
    assert report["compute"] == pytest.approx((2 * 1.0 + 3 * 0.75 + 4 * 0.5) / 9, abs=1e-4)
    assert report["met"] is None


async def test_a_schedule_on_the_openai_routes_and_its_events(service: HttpService) -> None:
    budget = {"schedule": [[0, 6], [2, 2]], "latency_ms": 60_000}
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "budget": budget}

    reply = (await service.post("/v1/chat/completions", body)).json()

    assert reply["choices"][0]["budget"]["tokens_by_exit"] == {"6": 2, "2": 2}
    assert reply["budget"]["met"] is True


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"budget": {"schedule": [[0, 6], [2, 5]]}}, "budget.schedule", "names 5"),
        ({"budget": {"schedule": [[0, 2], [2, 4]]}}, "budget.schedule", "descend"),
        ({"budget": {"schedule": [[0, 6]], "exit_layer": 6}}, "budget.schedule", "exit_layer=6"),
        ({"budget": {"schedule": [[0, 6]]}, "model": f"{MODEL}@6"}, "budget.schedule", "fixes"),
        ({"budget": {"schedule": [[0, 6]], "compute": 0.5}}, "budget.compute", "schedule=[[0, 6]]"),
    ],
)
async def test_a_schedule_that_cannot_be_is_refused_by_name(
    shared: HttpService, body: dict[str, Any], param: str, words: str
) -> None:
    reply = await shared.post("/generate", {"prompt": "a", "max_tokens": 2, **body})

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert words in reply.json()["error"]["message"]


async def test_latency_headers_are_a_budget_and_the_body_wins(shared: HttpService) -> None:
    body = {"prompt": "a", "max_tokens": 1, "budget": {"ttft_ms": 5}}
    headers = {"x-slo-ttft-ms": "7", "x-slo-tpot-ms": "8", "x-slo-e2e-ms": "9.5"}
    seen = len(shared.ended.reports)

    await shared.post("/generate", body, **headers)

    budget = (await shared.ended.wait_for(seen + 1))[-1].budget
    assert (budget.ttft_ms, budget.tpot_ms, budget.latency_ms) == (5, 8, 9.5)


async def test_a_stream_has_one_event_per_token_and_ends_with_the_whole_story(
    shared: HttpService,
) -> None:
    body = {"prompt": "a", "max_tokens": 3, "request_id": "s1"}

    events = await shared.events("/generate", body)

    choices = [{"index": 0, "exit_layer": 6, "text": t, "finish_reason": None} for t in "bc"]
    assert events[:2] == [{"id": "s1", "model": MODEL, "choices": [choice]} for choice in choices]
    last = events[2]
    assert last["choices"] == [
        {"index": 0, "exit_layer": 6, "text": "d", "finish_reason": "length"}
    ]
    assert last["budget"]["tokens_by_exit"] == {"6": 3}
    assert last["usage"]["completion_tokens"] == 3
    assert len(events) == 3


@pytest.mark.parametrize("extra", [{}, {"return_token_ids": True}])
async def test_each_event_of_a_stream_names_the_exit_that_made_its_token(
    shared: HttpService, extra: dict[str, Any]
) -> None:
    schedule = [[0, 6], [2, 4], [3, 2]]
    body = {"prompt": "a", "max_tokens": 5, "budget": {"schedule": schedule}, **extra}

    events = await shared.events("/generate", body)

    assert [event["choices"][0]["exit_layer"] for event in events] == [6, 6, 4, 2, 2]
    assert events[-1]["budget"]["tokens_by_exit"] == {"6": 2, "4": 1, "2": 2}


async def test_a_stream_of_several_answers_merges_them_by_index(shared: HttpService) -> None:
    events = await shared.events("/generate", {"prompt": "a", "max_tokens": 4, "n": 3})

    texts = dict.fromkeys(range(3), "")
    for message in events:
        [choice] = message["choices"]
        texts[choice["index"]] += choice["text"]
    ends = [message for message in events if message["choices"][0]["finish_reason"]]
    assert texts == dict.fromkeys(range(3), "bcde")
    assert len(events) == 12
    assert len(ends) == 3
    assert all("budget" in message for message in ends)
    assert [("usage" in message) for message in ends] == [False, False, True]
    assert ends[-1]["usage"]["completion_tokens"] == 12


async def test_a_stream_may_carry_logprobs_token_ids_and_running_usage(
    shared: HttpService,
) -> None:
    body = {
        "prompt": "a",
        "max_tokens": 2,
        "logprobs": 0,
        "return_token_ids": True,
        "stream_options": {"continuous_usage_stats": True},
    }

    events = await shared.events("/generate", body)

    assert [e["usage"]["completion_tokens"] for e in events] == [1, 2]
    assert [e["choices"][0]["token_ids"] for e in events] == [[98], [99]]
    assert [e["choices"][0]["logprobs"][0]["token"] for e in events] == ["b", "c"]


async def test_an_end_of_sequence_token_ends_the_stream_without_text(
    make: Callable[..., HttpService],
) -> None:
    service = make(rule=lambda tokens, exit_layer: EOS if len(tokens) > 2 else ord("x"))

    events = await service.events("/generate", {"prompt": "a"})

    assert [e["choices"][0]["text"] for e in events] == ["x", "x", ""]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_events_are_ascii_whatever_the_text(make: Callable[..., HttpService]) -> None:
    service = make(rule=lambda tokens, exit_layer: 127 if len(tokens) % 2 else ord('"'))

    reply = await service.post("/generate", {"prompt": "a", "max_tokens": 4, "stream": True})

    assert reply.content.isascii()
    assert reply.text.count("data: ") == 5


async def test_the_checkpoints_sampling_defaults_hold_where_the_request_is_silent(
    make: Callable[..., HttpService],
) -> None:
    defaults = {"temperature": 0.5, "top_k": 7, "do_sample": True, "top_p": None, "eos_token_id": 1}
    service = make(generation_defaults=defaults)
    body = {"prompt": "a", "max_tokens": 1}

    await service.post("/generate", body)
    await service.post("/generate", {**body, "temperature": 0.0})

    sampling = [plan.rows[0].sampling.params for plan in service.runner.plans]  # type: ignore[union-attr]
    assert [(s.temperature, s.top_k, s.top_p) for s in sampling] == [(0.5, 7, 1.0), (0.0, 7, 1.0)]


async def test_requests_with_the_same_id_may_live_at_once(service: HttpService) -> None:
    import asyncio

    body = {"prompt": "a", "max_tokens": 20, "request_id": "twin"}

    replies = await asyncio.gather(*(service.post("/generate", body) for _ in range(5)))

    assert [reply.json()["id"] for reply in replies] == ["twin"] * 5
    assert {reply.json()["usage"]["completion_tokens"] for reply in replies} == {20}


async def test_prefixes_are_shared_only_under_equal_salt(service: HttpService) -> None:
    body = {"prompt": "a" * 40, "max_tokens": 1, "cache_salt": "one"}
    cached = []

    for salt in ("one", "one", "two"):
        reply = await service.post("/generate", {**body, "cache_salt": salt})
        cached.append(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached[0] == cached[2] == 0
    assert cached[1] > 0


async def test_long_prompts_are_tokenised_off_the_event_loop(
    make: Callable[..., HttpService],
) -> None:
    service = make()

    short = await service.post("/tokenize", {"prompt": "a" * 100})
    on_loop = set(service.tokenizer.threads)
    long = await service.post("/tokenize", {"prompt": "a" * 30_000})

    assert (short.json()["count"], long.json()["count"]) == (100, 30_000)
    assert service.tokenizer.threads > on_loop == {"MainThread"}


async def test_lengths_are_learned_by_route_and_model_as_the_client_wrote_it(
    service: HttpService, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    submit = service.worker.submit

    def watched(request: Request, reservation: Reservation, **how: Any) -> RequestStream:
        seen.append(request.length_class)
        return submit(request, reservation, **how)

    monkeypatch.setattr(service.worker, "submit", watched)
    message = {"role": "user", "content": "a"}

    await service.post("/generate", {"prompt": "a", "max_tokens": 1})
    await service.post("/v1/completions", {"model": f"{MODEL}@4", "prompt": "a", "max_tokens": 1})
    await service.post(
        "/v1/chat/completions", {"model": MODEL, "messages": [message], "max_tokens": 1}
    )

    assert seen == [
        ("/generate", MODEL),
        ("/v1/completions", f"{MODEL}@4"),
        ("/v1/chat/completions", MODEL),
    ]


async def test_a_report_says_what_length_was_expected(make: Callable[..., HttpService]) -> None:
    service = make(rule=lambda known, exit_layer: EOS)

    await service.post("/generate", {"prompt": "a", "max_tokens": 9})

    [report] = await service.ended.wait_for(1)
    assert (report.expected_tokens, report.num_output_tokens) == (9, 1)
