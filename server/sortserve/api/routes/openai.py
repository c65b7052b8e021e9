"""The OpenAI routes: completions, chat completions, models."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from sortserve.api.bodies.models import ChatCompletionBody, CompletionBody
from sortserve.api.bodies.parameters import BudgetHeaders, ModelChoice, read_model
from sortserve.api.bodies.prompts import TextPrompt, TokenPrompt, read_messages, read_prompts
from sortserve.api.bodies.unsupported import refuse_unsupported
from sortserve.api.echo import echoed_prompts
from sortserve.api.generation import Generation
from sortserve.api.jobs import Job, make_job, tier_of
from sortserve.api.key_depth import KeyExits
from sortserve.api.replies.formats import ChatFormat, CompletionFormat, GenerateFormat
from sortserve.api.replies.models import (
    ChatCompletionResponse,
    CompletionResponse,
    ModelResponse,
    ModelsResponse,
)
from sortserve.api.replies.streaming import GenerationReply, GenerationStream
from sortserve.api.replies.tool_format import ToolFormat
from sortserve.api.routes.dependencies import OpenExits, Serving, body_of
from sortserve.api.routes.responses import GENERATION_RESPONSES, errors
from sortserve.api.service import Service
from sortserve.api.tools.choice import ToolChoice, read_tool_choice, require_dialect
from sortserve.core.errors import InvalidRequestError

__all__ = ["router"]

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own default."""


router = APIRouter(tags=["OpenAI"])
"""Routes that clients of OpenAI's API know."""


@router.get("/v1/models", responses=errors(401))
async def models(service: Serving, open_exits: OpenExits) -> ModelsResponse:
    """The served name, and `NAME@E` for each exit that the key may have."""
    name = service.settings.served_model_name
    names = [name, *(f"{name}@{exit_layer}" for exit_layer in open_exits.layers)]
    entries = [_model_entry(service, name, open_exits) for name in names]
    return ModelsResponse(object="list", data=entries)


@router.get("/v1/models/{model_id:path}", responses=errors(401, 404))
async def model(model_id: str, service: Serving, open_exits: OpenExits) -> ModelResponse:
    """One of them."""
    return _model_entry(service, model_id, open_exits)


def _model_entry(service: Service, name: str, open_exits: KeyExits) -> ModelResponse:
    exits, served_name = service.worker.exits, service.settings.served_model_name
    choice = read_model(name, served_name, exits, known_to=open_exits.layers)
    return ModelResponse(
        id=choice.name,
        object="model",
        created=service.created_s,
        owned_by="sortserve",
        root=served_name,
        max_model_len=service.worker.max_model_len,
        exit_layer=choice.exit_layer,
        exits=list(open_exits.layers),
        license=service.settings.license,
    )


@router.post("/v1/completions", response_model=CompletionResponse, responses=GENERATION_RESPONSES)
async def completions(
    request: Request,
    headers: Annotated[BudgetHeaders, Header()],
    body: Annotated[CompletionBody, body_of(CompletionBody)],
    service: Serving,
) -> Response:
    """Continue a prompt, or several."""
    read = partial(_completion_job, service, request, headers, body)
    model, prompts, job = await service.work_on_body(request, read)
    echo = await echoed_prompts(service, job, prompts) if body.echo else None
    generation = await service.start(job)
    options = body.stream_options
    format_ = CompletionFormat(
        generation=generation,
        tokenizer=service.tokenizer,
        head=_head("cmpl", "text_completion", job, model),
        with_logprobs=body.logprobs is not None,
        with_token_ids=bool(body.return_token_ids),
        usage_at_end=bool(options and options.include_usage),
        usage_always=bool(options and options.continuous_usage_stats),
        echo=echo,
    )
    return _reply(service, job, generation, format_)


