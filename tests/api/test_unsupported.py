"""What other servers offer and this one does not is refused by name, and never ignored."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParams

from sortserve.api.bodies import unsupported
from sortserve.api.bodies.models import ChatCompletionBody, CompletionBody
from sortserve.api.bodies.unsupported import refuse_unsupported
from sortserve.core.errors import InvalidRequestError
from support.http_service import HttpService

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BASE: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ASKING: list[tuple[str, Any]] = [
    # llama.cpp
    ("grammar", 'root ::= "yes" | "no"'),
    ("grammar_lazy", True),
    ("grammar_triggers", [{"type": 0, "value": "<tool>"}]),
    ("json_schema", SCHEMA),
    ("json_schema", {}),
    ("mirostat", 2),
    ("dry_multiplier", 0.8),
    ("xtc_probability", 0.5),
    ("typical_p", 0.5),
    ("top_n_sigma", 1.0),
    ("dynatemp_range", 0.5),
    ("samplers", ["top_k"]),
    ("n_predict", 5),
    ("n_indent", 4),
    ("n_probs", 3),
    ("repeat_penalty", 1.1),
    ("lora", [{"id": 0, "scale": 0.5}]),
    # vLLM
    ("guided_json_object", True),
    ("guided_decoding_backend", "xgrammar"),
    ("guided_whitespace_pattern", "[ ]*"),
    ("guided_something_new", "x"),
    ("structural_tag", {"type": "structural_tag"}),
    ("bad_words", ["no"]),
    ("allowed_token_ids", [1]),
    ("logits_processors", ["x"]),
    ("vllm_xargs", {"x": 1}),
    ("return_tokens_as_token_ids", True),
    ("spaces_between_special_tokens", False),
    ("prompt_logprobs", 0),
    ("length_penalty", 2),
    # SGLang
    ("regex", "a+"),
    ("ebnf", "root ::= 'a'"),
    ("stop_regex", "a+"),
    ("custom_logit_processor", "x"),
    ("lora_path", "x"),
    ("return_hidden_states", True),
    # TGI and LoRAX
    ("grammar", {"type": "json", "value": SCHEMA}),
    ("adapter_id", "x"),
    ("max_new_tokens", 5),
    ("do_sample", False),
    ("watermark", True),
    ("truncate", 100),
    ("parameters", {"grammar": {"type": "regex", "value": "a+"}}),
    # TensorRT-LLM, NIM
    ("guided_decoding_params", {"guide_type": "json"}),
    ("guided_decoding", {"json": SCHEMA}),
    ("nvext", {"guided_json": SCHEMA}),
    ("beam_width", 4),
    # Ollama
    ("format", "json"),
    ("format", SCHEMA),
    ("options", {"num_predict": 5}),
    ("system", "Be kind."),
    ("template", "{{ .Prompt }}"),
    ("think", True),
    # OpenAI
    ("text", {"format": {"type": "json_schema", "schema": SCHEMA}}),
    ("reasoning_effort", "low"),
    ("verbosity", "low"),
    ("web_search_options", {}),
    ("modalities", ["text", "audio"]),
    # Mistral, Fireworks, Gemini, Anthropic, OpenRouter and others
    ("safe_prompt", True),
    ("random_seed", 5),
    ("mirostat_target", 5.0),
    ("prompt_truncate_len", 100),
    ("context_length_exceeded_behavior", "truncate"),
    ("response_schema", SCHEMA),
    ("thinking", {"type": "enabled", "budget_tokens": 1024}),
    ("reasoning", {"effort": "high"}),
    ("transforms", ["middle-out"]),
    ("regex_pattern", "a+"),
    ("grammar_string", "x"),
    ("banned_strings", ["x"]),
    ("extra_body", {"guided_json": SCHEMA}),
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("name", "value"), ASKING)
async def test_a_field_that_asks_for_what_is_not_served_is_refused_by_name(
    shared: HttpService, path: str, name: str, value: Any
) -> None:
    reply = await shared.post(path, {**BASE[path], name: value})

    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["param"], error["code"]) == (name, "unsupported_field")
    assert error["message"].startswith(f"{name}=")


@pytest.mark.parametrize("name", sorted({name for name, _ in ASKING}))
async def test_the_native_route_refuses_them_as_unknown(shared: HttpService, name: str) -> None:
    reply = await shared.post("/generate", {"prompt": "a", "max_tokens": 1, name: "x"})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("name", [*unsupported._HARMLESS_VALUES, "guided_anything"])
def test_each_known_field_has_values_that_ask_for_nothing_and_refuses_all_others(
    name: str,
) -> None:
    refuse_unsupported({name: None})
    for value in unsupported._HARMLESS_VALUES.get(name, ()):
        refuse_unsupported({name: value})

    for value in ("something", 12345, {"some": "thing"}, ["something"]):
        with pytest.raises(InvalidRequestError) as error:
            refuse_unsupported({name: value})
        assert error.value.param == name


def test_false_is_no_zero_and_true_is_no_one() -> None:
    for name, value in (("mirostat", False), ("typical_p", True), ("think", 0)):
        with pytest.raises(InvalidRequestError):
            refuse_unsupported({name: value})


def test_a_field_of_another_name_says_ours() -> None:
    with pytest.raises(InvalidRequestError, match=r"max_new_tokens=5 .*; use max_tokens\."):
        refuse_unsupported({"max_new_tokens": 5})


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": "", "json_schema": None, "guided_choice": [], "format": ""},
        {"mirostat": 0, "mirostat_tau": 5, "mirostat_eta": 0.1, "typical_p": 1.0},
        {"dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "xtc_probability": 0.0},
        {"reasoning_effort": "none", "verbosity": "medium", "thinking": {"type": "disabled"}},
        {"store": True, "metadata": {"a": "b"}, "parallel_tool_calls": True, "cache_prompt": True},
        {"n_predict": -1, "repeat_penalty": 1.0, "samplers": [], "lora": [], "keep_alive": "5m"},
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_values_that_ask_for_nothing_are_served(
    shared: HttpService, path: str, fields: dict[str, Any]
) -> None:
    reply = await shared.post(path, {**BASE[path], **fields})

    assert reply.status_code == 200, reply.text


async def test_tools_are_refused_on_the_route_that_has_no_messages(shared: HttpService) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]

    reply = await shared.post(COMPLETIONS, {**BASE[COMPLETIONS], "tools": tools})

    error = reply.json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_field")


async def test_an_answer_that_is_to_be_continued_is_refused(shared: HttpService) -> None:
    messages = [*BASE[CHAT]["messages"], {"role": "assistant", "content": "I", "prefix": True}]

    reply = await shared.post(CHAT, {"messages": messages})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages.1.prefix")


TOLERATED = {
    *("metadata", "store", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
"""What OpenAI's client can send that is neither served nor changes an answer."""


@pytest.mark.parametrize(
    ("params", "schema"), [(ChatParams, ChatCompletionBody), (TextParams, CompletionBody)]
)
def test_everything_that_openais_client_can_send_is_served_refused_or_does_not_matter(
    params: type, schema: type[ChatCompletionBody] | type[CompletionBody]
) -> None:
    known = {*schema.model_fields, *unsupported._HARMLESS_VALUES, *TOLERATED}

    assert set(get_type_hints(params)) - known == set()
