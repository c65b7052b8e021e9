"""``POST /generate``, ``GET /exits``, ``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from sortserve.api.bodies.models import (
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
)
from sortserve.api.bodies.parameters import ModelChoice, read_model
from sortserve.api.bodies.prompts import (
    Prompt,
    check_token_ids,
    encode_all,
    exactly_one,
    read_messages,
    read_prompt,
)
from sortserve.api.jobs import Job, make_job
from sortserve.api.openapi import documented
from sortserve.api.replies.formats import GenerateFormat
from sortserve.api.replies.large_json import json_reply
from sortserve.api.replies.models import (
    DetokenizeResponse,
    ExitsResponse,
    GenerateResponse,
    TokenizeResponse,
)
from sortserve.api.replies.streaming import GenerationReply, GenerationStream
from sortserve.api.service import Service
from sortserve.core.budget import ExitInfo
from sortserve.core.errors import InvalidRequestError

__all__ = ["native_routes"]

TYPICAL_TOKENS = 128
"""Prompt and answer length of the request whose times ``GET /exits`` estimates."""


def native_routes(service: Service) -> APIRouter:
    """The routes that are ours alone."""
    router = APIRouter(tags=["sortserve"])

    @router.post("/generate", **documented(GenerateResponse, GenerateBody, generates=True))
    async def generate(request: Request) -> Response:
        """Generate text within a budget."""
        return await _generate(service, request)

    @router.get("/exits", **documented(ExitsResponse))
    async def exits() -> dict[str, Any]:
        """The sub-models: what each costs, how good it is, how fast it would be now."""
        num_tokens = _typical_tokens(service)
        return {
            "exits": [_exit_entry(service, info) for info in service.worker.exits.exits],
            "estimate_for": {"prompt_tokens": num_tokens, "max_tokens": num_tokens},
        }

    @router.post("/tokenize", **documented(TokenizeResponse, TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """A prompt or messages as token ids, exactly as the generation routes see them."""
        return await _tokenize(service, request)

    @router.post("/detokenize", **documented(DetokenizeResponse, DetokenizeBody))
    async def detokenize(request: Request) -> dict[str, Any]:
        """Token ids as text."""
        return await service.read(request, DetokenizeBody, partial(_detokenized, service))

    return router


async def _generate(service: Service, request: Request) -> Response:
    arrival_s = service.worker.clock()
    read = partial(_generate_job, service, request, arrival_s)
    body, model, job = await service.read(request, GenerateBody, read)
    generation = await service.start(job)
    options = body.stream_options
    format_ = GenerateFormat(
        generation=generation,
        tokenizer=service.tokenizer,
        head={"id": job.request_id, "model": model.name},
        with_logprobs=body.logprobs is not None,
        with_token_ids=bool(body.return_token_ids),
        usage_always=bool(options and options.continuous_usage_stats),
    )
    timeout_s = service.settings.request_timeout_s
    if body.stream:
        return GenerationStream(generation, format_, timeout_s=timeout_s)
    return GenerationReply(generation, format_.body, service.threads, timeout_s=timeout_s)


def _generate_job(
    service: Service, request: Request, arrival_s: float, body: GenerateBody
) -> tuple[GenerateBody, ModelChoice, Job]:
    settings, worker, tokenizer = service.settings, service.worker, service.tokenizer
    model = read_model(body.model, settings.served_model_name, worker.exits)
    prompt = _prompt_of(body, tokenizer.vocab_size, service.limits.max_text_chars)
    job = make_job(
        request,
        body,
        [prompt],
        model,
        arrival_s=arrival_s,
        max_tokens=body.max_tokens,
        default_max_tokens=worker.max_model_len,
        logprobs=body.logprobs,
        sampling_defaults=settings.sampling_defaults,
        vocab_size=tokenizer.vocab_size,
        field_names={} if body.prompt is not None else {"prompt": "messages"},
    )
    return body, model, job


def _prompt_of(body: GenerateBody | TokenizeBody, vocab_size: int, max_chars: int) -> Prompt:
    exactly_one(body.prompt, body.messages)
    if body.messages is not None:
        return read_messages(
            body.messages,
            max_chars=max_chars,
            add_generation_prompt=body.add_generation_prompt,
            template_arguments=body.chat_template_kwargs,
        )
    for name in ("add_generation_prompt", "chat_template_kwargs"):
        if getattr(body, name) is not None:
            raise InvalidRequestError(f"{name} can only be given with messages.", param=name)
    return read_prompt(
        body.prompt,
        "prompt",
        vocab_size,
        max_chars=max_chars,
        add_special_tokens=body.add_special_tokens is not False,
    )


async def _tokenize(service: Service, request: Request) -> Response:
    def read(body: TokenizeBody) -> tuple[TokenizeBody, Prompt]:
        read_model(body.model, service.settings.served_model_name, service.worker.exits)
        max_chars = service.limits.max_tokenize_chars
        return body, _prompt_of(body, service.tokenizer.vocab_size, max_chars)

    body, prompt = await service.read(request, TokenizeBody, read)
    [token_ids] = await encode_all(
        [prompt],
        service.tokenizer,
        service.threads,
        max_tokens=service.limits.max_encoded_tokens,
    )

    def reply() -> dict[str, Any]:
        reply = {
            "count": len(token_ids),
            "max_model_len": service.worker.max_model_len,
            "tokens": token_ids,
        }
        if body.return_token_strs:
            as_text = service.tokenizer.convert_id_to_token_text
            reply["token_strs"] = [as_text(token_id)[0] for token_id in token_ids]
        return reply

    return await json_reply(reply, len(token_ids), service.threads)


def _detokenized(service: Service, body: DetokenizeBody) -> dict[str, Any]:
    read_model(body.model, service.settings.served_model_name, service.worker.exits)
    tokenizer = service.tokenizer
    token_ids = check_token_ids(body.tokens, "tokens", tokenizer.vocab_size)
    text = tokenizer.decode(token_ids, skip_special_tokens=bool(body.skip_special_tokens))
    return {"prompt": text}


def _typical_tokens(service: Service) -> int:
    return min(TYPICAL_TOKENS, service.worker.max_model_len // 2)


def _exit_entry(service: Service, info: ExitInfo) -> dict[str, Any]:
    num_tokens = _typical_tokens(service)
    estimate = service.worker.estimate(info.exit_layer, num_tokens, num_tokens)
    return {
        "exit_layer": info.exit_layer,
        "model": f"{service.settings.served_model_name}@{info.exit_layer}",
        "num_parameters": info.num_parameters,
        "compute": round(info.compute, 4),
        "quality": None if info.quality is None else dict(info.quality),
        "score": info.score,
        "estimate": None
        if estimate is None
        else {
            "ttft_ms": round(estimate.ttft_s * 1e3, 3),
            "tpot_ms": round(estimate.tpot_s * 1e3, 3),
            "latency_ms": round(estimate.e2e_s * 1e3, 3),
        },
    }
