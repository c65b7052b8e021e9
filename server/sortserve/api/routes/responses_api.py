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
from sortserve.api.tools.choice import ToolChoice, read_tool_choice, require_dialect
from sortserve.api.tools.offered import RESPONSES

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
    read = partial(_job, service, request, headers, body)
    model, choice, job = await service.work_on_body(request, read)
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
        request=_repeated(body, choice, job),
        choice=choice,
        dialect=service.tokenizer.tool_dialect,
    )
    timeout_s = service.settings.request_timeout_s
    if job.stream:
        return GenerationStream(generation, format_, timeout_s=timeout_s)
    return GenerationReply(generation, format_.body, service.threads, timeout_s=timeout_s)


def _job(
    service: Service, request: Request, headers: BudgetHeaders, body: ResponsesBody
) -> tuple[ModelChoice, ToolChoice, Job]:
    settings = service.settings
    model = read_model(body.model, settings.served_model_name, service.worker.exits)
    refuse_unsupported(body.model_extra or {})
    check_stateless(body)
    choice = read_tool_choice(body.tools, body.tool_choice, body.parallel_tool_calls, RESPONSES)
    require_dialect(choice, service.tokenizer.tool_dialect)
    prompt = read_input(
        body,
        max_chars=service.limits.max_text_chars,
        template_arguments=choice.template_arguments,
    )
    # An answer that must be a call has no text that text.format could be of.
    call_format, text_format = choice.output_format(), read_text_format(body)
    job = make_job(
        request,
        headers,
        body,
        [prompt],
        model,
        max_tokens=body.max_output_tokens,
        default_max_tokens=service.worker.max_model_len,
        logprobs=reads_logprobs(body),
        settings=settings,
        vocab_size=service.tokenizer.vocab_size,
        format_=call_format or text_format,
        format_source="text.format" if call_format is None else "tool_choice",
        field_names={
            "prompt": "input",
            "messages": "input",
            "max_tokens": "max_output_tokens",
            "logprobs": "top_logprobs",
        },
    )
    return model, choice, job


def _repeated(body: ResponsesBody, choice: ToolChoice, job: Job) -> dict[str, Any]:
    """What of the request the reply repeats, with what counted where it said nothing."""
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": choice.is_parallel,
        "previous_response_id": None,
        "store": False,
        "temperature": job.sampling.temperature,
        "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
        "tool_choice": choice.kind if body.tool_choice is None else body.tool_choice,
        "tools": [_repeated_tool(tool) for tool in body.tools or ()],
        "top_logprobs": job.sampling.logprobs or 0,
        "top_p": job.sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _repeated_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the fields that clients expect of each: a schema is always kept."""
    return {"type": "function", "description": None, "parameters": None, "strict": True, **tool}
