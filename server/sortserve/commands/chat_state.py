"""What a chat in a terminal knows, and how lines that begin with a slash change it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sortserve.core.schedule import DepthSchedule

__all__ = ["HELP", "ChatState", "apply_slash"]

Turn = dict[str, str]
OFF = ("off", "auto", "none")
MS_PER_UNIT = {"ms": 1.0, "s": 1e3, "": 1.0}


@dataclass(frozen=True, kw_only=True)
class ChatState:
    """A conversation, and what its next answer may cost."""

    turns: tuple[Turn, ...] = ()
    """``{"role": ..., "content": ...}``, without the system prompt."""
    system: str = ""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a request's ``budget``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Sampling fields: ``max_tokens``, ``temperature``, ``seed``."""

    @property
    def messages(self) -> list[Turn]:
        """The whole conversation, as a request carries it."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]

    def asked(self, text: str) -> ChatState:
        """With a question at the end."""
        return replace(self, turns=(*self.turns, {"role": "user", "content": text}))

    def answered(self, text: str) -> ChatState:
        """With an answer at the end."""
        return replace(self, turns=(*self.turns, {"role": "assistant", "content": text}))

    def last_question(self) -> tuple[ChatState, str] | None:
        """The state before the last question, and the question; None if there was none."""
        places = [i for i, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not places:
            return None
        return replace(self, turns=self.turns[: places[-1]]), self.turns[places[-1]]["content"]

    @property
    def cost(self) -> str:
        """What the next answer may cost, in words."""
        if not self.budget:
            return "no budget: the server chooses the exit"
        return "budget: " + ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.budget.items()
        )


def apply_slash(state: ChatState, line: str) -> tuple[ChatState, str]:
    """The state after a line such as ``/exit 24``, and what to tell.

    ``/help``, ``/exits``, ``/again`` and ``/quit`` change no state and are the caller's.

    Raises:
        ValueError: there is no such command, or its value is not allowed; the text says what is.
    """
    name, _, value = line[1:].strip().partition(" ")
    command = _COMMANDS.get(name)
    if command is None:
        raise ValueError(f"/{name} is not a command. /help lists them.")
    return command(state, value.strip())


def _budget(state: ChatState, name: str, value: Any, *excluded: str) -> tuple[ChatState, str]:
    """A field of the budget set, or removed if None; fields that exclude it go."""
    budget = {k: v for k, v in state.budget.items() if k != name}
    if value is not None:
        budget = {k: v for k, v in budget.items() if k not in excluded}
        budget[name] = value
    changed = replace(state, budget=budget)
    return changed, changed.cost


def _exit(state: ChatState, value: str) -> tuple[ChatState, str]:
    if not value:
        raise ValueError(
            "/exit LAYER answers with that exit, /exit auto lets the server choose; /quit leaves."
        )
    layer = None if value in OFF else _integer("/exit", value)
    return _budget(
        state, "exit_layer", layer, "compute", "min_quality", "min_exit_layer", "schedule"
    )


def _schedule(state: ChatState, value: str) -> tuple[ChatState, str]:
    try:
        pairs = None if value in OFF else DepthSchedule.parse(value).document
    except ValueError as error:
        raise ValueError(f"/schedule {value} is not allowed: {error}; off lifts it.") from None
    return _budget(
        state, "schedule", pairs, "compute", "min_quality", "min_exit_layer", "exit_layer"
    )


def _time(name: str) -> Callable[[ChatState, str], tuple[ChatState, str]]:
    def change(state: ChatState, value: str) -> tuple[ChatState, str]:
        return _budget(state, name, None if value in OFF else milliseconds(value))

    return change


def _share(command: str, name: str) -> Callable[[ChatState, str], tuple[ChatState, str]]:
    def change(state: ChatState, value: str) -> tuple[ChatState, str]:
        share = None if value in OFF else _number(command, value)
        if share is not None and not 0 <= share <= 1:
            raise ValueError(
                f"{command} {value} is not allowed: give a number from 0 to 1, or off."
            )
        return _budget(state, name, share, "exit_layer", "schedule")

    return change


def _on_miss(state: ChatState, value: str) -> tuple[ChatState, str]:
    allowed = ("degrade", "truncate", "reject")
    if value not in (*allowed, *OFF):
        raise ValueError(f"/miss {value} is not allowed: give one of {', '.join(allowed)}.")
    return _budget(state, "on_miss", None if value in OFF else value)


def _option(
    command: str, name: str, read: Callable[[str, str], Any]
) -> Callable[[ChatState, str], tuple[ChatState, str]]:
    def change(state: ChatState, value: str) -> tuple[ChatState, str]:
        options = {k: v for k, v in state.options.items() if k != name}
        if value not in OFF:
            options[name] = read(command, value)
        told = f"{name}={options[name]}" if name in options else f"{name}: the server's default"
        return replace(state, options=options), told

    return change


def _system(state: ChatState, value: str) -> tuple[ChatState, str]:
    return replace(state, system=value), "system prompt set" if value else "no system prompt"


def _new(state: ChatState, value: str) -> tuple[ChatState, str]:
    return replace(state, turns=()), "a new conversation"


def milliseconds(text: str) -> float:
    """``800ms``, ``800``, ``2s`` or ``1.5 s`` as milliseconds.

    Raises:
        ValueError: it is something else.
    """
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    unit = text[len(text.rstrip("abcdefghijklmnopqrstuvwxyz")) :]
    try:
        value = float(number) * MS_PER_UNIT[unit]
    except (KeyError, ValueError):
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is not a time: give one such as 800ms or 2s, or off.")
    return value


def _integer(command: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{command} {text} is not allowed: give an integer.") from None


def _number(command: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{command} {text} is not allowed: give a number.") from None


_COMMANDS: Mapping[str, Callable[[ChatState, str], tuple[ChatState, str]]] = {
    "exit": _exit,
    "schedule": _schedule,
    "budget": _time("latency_ms"),
    "ttft": _time("ttft_ms"),
    "tpot": _time("tpot_ms"),
    "compute": _share("/compute", "compute"),
    "floor": _share("/floor", "min_quality"),
    "miss": _on_miss,
    "max": _option("/max", "max_tokens", _integer),
    "temperature": _option("/temperature", "temperature", _number),
    "seed": _option("/seed", "seed", _integer),
    "system": _system,
    "new": _new,
}

HELP = """\
  /exit 24          answer with the first 24 layers; /exit auto: the server chooses
  /schedule 0:30,32:27   exit 30 for 32 tokens, then 27; off: none
  /budget 800ms     the whole answer within this time; off: no bound
  /ttft 200ms       the first token within this time
  /tpot 25ms        each further token within this time
  /compute 0.9      at most this share of the full model's arithmetic
  /floor 0.6        no exit of a lower quality score
  /miss truncate    if no exit fits the times: degrade, truncate or reject
  /max 128          at most so many tokens an answer
  /temperature 0    0 takes the likeliest token
  /seed 1           repeat an answer
  /system TEXT      what the model is told first; empty: nothing
  /again            ask the last question once more, with what is set now
  /new              begin a new conversation
  /exits            the exits, what they cost and how good they are
  /quit             leave (or Ctrl-D); Ctrl-C ends an answer
  Anything else is a question. A line that begins with // is one that begins with /."""
