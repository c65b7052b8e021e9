"""Calls of a model's own accord, with a real model and templates in the style of three families.

No small model calls tools: an expression holds this one to the form that its template teaches, and
the words in it are its own. Nothing else is scripted: the prompt is the template's, the text is
read back as a call, and goes into the template again with its result.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from sortserve.api.app import create_app
from sortserve.api.settings import ApiSettings
from sortserve.checkpoint.load import load_checkpoint
from sortserve.engine.assemble import EngineOptions, assemble
from sortserve.engine.worker import EngineWorker
from sortserve.text.tokenizer import Tokenizer
from support.chat_templates import TOOL_TEMPLATES
from support.tiny_models import make_tiny_checkpoint, tiny_tokenizer

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
_WORD = '"[A-Z][a-z]{2,6}"'
FORMS = {
    "hermes": rf'<tool_call>\n\{{"name": "weather", "arguments": \{{"city": {_WORD}\}}\}}\n'
    "</tool_call>",
    "llama3": rf'\{{"name": "weather", "parameters": \{{"city": {_WORD}\}}\}}',
    "mistral": rf'\[TOOL_CALLS\] \[\{{"name": "weather", "arguments": \{{"city": {_WORD}\}}\}}\]',
}


@pytest.fixture(scope="module")
def make_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    folder = tmp_path_factory.mktemp("tools")  # a character is a token, so prompts are long
    path = make_tiny_checkpoint(folder, exits=(2, 4, 6), max_position_embeddings=1024)
    checkpoint = load_checkpoint(str(path), dtype="float32", device="cpu")
    parts = assemble(checkpoint, EngineOptions(block_size=4, seed=0, min_quality=0.0))
    worker = EngineWorker(parts.engine)
    worker.start()

    def make(dialect: str) -> Any:
        hf_tokenizer = tiny_tokenizer()
        hf_tokenizer.chat_template = TOOL_TEMPLATES[dialect]
        tokenizer = Tokenizer(hf_tokenizer, checkpoint.eos_token_ids)
        assert tokenizer.tool_dialect == dialect
        return create_app(worker, tokenizer, ApiSettings(served_model_name="tiny"))

    yield make
    worker.stop()


@pytest.fixture(params=FORMS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def client(make_app: Callable[[str], Any], dialect: str) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=make_app(dialect))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def asking(dialect: str, **fields: Any) -> dict[str, Any]:
    form = {"structured_outputs": {"regex": FORMS[dialect]}, "tool_choice": "auto", "seed": 3}
    return {**form, "tools": [TOOL], **fields}


async def rendered(client: httpx.AsyncClient, messages: list[Any]) -> str:
    body = {"messages": messages, "chat_template_kwargs": {"tools": [TOOL]}}
    tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
    return str((await client.post("/detokenize", json={"tokens": tokens})).json()["prompt"])


async def test_a_chat_calls_and_goes_on(client: httpx.AsyncClient, dialect: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "the rain"}]
    body = asking(dialect, messages=messages, max_tokens=150)

    reply = await client.post(CHAT, json=body)

    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    city = json.loads(call["function"]["arguments"])["city"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "It rains."}
    later = [*messages, choice["message"], result]
    prompt = await rendered(client, later)
    assert city in prompt
    assert "It rains." in prompt
    assert '"city"' in await rendered(client, messages), "the template tells of the tools"
    again = await client.post(CHAT, json={"messages": later, "tools": [TOOL], "max_tokens": 2})
    assert again.status_code == 200, again.text


async def test_a_response_calls_and_goes_on(client: httpx.AsyncClient, dialect: str) -> None:
    tool = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
    body = asking(dialect, input="the rain", tools=[tool], max_output_tokens=150)

    answered = await client.post(RESPONSES, json=body)

    assert answered.status_code == 200, answered.text
    reply = answered.json()
    [call] = reply["output"]
    assert (call["type"], call["name"], reply["status"]) == (
        "function_call",
        "weather",
        "completed",
    )
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "It rains."}
    items = [{"role": "user", "content": "the rain"}, call, output]
    again = await client.post(
        RESPONSES, json={"input": items, "tools": [tool], "max_output_tokens": 2}
    )
    assert again.status_code == 200, again.text
