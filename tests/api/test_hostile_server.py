"""Hostile bodies against a real server in a process of its own: its answers, /livez, its memory.

The machine may be busy: of several attempts the best one counts.
"""

from __future__ import annotations

import http.client
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from support.hostile import KINDS, HostileBody

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LIMIT_BYTES = 4 << 20
ATTEMPTS = 4
LONGEST_WAIT_S = 0.1
FIELDS = [
    ("/v1/completions", "prompt"),
    ("/v1/completions", "stop"),
    ("/v1/completions", "x"),
    ("/v1/chat/completions", "messages"),
    ("/v1/chat/completions", "messages.0.content"),
    ("/v1/chat/completions", "chat_template_kwargs"),
    ("/tokenize", "prompt"),
    ("/detokenize", "tokens"),
]


def run_server(folder: Path, listener: socket.socket) -> None:
    from sortserve.api.app import create_app
    from sortserve.api.bodies.limits import max_encoded_tokens
    from sortserve.api.settings import ApiSettings
    from sortserve.engine.worker import EngineWorker
    from sortserve.process.garbage import calm_garbage_collector
    from sortserve.text.tokenizer import Tokenizer
    from support.serving import serve
    from support.tiny_models import make_tiny_checkpoint

    served = serve(make_tiny_checkpoint(folder, "llama-tied"))
    worker = EngineWorker(served.engine())
    worker.start()
    tokenizer = Tokenizer(
        served.checkpoint.tokenizer,
        served.tokenizer.eos_token_ids,
        max_tokens=max_encoded_tokens(worker.max_model_len),
    )
    settings = ApiSettings(served_model_name="m", max_token_chars=tokenizer.max_token_chars)
    config = uvicorn.Config(create_app(worker, tokenizer, settings), log_config=None)
    calm_garbage_collector()
    uvicorn.Server(config).run(sockets=[listener])


@dataclass
class Server:
    port: int
    pid: int

    def post(self, path: str, content: bytes) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        connection.close()
        return reply.status

    def is_alive(self) -> bool:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            connection.request("GET", "/livez")
            status = connection.getresponse().status
            connection.close()
        except OSError:
            return False
        return status == 200

    def memory_bytes(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        [line] = [line for line in lines if line.startswith(name + ":")]
        return int(line.split()[1]) * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    listener = socket.create_server(("127.0.0.1", 0))
    process = multiprocessing.get_context("spawn").Process(
        target=run_server, args=(tmp_path_factory.mktemp("m"), listener), daemon=True
    )
    process.start()
    assert process.pid is not None
    server = Server(listener.getsockname()[1], process.pid)
    listener.close()
    deadline = time.monotonic() + 120
    while not server.is_alive():
        assert process.is_alive()
        assert time.monotonic() < deadline
    yield server
    process.kill()
    process.join()


def measured(server: Server, body: HostileBody) -> tuple[int, float, int]:
    """The status, the longest wait for /livez meanwhile, and the growth of memory."""
    waits = [0.0]
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            start = time.perf_counter()
            assert server.is_alive()
            waits.append(time.perf_counter() - start)

    content = body.content
    server.forget_peak()
    before = server.memory_bytes("VmRSS")
    poller = threading.Thread(target=poll)
    poller.start()
    try:
        status = server.post(body.path, content)
    finally:
        stop.set()
        poller.join()
    return status, max(waits), server.memory_bytes("VmHWM") - before


@pytest.mark.parametrize("size", [16_000, 260_000, 520_000, 2_000_000, LIMIT_BYTES - 200])
@pytest.mark.parametrize(("path", "field"), FIELDS)
def test_a_server_stays_awake_and_small_whatever_it_is_sent(
    server: Server, path: str, field: str, size: int
) -> None:
    for kind in KINDS:
        body = HostileBody(path, field, kind, size)
        attempts = [measured(server, body)]
        while len(attempts) < ATTEMPTS and (
            min(wait for _, wait, _ in attempts) >= LONGEST_WAIT_S
            or min(growth for _, _, growth in attempts) >= 3 * LIMIT_BYTES
        ):
            attempts.append(measured(server, body))

        assert all(status < 500 for status, _, _ in attempts), str(body)
        assert min(wait for _, wait, _ in attempts) < LONGEST_WAIT_S, str(body)
        assert min(growth for _, _, growth in attempts) < 3 * LIMIT_BYTES, str(body)
