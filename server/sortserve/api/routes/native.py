"""``POST /generate``, ``GET /exits``, ``/tokenize``, ``/detokenize``, ``/tokenizer_info``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from sortserve.api.bodies.models import (
    DetokenizeBody,
    GenerateBody,
    TokenizeBody,
)
from sortserve.api.bodies.parameters import BudgetHeaders, ModelChoice, read_model
from sortserve.api.bodies.prompts import (
    Prompt,
    check_token_ids,
    encode_all,
    exactly_one,
    read_messages,
    read_prompt,
)
from sortserve.api.jobs import Job, make_job, tier_of
from sortserve.api.replies.formats import GenerateFormat
from sortserve.api.replies.large_json import json_reply
from sortserve.api.replies.models import (
    DetokenizeResponse,
    EstimateFor,
    ExitEntry,
    ExitEstimate,
    ExitsResponse,
    GenerateResponse,
    ScheduleEntry,
    TokenizeResponse,
    TokenizerInfoResponse,
)
from sortserve.api.replies.streaming import GenerationReply, GenerationStream
from sortserve.api.routes.dependencies import OpenExits, Serving, body_of
from sortserve.api.routes.responses import BODY_ERRORS, GENERATION_RESPONSES, errors
from sortserve.api.service import Service
from sortserve.core.budget import ExitInfo, ExitTable
from sortserve.core.errors import InvalidRequestError
from sortserve.core.schedule import DepthSchedule, ScheduleInfo

__all__ = ["router"]

TYPICAL_TOKENS = 128
"""Prompt and answer length of the request whose times ``GET /exits`` estimates."""


router = APIRouter(tags=["sortserve"])
"""The routes that are ours alone."""


@router.post("/generate", response_model=GenerateResponse, responses=GENERATION_RESPONSES)
async def generate(
    request: Request,
    headers: Annotated[BudgetHeaders, Header()],
    body: Annotated[GenerateBody, body_of(GenerateBody)],
    service: Serving,
) -> Response:
    """Generate text within a budget."""
    read = partial(_generate_job, service, request, headers, body)
    model, job = await service.work_on_body(request, read)
    generation = await service.start(job)
    options = body.stream_options
    format_ = GenerateFormat(
        generation=generation,
        tokenizer=service.tokenizer,
        head={"id": job.request_id, "model": model.name, **tier_of(job)},
        with_logprobs=body.logprobs is not None,
        with_token_ids=bool(body.return_token_ids),
        usage_always=bool(options and options.continuous_usage_stats),
    )
    timeout_s = service.settings.request_timeout_s
    if body.stream:
        return GenerationStream(generation, format_, timeout_s=timeout_s)
    return GenerationReply(generation, format_.body, service.threads, timeout_s=timeout_s)


def _generate_job(
    service: Service, request: Request, headers: BudgetHeaders, body: GenerateBody
) -> tuple[ModelChoice, Job]:
    settings, worker, tokenizer = service.settings, service.worker, service.tokenizer
    model = read_model(body.model, settings.served_model_name, worker.exits)
    prompt = _prompt_of(body, tokenizer.vocab_size, service.limits.max_text_chars)
    job = make_job(
        request,
        headers,
        body,
        [prompt],
        model,
        max_tokens=body.max_tokens,
        default_max_tokens=worker.max_model_len,
        logprobs=body.logprobs,
        settings=settings,
        vocab_size=tokenizer.vocab_size,
        field_names={} if body.prompt is not None else {"prompt": "messages"},
    )
    return model, job


@router.get("/exits", responses=errors(401))
async def exits(service: Serving, open_exits: OpenExits) -> ExitsResponse:
    """The sub-models that the key may have: cost, quality, and how fast each would be now."""
    num_tokens = min(TYPICAL_TOKENS, service.worker.max_model_len // 2)
    table = service.worker.exits
    entries = [
        _exit_entry(
            service,
            table[exit_layer],
            num_tokens,
            served_unasked=exit_layer in open_exits.served_unasked,
        )
        for exit_layer in open_exits.layers
    ]
    estimates = {entry.exit_layer: entry.estimate for entry in entries}
    schedules = [s for s in table.schedules if set(s.schedule.exits) <= set(open_exits.layers)]
    return ExitsResponse(
        exits=entries,
        schedules=[_schedule_entry(info, table, estimates, num_tokens) for info in schedules],
        estimate_for=EstimateFor(prompt_tokens=num_tokens, max_tokens=num_tokens),
        min_quality=table.min_quality,
    )


def _exit_entry(
    service: Service, info: ExitInfo, num_tokens: int, *, served_unasked: bool
) -> ExitEntry:
    estimate = service.worker.estimate(info.exit_layer, num_tokens, num_tokens)
    return ExitEntry(
        exit_layer=info.exit_layer,
        model=f"{service.settings.served_model_name}@{info.exit_layer}",
        num_parameters=info.num_parameters,
        compute=round(info.compute, 4),
        quality=None if info.quality is None else dict(info.quality),
        score=info.score,
        usable=info.usable,
        served_unasked=served_unasked,
        estimate=None
        if estimate is None
        else ExitEstimate(
            ttft_ms=round(estimate.ttft_s * 1e3, 3),
            tpot_ms=round(estimate.tpot_s * 1e3, 3),
            latency_ms=round(estimate.e2e_s * 1e3, 3),
        ),
    )


def _schedule_entry(
    info: ScheduleInfo,
    table: ExitTable,
    estimates: Mapping[int, ExitEstimate | None],
    num_tokens: int,
) -> ScheduleEntry:
    schedule = info.schedule
    return ScheduleEntry(
        schedule=schedule.document,
        compute=round(schedule.mean(lambda e: table[e].compute, num_tokens), 4),
        quality=None if info.quality is None else dict(info.quality),
        score=info.score,
        estimate=_schedule_estimate(schedule, estimates, num_tokens),
    )


def _schedule_estimate(
    schedule: DepthSchedule, estimates: Mapping[int, ExitEstimate | None], num_tokens: int
) -> ExitEstimate | None:
    """The first exit's time of a prompt, and the mean of the exits' times of a token."""
    known = {e: estimate for e, estimate in estimates.items() if estimate is not None}
    if not known.keys() >= set(schedule.exits):
        return None
    ttft_ms = known[schedule.exit_at(0)].ttft_ms
    tpot_ms = schedule.mean(lambda e: known[e].tpot_ms, num_tokens, start=1)
    return ExitEstimate(
        ttft_ms=ttft_ms,
        tpot_ms=round(tpot_ms, 3),
        latency_ms=round(ttft_ms + (num_tokens - 1) * tpot_ms, 3),
    )


@router.post("/tokenize", response_model=TokenizeResponse, responses=BODY_ERRORS)
async def tokenize(
    request: Request, body: Annotated[TokenizeBody, body_of(TokenizeBody)], service: Serving
) -> Response:
    """A prompt or messages as token ids, exactly as the generation routes see them."""
    tokenizer, limits = service.tokenizer, service.limits

    def read() -> Prompt:
        read_model(body.model, service.settings.served_model_name, service.worker.exits)
        return _prompt_of(body, tokenizer.vocab_size, limits.max_tokenize_chars)

    prompt = await service.work_on_body(request, read)
    [token_ids] = await encode_all(
        [prompt], tokenizer, service.threads, max_tokens=limits.max_encoded_tokens
    )

    def reply() -> dict[str, Any]:
        reply = {
            "count": len(token_ids),
            "max_model_len": service.worker.max_model_len,
            "tokens": token_ids,
        }
        if body.return_token_strs:
            as_text = tokenizer.convert_id_to_token_text
            reply["token_strs"] = [as_text(token_id)[0] for token_id in token_ids]
        return reply

    return await json_reply(reply, len(token_ids), service.threads)


@router.post("/detokenize", responses=BODY_ERRORS)
async def detokenize(
    request: Request, body: Annotated[DetokenizeBody, body_of(DetokenizeBody)], service: Serving
) -> DetokenizeResponse:
    """Token ids as text."""
    tokenizer = service.tokenizer

    def decode() -> str:
        read_model(body.model, service.settings.served_model_name, service.worker.exits)
        token_ids = check_token_ids(body.tokens, "tokens", tokenizer.vocab_size)
        return tokenizer.decode(token_ids, skip_special_tokens=bool(body.skip_special_tokens))

    return DetokenizeResponse(prompt=await service.work_on_body(request, decode))


@router.get("/tokenizer_info", responses=errors(401))
async def tokenizer_info(service: Serving) -> TokenizerInfoResponse:
    """Special tokens and chat template, for programs that tokenise through this server."""
    return TokenizerInfoResponse(
        **service.tokenizer.info, model_max_length=service.worker.max_model_len
    )


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
