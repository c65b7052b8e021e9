"""What is asked of an LLM, found to be possible before any of it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

from sortserve.api.bodies.prompts import read_messages, read_prompt
from sortserve.core.budget import Budget
from sortserve.core.errors import InvalidRequestError, SortserveError
from sortserve.core.grammar import length_class_of
from sortserve.core.request import EXPECTED_TOKENS, Request
from sortserve.core.sampling_params import SamplingParams
from sortserve.core.weights import PRIORITY, WeightRules
from sortserve.engine.engine import Engine
from sortserve.llm.offline import Task, blamed
from sortserve.text.tokenizer import Tokenizer

__all__ = ["Asking", "Budgets", "Messages", "Priorities", "Prompts", "Sampling", "TokenIds"]

T = TypeVar("T")

TokenIds = Sequence[int]
Prompts = str | TokenIds | Sequence[str | TokenIds]
Messages = Sequence[Mapping[str, Any]]
Sampling = SamplingParams | Sequence[SamplingParams] | None
Budgets = Budget | Sequence[Budget] | None
Priorities = int | Sequence[int]


class Prompt(NamedTuple):
    """A prompt as token ids."""

    name: str
    """What the caller knows it by."""
    text: str | None
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Asking:
    """Makes tasks of prompts; any thread may ask."""

    engine: Engine
    """Asked whether it could serve a request; nothing else."""
    tokenizer: Tokenizer
    default_sampling: SamplingParams
    ids: Iterator[int]
    """Numbers that no other request has."""

    def of_prompts(
        self,
        prompts: Prompts,
        sampling: Sampling,
        budget: Budgets,
        n: int,
        priority: Priorities,
    ) -> list[Task]:
        """``n`` samples of each prompt.

        Raises:
            InvalidRequestError: a prompt or its parameters cannot be served.
        """
        return self._tasks(self._prompts(prompts), sampling, budget, n, priority)

    def of_prompt(
        self,
        prompt: str | TokenIds,
        sampling: SamplingParams | None,
        budget: Budget | None,
        priority: int,
    ) -> Task:
        """One sample of one prompt; raises as ``of_prompts``."""
        (task,) = self._tasks([self._prompt(prompt, "prompt")], sampling, budget, 1, priority)
        return task

    def of_conversations(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling,
        budget: Budgets,
        n: int,
        priority: Priorities,
        template: Mapping[str, Any],
    ) -> list[Task]:
        """``n`` samples of each conversation; raises as ``of_prompts``."""
        prompts = self._conversations(messages, template)
        return self._tasks(prompts, sampling, budget, n, priority)

    def chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """A conversation as token ids."""
        prompt = read_messages(
            [dict(one) if isinstance(one, Mapping) else one for one in messages],
            max_chars=sys.maxsize,
            add_generation_prompt=add_generation_prompt,
            template_arguments=variables,
        )
        return prompt.encode(self.tokenizer)

    def _prompts(self, prompts: Prompts) -> list[Prompt]:
        """One prompt or several: a list whose items are numbers is one."""
        is_one = isinstance(prompts, str) or (
            len(prompts) > 0 and all(isinstance(item, int) for item in prompts)
        )
        if is_one:
            return [self._prompt(prompts, "prompts")]
        return [self._prompt(prompt, f"prompts.{i}") for i, prompt in enumerate(prompts)]

    def _prompt(self, prompt: object, name: str) -> Prompt:
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
        value = list(cast(TokenIds, prompt)) if is_list else prompt
        read = read_prompt(
            value,
            name,
            self.tokenizer.vocab_size,
            max_chars=sys.maxsize,
            add_special_tokens=True,
        )
        with _naming("prompt", name):
            token_ids = tuple(read.encode(self.tokenizer))
        return Prompt(name, value if isinstance(value, str) else None, token_ids)

    def _conversations(
        self, messages: Messages | Sequence[Messages], template: Mapping[str, Any]
    ) -> list[Prompt]:
        """One conversation or several: a list whose items are lists is several."""
        if messages and isinstance(messages[0], Sequence):
            named = {f"messages.{i}": cast(Messages, one) for i, one in enumerate(messages)}
        else:
            named = {"messages": cast(Messages, messages)}
        prompts = []
        for name, conversation in named.items():
            with _naming("messages", name):
                prompts.append(Prompt(name, None, tuple(self.chat(conversation, **template))))
        return prompts

    def _tasks(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        budget: Budgets,
        n: int,
        priority: Priorities,
    ) -> list[Task]:
        """Everything that is to run, found to be possible."""
        if type(n) is not int or n < 1:
            raise InvalidRequestError(f"n={n!r} is not allowed: an integer >= 1.", param="n")
        sampling = self.default_sampling if sampling is None else sampling
        samplings = _one_each("sampling", sampling, SamplingParams, len(prompts))
        budgets = _one_each("budget", budget or Budget(), Budget, len(prompts))
        weights = [_weight(own) for own in _one_each("priority", priority, int, len(prompts))]
        arrival_s = self.engine.clock()
        tasks = []
        asked = zip(prompts, samplings, budgets, weights, strict=True)
        for i, (prompt, params, own, weight) in enumerate(asked):
            request = self._request(prompt, params, own, arrival_s)
            request = replace(request, weight=weight, is_one_of_several=n > 1)
            with _naming("prompt", prompt.name):
                self.engine.validate(request)
            samples = tuple(
                replace(request, request_id=str(next(self.ids)), sample_index=k) for k in range(n)
            )
            tasks.append(Task(index=i, name=prompt.name, prompt=prompt.text, samples=samples))
        return tasks

    def _request(
        self, prompt: Prompt, sampling: SamplingParams, budget: Budget, arrival_s: float
    ) -> Request:
        expected_tokens, most = None, self.engine.config.max_model_len
        if sampling.max_tokens == most:  # no prompt leaves so much room
            room = max(1, most - len(prompt.token_ids))
            sampling = replace(sampling, max_tokens=room)
            expected_tokens = min(room, EXPECTED_TOKENS)
        format_ = sampling.output_format
        grammar = None if format_ is None else self.tokenizer.grammars.compile(format_)
        return Request(
            request_id="",
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            budget=budget,
            arrival_s=arrival_s,
            expected_tokens=expected_tokens,
            length_class=length_class_of((), grammar),
            grammar=grammar,
        )


def _weight(priority: int) -> float:
    """What a request of that priority is worth.

    Raises:
        InvalidRequestError: it is no priority.
    """
    if priority not in PRIORITY:
        raise InvalidRequestError(
            f"priority={priority!r} is not allowed: {PRIORITY.allowed}.", param="priority"
        )
    return WeightRules().weigh(None, priority).weight


def _one_each(name: str, given: T | Sequence[T], kind: type[T], num_prompts: int) -> Sequence[T]:
    """What was given for each prompt.

    Raises:
        InvalidRequestError: it is of another type, or there are not as many as prompts.
    """
    if isinstance(given, kind):
        return [given] * num_prompts
    if not isinstance(given, list | tuple) or not all(isinstance(one, kind) for one in given):
        raise InvalidRequestError(
            f"{name} must be of type {kind.__name__}, or a list of these.", param=name
        )
    if len(given) != num_prompts:
        raise InvalidRequestError(
            f"{name} has {len(given)} entries for {num_prompts} prompts: give one for each, or one "
            "for all.",
            param=name,
        )
    return given


@contextmanager
def _naming(part: str, name: str) -> Iterator[None]:
    """Errors about ``part`` name what the caller knows it by."""
    try:
        yield
    except SortserveError as error:
        raise blamed(error, part, name) from error.__cause__
