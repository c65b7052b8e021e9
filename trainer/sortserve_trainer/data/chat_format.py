"""How a conversation reads as text, and which parts of the text are answers.

The text is what the server would feed: the base's own chat template up to and with the opening of
the assistant's turn, then the answer. A base without a template gets ``PLAIN_TEMPLATE``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sortserve_trainer.data.forms import Conversation
from sortserve_trainer.data.source import bad_data

__all__ = ["PLAIN_TEMPLATE", "ChatFormat", "Span"]

Span = tuple[int, int]
"""Characters [start, end) of a text."""

PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '### Response:\n' + message['content'] + (eos_token or '') + '\n\n' }}
{%- elif message['role'] == 'user' -%}
{{ '### Instruction:\n' + message['content'] + '\n\n' }}
{%- else -%}
{{ message['content'] + '\n\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"""


class ChatFormat:
    """The chat template of one tokenizer.

    Args:
        tokenizer: transformers' fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = None if tokenizer.chat_template else PLAIN_TEMPLATE
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        special |= {tokenizer.eos_token} if tokenizer.eos_token else set()
        longest_first = sorted(special, key=lambda token: (-len(token), token))
        one_of_them = "|".join(re.escape(token) for token in longest_first) or "(?!)"
        self._end_of_turn = re.compile(rf"\s*(?:{one_of_them})")

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer puts its own around the text, as it does around a plain prompt."""
        return self._template is not None

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The whole text, and the characters of each answer with the token that ends its turn.

        An answer that was cut has none.

        Raises:
            ConfigError: the template refuses the messages, or shows them in a way in which the
                answers cannot be told from the rest.
        """
        messages, turns = conversation.messages, conversation.answer_turns
        text = self._render(conversation, messages, add_generation_prompt=False)
        _check_tools_are_shown(conversation, text)
        starts = []
        for turn in turns:
            prompt = self._render(conversation, messages[:turn], add_generation_prompt=True)
            if not text.startswith(prompt):
                problem = (
                    f"the base's chat template writes what is before `messages[{turn}]` another "
                    "way once more turns follow, so the answer cannot be found in the text"
                )
                raise bad_data(conversation.place, problem)
            starts.append(len(prompt))
        limits = [*starts[1:], len(text)]
        spans = []
        for turn, start, limit in zip(turns, starts, limits, strict=True):
            if messages[turn].get("tool_calls"):
                spans.append((start, self._end_of_calls(conversation, text, turn, start)))
                continue
            end = self._end_of_content(text, messages[turn]["content"], start, limit)
            if end is None:
                problem = f"the base's chat template leaves out or rewrites `messages[{turn}]`"
                raise bad_data(conversation.place, problem)
            is_open = conversation.is_cut and turn == turns[-1]
            match = None if is_open else self._end_of_turn.match(text, end)
            spans.append((start, match.end() if match else end))
        return text, spans

    def _end_of_calls(self, conversation: Conversation, text: str, turn: int, start: int) -> int:
        """Where a turn that calls tools ends, with its end-of-turn token: its words are the
        template's own.
        """
        messages = conversation.messages[: turn + 1]
        whole = self._render(conversation, messages, add_generation_prompt=False)
        said = text[start : len(whole)]
        names = [str(_function(call).get("name", "")) for call in messages[turn]["tool_calls"]]
        if not text.startswith(whole) or not all(name in said for name in names):
            problem = (
                f"the base's chat template leaves out or rewrites the tool calls of "
                f"`messages[{turn}]`"
            )
            raise bad_data(conversation.place, problem)
        ends = [
            match for match in self._end_of_turn.finditer(said) if match.end() == len(said.rstrip())
        ]
        if not ends:
            return start + len(said.rstrip())
        is_open = conversation.is_cut and turn == conversation.answer_turns[-1]
        return start + (ends[-1].start() if is_open else ends[-1].end())

    @staticmethod
    def _end_of_content(text: str, content: str, start: int, limit: int) -> int | None:
        """Where an answer ends, before its end-of-turn token; None if it is not in the text.

        A template may trim the answer, or put something before it, such as an empty thought.
        """
        content = content.strip()
        found = (
            start if text.startswith(content, start, limit) else text.find(content, start, limit)
        )
        return None if found < 0 else found + len(content)

    def _render(
        self,
        conversation: Conversation,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=conversation.tools,
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # a template is a program, and it can fail in any way
            problem = f"the base's chat template does not take this row: {error}"
            raise bad_data(conversation.place, problem.rstrip(".")) from error
        return text


def _check_tools_are_shown(conversation: Conversation, text: str) -> None:
    """A template that knows no tools says nothing of it; the model would learn to invent."""
    for tool in conversation.tools or ():
        if str(_function(tool).get("name", "")) not in text:
            problem = "the base's chat template does not show `tools`"
            raise bad_data(conversation.place, problem)


def _function(tool_or_call: Mapping[str, Any]) -> Mapping[str, Any]:
    found = tool_or_call.get("function", tool_or_call)
    return found if isinstance(found, Mapping) else {}
