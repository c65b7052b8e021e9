"""The client and the server speak the same language: a real HTTP server, a scripted model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import uvicorn

import sortserve
from sortserve.api.app import create_app
from sortserve.api.bodies.models import GenerateBody
from sortserve.api.settings import ApiSettings
from sortserve.core.plan import StepPlan
from sortserve.core.sampling_params import SampledToken
from sortserve.engine.worker import EngineWorker
from sortserve.telemetry.metrics import Metrics
from sortserve_client import (
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    Budget,
    Client,
    NotFoundError,
    SamplingOptions,
)
from support.http_service import FormCompiler
from support.scripted import VOCAB_SIZE, ScriptedRunner, make_engine

API_KEY = "s3cret"
EXITS = (2, 4, 6)
MESSAGES = [{"role": "user", "content": "a"}]


class AsciiTokenizer:
    """Each character is its number. A conversation is its contents, one after the other."""

    vocab_size = VOCAB_SIZE
    info: ClassVar[dict[str, Any]] = {}
    grammars = FormCompiler()
    tool_dialect = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **_: Any
    ) -> list[int]:
        return self.encode("".join(message["content"] for message in messages))

    def convert_id_to_token_text(self, token_id: int) -> tuple[str, bytes]:
        return chr(token_id), bytes([token_id])


class GatedRunner(ScriptedRunner):
    """Runs freely until ``gated`` is set; from then on each step needs a permit."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = False
        self.permits = threading.Semaphore(0)

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        if self.gated:
            assert self.permits.acquire(timeout=30)
        return super().execute(plan)


@dataclass
class Served:
    """A running server."""

    url: str
    runner: GatedRunner


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    runner = GatedRunner()
    metrics = Metrics("tiny", EXITS, version=sortserve.__version__)
    worker = EngineWorker(make_engine(exits=EXITS, runner=runner, observer=metrics))
    metrics.watch(worker.stats)
    worker.start()
    settings = ApiSettings(served_model_name="tiny", api_keys=(API_KEY,), enable_docs=False)
    app = create_app(worker, AsciiTokenizer(), settings, metrics)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None)
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", runner)
    server.should_exit = True
    thread.join()
    listener.close()
    worker.stop()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.url, API_KEY) as client:
        yield client


def test_an_answer_says_what_it_cost(client: Client) -> None:
    answer = client.generate("ab", max_tokens=4, temperature=0, budget=Budget(exit_layer=4))

    assert (answer.text, answer.finish_reason, answer.model) == ("cdef", "length", "tiny")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 4)
    assert answer.budget.exit_layer == 4
    assert answer.budget.tokens_by_exit == {4: 4}
    assert answer.budget.compute == pytest.approx(6 / 8)
    assert answer.budget.actual_ms is not None


def test_a_stream_says_the_same_as_a_whole_answer(client: Client) -> None:
    options: SamplingOptions = {"max_tokens": 5, "stop": "e", "logprobs": 1}
    whole = client.generate("a", budget=Budget(exit_layer=2), **options)

    with client.stream("a", budget=Budget(exit_layer=2), **options) as stream:
        events = list(stream)
        streamed = stream.result()

    assert "".join(event.text for event in events) == streamed.text == whole.text == "bcd"
    assert streamed.finish_reason == whole.finish_reason == "stop"
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens
    assert streamed.budget.tokens_by_exit == whole.budget.tokens_by_exit
    assert streamed.choices[0].logprobs == whole.choices[0].logprobs
    assert events[-1].budget is not None


def test_logprobs_and_token_ids_are_typed(client: Client) -> None:
    answer = client.generate("a", max_tokens=2, logprobs=2, return_token_ids=True)

    (choice,) = answer.choices
    assert choice.token_ids == (ord("b"), ord("c"))
    assert choice.logprobs is not None
    first = choice.logprobs[0]
    assert (first.token, first.token_id, first.bytes) == ("b", ord("b"), (ord("b"),))
    assert [top.token for top in first.top_logprobs] == ["b", "c"]


