"""What an exit answers, by our engine, greedily: questions from memory, and prompts freely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sortserve import LLM, Budget, SamplingParams
from sortserve.checkpoint.load import LoadedCheckpoint
from sortserve.core.errors import ConfigError
from sortserve.core.request import FinishReason
from sortserve.core.schedule import DepthSchedule
from sortserve_trainer.data.chat_format import PLAIN_TEMPLATE
from sortserve_trainer.evaluation.answers import score_answer
from sortserve_trainer.evaluation.rows import Question
from sortserve_trainer.model.generation import sampling_for
from sortserve_trainer.model.repetition import ends_in_loop, repeated_ngrams

__all__ = ["Answer", "AnswerQuality", "Answerer", "Fluency", "measure_answers", "measure_fluency"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said to one prompt."""

    text: str
    token_ids: tuple[int, ...]
    """With the token that ended it, if one did."""
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class AnswerQuality:
    """Means over the questions of one file; each in [0, 1]."""

    exact_match: float
    f1: float
    contains: float
    num_questions: int


@dataclass(frozen=True, kw_only=True)
class Fluency:
    """Means over the answers to the prompts of one file."""

    repetition: float
    """Share of 4-grams of tokens that occurred before in the same answer."""
    loop_rate: float
    """Share of answers that end in a loop."""
    mean_tokens: float
    """Length, without the token that ended it."""
    ended: float
    """Share of answers that the model ended; the others were cut at the limit."""
    num_prompts: int


class Answerer:
    """An engine over one checkpoint, and its chat format.

    Args:
        checkpoint: what answers.
        messages: all that will be asked; no answer is longer than ``max_tokens``.
        max_tokens: of any answer.
        max_num_seqs: answers generated at once.

    Raises:
        ConfigError: a message leaves no room for an answer in the model's context.
    """

    def __init__(
        self,
        checkpoint: LoadedCheckpoint,
        messages: Sequence[str],
        *,
        max_tokens: int,
        max_num_seqs: int,
    ) -> None:
        self._hf_tokenizer: Any = checkpoint.tokenizer
        longest = max(len(self._encode(message)) for message in messages)
        if longest >= checkpoint.max_model_len:
            raise ConfigError(
                f"a prompt of {longest} tokens leaves no room for an answer: the context of "
                f"{checkpoint.name} is {checkpoint.max_model_len} tokens."
            )
        self._llm = LLM(
            checkpoint,
            max_model_len=min(checkpoint.max_model_len, longest + max_tokens),
            max_num_seqs=min(max_num_seqs, len(messages)),
        )

    def answer(
        self,
        messages: Sequence[str],
        *,
        depth: int | DepthSchedule,
        max_tokens: int,
        on_answer: Callable[[], None] = lambda: None,
    ) -> list[Answer]:
        """The greedy answers at an exit or under a schedule, in the order of ``messages``."""
        prompts = [self._encode(message) for message in messages]
        greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        results = self._llm.generate(
            prompts,
            sampling_for(self._llm, prompts, greedy),
            budget=_budget(depth),
            progress=lambda _: on_answer(),
        )
        outputs = [result.outputs[0] for result in results]
        return [
            Answer(text=out.text, token_ids=out.token_ids, finish_reason=out.finish_reason)
            for out in outputs
        ]

    def close(self) -> None:
        """End the engine and free its memory."""
        self._llm.close()

    def _encode(self, message: str) -> list[int]:
        """A message in the model's chat template, or in that it is trained with without one."""
        tokenizer = self._hf_tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,
            add_generation_prompt=True,
            tokenize=False,
        )
        ids: list[int] = tokenizer.backend_tokenizer.encode(
            text, add_special_tokens=not tokenizer.chat_template
        ).ids
        return ids


def _budget(depth: int | DepthSchedule) -> Budget:
    return Budget(exit_layer=depth) if isinstance(depth, int) else Budget(schedule=depth)


def measure_answers(questions: Sequence[Question], answers: Sequence[Answer]) -> AnswerQuality:
    """Each answer against all aliases of its question."""
    scores = [
        score_answer(answer.text, question.aliases)
        for question, answer in zip(questions, answers, strict=True)
    ]
    return AnswerQuality(
        exact_match=_mean([score.exact_match for score in scores]),
        f1=_mean([score.f1 for score in scores]),
        contains=_mean([score.contains for score in scores]),
        num_questions=len(scores),
    )


def measure_fluency(answers: Sequence[Answer]) -> Fluency:
    """How often answers repeat themselves, how long they are, and whether they end."""
    texts = [answer.token_ids[:-1] if has_ended(answer) else answer.token_ids for answer in answers]
    return Fluency(
        repetition=_mean([repeated_ngrams(tokens) for tokens in texts]),
        loop_rate=_mean([float(ends_in_loop(tokens)) for tokens in texts]),
        mean_tokens=_mean([float(len(tokens)) for tokens in texts]),
        ended=_mean([float(has_ended(answer)) for answer in answers]),
        num_prompts=len(answers),
    )


def has_ended(answer: Answer) -> bool:
    """Whether the model ended it, with an end-of-sequence token."""
    return answer.finish_reason is FinishReason.STOP


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
