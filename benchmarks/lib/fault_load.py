"""Live requests of all kinds under a fault, and what became of each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.lib.http_client import HttpClient, HttpConnection, encode_request
from sortserve_client._sse import SSEDecoder

__all__ = ["Answer", "Ask", "End", "Round", "live_requests", "run_load", "text_of", "wait_running"]

End = Literal["whole", "error", "cut", "none"]
"""Answered in full; an error that is one of the API's; the connection ended; nothing came."""
WAIT_S = 60.0
LOOK_S = 0.25
MIN_EVENTS = 3
"""A stream is live when so many events have come."""


@dataclass(frozen=True)
class Ask:
    """One request of the load."""

    name: str
    path: str
    body: dict[str, Any]
    is_repeatable: bool = True
    """Whether its text is the same each time."""

    @property
    def is_plain(self) -> bool:
        """Whether no thread beside the engine's works for it."""
        return self.path == "/v1/completions" and "structured_outputs" not in self.body


@dataclass
class Answer:
    """What came of it."""

    ask: Ask
    end: End = "none"
    status: int = 0
    text: str = ""
    error: dict[str, Any] | None = None
    after_s: float | None = None
    """Seconds from the fault to its end; None: it had ended before, or never did."""
    num_events: int = 0


@dataclass
class Round:
    """The answers to one load."""

    answers: list[Answer] = field(default_factory=list)
    longest_s: float = 0.0
    """From the fault to the last end."""

    def count(self, end: End) -> int:
        """How many ended so."""
        return sum(answer.end == end for answer in self.answers)

    def texts(self) -> dict[str, str]:
        """Of those that are whole and the same each time."""
        return {
            a.ask.name: a.text for a in self.answers if a.end == "whole" and a.ask.is_repeatable
        }


def live_requests(model: str, num_tokens: int = 96, exits: tuple[int, int] = (2, 4)) -> list[Ask]:
    """Twelve requests: every route, streamed and whole, at each kind of budget.

    Args:
        model: as it is served.
        num_tokens: of each answer.
        exits: two of its exits, the shallow one first.
    """
    shallow, middle = exits
    base = {"model": model, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}
    chat = {**base, "messages": [{"role": "user", "content": "Tell me more."}]}
    stop = {"stop": ["never to be seen"]}
    native = {name: value for name, value in base.items() if name != "model"}
    reply = {"model": model, "max_output_tokens": num_tokens, "temperature": 0, "input": "Go on."}
    lines = {"structured_outputs": {"regex": "[a-f ]{32}"}}
    completions, chats = "/v1/completions", "/v1/chat/completions"
    return [
        Ask("stream", completions, {**base, **stop, "prompt": "One", "stream": True}),
        Ask("shallow", completions, _at(shallow, {**base, "prompt": "Two", "stream": True})),
        Ask("middle", completions, _at(middle, {**base, "prompt": "Three", "stream": True})),
        Ask("whole", completions, {**base, **stop, "prompt": "Four"}),
        Ask("shallow whole", completions, _at(shallow, {**base, "prompt": "Five"})),
        Ask("chat", chats, {**chat, "stream": True}),
        Ask("chat whole", chats, chat),
        Ask("native", "/generate", {**native, "prompt": "Six", "stream": True}),
        Ask(
            "timed",
            "/generate",
            {**native, "prompt": "Seven", "budget": {"latency_ms": 60_000, "on_miss": "degrade"}},
            is_repeatable=False,
        ),
        Ask(
            "sampled", completions, {**base, "prompt": "Eight", "temperature": 1, "seed": 3, "n": 2}
        ),
        Ask("structured", completions, {**base, **lines, "prompt": "Nine", "ignore_eos": False}),
        Ask("response", "/v1/responses", reply),
    ]


def _at(exit_layer: int, body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "budget": {"exit_layer": exit_layer}}


