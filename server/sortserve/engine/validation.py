"""What can never be served is refused before it is queued (no torch)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sortserve.core.errors import CONTEXT_LENGTH_EXCEEDED, InvalidRequestError
from sortserve.core.request import Request
from sortserve.scheduling.kv_cache import KVCacheManager

__all__ = ["check_lengths", "check_vocabulary", "exits_that_fit"]


def check_lengths(request: Request, max_model_len: int) -> None:
    """Refuse a prompt that is empty, or that leaves the context no room for the answer.

    Args:
        request: to look at.
        max_model_len: most tokens of prompt and output together.

    Raises:
        InvalidRequestError: ``param`` names the field.
    """
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    if num_prompt == 0:
        raise InvalidRequestError("prompt is empty: give at least one token.", param="prompt")
    if num_prompt >= max_model_len:
        raise InvalidRequestError(
            f"prompt has {num_prompt} tokens, but this model's maximum context length is "
            f"{max_model_len} tokens, with at least one for the answer. Shorten it.",
            param="prompt",
            code=CONTEXT_LENGTH_EXCEEDED,
        )
    if num_prompt + max_tokens > max_model_len:
        raise InvalidRequestError(
            f"max_tokens={max_tokens} with a prompt of {num_prompt} tokens is too much: this "
            f"model's maximum context length is {max_model_len} tokens, so at most "
            f"{max_model_len - num_prompt} fit.",
            param="max_tokens",
            code=CONTEXT_LENGTH_EXCEEDED,
        )


def exits_that_fit(
    request: Request, allowed: Sequence[int], kv_cache: KVCacheManager
) -> tuple[int, ...]:
    """The allowed exits at which the request alone would fit the KV cache, ascending.

    Raises:
        InvalidRequestError: there is none; ``param`` is ``max_tokens``.
    """
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    num_pages = kv_cache.pool.num_pages
    fitting = tuple(e for e in allowed if _most_pages(request, e, kv_cache) <= num_pages)
    if not fitting:
        raise InvalidRequestError(
            f"max_tokens={max_tokens} with a prompt of {num_prompt} tokens needs "
            f"{_most_pages(request, allowed[0], kv_cache)} pages of "
            f"KV cache at exit {allowed[0]}; the server has {num_pages}. Ask for fewer tokens "
            "or a shallower exit.",
            param="max_tokens",
        )
    return fitting


def _most_pages(request: Request, exit_layer: int, kv_cache: KVCacheManager) -> int:
    """The most pages that a request holds at any time, if it starts at an exit.

    Under a schedule that is at the end of one of its parts: each is longer and shallower than the
    one before.
    """
    num_prompt, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    schedule = request.budget.schedule
    parts = [(max_tokens, exit_layer)]
    if schedule is not None:
        parts = [(end, min(e, exit_layer)) for _, end, e in schedule.spans(max_tokens)]
    return max(kv_cache.num_pages_needed(num_prompt + end, e) for end, e in parts)


def check_vocabulary(request: Request, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
    """Refuse ids outside the vocabulary, and masks that leave nothing of it.

    Args:
        request: with the ids of its prompt and of its sampling parameters.
        vocab_size: of the model.
        eos_token_ids: end the request unless it ignores them; they may lie outside.

    Raises:
        InvalidRequestError: ``param`` names the field.
    """
    sampling = request.sampling
    _check_ids("prompt", request.prompt_token_ids, vocab_size)
    _check_ids("logit_bias", sampling.logit_bias, vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else eos_token_ids)
    if sampling.min_tokens > 0 and sum(0 <= end < vocab_size for end in ends) == vocab_size:
        raise InvalidRequestError(
            f"min_tokens={sampling.min_tokens} cannot be kept: every token of the vocabulary would "
            "end the answer. Give fewer stop_token_ids.",
            param="min_tokens",
        )


def _check_ids(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            path = f"{param}.{token_id if param == 'logit_bias' else index}"
            raise InvalidRequestError(
                f"{path}: there is no token {token_id}; ids go from 0 to {vocab_size - 1}.",
                param=path,
            )
