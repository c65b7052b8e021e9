"""``POST /generate``, ``GET /exits``, ``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from sortserve.api.bodies import read_body
from sortserve.api.formats import GenerateFormat
from sortserve.api.jobs import make_job
from sortserve.api.limits import read_model
from sortserve.api.openapi import documented
from sortserve.api.prompts import (
    Prompt,
    check_token_ids,
    encode_all,
    exactly_one,
    read_messages,
    read_prompt,
)
from sortserve.api.replies import (
    DetokenizeReply,
    ExitsReply,
    GenerateReply,
    TokenizeReply,
)
from sortserve.api.schemas import (
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from sortserve.api.service import Service
from sortserve.api.streaming import GenerationReply, GenerationStream
from sortserve.budget import ExitInfo
from sortserve.errors import InvalidRequestError

__all__ = ["native_routes"]

TYPICAL_TOKENS = 128
"""Prompt and answer length of the request whose times ``GET /exits`` estimates."""


def native_routes(service: Service) -> APIRouter:
    """The routes that are ours alone."""
    router = APIRouter(tags=["sortserve"])

    @router.post("/generate", **documented(GenerateReply, GenerateRequest, generates=True))
    async def generate(request: Request) -> Response:
        """Generate text within a budget."""
        return await _generate(service, request)

    @router.get("/exits", **documented(ExitsReply))
    async def exits() -> dict[str, Any]:
        """The sub-models: what each costs, how good it is, how fast it would be now."""
        num_tokens = _typical_tokens(service)
        return {
            "exits": [_exit_entry(service, info) for info in service.worker.exits.exits],
            "estimate_for": {"prompt_tokens": num_tokens, "max_tokens": num_tokens},
        }

    @router.post("/tokenize", **documented(TokenizeReply, TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        """A prompt or messages as token ids, exactly as the generation routes see them."""
        body = await read_body(request, TokenizeRequest)
        read_model(body.model, service.settings.served_model_name, service.worker.exits)
        return await _tokenize(service, body)

    @router.post("/detokenize", **documented(DetokenizeReply, DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        """Token ids as text."""
        body = await read_body(request, DetokenizeRequest)
        read_model(body.model, service.settings.served_model_name, service.worker.exits)
        tokenizer = service.tokenizer
        token_ids = check_token_ids(body.tokens, "tokens", tokenizer.vocab_size)
        skip = bool(body.skip_special_tokens)
        return {"prompt": tokenizer.decode(token_ids, skip_special_tokens=skip)}

    return router


async def _generate(service: Service, request: Request) -> Response:
    arrival_s = service.worker.clock()
    body = await read_body(request, GenerateRequest)
    settings, worker, tokenizer = service.settings, service.worker, service.tokenizer
    model = read_model(body.model, settings.served_model_name, worker.exits)
    job = make_job(
        request,
        body,
        [_prompt_of(body, tokenizer.vocab_size)],
        model,
        arrival_s=arrival_s,
        max_tokens=body.max_tokens,
        default_max_tokens=worker.max_model_len,
        logprobs=body.logprobs,
        sampling_defaults=settings.sampling_defaults,
        vocab_size=tokenizer.vocab_size,
        field_names={} if body.prompt is not None else {"prompt": "messages"},
    )
    generation = await service.start(job)
    options = body.stream_options
    format_ = GenerateFormat(
        generation=generation,
        tokenizer=tokenizer,
        head={"id": job.request_id, "model": model.name},
        with_logprobs=body.logprobs is not None,
        with_token_ids=bool(body.return_token_ids),
        usage_always=bool(options and options.continuous_usage_stats),
    )
    if body.stream:
        return GenerationStream(generation, format_, timeout_s=settings.request_timeout_s)
    return GenerationReply(generation, format_.body, timeout_s=settings.request_timeout_s)


def _prompt_of(body: GenerateRequest | TokenizeRequest, vocab_size: int) -> Prompt:
    exactly_one(body.prompt, body.messages)
    if body.messages is not None:
        return read_messages(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            template_arguments=body.chat_template_kwargs,
        )
    for name in ("add_generation_prompt", "chat_template_kwargs"):
        if getattr(body, name) is not None:
            raise InvalidRequestError(f"{name} can only be given with messages.", param=name)
    return read_prompt(
        body.prompt, "prompt", vocab_size, add_special_tokens=body.add_special_tokens is not False
    )


async def _tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer = service.tokenizer
    [token_ids] = await encode_all([_prompt_of(body, tokenizer.vocab_size)], tokenizer)
    reply: dict[str, Any] = {
        "count": len(token_ids),
        "max_model_len": service.worker.max_model_len,
        "tokens": token_ids,
    }
    if body.return_token_strs:
        reply["token_strs"] = [tokenizer.convert_id_to_token_text(t)[0] for t in token_ids]
    return reply


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
