"""Which token ids a request may name: those that the model has embeddings and logits for."""

from __future__ import annotations

from collections.abc import Collection

from sortserve.core.errors import InvalidRequestError
from sortserve.core.request import Request

__all__ = ["check_vocabulary"]


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
