"""What replies and stream events look like on each of the three generation routes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, ClassVar

from sortserve.api.generation import ChoiceResult, Generation
from sortserve.api.interfaces import Tokenizer
from sortserve.api.problems import error_body
from sortserve.api.replies.logprobs import CompletionLogprobs, token_entries
from sortserve.api.replies.streaming import END_OF_STREAM, event
from sortserve.core.errors import SortserveError
from sortserve.core.request import RequestOutput
from sortserve.core.sampling_params import SampledToken

__all__ = ["ChatFormat", "CompletionFormat", "GenerateFormat"]


@dataclass(kw_only=True)
class GenerateFormat:
    """``POST /generate``; also the frame that the OpenAI formats fill in.

    A format belongs to one request. ``body`` makes the whole reply; ``opening``, ``chunk`` and
    ``closing`` make the events of a stream.
    """

    generation: Generation
    tokenizer: Tokenizer
    head: Mapping[str, Any]
    """The fields before ``choices``: id, model and so on."""
    with_logprobs: bool = False
    with_token_ids: bool = False
    usage_at_end: bool = True
    usage_always: bool = False
    """Add the usage so far to every event."""

    text_key: ClassVar[str] = '"text":'
    with_exit: ClassVar[bool] = True
    """Whether each event names the exit that made its token."""
    text_end: ClassVar[str] = ""
    end: ClassVar[str] = END_OF_STREAM

    def __post_init__(self) -> None:
        self._starts_at: dict[int, list[str]] = {}
        self._end = self.text_end + ',"finish_reason":null}]}\n\n'
        self._is_plain = not (self.with_logprobs or self.with_token_ids or self.usage_always)

    def head_at(self, exit_layer: int) -> dict[str, Any]:
        """The head of a message with tokens of an exit."""
        model = self.generation.model_at(self.head["model"], exit_layer)
        return {**self.head, "model": model}

    # ---- streams ----

    def _starts(self, exit_layer: int) -> list[str]:
        """What the events of each choice share at an exit, encoded once: only the text differs."""
        starts = self._starts_at.get(exit_layer)
        if starts is None:
            head = json.dumps(self.head_at(exit_layer), separators=(",", ":"))[1:-1]
            num_choices = len(self.generation.choices)
            depth = f'"exit_layer":{exit_layer},' if self.with_exit else ""
            starts = self._starts_at[exit_layer] = [
                f'data: {{{head},"choices":[{{"index":{i},{depth}{self.text_key}'
                for i in range(num_choices)
            ]
        return starts

    def opening(self) -> str:
        """Events before the first token."""
        return ""

    def chunk(self, index: int, output: RequestOutput) -> str:
        """The one event of a token step."""
        if self._is_plain and output.finish_reason is None:
            return self._starts(output.exit_layer)[index] + quoted(output.text) + self._end
        return event(self._full_chunk(index, output))

    def _full_chunk(self, index: int, output: RequestOutput) -> dict[str, Any]:
        depth = {"exit_layer": output.exit_layer} if self.with_exit else {}
        choice = {"index": index, **depth, **self._delta(output)}
        choice["finish_reason"] = output.finish_reason
        choice |= self._extras(index, output.tokens)
        message = {**self.head_at(output.exit_layer), "choices": [choice]}
        if output.report is not None:
            message["budget"] = output.report.budget_reply()
        if self.usage_always or (self._usage_in_last_chunk and self._is_over):
            message["usage"] = self.generation.usage()
        return message

    @property
    def _usage_in_last_chunk(self) -> bool:
        return True

    @property
    def _is_over(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.generation.choices)

    def closing(self) -> str:
        """Events after the last token."""
        return ""

    def failure(self, error: SortserveError) -> str:
        """The last event of a stream that failed."""
        return event(error_body(error))

    # ---- whole replies ----

    def body(self) -> dict[str, Any]:
        """The reply to a request that is not streamed; ``choices`` is an iterator, for memory."""
        choices = (
            {
                "index": index,
                **self._whole(index, choice),
                "finish_reason": choice.finish_reason,
                "logprobs": None,
                **self._extras(index, choice.tokens),
                "budget": None if choice.report is None else choice.report.budget_reply(),
            }
            for index, choice in enumerate(self.generation.choices)
        )
        generation = self.generation
        return {
            **self.head_at(generation.exit_layer),
            "choices": choices,
            "usage": generation.usage(),
            "budget": generation.budget_reply(),
        }

    # ---- what differs between routes ----

    def _delta(self, output: RequestOutput) -> dict[str, Any]:
        return {"text": output.text}

    def _whole(self, index: int, choice: ChoiceResult) -> dict[str, Any]:
        return {"text": choice.text}

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> Any:
        return token_entries(self.tokenizer, tokens, with_ids=True)

    def _extras(self, index: int, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self.with_logprobs:
            extras["logprobs"] = self._logprobs(index, tokens)
        if self.with_token_ids:
            extras["token_ids"] = [token.token_id for token in tokens]
        return extras


class _OpenAIFormat(GenerateFormat):
    """The usage comes in an event of its own, without choices, and only if asked for."""

    with_exit = False

    @property
    def _usage_in_last_chunk(self) -> bool:
        return False

    def closing(self) -> str:
        """The usage event."""
        if not self.usage_at_end:
            return ""
        head = self.head_at(self.generation.exit_layer)
        return event({**head, "choices": [], "usage": self.generation.usage()})


@dataclass(kw_only=True)
class CompletionFormat(_OpenAIFormat):
    """``POST /v1/completions``."""

    echo: Callable[[int], str] | None = None
    """The prompt of a choice, if replies begin with it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._choice_logprobs = [
            CompletionLogprobs(self.tokenizer) for _ in self.generation.choices
        ]
        self._untold = set(range(len(self.generation.choices)))

    def opening(self) -> str:
        """With ``echo`` the prompts; with ``logprobs`` each comes with the first token after it."""
        if self.echo is None or self.with_logprobs:
            return ""
        indices = range(len(self.generation.choices))
        starts = self._starts(self.generation.start_layer)
        return "".join(starts[i] + quoted(self.echo(i)) + self._end for i in indices)

    def _full_chunk(self, index: int, output: RequestOutput) -> dict[str, Any]:
        is_first = index in self._untold
        message = super()._full_chunk(index, output)
        if is_first and self.echo is not None and self.with_logprobs:
            [choice] = message["choices"]
            choice["text"] = self.echo(index) + choice["text"]
        return message

    def _whole(self, index: int, choice: ChoiceResult) -> dict[str, Any]:
        return {"text": (self.echo(index) if self.echo is not None else "") + choice.text}

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> Any:
        if index in self._untold:
            self._untold.remove(index)
            tokens = [*self.generation.prompt_tokens(index), *tokens]
        return self._choice_logprobs[index].next(tokens)


class ChatFormat(_OpenAIFormat):
    """``POST /v1/chat/completions``."""

    text_key = '"delta":{"content":'
    text_end = "}"

    def opening(self) -> str:
        """The chunks that name the role."""
        delta = {"role": "assistant", "content": ""}
        usage = {"usage": self.generation.usage()} if self.usage_always else {}
        choices = (
            {"index": index, "delta": delta, "finish_reason": None}
            for index in range(len(self.generation.choices))
        )
        head = self.head_at(self.generation.start_layer)
        return "".join(event({**head, "choices": [choice], **usage}) for choice in choices)

    def _delta(self, output: RequestOutput) -> dict[str, Any]:
        is_bare_end = output.finish_reason is not None and not output.text
        return {"delta": {} if is_bare_end else {"content": output.text}}

    def _whole(self, index: int, choice: ChoiceResult) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": choice.text}}

    def _logprobs(self, index: int, tokens: Sequence[SampledToken]) -> Any:
        return {"content": token_entries(self.tokenizer, tokens)}
