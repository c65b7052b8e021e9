"""The HTTP service over the real engine and tokenizer, on a tiny random checkpoint in fp32."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jinja2
import pytest
from fastapi import FastAPI
from transformers import AutoTokenizer

from sortserve.api.app import create_app
from sortserve.api.settings import ApiSettings
from sortserve.engine.worker import EngineWorker
from sortserve.process.build import build
from sortserve.process.config import load_settings
from support.http_service import parse_events
from support.serving import Served, serve
from support.tiny_models import VOCAB_SIZE, make_tiny_checkpoint, tiny_tokenizer

CHAT = [{"role": "user", "content": "hé 😀 there"}]
NUM_TOKENS = len(tiny_tokenizer())
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "the 你好", "seed": 3}),
    ("/generate", {"messages": CHAT, "seed": 4, "budget": {"exit_layer": 2}}),
    ("/v1/completions", {"prompt": ["the", "in"], "n": 2, "seed": 5, "model": "m@4"}),
    ("/v1/chat/completions", {"messages": CHAT, "seed": 6, "logprobs": True, "top_logprobs": 3}),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    path: Path = make_tiny_checkpoint(tmp_path_factory.mktemp("m"), "llama-tied", exits=(2, 4, 6))
    return serve(path)


@pytest.fixture
async def app(served: Served) -> AsyncIterator[FastAPI]:
    worker = EngineWorker(served.engine())
    worker.start()
    yield create_app(worker, served.tokenizer, ApiSettings(served_model_name="m"))
    await asyncio.to_thread(worker.stop)


async def post(app: FastAPI, path: str, body: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, json=body)


async def get(app: FastAPI, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


def text_of(choice: dict[str, Any]) -> str:
    part = choice.get("message") or choice.get("delta")
    return str(choice["text"] if part is None else part.get("content", ""))


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_streamed_text_equals_the_whole_text_whatever_the_bytes(
    app: FastAPI, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "max_tokens": 60, "temperature": 1.5, "ignore_eos": True}

    whole = (await post(app, path, body)).json()
    reply = await post(app, path, {**body, "stream": True})

    streamed: dict[int, str] = {}
    counts: dict[int, int] = {}
    for event in parse_events(reply.text):
        for choice in event["choices"]:
            index = choice["index"]
            streamed[index] = streamed.get(index, "") + text_of(choice)
            counts[index] = counts.get(index, 0) + 1
    assert streamed == {c["index"]: text_of(c) for c in whole["choices"]}
    assert not all(text.isascii() for text in streamed.values())
    role_events = "chat" in path
    assert set(counts.values()) == {60 + role_events}


async def test_the_bytes_of_the_logprobs_are_the_text(app: FastAPI) -> None:
    body = {"prompt": "the", "max_tokens": 40, "logprobs": 0, "ignore_eos": True, "seed": 1}

    [choice] = (await post(app, "/generate", body)).json()["choices"]

    raw = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"])
    assert raw.decode(errors="replace") == choice["text"]
    assert all(entry["logprob"] <= 0 for entry in choice["logprobs"])


async def test_completions_name_every_rival_though_most_are_halves_of_characters(
    app: FastAPI,
) -> None:
    body = {"prompt": "the", "max_tokens": 30, "logprobs": 20, "ignore_eos": True, "seed": 1}

    [choice] = (await post(app, "/v1/completions", body)).json()["choices"]
    [exact] = (await post(app, "/generate", body)).json()["choices"]

    tops = choice["logprobs"]["top_logprobs"]
    for top, entry in zip(tops, exact["logprobs"], strict=True):
        rivals = {e["token_id"]: e["logprob"] for e in (*entry["top_logprobs"], entry)}
        assert sorted(top.values()) == sorted(rivals.values())
    assert any(name.startswith("bytes:\\x") for top in tops for name in top)


async def test_mixed_depths_at_once_answer_as_each_alone(app: FastAPI) -> None:
    bodies = [
        {"prompt": f"the {i}", "max_tokens": 12, "seed": i, "model": f"m@{exit_layer}"}
        for i in range(4)
        for exit_layer in (2, 4, 6)
    ]

    alone = [(await post(app, "/v1/completions", body)).json() for body in bodies]
    together = await asyncio.gather(*(post(app, "/v1/completions", body) for body in bodies))

    assert [r.json()["choices"][0]["text"] for r in together] == [
        reply["choices"][0]["text"] for reply in alone
    ]
    assert len({reply["choices"][0]["text"] for reply in alone}) > 6


async def test_a_program_without_the_tokenizer_can_do_what_it_does(app: FastAPI) -> None:
    """As lm-eval's ``tokenizer_backend=remote`` has it: its own template, the server's tokens."""
    info = (await get(app, "/tokenizer_info")).json()

    text = jinja2.Template(info["chat_template"], keep_trailing_newline=True).render(
        messages=CHAT, add_generation_prompt=True
    )
    own = await post(app, "/tokenize", {"prompt": text, "add_special_tokens": False})
    ends = await post(app, "/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False})

    asked = await post(app, "/tokenize", {"messages": CHAT})
    assert own.json()["tokens"] == asked.json()["tokens"]
    assert ends.json()["tokens"] == [tiny_tokenizer().eos_token_id]
    assert info["model_max_length"] == asked.json()["max_model_len"]
    assert info["additional_special_tokens"] == ["<|im_start|>"]


async def test_tokenize_shows_what_the_chat_template_writes(app: FastAPI) -> None:
    tokens = (await post(app, "/tokenize", {"messages": CHAT})).json()["tokens"]

    text = (await post(app, "/detokenize", {"tokens": tokens})).json()["prompt"]
    usage = (await post(app, "/generate", {"messages": CHAT, "max_tokens": 1})).json()["usage"]

    assert text == "<|im_start|>user\nhé 😀 there<|im_end|>\n<|im_start|>assistant\n"
    assert usage["prompt_tokens"] == len(tokens)


async def test_a_template_that_reads_parts_gets_what_the_user_says(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = make_tiny_checkpoint(tmp_path_factory.mktemp("parts"), exits=None)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for part in m['content'] %}{% if part.type == 'text' %}"
        "<{{ part.text }}>{% endif %}{% endfor %}{% endfor %}"
    )
    served = serve(path)
    worker = EngineWorker(served.engine())
    app = create_app(worker, served.tokenizer, ApiSettings(served_model_name="m"))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    for content, written in (("hello", "<hello>"), (parts, "<a><b>")):
        body = {"messages": [{"role": "user", "content": content}]}
        tokens = (await post(app, "/tokenize", body)).json()["tokens"]
        text = (await post(app, "/detokenize", {"tokens": tokens})).json()["prompt"]
        assert text == written


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "padding", "self", "messages"])
async def test_template_arguments_cannot_reach_behind_the_template(app: FastAPI, name: str) -> None:
    body = {"messages": CHAT, "max_tokens": 1, "chat_template_kwargs": {name: "x"}}

    reply = await post(app, "/v1/chat/completions", body)

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == f"chat_template_kwargs.{name}"


@pytest.fixture
async def small_embedding(tmp_path: Path) -> AsyncIterator[FastAPI]:
    """A checkpoint whose tokenizer got a token that the model has no embedding for."""
    path = make_tiny_checkpoint(tmp_path, "llama-tied", exits=(2, 4, 6))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCAB_SIZE - len(tokenizer) + 1)])
    tokenizer.save_pretrained(path)
    serving = build(load_settings({"model": str(path), "calibrate": False, "max_num_seqs": 4}))
    serving.worker.start()
    yield create_app(serving.worker, serving.tokenizer, ApiSettings(served_model_name="m"))
    await asyncio.to_thread(serving.worker.stop)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/generate", {"prompt": "a{late}"}, "prompt"),
        ("/generate", {"messages": [{"role": "user", "content": "{late}"}]}, "messages"),
        ("/generate", {"prompt": [5, VOCAB_SIZE]}, "prompt.1"),
        (
            "/generate",
            {"prompt": "a", "logit_bias": {str(VOCAB_SIZE): 1}},
            f"logit_bias.{VOCAB_SIZE}",
        ),
        ("/generate", {"prompt": "a", "stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids.0"),
        ("/v1/completions", {"prompt": ["a", "{late}"]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "{late}"}]}, "messages"),
        ("/tokenize", {"prompt": "{late}"}, "prompt"),
    ],
)
async def test_a_token_beyond_the_embedding_is_a_400_that_names_the_field(
    small_embedding: FastAPI, path: str, fields: dict[str, Any], param: str
) -> None:
    late = f"<extra{VOCAB_SIZE - NUM_TOKENS}>"
    body = json.loads(json.dumps(fields).replace("{late}", late))
    if path != "/tokenize":
        body["max_tokens"] = 2

    refused, neighbour = await asyncio.gather(
        post(small_embedding, path, body),
        post(small_embedding, "/generate", {"prompt": "a<extra0>", "max_tokens": 8}),
    )

    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param
    assert str(VOCAB_SIZE) in refused.json()["error"]["message"]
    assert neighbour.status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e-40, "temperature": 1},
        {"repetition_penalty": 5e-324, "temperature": 1e-300},
        {"repetition_penalty": 1e-300, "top_p": 0.5, "logprobs": 5},
        {"logit_bias": {"5": 100, "6": -100}, "temperature": 5e-324, "min_p": 1},
        {"top_p": 0, "temperature": 100},
    ],
)
async def test_extreme_sampling_is_served_and_leaves_the_neighbours_alone(
    app: FastAPI, fields: dict[str, Any]
) -> None:
    neighbour = {"prompt": "the tin", "max_tokens": 8, "seed": 5, "ignore_eos": True}
    expected = (await post(app, "/generate", neighbour)).json()["choices"]

    extreme, *neighbours = await asyncio.gather(
        post(app, "/generate", {"prompt": "Hello", "max_tokens": 4, **fields}),
        *(post(app, "/generate", neighbour) for _ in range(3)),
    )

    assert extreme.status_code == 200, extreme.text
    for reply in neighbours:
        assert [c["text"] for c in reply.json()["choices"]] == [c["text"] for c in expected]


async def test_top_p_0_gives_the_greedy_answer(app: FastAPI) -> None:
    body = {"prompt": "the", "max_tokens": 8, "ignore_eos": True}

    likeliest = await post(app, "/generate", {**body, "top_p": 0, "seed": 3})
    greedy = await post(app, "/generate", {**body, "temperature": 0})

    assert likeliest.json()["choices"][0]["text"] == greedy.json()["choices"][0]["text"]
