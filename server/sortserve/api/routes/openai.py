"""The OpenAI routes: completions, chat completions, models."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from sortserve.api.bodies.limits import MAX_ECHO_CHARS
from sortserve.api.bodies.models import ChatCompletionBody, CompletionBody
from sortserve.api.bodies.parameters import ModelChoice, read_model
from sortserve.api.bodies.prompts import TextPrompt, TokenPrompt, read_messages, read_prompts
from sortserve.api.bodies.unsupported import refuse_unsupported
from sortserve.api.generation import Generation
from sortserve.api.jobs import Job, make_job
from sortserve.api.openapi import documented
from sortserve.api.replies.formats import ChatFormat, CompletionFormat, GenerateFormat
from sortserve.api.replies.models import (
    ChatCompletionResponse,
    CompletionResponse,
    ModelResponse,
    ModelsResponse,
)
from sortserve.api.replies.streaming import GenerationReply, GenerationStream
from sortserve.api.service import Service
from sortserve.core.errors import InvalidRequestError

__all__ = ["openai_routes"]

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own default."""
THREAD_FROM_IDS = 2048
"""Prompts of so many token ids are decoded on a thread."""


def openai_routes(service: Service) -> APIRouter:
    """Routes that clients of OpenAI's API know."""
    router = APIRouter(tags=["OpenAI"])
    created = int(time.time())

    @router.post(
        "/v1/completions", **documented(CompletionResponse, CompletionBody, generates=True)
    )
    async def completions(request: Request) -> Response:
        """Continue a prompt, or several."""
        return await _completions(service, request)

    @router.post(
        "/v1/chat/completions",
        **documented(ChatCompletionResponse, ChatCompletionBody, generates=True),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await _chat(service, request)

    @router.get("/v1/models", **documented(ModelsResponse))
    async def models() -> dict[str, Any]:
        """The served name, and `NAME@E` for each exit."""
        name, exits = service.settings.served_model_name, service.worker.exits
        names = [name, *(f"{name}@{exit_layer}" for exit_layer in exits.layers)]
        return {"object": "list", "data": [_model_entry(service, n, created) for n in names]}

    @router.get("/v1/models/{model_id:path}", **documented(ModelResponse, errors=(401, 404)))
    async def model(model_id: str) -> dict[str, Any]:
        """One of them."""
        choice = read_model(model_id, service.settings.served_model_name, service.worker.exits)
        return _model_entry(service, choice.name, created)

    return router


def _model_entry(service: Service, name: str, created: int) -> dict[str, Any]:
    exits = service.worker.exits
    choice = read_model(name, service.settings.served_model_name, exits)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "sortserve",
        "root": service.settings.served_model_name,
        "max_model_len": service.worker.max_model_len,
        "exit_layer": choice.exit_layer,
        "exits": list(exits.layers),
    }


async def _completions(service: Service, request: Request) -> Response:
    arrival_s = service.worker.clock()
    read = partial(_completion_job, service, request, arrival_s)
    body, model, prompts, job = await service.read(request, CompletionBody, read)
    echo = await _echo(service, job, prompts) if body.echo else None
    generation = await service.start(job)
    options = body.stream_options
    format_ = CompletionFormat(
        generation=generation,
        tokenizer=service.tokenizer,
        head=_head("cmpl", "text_completion", job, model, body.service_tier),
        with_logprobs=body.logprobs is not None,
        with_token_ids=bool(body.return_token_ids),
        usage_at_end=bool(options and options.include_usage),
        usage_always=bool(options and options.continuous_usage_stats),
        echo=echo,
    )
    return _reply(service, job, generation, format_)


def _completion_job(
    service: Service, request: Request, arrival_s: float, body: CompletionBody
) -> tuple[CompletionBody, ModelChoice, list[TextPrompt | TokenPrompt], Job]:
    settings, tokenizer = service.settings, service.tokenizer
    model = read_model(body.model, settings.served_model_name, service.worker.exits)
    refuse_unsupported({**(body.model_extra or {}), "suffix": body.suffix})
    _check_completion(body)
    prompts = read_prompts(
        body.prompt,
        tokenizer.vocab_size,
        max_chars=service.limits.max_text_chars,
        add_special_tokens=body.add_special_tokens is not False,
    )
    job = make_job(
        request,
        body,
        prompts,
        model,
        arrival_s=arrival_s,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        logprobs=body.logprobs,
        sampling_defaults=settings.sampling_defaults,
        vocab_size=tokenizer.vocab_size,
    )
    return body, model, prompts, job


