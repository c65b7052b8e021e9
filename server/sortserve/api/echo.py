"""``echo``: the prompt at the head of each answer, and what the model says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sortserve.api.bodies.limits import MAX_ECHO_CHARS
from sortserve.api.bodies.prompts import TextPrompt, TokenPrompt
from sortserve.api.jobs import Job
from sortserve.api.service import Service
from sortserve.core.errors import InvalidRequestError

__all__ = ["echoed_prompts"]

THREAD_FROM_IDS = 2048
"""Prompts of so many token ids are decoded on a thread."""


async def echoed_prompts(
    service: Service, job: Job, prompts: Sequence[TextPrompt | TokenPrompt]
) -> Callable[[int], str]:
    """The prompt of each choice as text; token ids are decoded here, once.

    Raises:
        InvalidRequestError: all answers together would repeat too much.
    """

    def decode() -> list[str]:
        skip = job.sampling.skip_special_tokens
        return [
            prompt.text
            if isinstance(prompt, TextPrompt)
            else service.tokenizer.decode(prompt.token_ids, skip_special_tokens=skip)
            for prompt in prompts
        ]

    num_token_ids = sum(len(p.token_ids) for p in prompts if isinstance(p, TokenPrompt))
    texts = decode() if num_token_ids < THREAD_FROM_IDS else await service.threads.run(decode)
    num_chars = job.n * sum(map(len, texts))
    if num_chars > MAX_ECHO_CHARS:
        raise InvalidRequestError(
            f"echo=true would repeat {num_chars} characters of prompts; {MAX_ECHO_CHARS} are "
            "allowed. Lower n, or leave echo out.",
            param="echo",
        )
    return lambda index: texts[index // job.n]