def test_several_answers_each_have_their_own_budget(client: Client) -> None:
    whole = client.generate(messages=MESSAGES, max_tokens=2, n=2, budget=Budget(exit_layer=6))
    with client.stream(messages=MESSAGES, max_tokens=2, n=2, budget=Budget(exit_layer=6)) as stream:
        streamed = stream.result()

    for answer in (whole, streamed):
        assert [choice.text for choice in answer.choices] == ["bc", "bc"]
        for choice in answer.choices:
            assert choice.budget is not None
            assert choice.budget.tokens_by_exit == {6: 2}
    assert whole.usage == streamed.usage


def test_leaving_a_stream_aborts_the_request_on_the_server(served: Served) -> None:
    # Steps are handed out one at a time, so that the request cannot end by itself.
    runner = served.runner
    runner.gated = True
    try:
        with Client(served.url, API_KEY) as client:
            runner.permits.release()  # the server answers with the first token
            with client.stream("a", max_tokens=200) as stream:
                next(stream)
            text = client.metrics()
            for _ in range(100):  # each turn is a request to the server, which sees us leave
                aborted = metric(text, 'request_success_total{finished_reason="abort"')
                if aborted == 1.0 and metric(text, "kv_pages_used{") == 0.0:
                    break
                runner.permits.release()
                text = client.metrics()
    finally:
        runner.gated = False
        runner.permits.release()

    assert metric(text, 'request_success_total{finished_reason="abort"') == 1.0
    assert metric(text, "kv_pages_used{") == 0.0


def metric(text: str, start: str) -> float:
    """The value of the first sample that begins like this, but for our prefix."""
    for line in text.splitlines():
        if line.startswith(f"sortserve_{start}"):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no sample begins with {start}")


def test_a_refusal_names_the_field(client: Client) -> None:
    with pytest.raises(BadRequestError) as no_exit:
        client.generate("a", budget=Budget(exit_layer=5))
    with pytest.raises(BadRequestError) as no_field:
        client.generate("a", extra={"max_token": 3})
    with pytest.raises(BadRequestError) as in_a_stream, client.stream("a", top_p=7.0):
        pass

    assert no_exit.value.param == "budget.exit_layer"
    assert no_field.value.param == "max_token"
    assert in_a_stream.value.param == "top_p"
    assert no_exit.value.request_id


def test_a_missing_key_and_an_unknown_model_have_their_own_errors(
    served: Served, client: Client
) -> None:
    with Client(served.url) as stranger, pytest.raises(AuthenticationError):
        stranger.generate("a")
    with pytest.raises(NotFoundError):
        client.generate("a", model="huge")


def test_the_small_routes_answer(client: Client) -> None:
    exits = client.exits()

    assert [info.exit_layer for info in exits] == list(EXITS)
    assert client.generate("a", model=exits[0].model, max_tokens=1).budget.exit_layer == EXITS[0]
    assert [info.compute for info in exits] == pytest.approx([4 / 8, 6 / 8, 1.0])
    assert all(info.num_parameters and info.score for info in exits)
    assert "tiny" in {model.id for model in client.models()}
    assert client.tokenize("abc").tokens == (97, 98, 99)
    assert client.tokenize(messages=MESSAGES).count == 1
    assert client.detokenize([97, 98]) == "ab"
    assert client.health().state == "ready"
    assert client.version() == sortserve.__version__


async def test_many_depths_at_once(served: Served) -> None:
    async with AsyncClient(served.url, API_KEY) as client:
        answers = await asyncio.gather(
            *(
                client.generate("a", max_tokens=6, budget=Budget(exit_layer=EXITS[i % 3]))
                for i in range(24)
            )
        )

    assert {answer.text for answer in answers} == {"bcdefg"}
    assert [answer.budget.exit_layer for answer in answers] == [EXITS[i % 3] for i in range(24)]


def test_the_client_knows_every_field_that_the_server_takes() -> None:
    by_name = {"prompt", "messages", "budget", "stream", "stream_options"}

    assert SamplingOptions.__annotations__.keys() == GenerateBody.model_fields.keys() - by_name
