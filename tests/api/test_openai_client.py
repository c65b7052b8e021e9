"""The ``openai`` package works unchanged, over a real server on a loopback port."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, get_args, get_type_hints

import openai
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from sortserve.cost.model import CostModel
from support.http_service import MODEL, HttpService, listening, make_service, with_comments

MESSAGES = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[HttpService, str]]:
    service = make_service(api_keys=("k1", "k2"))
    with listening(service.app) as url:
        yield service, url
    service.worker.stop()


@pytest.fixture
def make_served() -> Iterator[Callable[..., tuple[HttpService, str]]]:
    """Starts services of other settings, each behind a socket of its own."""
    with ExitStack() as stack:

        def make(**options: Any) -> tuple[HttpService, str]:
            service = make_service(**options)
            stack.callback(service.worker.stop)
            return service, stack.enter_context(listening(service.app))

        yield make


@pytest.fixture
def client(served: tuple[HttpService, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[1]}/v1", api_key="k2", max_retries=0) as client:
        yield client


def test_a_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="a", max_tokens=3, seed=1)

    assert reply.choices[0].text == "bcd"
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == 4
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_completions_of_several_prompts_with_logprobs_and_stop(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=["a", "m"], n=2, max_tokens=5, logprobs=1, stop=["e", "q"]
    )

    assert [choice.text for choice in reply.choices] == ["bcd", "bcd", "nop", "nop"]
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    assert reply.choices[0].logprobs.tokens[:3] == ["b", "c", "d"]


def test_a_streamed_completion(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt="a",
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    assert "".join(c.choices[0].text for c in chunks if c.choices) == "bcde"
    assert chunks[-1].usage.completion_tokens == 4


def test_comments_in_a_stream_are_nothing_to_the_package() -> None:
    service = make_service()
    with (
        listening(with_comments(service.app)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="k") as client,
    ):
        lines = client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True)
        chat = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=3, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in lines) == "bcd"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == "bcd"
    service.worker.stop()


def test_an_error_in_a_stream_arrives_as_the_packages_own() -> None:
    service = make_service()
    with (
        listening(service.app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="k") as client,
    ):
        service.runner.fail_next = True
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True)
        with pytest.raises(openai.APIError, match="model failed") as error:
            list(stream)
    service.worker.stop()

    assert error.value.code == "engine_error"


def test_a_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=3, n=2, temperature=0
    )

    assert [choice.message.content for choice in reply.choices] == ["bcd", "bcd"]
    assert reply.choices[1].message.role == "assistant"


def test_a_chat_with_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=1
    )

    first, second = reply.choices[0].logprobs.content
    assert (first.token, second.token) == ("b", "c")
    assert first.bytes == [98]
    assert first.top_logprobs[0].logprob == -1.0


def test_a_streamed_chat_of_two_answers(client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    finish = {}
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, n=2, stream=True
    )

    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finish[choice.index] = choice.finish_reason

    assert texts == {0: "bcde", 1: "bcde"}
    assert finish == {0: "length", 1: "length"}


def test_every_service_tier_that_the_package_knows_is_served(client: openai.OpenAI) -> None:
    hints = get_type_hints(CompletionCreateParamsNonStreaming)["service_tier"]
    tiers = {tier for option in get_args(hints) for tier in get_args(option)}

    for tier in tiers:
        reply = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=1, service_tier=tier
        )
        assert reply.service_tier == (tier if tier in ("flex", "priority") else "default")
    assert {"auto", "flex", "scale", "priority"} <= tiers


def test_a_budget_in_the_extra_body(client: openai.OpenAI) -> None:
    budget = {"exit_layer": 4, "latency_ms": 60_000}
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, extra_body={"budget": budget}
    )

    assert reply.budget["exit_layer"] == 4
    assert reply.budget["met"] is True


def test_a_streamed_budget_says_what_became_of_it(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=2,
        stream=True,
        extra_body={"budget": {"compute": 0.5}},
    )

    assert [chunk.model_extra.get("budget", {}).get("exit_layer") for chunk in stream] == [None, 2]


def test_an_exit_in_the_model_name(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=f"{MODEL}@2", prompt="a", max_tokens=1)

    assert (reply.model, reply.budget["exit_layer"]) == ("tiny@2", 2)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny@2", "tiny@4", "tiny@6"]
    assert client.models.retrieve("tiny@4").id == "tiny@4"


def test_errors_arrive_as_the_packages_own(
    client: openai.OpenAI, served: tuple[HttpService, str]
) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", top_p=2)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with (
        openai.OpenAI(base_url=f"{served[1]}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()

    assert bad.value.param == "top_p"
    assert bad.value.request_id


@pytest.fixture
def retrying(served: tuple[HttpService, str]) -> Iterator[openai.OpenAI]:
    """Retries as often as it does by default, but at once."""
    with openai.OpenAI(base_url=f"{served[1]}/v1", api_key="k2") as client:
        client._sleep_for_retry = lambda **_: None
        yield client


def test_a_budget_that_cannot_be_met_is_asked_for_once(
    retrying: openai.OpenAI, served: tuple[HttpService, str]
) -> None:
    service, _ = served
    line = (0.0, 1e-3, 0.0, 0.0, 0.0)
    service.engine.costs.use(CostModel(line, line))
    service.ended.rejections.clear()
    budget = {"latency_ms": 1, "on_miss": "reject"}

    for stream in (False, True):
        with pytest.raises(openai.RateLimitError, match="No allowed exit fits"):
            retrying.completions.create(
                model=MODEL, prompt="a", stream=stream, extra_body={"budget": budget}
            )

    service.engine.costs.use(None)
    assert service.ended.rejections == ["budget_unattainable"] * 2


def test_a_full_queue_is_asked_again(make_served: Callable[..., tuple[HttpService, str]]) -> None:
    service, url = make_served(worker_options={"max_num_queued_reqs": 1})
    with service.worker.reserve(1, 1), openai.OpenAI(base_url=f"{url}/v1", api_key="k") as client:
        client._sleep_for_retry = lambda **_: None
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=MODEL, prompt="a")

    assert service.ended.rejections == ["queue_full"] * 3


def test_leaving_a_stream_aborts_the_request(
    client: openai.OpenAI, served: tuple[HttpService, str]
) -> None:
    service, _ = served
    seen = len(service.ended.reports)
    service.runner.gated = True
    service.runner.permits.release()
    stream = client.completions.create(model=MODEL, prompt="a", max_tokens=200, stream=True)
    assert next(iter(stream)).choices[0].text == "b"

    stream.close()
    report = service.ended.run_until(seen + 1, step=service.runner.permits.release)[-1]
    service.runner.open()

    assert report.finish_reason == "abort"
    assert report.num_output_tokens < 200