async def run_load(
    client: HttpClient,
    asks: Sequence[Ask],
    strike: Callable[[], Awaitable[object]] | None = None,
    *,
    wait_s: float = WAIT_S,
) -> Round:
    """Send all at once; when every stream is live, ``strike``; wait for all the ends."""
    loop = asyncio.get_running_loop()
    answers = [Answer(ask) for ask in asks]
    struck_s = loop.time()
    ends: dict[int, float] = {}

    async def one(index: int) -> None:
        await _ask(client, answers[index])
        ends[index] = loop.time()

    tasks = [asyncio.create_task(one(index)) for index in range(len(asks))]
    streams = [answer for answer in answers if answer.ask.body.get("stream")]
    while not all(task.done() for task in tasks) and any(
        answer.num_events < MIN_EVENTS and answer.end == "none" for answer in streams
    ):
        await asyncio.sleep(0.002)
    struck_s = loop.time()
    if strike is not None:
        await strike()
    pauses = await wait_running(tasks, wait_s)
    for task in tasks:
        task.cancel()
    for index, ended_s in ends.items():
        if ended_s >= struck_s:
            paused_s = sum(length for at_s, length in pauses if at_s <= ended_s)
            answers[index].after_s = ended_s - struck_s - paused_s
    longest_s = max((a.after_s for a in answers if a.after_s is not None), default=0.0)
    return Round(answers, wait_s if any(a.end == "none" for a in answers) else longest_s)


async def wait_running(
    tasks: Sequence[asyncio.Task[Any]], wait_s: float
) -> list[tuple[float, float]]:
    """Wait for all; time in which this process itself was stopped does not count.

    Returns when each stop was over, and how long it was.
    """
    loop, pauses, waited_s = asyncio.get_running_loop(), list[tuple[float, float]](), 0.0
    while not all(task.done() for task in tasks) and waited_s < wait_s:
        looked_s = loop.time()
        await asyncio.wait(tasks, timeout=LOOK_S)
        gone_s = loop.time() - looked_s
        waited_s += min(gone_s, 4 * LOOK_S)
        if gone_s > 4 * LOOK_S:
            pauses.append((looked_s, gone_s - LOOK_S))
    return pauses


async def _ask(client: HttpClient, answer: Answer) -> None:
    ask = answer.ask
    data = encode_request("POST", ask.path, json.dumps(ask.body).encode(), client.headers)
    decoder, whole = SSEDecoder(), bytearray()
    documents: list[Any] = []
    is_over = False

    def on_body(piece: bytes) -> None:
        nonlocal is_over
        whole.extend(piece)
        if not ask.body.get("stream"):
            return
        for event in decoder.feed(piece):
            answer.num_events += 1
            if event.data == "[DONE]":
                is_over = True
            else:
                documents.append(json.loads(event.data))

    try:
        connection = await HttpConnection.open(client.host, client.port)
    except OSError:
        answer.end = "cut"
        return
    try:
        response = await connection.request(data, on_body)
    except OSError:
        answer.end = "cut"
        return
    finally:
        connection.close()
    answer.status = response.status
    if not ask.body.get("stream") or response.status != 200:
        document = json.loads(bytes(whole) or response.body or b"null")
        documents, is_over = [document], True
    errors = [d["error"] for d in documents if isinstance(d, dict) and d.get("error")]
    answer.error = errors[0] if errors else None
    answer.text = "".join(text_of(document) for document in documents)
    if errors:
        answer.end = "error" if errors[0].get("message") else "cut"
    else:
        answer.end = "whole" if response.status == 200 and is_over else "cut"


def text_of(document: Any) -> str:
    """The text of one reply or event, of any route."""
    if not isinstance(document, dict):
        return ""
    pieces = []
    for choice in document.get("choices", ()):
        part = choice.get("message") or choice.get("delta") or choice
        pieces.append(str(part.get("content") or part.get("text") or ""))
    for item in document.get("output", ()):
        pieces += [str(part.get("text", "")) for part in item.get("content", ())]
    return "".join(pieces)
