"""The HTTP service over a scripted engine, and an ASGI client whose hands are on both ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import sortserve
from sortserve.admission.key_ledger import KeyLedger
from sortserve.api.app import create_app
from sortserve.api.http.limits import ConnectionLimits
from sortserve.api.http.protocol import HttpProtocol
from sortserve.api.replies.streaming import COMMENT
from sortserve.api.settings import ApiSettings
from sortserve.core.api_keys import KeyPolicy
from sortserve.core.budget import Budget
from sortserve.core.errors import InvalidRequestError
from sortserve.core.grammar import OutputFormat
from sortserve.core.plan import StepPlan
from sortserve.core.request import RequestReport, StepRecord
from sortserve.core.sampling_params import SampledToken
from sortserve.engine.engine import Engine
from sortserve.engine.worker import EngineWorker
from sortserve.telemetry.logs import Observers
from sortserve.telemetry.metrics import Metrics
from sortserve.telemetry.totals import Totals
from sortserve_client._sse import SSEDecoder
from support.scripted import VOCAB_SIZE, Rule, ScriptedRunner, make_engine, next_letter
from support.scripted_grammar import Form

EXITS = (2, 4, 6)
MODEL = "tiny"
WAIT_S = 30


class FormCompiler:
    """Formats of any kind are forms to fill in (``support.scripted_grammar``)."""

    def kept(self, format_: OutputFormat) -> None:
        """Nothing is kept."""

    def compile(self, format_: OutputFormat) -> Form:
        return Form(format_.text)


class AsciiTokenizer:
    """Each character is its number; a conversation is its contents, one after the other."""

    vocab_size = VOCAB_SIZE
    max_token_chars = 1
    info: ClassVar[Mapping[str, Any]] = {
        "tokenizer_class": "CharacterTokenizer",
        "bos_token": None,
        "eos_token": "~",
        "unk_token": None,
        "pad_token": None,
        "additional_special_tokens": [],
        "chat_template": None,
    }

    def __init__(self) -> None:
        self.grammars = FormCompiler()
        self.threads: set[str] = set()
        """Names of the threads that encoded something."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.threads.add(threading.current_thread().name)
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))

    tool_dialect: str | None = None

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        if messages[0]["role"] == "alien":
            raise InvalidRequestError("The template knows no alien.", param="messages")
        contents = [m["content"] for m in messages]
        parts = [[{"text": c}] if isinstance(c, str) else c for c in contents]
        texts = [part["text"] for content in parts for part in content]
        return self.encode(variables.get("prefix", "") + "".join(texts))

    def convert_id_to_token_text(self, token_id: int) -> tuple[str, bytes]:
        return chr(token_id), bytes([token_id])


class GatedRunner(ScriptedRunner):
    """Runs freely until ``gated`` is set; from then on each step needs a permit."""

    def __init__(self, *, rule: Rule = next_letter) -> None:
        super().__init__(rule=rule)
        self.gated = False
        self.permits = threading.Semaphore(0)

    def execute(self, plan: StepPlan) -> list[SampledToken]:
        if self.gated:
            assert self.permits.acquire(timeout=WAIT_S)
        return super().execute(plan)

    def open(self) -> None:
        self.gated = False
        self.permits.release()


class Ended:
    """An observer that lets a test wait for requests to be over."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._changed = threading.Condition()
        self.reports: list[RequestReport] = []
        self.rejections: list[str] = []

    def on_step(self, record: StepRecord) -> None:
        self._metrics.on_step(record)

    def on_finished(self, report: RequestReport) -> None:
        with self._changed:
            self.reports.append(report)
            self._changed.notify_all()

    def on_rejected(self, reason: str, budget: Budget | None) -> None:
        self.rejections.append(reason)

    def on_forecast_failed(self) -> None:
        self._metrics.on_forecast_failed()

    def on_probe_step(self) -> None:
        self._metrics.on_probe_step()

    async def wait_for(self, count: int) -> list[RequestReport]:
        """The reports, once there are so many."""

        def wait() -> None:
            with self._changed:
                assert self._changed.wait_for(lambda: len(self.reports) >= count, WAIT_S)

        await asyncio.to_thread(wait)
        return self.reports

    def run_until(self, count: int, step: Callable[[], None]) -> list[RequestReport]:
        """Let the engine make step after step until so many requests are over."""
        with self._changed:
            while len(self.reports) < count:
                step()
                self._changed.wait(0.02)
        return self.reports


@dataclass
class HttpService:
    """One running service without a socket."""

    app: FastAPI
    worker: EngineWorker
    engine: Engine
    runner: GatedRunner
    tokenizer: AsciiTokenizer
    ended: Ended
    keys: KeyLedger | None = None

    def client(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    async def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, json=body, headers=headers)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        async with self.client() as client:
            return await client.get(path, headers=headers)

    async def events(self, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The messages of a stream; its frame is checked on the way."""
        reply = await self.post(path, {**body, "stream": True})
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        return parse_events(reply.text)


