"""Fields of the OpenAI API and its dialects that this server knows and cannot honour.

Ignoring them would answer something else than was asked, so any value that asks for something is
refused by name. Fields not listed here, and not in the schemas, are tolerated: what they ask for
does not change the answer (caching, routing, billing, storage), or only tunes a listed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sortserve.api.problems import shortened
from sortserve.core.budget import BUDGET_FIELDS
from sortserve.core.errors import InvalidRequestError

__all__ = ["refuse_unsupported"]

Group = tuple[tuple[Any, ...], tuple[str, ...]]
"""Values that ask for nothing, besides null, and the fields that they ask nothing of."""

# The form of the text: grammars, schemas, choices.
_CONSTRAINTS: tuple[Group, ...] = (
    (({}, {"format": {"type": "text"}}), ("text",)),
    (({}, False), ("structured_output",)),
    (("", "text"), ("format", "output_format", "response_mime_type")),
    ((False,), ("json_mode", "json_object", "guided_json_object", "grammar_lazy")),
    # An empty schema asks for JSON of any kind.
    ((), ("json_schema", "schema", "output_schema", "response_schema")),
    (
        ("",),
        (
            *("grammar", "grammar_string", "ebnf", "gbnf", "lark"),
            *("regex", "regex_pattern"),
            *("guided_decoding_backend", "guided_whitespace_pattern"),
        ),
    ),
    (([],), ("grammar_triggers",)),
    (({}, "", []), ("structural_tag", "guided_decoding", "guided_decoding_params", "constraint")),
    ((0,), ("n_indent",)),
)
# Tools and what else a model would have to reach for.
_TOOLS: tuple[Group, ...] = (
    (([],), ("tools", "functions", "plugins", "mcp_servers")),
    (("none", "auto"), ("tool_choice", "function_call")),
    (("",), ("tool_prompt",)),
    ((), ("web_search_options", "search_parameters", "search_options")),  # {} searches
)
# How much to think and to write.
_EFFORT: tuple[Group, ...] = (
    (("none",), ("reasoning_effort",)),
    (({}, False, {"enabled": False}, {"effort": "none"}), ("reasoning",)),
    ((False, {"type": "disabled"}), ("thinking",)),
    ((False,), ("think", "enable_thinking")),
    ((0, -1), ("thinking_budget", "thinking_token_budget", "reasoning_budget")),
    (("medium",), ("verbosity",)),
)
# Other samplers than ours. Only what switches one on: the rest of its settings does nothing alone.
_SAMPLERS: tuple[Group, ...] = (
    ((0,), ("mirostat", "mirostat_mode")),
    ((), ("mirostat_target",)),
    ((1,), ("typical_p", "typical", "tfs", "tfs_z")),
    (
        (0,),
        (
            *("dry_multiplier", "xtc_probability", "top_a", "smoothing_factor", "dynatemp_range"),
            *("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "skew", "min_keep"),
            "no_repeat_ngram_size",
        ),
    ),
    ((0, -1), ("top_n_sigma", "adaptive_target")),
    ((1,), ("encoder_repetition_penalty", "encoder_rep_pen", "guidance_scale", "cfg_scale")),
    (("",), ("negative_prompt",)),
    (
        (False,),
        ("dynatemp", "dynamic_temperature", "temperature_last", "penalize_nl", "watermark"),
    ),
    (([], ""), ("samplers", "sampler_order", "sampler_priority")),
    ((False,), ("use_beam_search", "early_stopping")),
    ((1,), ("num_beams", "num_beam_groups", "beam_width", "length_penalty", "best_of")),
    ((0,), ("diversity_penalty",)),
    (
        ([], ""),
        (
            *("logits_processors", "logit_processors", "logits_processor"),
            *("custom_logit_processor", "allowed_token_ids", "bad_words", "bad"),
            *("banned_tokens", "banned_strings", "custom_token_bans", "stop_regex"),
        ),
    ),
    ((False,), ("ban_eos_token", "no_stop_trim")),
    (({},), ("custom_params", "vllm_xargs", "repetition_detection", "watermarking_config")),
)
# Other weights, other prompts, other kinds of input.
_INPUTS: tuple[Group, ...] = (
    (
        ([], {}, ""),
        (
            *("lora", "lora_path", "lora_request", "lora_adapters", "adapter", "adapters"),
            *("adapter_id", "adapter_source", "merged_adapters"),
        ),
    ),
    (
        ("",),
        (
            *("chat_template", "template", "system", "instructions", "guideline", "suffix"),
            *("input_prefix", "input_suffix", "previous_response_id", "prompt_mode"),
            "safety_model",
        ),
    ),
    (([],), ("documents", "guardrails", "transforms", "context")),
    ((False,), ("raw", "continue_final_message", "safe_prompt", "echo")),
    ((False,), ("add_special_tokens",)),  # of chat: the template writes them
    (
        ("", [], {}),
        (
            *("prompt", "messages"),  # of the other route
            *("prompt_embeds", "input_embeds", "input_ids", "images", "image_data"),
            *("audio_data", "video_data", "multi_modal_data"),
        ),
    ),
    ((), ("truncate_prompt_tokens", "prompt_truncate_len", "prompt_truncate_length")),
    (("disabled", False), ("truncation", "truncate")),
    (("error",), ("context_length_exceeded_behavior",)),
    (({},), ("session_params",)),
    ((), ("prediction",)),
    ((), ("conversation",)),
    ((False,), ("background",)),
)
# What a reply would have to hold besides the text.
_REPLIES: tuple[Group, ...] = (
    ((["text"],), ("modalities",)),
    ((), ("audio", "moderation", "prompt_logprobs")),
    ((0,), ("n_probs", "top_n_tokens")),
    (
        (False,),
        (
            *("return_hidden_states", "return_full_text", "return_tokens_as_token_ids"),
            "decoder_input_details",
        ),
    ),
    ((True,), ("spaces_between_special_tokens", "detokenize")),
    ((0,), ("t_max_predict_ms",)),
)
# Objects of other APIs that hold any of the above.
_NESTS: tuple[Group, ...] = (
    (({},), ("extra_body", "parameters", "options", "sampling_params", "generation_config")),
    (({},), ("nvext",)),
)
# Fields that have another name here, which the refusal says.
_ALIASES: dict[str, Group] = {
    "max_tokens": (
        (-1,),
        ("max_new_tokens", "max_output_tokens", "max_length", "n_predict", "num_predict"),
    ),
    "min_tokens": ((0,), ("min_new_tokens", "min_length")),
    "stop": (([], ""), ("stop_sequences", "stop_words")),
    "seed": ((-1,), ("random_seed",)),
    "repetition_penalty": ((1,), ("repeat_penalty", "rep_pen")),
    "temperature": ((True,), ("do_sample",)),
}
_GROUPS: tuple[Group, ...] = (
    *(*_CONSTRAINTS, *_TOOLS, *_EFFORT, *_SAMPLERS, *_INPUTS, *_REPLIES, *_NESTS),
    *_ALIASES.values(),
)
_HARMLESS_VALUES = {name: values for values, names in _GROUPS for name in names}
"""Field name to the values that ask for nothing."""
_OUR_NAMES = {name: ours for ours, (_, names) in _ALIASES.items() for name in names}
_CONSTRAINT_PREFIX = "guided_"
"""vLLM's; whatever comes after it, the text shall have a form."""
_BUDGET_FIELDS = frozenset(BUDGET_FIELDS)


def refuse_unsupported(body_fields: Mapping[str, Any]) -> None:
    """Refuse fields that would change the answer if we could honour them.

    Raises:
        InvalidRequestError: ``param`` is the field.
    """
    offers_nothing = body_fields.get("tool_choice") == "none"  # whatever tools are listed
    for name, value in body_fields.items():
        if value is None or (offers_nothing and name == "tools"):
            continue
        if name in _BUDGET_FIELDS:
            raise InvalidRequestError(
                f'{name} belongs inside budget: send {{"budget": {{"{name}": ...}}}}.', param=name
            )
        if _asks_for_something(name, value):
            instead = f"use {_OUR_NAMES[name]}" if name in _OUR_NAMES else "leave it out"
            raise InvalidRequestError(
                f"{name}={shortened(value)} is not supported by this server; {instead}.",
                param=name,
                code="unsupported_field",
            )


def _asks_for_something(name: str, value: object) -> bool:
    """Whether the field is one that is known here, with a value that is not harmless."""
    harmless = _HARMLESS_VALUES.get(name)
    if harmless is None:
        if not name.startswith(_CONSTRAINT_PREFIX):
            return False
        harmless = ("", [], False)
    # In JSON false is no 0, but in Python it is.
    return not any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless
    )
