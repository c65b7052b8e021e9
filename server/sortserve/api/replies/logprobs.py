"""Log probabilities in the two formats of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sortserve.api.interfaces import Tokenizer
from sortserve.core.sampling_params import SampledToken

__all__ = ["CompletionLogprobs", "token_entries"]

LOWEST = -9999.0
"""What minus infinity is written as, as OpenAI does: JSON has no infinity."""


def token_entries(
    tokenizer: Tokenizer, tokens: Iterable[SampledToken], *, with_ids: bool = False
) -> list[dict[str, Any]]:
    """Entries as in ``logprobs.content`` of chat: token, logprob, bytes, top_logprobs.

    Args:
        tokenizer: says what a token is as text and as bytes.
        tokens: sampled tokens with log probabilities.
        with_ids: add ``token_id`` to each entry.
    """
    return [
        {
            **_entry(tokenizer, token.token_id, token.logprob, with_ids),
            "top_logprobs": [
                _entry(tokenizer, top.token_id, top.logprob, with_ids) for top in token.top_logprobs
            ],
        }
        for token in tokens
    ]


def _entry(
    tokenizer: Tokenizer, token_id: int, logprob: float | None, with_id: bool
) -> dict[str, Any]:
    text, raw = tokenizer.convert_id_to_token_text(token_id)
    entry = {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}
    return {**entry, "token_id": token_id} if with_id else entry


def _finite(logprob: float | None) -> float:
    assert logprob is not None, "the request asked for log probabilities"
    return max(logprob, LOWEST)


class CompletionLogprobs:
    """The ``logprobs`` objects of one choice of a completion; offsets run on from call to call."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def next(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        """``tokens``, ``token_logprobs``, ``top_logprobs`` and ``text_offset`` of more tokens.

        As in OpenAI's API the sampled token is always among ``top_logprobs``, which may therefore
        have one entry more than was asked for. The likeliest token of a text has the text as its
        key; others of the same text (two halves of characters, say) have their bytes after
        ``bytes:``, and where these are taken as well their id, ``token_id:7``. The first token of
        a prompt has no log probability: null.
        """
        texts: list[str] = []
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            text = self._text(token.token_id)
            texts.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            tops.append(None if token.logprob is None else self._top(token))
        return {
            "tokens": texts,
            "token_logprobs": [None if t.logprob is None else _finite(t.logprob) for t in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, token: SampledToken) -> dict[str, float]:
        """The sampled token and its rivals, the likeliest first; none hides another."""
        logprobs = {top.token_id: _finite(top.logprob) for top in token.top_logprobs}
        logprobs[token.token_id] = _finite(token.logprob)
        ranked = sorted(logprobs, key=lambda i: (-logprobs[i], i != token.token_id))
        plain: dict[str, int] = {}
        for token_id in ranked:
            plain.setdefault(self._text(token_id), token_id)
        named: dict[str, float] = {}
        for token_id in ranked:
            name = self._text(token_id)
            if plain[name] != token_id:
                data = self._tokenizer.convert_id_to_token_text(token_id)[1]
                name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
                if name in plain or name in named:
                    name = f"token_id:{token_id}"
            named[name] = logprobs[token_id]
        return named

    def _text(self, token_id: int) -> str:
        return self._tokenizer.convert_id_to_token_text(token_id)[0]
