"""From the fields of a body to sampling parameters and a budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, WithJsonSchema

from sortserve.api.bodies.limits import FORMAT_FIELDS
from sortserve.api.bodies.models import GenerationFields
from sortserve.api.problems import shortened
from sortserve.core.budget import MILLISECONDS, Budget, ExitTable
from sortserve.core.errors import InvalidRequestError, NotFoundError
from sortserve.core.formats import read_format, read_kind
from sortserve.core.grammar import OutputFormat
from sortserve.core.sampling_params import SamplingParams

__all__ = [
    "BUDGET_HEADERS",
    "BudgetHeaders",
    "ModelChoice",
    "read_budget",
    "read_model",
    "read_output_format",
    "read_sampling",
]

_Milliseconds = Annotated[
    str | None,  # read by ``_milliseconds``: pydantic would take 1_0 for 10
    WithJsonSchema(MILLISECONDS.json_schema),
]


class BudgetHeaders(BaseModel):
    """Headers by which routers pass latency budgets."""

    ttft_ms: _Milliseconds = Field(
        None,
        alias="x-slo-ttft-ms",
        description="The same as budget.ttft_ms of the body, which wins.",
    )
    tpot_ms: _Milliseconds = Field(
        None,
        alias="x-slo-tpot-ms",
        description="The same as budget.tpot_ms of the body, which wins.",
    )
    latency_ms: _Milliseconds = Field(
        None,
        alias="x-slo-e2e-ms",
        description="The same as budget.latency_ms of the body, which wins.",
    )


BUDGET_HEADERS = {str(field.alias): name for name, field in BudgetHeaders.model_fields.items()}
"""Each header, and the budget field it means."""
_GUIDED = "guided_"
_UNSET: Mapping[str, object] = {"choice": [], "regex": "", "grammar": ""}
"""Of the fields ``guided_*``: what clients send that have them always."""
NO_BUDGET = Budget()
SAMPLING_FIELDS = (
    *("min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens"),
)


class ModelChoice(NamedTuple):
    """Which model a request names."""

    name: str
    """As the client wrote it, for the reply."""
    exit_layer: int | None
    """E of ``NAME@E``."""


def read_model(
    name: str | None,
    served_name: str,
    exits: ExitTable,
    *,
    known_to: Collection[int] | None = None,
) -> ModelChoice:
    """The model that a request names; none is the served one.

    Args:
        name: as the client wrote it.
        served_name: of the whole model.
        exits: of the checkpoint.
        known_to: the exits that there are for this client; None: all.

    Raises:
        NotFoundError: another model, or an exit that does not exist.
    """
    if name is None or name == served_name:
        return ModelChoice(served_name, None)
    layers = [e for e in exits.layers if known_to is None or e in known_to]
    base, at, suffix = name.rpartition("@")
    if at and base == served_name:
        for exit_layer in layers:
            if suffix == str(exit_layer):
                return ModelChoice(name, exit_layer)
    raise NotFoundError(
        f"The model {shortened(name)} does not exist: this server has {served_name!r}, "
        f"and {served_name}@E for the exits E in {layers}.",
        param="model",
        code="model_not_found",
    )


def read_budget(
    body: Mapping[str, Any] | None,
    headers: BudgetHeaders,
    model: ModelChoice,
    *,
    default: Budget = NO_BUDGET,
) -> Budget:
    """The budget of body, headers and model name; the body wins over the headers.

    ``default`` is that of requests which give none in any of the three.

    Raises:
        InvalidRequestError: a value is not allowed, or two of them contradict each other.
    """
    in_body = Budget.from_mapping(body or {})  # so that an error names what the body says
    values = {name: value for name, value in (body or {}).items() if value is not None}
    for header, name in BUDGET_HEADERS.items():
        if (value := getattr(headers, name)) is not None:
            values.setdefault(name, _milliseconds(header, value))
    if model.exit_layer is not None:
        _check_exit_alone(in_body, model)
        values["exit_layer"] = model.exit_layer
    if not values:
        return default
    return Budget.from_mapping(values)


def _milliseconds(header: str, value: str) -> float:
    try:
        if "_" in value:
            raise ValueError  # Python would read 1_0 as 10
        milliseconds = float(value)
        Budget(latency_ms=milliseconds)  # which numbers make sense is for the budget to say
    except ValueError:  # InvalidRequestError is one
        raise InvalidRequestError(
            f"{header}={shortened(value)} is not allowed: it must be {MILLISECONDS.allowed}.",
            param=header,
        ) from None
    return milliseconds


def _check_exit_alone(budget: Budget, model: ModelChoice) -> None:
    if budget.exit_layer not in (None, model.exit_layer):
        raise InvalidRequestError(
            f"budget.exit_layer={budget.exit_layer} contradicts model={model.name!r}, which names "
            f"exit {model.exit_layer}. Drop one of the two.",
            param="budget.exit_layer",
        )
    for name in ("schedule", "compute", "min_exit_layer", "min_quality"):
        if getattr(budget, name) is not None:
            raise InvalidRequestError(
                f"budget.{name} cannot be given with model={model.name!r}, which fixes the depth. "
                "Drop one of the two.",
                param=f"budget.{name}",
            )


def read_sampling(
    body: GenerationFields,
    *,
    defaults: Mapping[str, Any],
    max_tokens: int,
    logprobs: int | None,
    vocab_size: int,
) -> SamplingParams:
    """The sampling parameters of a body.

    Args:
        body: what the client gave.
        defaults: for fields it did not give.
        max_tokens: the limit to use.
        logprobs: rivals per token; None: no log probabilities.
        vocab_size: token ids are below it.

    Raises:
        InvalidRequestError: ``param`` names the field.
    """
    values = dict(defaults)
    for name in SAMPLING_FIELDS:
        if (value := getattr(body, name)) is not None:
            values[name] = value
    for i, token_id in enumerate(body.stop_token_ids or ()):
        _check_in_vocabulary(f"stop_token_ids.{i}", token_id, vocab_size)
    return SamplingParams(
        max_tokens=max_tokens,
        logit_bias=_read_logit_bias(body.logit_bias or {}, vocab_size),
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        format=read_output_format(body),
        **values,
    )


def read_output_format(body: GenerationFields) -> OutputFormat | None:
    """What the answer must look like, in whichever field the client says it.

    Raises:
        InvalidRequestError: it is no format, or several are given.
    """
    given: dict[str, OutputFormat] = {}
    for name in FORMAT_FIELDS:
        value = getattr(body, name) if name in type(body).model_fields else None
        is_guided = name.startswith(_GUIDED)
        kind = name.removeprefix(_GUIDED)
        if value is None or (is_guided and value == _UNSET.get(kind)):
            continue
        format_ = read_kind(kind, value, name) if is_guided else read_format(value, name)
        if format_ is not None:
            given[name] = format_
    if len(given) > 1:
        first, second, *_ = given
        raise InvalidRequestError(
            f"{first} and {second} both say what the answer must look like. Drop one of the two.",
            param=second,
        )
    return next(iter(given.values()), None)


def _read_logit_bias(given: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise InvalidRequestError(
                f"logit_bias has the key {shortened(key)}: keys must be token ids.",
                param=f"logit_bias.{key[:20]}",
            )
        _check_in_vocabulary(f"logit_bias.{key}", int(key), vocab_size)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequestError(
                f"logit_bias.{key}={shortened(value)} is not allowed: it must be a number.",
                param=f"logit_bias.{key}",
            )
        bias[int(key)] = value
    return bias


def _check_in_vocabulary(param: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise InvalidRequestError(
            f"{param}: there is no token {token_id}; ids go from 0 to {vocab_size - 1}.",
            param=param,
        )