def _completion_job(
    service: Service, request: Request, headers: BudgetHeaders, body: CompletionBody
) -> tuple[ModelChoice, list[TextPrompt | TokenPrompt], Job]:
    settings, tokenizer = service.settings, service.tokenizer
    model = read_model(body.model, settings.served_model_name, service.worker.exits)
    refuse_unsupported({**(body.model_extra or {}), "suffix": body.suffix})
    _check_completion(body)
    # With echo, none at all may be asked for; the engine makes one, as it ends a request by one.
    drops_answer = bool(body.echo) and body.max_tokens == 0
    prompts = read_prompts(
        body.prompt,
        tokenizer.vocab_size,
        max_chars=service.limits.max_text_chars,
        add_special_tokens=body.add_special_tokens is not False,
    )
    job = make_job(
        request,
        headers,
        body,
        prompts,
        model,
        max_tokens=1 if drops_answer else body.max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=body.logprobs,
        settings=settings,
        vocab_size=tokenizer.vocab_size,
    )
    num_top = body.logprobs if body.echo else None
    return model, prompts, replace(job, prompt_logprobs=num_top, drops_answer=drops_answer)


def _check_completion(body: CompletionBody) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            f"best_of={body.best_of} is not supported: answers are not ranked, so it can only be "
            f"n={body.n or 1}. Leave it out.",
            param="best_of",
        )


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletionResponse,
    responses=GENERATION_RESPONSES,
)
async def chat_completions(
    request: Request,
    headers: Annotated[BudgetHeaders, Header()],
    body: Annotated[ChatCompletionBody, body_of(ChatCompletionBody)],
    service: Serving,
) -> Response:
    """Answer a conversation."""
    read = partial(_chat_job, service, request, headers, body)
    model, choice, job = await service.work_on_body(request, read)
    generation = await service.start(job)
    options = body.stream_options
    object_ = "chat.completion.chunk" if body.stream else "chat.completion"
    format_of: Callable[..., ChatFormat] = ChatFormat
    if choice.kind != "none":
        format_of = partial(ToolFormat, choice=choice, dialect=service.tokenizer.tool_dialect)
    format_ = format_of(
        generation=generation,
        tokenizer=service.tokenizer,
        head=_head("chatcmpl", object_, job, model),
        with_logprobs=bool(body.logprobs),
        with_token_ids=bool(body.return_token_ids),
        usage_at_end=bool(options and options.include_usage),
        usage_always=bool(options and options.continuous_usage_stats),
    )
    return _reply(service, job, generation, format_)


def _chat_job(
    service: Service, request: Request, headers: BudgetHeaders, body: ChatCompletionBody
) -> tuple[ModelChoice, ToolChoice, Job]:
    settings = service.settings
    model = read_model(body.model, settings.served_model_name, service.worker.exits)
    refuse_unsupported(body.model_extra or {})
    choice = read_tool_choice(body.tools, body.tool_choice, body.parallel_tool_calls)
    require_dialect(choice, service.tokenizer.tool_dialect)
    prompt = read_messages(
        body.messages,
        max_chars=service.limits.max_text_chars,
        add_generation_prompt=body.add_generation_prompt,
        template_arguments={**(body.chat_template_kwargs or {}), **choice.template_arguments},
    )
    is_new_name = body.max_completion_tokens is not None
    limit_name = "max_completion_tokens" if is_new_name else "max_tokens"
    job = make_job(
        request,
        headers,
        body,
        [prompt],
        model,
        max_tokens=_chat_max_tokens(body),
        default_max_tokens=service.worker.max_model_len,
        logprobs=_chat_logprobs(body),
        settings=settings,
        vocab_size=service.tokenizer.vocab_size,
        field_names={"prompt": "messages", "max_tokens": limit_name, "logprobs": "top_logprobs"},
        format_=choice.output_format(),
    )
    return model, choice, job


def _chat_max_tokens(body: ChatCompletionBody) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequestError(
            f"max_completion_tokens={new} contradicts max_tokens={old}. Drop one of the two.",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _chat_logprobs(body: ChatCompletionBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true.", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _head(prefix: str, object_: str, job: Job, model: ModelChoice) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{job.request_id}",
        "object": object_,
        "created": int(time.time()),
        "model": model.name,
        **tier_of(job),
    }


def _reply(service: Service, job: Job, generation: Generation, format_: GenerateFormat) -> Response:
    timeout_s = service.settings.request_timeout_s
    if job.stream:
        return GenerationStream(generation, format_, timeout_s=timeout_s)
    return GenerationReply(generation, format_.body, service.threads, timeout_s=timeout_s)
