"""OpenAI's responses API, without a memory: every request brings its whole conversation."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from sortserve.api.bodies.parameters import BudgetHeaders, ModelChoice, read_model
from sortserve.api.bodies.responses import (
    ResponsesBody,
    check_stateless,
    read_input,
    read_text_format,
    reads_logprobs,
)
from sortserve.api.bodies.unsupported import refuse_unsupported
from sortserve.api.jobs import Job, make_job, tier_of
from sortserve.api.replies.responses_format import ResponsesFormat, ResponsesResponse
from sortserve.api.replies.streaming import GenerationReply, GenerationStream
from sortserve.api.routes.dependencies import Serving, body_of
from sortserve.api.routes.responses import GENERATION_RESPONSES
from sortserve.api.service import Service

__all__ = ["router"]

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", response_model=ResponsesResponse, responses=GENERATION_RESPONSES)
async def responses(
    request: Request,
    headers: Annotated[BudgetHeaders, Header()],
    body: Annotated[ResponsesBody, body_of(ResponsesBody)],
    service: Serving,
) -> Response:
    """Answer a conversation; nothing of it is kept."""
    model, job = await service.work_on_body(request, partial(_job, service, request, headers, body))
    generation = await service.start(job)
    format_ = ResponsesFormat(
        generation=generation,
        tokenizer=service.tokenizer,
        head={
            "id": f"resp_{job.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model.name,
            **tier_of(job),
        },
        with_logprobs=job.sampling.logprobs is not None,
        request=_repeated(body, job),
    )
    timeout_s = service.settings.request_timeout_s
    if job.stream:
        return GenerationStream(generation, format_, timeout_s=timeout_s)
    return GenerationReply(generation, format_.body, service.threads, timeout_s=timeout_s)


def _job(
    service: Service, request: Request, headers: BudgetHeaders, body: ResponsesBody
) -> tuple[ModelChoice, Job]:
    settings = service.settings
    model = read_model(body.model, settings.served_model_name, service.worker.exits)
    refuse_unsupported(body.model_extra or {})
    check_stateless(body)
    job = make_job(
        request,
        headers,
        body,
        [read_input(body, max_chars=service.limits.max_text_chars)],
        model,
        max_tokens=body.max_output_tokens,
        default_max_tokens=service.worker.max_model_len,
        logprobs=reads_logprobs(body),
        settings=settings,
        vocab_size=service.tokenizer.vocab_size,
        format_=read_text_format(body),
        field_names={
            "prompt": "input",
            "messages": "input",
            "max_tokens": "max_output_tokens",
            "logprobs": "top_logprobs",
        },
    )
    return model, job


def _repeated(body: ResponsesBody, job: Job) -> dict[str, Any]:
    """What of the request the reply repeats, with what counted where it said nothing."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": job.sampling.temperature,
        "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_logprobs": job.sampling.logprobs or 0,
        "top_p": job.sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
