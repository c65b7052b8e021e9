"""Prompts that a model writes itself, from the opening of its chat template's user turn.

A model that was tuned on conversations has learned both sides of them: left alone after the
opening of a user's turn, it writes what a user would ask (Magpie, arXiv 2406.08464). So training
data need nothing but the model.
"""

from __future__ import annotations

from itertools import takewhile

from sortserve import LLM, Budget, SamplingParams
from sortserve.core.errors import ConfigError
from sortserve_trainer.model.generation import is_sound, sampling_for

__all__ = ["write_prompts"]

TEMPERATURE, TOP_P = 0.9, 0.95
"""Of the prompts, whatever the answers are drawn with: equal prompts would teach nothing."""


def write_prompts(
    llm: LLM, count: int, *, budget: Budget, max_tokens: int, max_repetition: float, seed: int
) -> list[str]:
    """What a user might ask the model; "" where the turn did not end or goes around in circles.

    Args:
        llm: who writes; it has a chat template.
        count: how many.
        budget: what the model writes with.
        max_tokens: of a prompt.
        max_repetition: what goes around in circles, as ``is_sound`` has it.
        seed: of the draws.

    Raises:
        ConfigError: the chat template does not open a user's turn.
        InvalidRequestError: the model has no chat template.
    """
    openings = [_opening(llm)] * count
    sampling = SamplingParams(
        temperature=TEMPERATURE, top_p=TOP_P, max_tokens=max_tokens, seed=seed
    )
    samplings = sampling_for(llm, openings, sampling)
    results = llm.generate(openings, samplings, budget=budget, progress=False)
    written = [result.outputs[0] for result in results]
    return [
        output.text.strip() if is_sound(output, max_repetition=max_repetition) else ""
        for output in written
    ]


def _opening(llm: LLM) -> list[int]:
    """The token ids of the chat template up to what a user says first.

    What two conversations begin with alike: a template may put a space before the words, and the
    tokenizer joins it to them.
    """
    one, other = (llm.chat_prompt([{"role": "user", "content": word}]) for word in ("x", "?"))
    pairs = zip(one, other, strict=False)
    opening = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if not opening:
        raise ConfigError(
            "--write-prompts needs a model whose chat template opens a user's turn.",
            param="write-prompts",
        )
    return opening
