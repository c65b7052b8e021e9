"""One HTTP request reduced to what the engine needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from sortserve.admission.key_ledger import KeyUse
from sortserve.api.bodies.models import GenerationFields
from sortserve.api.bodies.parameters import (
    BUDGET_HEADERS,
    BudgetHeaders,
    ModelChoice,
    read_budget,
    read_sampling,
)
from sortserve.api.bodies.prompts import Prompt
from sortserve.api.http.tracing import trace_parent
from sortserve.api.problems import renamed
from sortserve.api.settings import ApiSettings
from sortserve.core.api_keys import KeyPolicy
from sortserve.core.budget import Budget
from sortserve.core.errors import InvalidRequestError
from sortserve.core.grammar import OutputFormat
from sortserve.core.sampling_params import SamplingParams
from sortserve.core.tracing import TraceParent

__all__ = ["Job", "make_job", "tier_of"]


OPEN = KeyPolicy()
"""What requests may do where there are no keys."""
NOTHING = Budget()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One HTTP request reduced to what the engine needs."""

    request_id: str
    prompts: Sequence[Prompt]
    n: int
    sampling: SamplingParams
    limit_is_default: bool
    """The client gave no max_tokens: ``sampling.max_tokens`` shrinks to what the context holds."""
    budget: Budget
    named_budget: Budget
    """What of it the client gave itself."""
    key_use: KeyUse | None
    """The request's account; None where there are no keys."""
    length_class: tuple[str, ...]
    """See ``Request.length_class``: served names and our own routes, so there are not many."""
    weight: float
    service_tier: str | None
    """The one that it is served as; None if the client named none."""
    cache_salt: str
    """Cached prefixes are shared between jobs of equal salt; it holds the API key's digest."""
    stream: bool
    arrival_s: float
    """On the engine's clock."""
    field_names: Mapping[str, str]
    """The engine's field names as this request spells them, for errors."""
    trace: TraceParent | None = None
    """Of what its spans are a part; None: it is not traced."""
    prompt_logprobs: int | None = None
    """Rivals per token of the prompts; None: nobody asks what the model says of them."""
    drops_answer: bool = False
    """The answer is one token, which the client does not want."""


def make_job(
    request: Request,
    headers: BudgetHeaders,
    body: GenerationFields,
    prompts: Sequence[Prompt],
    model: ModelChoice,
    *,
    max_tokens: int | None,
    default_max_tokens: int,
    logprobs: int | None,
    settings: ApiSettings,
    vocab_size: int,
    field_names: Mapping[str, str] | None = None,
    format_: OutputFormat | None = None,
    format_source: str = "tool_choice",
) -> Job:
    """Check everything that can be checked without tokenising.

    Args:
        request: for its id, its key and its arrival.
        headers: its budget headers.
        body: the fields that all routes share.
        prompts: read from the body already.
        model: read from the body already.
        max_tokens: what the client gave; None: the default.
        default_max_tokens: as many as this, or as fit the context.
        logprobs: rivals per token; None: no log probabilities.
        settings: what counts for fields that the body does not give.
        vocab_size: token ids are below it.
        field_names: the engine's field names as this route spells them.
        format_: what the answer must look like, where a field of this route alone says it.
        format_source: that field.

    Raises:
        InvalidRequestError: ``param`` names the field.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options can only be given with stream=true.", param="stream_options"
        )
    names = {**_header_names(headers, body.budget or {}), **(field_names or {})}
    try:
        budget = read_budget(body.budget, headers, model, default=settings.default_budget)
        sampling = read_sampling(
            body,
            defaults=settings.sampling_defaults,
            max_tokens=default_max_tokens if max_tokens is None else max_tokens,
            logprobs=logprobs,
            vocab_size=vocab_size,
        )
    except InvalidRequestError as error:
        raise renamed(error, names) from None
    if format_ is not None:
        told = sampling.output_format
        # A response_format is of the text, and an answer that must be a call has none.
        is_of_text = told is not None and told.param.startswith("response_format")
        if told is not None and not (is_of_text and format_source == "tool_choice"):
            raise InvalidRequestError(
                f"{told.param} cannot be given with a {format_source} that asks "
                "for another form. Drop one of the two.",
                param=format_source,
            )
        sampling = replace(sampling, format=format_)
    named = NOTHING if budget is settings.default_budget else budget
    if sampling.output_format is not None:
        budget = replace(budget, structured_min_quality=settings.structured_min_quality)
    use: KeyUse | None = getattr(request.state, "key_use", None)
    key = OPEN if use is None else use.policy
    priority = key.default_priority if body.priority is None else body.priority
    worth = settings.weight_rules.weigh(body.service_tier, priority, key.weights)
    return Job(
        request_id=body.request_id or request.state.request_id,
        prompts=prompts,
        n=body.n or 1,
        sampling=sampling,
        limit_is_default=max_tokens is None,
        budget=budget,
        named_budget=named,
        key_use=use,
        length_class=(request.scope["route"].path, model.name),
        weight=worth.weight,
        service_tier=None if body.service_tier is None else worth.tier,
        cache_salt=_cache_salt(request, body.cache_salt or ""),
        trace=trace_parent(request.state, prompts, sampling, model.name),
        stream=bool(body.stream),
        arrival_s=request.state.arrival_s,
        field_names=names,
    )


def tier_of(job: Job) -> dict[str, str]:
    """The field of a reply that names the service tier, if the client did."""
    return {} if job.service_tier is None else {"service_tier": job.service_tier}


def _cache_salt(request: Request, salt: str) -> str:
    """The client's salt, below its key: how fast a prompt is read tells nobody else's prompts.

    The digest has one length, so no key and salt can be mistaken for another pair.
    """
    return getattr(request.state, "key_digest", "") + salt


def _header_names(headers: BudgetHeaders, budget: Mapping[str, Any]) -> dict[str, str]:
    """Budget fields that came by header, under the header's name."""
    return {
        f"budget.{name}": header
        for header, name in BUDGET_HEADERS.items()
        if getattr(headers, name) is not None and budget.get(name) is None
    }