async def _echo(
    service: Service, job: Job, prompts: list[TextPrompt | TokenPrompt]
) -> Callable[[int], str]:
    """The prompt of each choice as text; token ids are decoded here, once."""

    def decode() -> list[str]:
        skip = job.sampling.skip_special_tokens
        return [
            prompt.text
            if isinstance(prompt, TextPrompt)
            else service.tokenizer.decode(prompt.token_ids, skip_special_tokens=skip)
            for prompt in prompts
        ]

    num_token_ids = sum(len(p.token_ids) for p in prompts if isinstance(p, TokenPrompt))
    texts = decode() if num_token_ids < THREAD_FROM_IDS else await service.threads.run(decode)
    num_chars = job.n * sum(map(len, texts))
    if num_chars > MAX_ECHO_CHARS:
        raise InvalidRequestError(
            f"echo=true would repeat {num_chars} characters of prompts; {MAX_ECHO_CHARS} are "
            "allowed. Lower n, or leave echo out.",
            param="echo",
        )
    return lambda index: texts[index // job.n]


def _check_completion(body: CompletionBody) -> None:
    if body.echo and body.logprobs is not None:
        raise InvalidRequestError(
            "echo=true cannot be given with logprobs: the prompt's own log probabilities are not "
            "computed. Drop one of the two.",
            param="echo",
        )
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            f"best_of={body.best_of} is not allowed: only n={body.n or 1}, or leave it out.",
            param="best_of",
        )


async def _chat(service: Service, request: Request) -> Response:
    arrival_s = service.worker.clock()
    read = partial(_chat_job, service, request, arrival_s)
    body, model, job = await service.read(request, ChatCompletionBody, read)
    generation = await service.start(job)
    options = body.stream_options
    object_ = "chat.completion.chunk" if body.stream else "chat.completion"
    format_ = ChatFormat(
        generation=generation,
        tokenizer=service.tokenizer,
        head=_head("chatcmpl", object_, job, model, body.service_tier),
        with_logprobs=bool(body.logprobs),
        with_token_ids=bool(body.return_token_ids),
        usage_at_end=bool(options and options.include_usage),
        usage_always=bool(options and options.continuous_usage_stats),
    )
    return _reply(service, job, generation, format_)


def _chat_job(
    service: Service, request: Request, arrival_s: float, body: ChatCompletionBody
) -> tuple[ChatCompletionBody, ModelChoice, Job]:
    settings = service.settings
    model = read_model(body.model, settings.served_model_name, service.worker.exits)
    refuse_unsupported(body.model_extra or {})
    prompt = read_messages(
        body.messages,
        max_chars=service.limits.max_text_chars,
        add_generation_prompt=body.add_generation_prompt,
        template_arguments=body.chat_template_kwargs,
    )
    is_new_name = body.max_completion_tokens is not None
    limit_name = "max_completion_tokens" if is_new_name else "max_tokens"
    job = make_job(
        request,
        body,
        [prompt],
        model,
        arrival_s=arrival_s,
        max_tokens=_chat_max_tokens(body),
        default_max_tokens=service.worker.max_model_len,
        logprobs=_chat_logprobs(body),
        sampling_defaults=settings.sampling_defaults,
        vocab_size=service.tokenizer.vocab_size,
        field_names={"prompt": "messages", "max_tokens": limit_name, "logprobs": "top_logprobs"},
    )
    return body, model, job


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


def _head(
    prefix: str, object_: str, job: Job, model: ModelChoice, service_tier: str | None
) -> dict[str, Any]:
    head: dict[str, Any] = {
        "id": f"{prefix}-{job.request_id}",
        "object": object_,
        "created": int(time.time()),
        "model": model.name,
    }
    return head if service_tier is None else {**head, "service_tier": "default"}


def _reply(service: Service, job: Job, generation: Generation, format_: GenerateFormat) -> Response:
    timeout_s = service.settings.request_timeout_s
    if job.stream:
        return GenerationStream(generation, format_, timeout_s=timeout_s)
    return GenerationReply(generation, format_.body, service.threads, timeout_s=timeout_s)