def parse_events(text: str) -> list[dict[str, Any]]:
    """JSON events of a whole stream, which must end with ``[DONE]``."""
    assert text.endswith("data: [DONE]\n\n")
    *events, _ = SSEDecoder().feed(text.encode())
    assert text.count("\n") == 2 * (len(events) + 1), "an event is one line, and an empty one"
    return [json.loads(event.data) for event in events]


def make_service(
    *,
    rule: Rule = next_letter,
    worker_options: Mapping[str, Any] | None = None,
    engine_options: Mapping[str, Any] | None = None,
    start: bool = True,
    key_policies: Iterable[KeyPolicy] | None = None,
    clock: Callable[[], float] = time.monotonic,
    tracing: Any = None,
    **settings: Any,
) -> HttpService:
    """A service over a scripted engine; the caller stops the worker."""
    runner, tokenizer = GatedRunner(rule=rule), AsciiTokenizer()
    metrics = Metrics(MODEL, EXITS, version=sortserve.__version__)
    ended, totals = Ended(metrics), Totals()
    observer = Observers([ended, totals, *([tracing] if tracing else [])])
    engine = make_engine(exits=EXITS, runner=runner, observer=observer, **(engine_options or {}))
    worker = EngineWorker(engine, **(worker_options or {}))
    api = ApiSettings(**{"served_model_name": MODEL, "backend": "scripted", **settings})
    metrics.watch(worker.stats, partial(worker.admission_stats, api.default_budget))
    keys = None
    if key_policies is not None:
        keys = KeyLedger(key_policies, clock=clock, observer=metrics.keys)
    app = create_app(worker, tokenizer, api, metrics, totals, keys, tracing)
    if start:
        worker.start()
    return HttpService(app, worker, engine, runner, tokenizer, ended, keys)


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """The application behind a real server on a loopback port, as its base URL."""
    protocol = partial(HttpProtocol, limits=ConnectionLimits())
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_config=None,
        http=protocol,  # type: ignore[arg-type]
        ws="none",
    )
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    listener.listen()  # who connects before the server runs waits for it
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def with_comments(app: ASGIApp) -> ASGIApp:
    """The application with a comment before each of its events, as in a stream that waits long."""

    async def commented(scope: Scope, receive: Receive, send: Send) -> None:
        is_stream = False

        async def send_more(message: Message) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                kinds = [value for name, value in message["headers"] if name == b"content-type"]
                is_stream = kinds[0].startswith(b"text/event-stream")
            elif is_stream and message.get("body"):
                await send({**message, "body": COMMENT, "more_body": True})
            await send(message)

        await app(scope, receive, send_more)

    return commented


@dataclass
class Connection:
    """One HTTP exchange at ASGI level: the test is the server, and can hang up at any moment."""

    app: ASGIApp
    path: str
    body: bytes
    method: str = "POST"
    headers: Sequence[tuple[bytes, bytes]] = ((b"content-type", b"application/json"),)
    messages: list[Message] = field(default_factory=list)
    send_fails: bool = False
    before_send: Callable[[Message], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self._is_body_sent = False
        self._has_left = asyncio.Event()
        self._grown = asyncio.Condition()

    def open(self) -> asyncio.Task[None]:
        """Run the application; the task ends when it returns."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": list(self.headers),
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }

        async def run() -> None:
            await self.app(scope, self._receive, self._send)

        return asyncio.create_task(run())

    def leave(self) -> None:
        """The client hangs up."""
        self._has_left.set()

    async def wait_for_events(self, count: int) -> None:
        """Wait until so many server-sent events are out."""
        async with asyncio.timeout(WAIT_S), self._grown:
            await self._grown.wait_for(lambda: self.content.count(b"\n\n") >= count)

    @property
    def status(self) -> int | None:
        starts = [m["status"] for m in self.messages if m["type"] == "http.response.start"]
        return starts[0] if starts else None

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    async def _receive(self) -> Message:
        if not self._is_body_sent:
            self._is_body_sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self._has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.before_send is not None:
            await self.before_send(message)
        if self.send_fails:
            raise OSError("broken pipe")
        async with self._grown:
            self.messages.append(message)
            self._grown.notify_all()


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()
