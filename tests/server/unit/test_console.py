"""Standard streams: gone, full, closed or interrupted, a command ends in order and in silence."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from sortserve.cli import main
from sortserve.core.errors import ConfigError
from sortserve.process.console import MAX_LINE, one_line, run_command
from sortserve_trainer.commands.console import Console

WORDS = [f"word{i} " for i in range(2_000)]


class Storyteller(BaseHTTPRequestHandler):
    """Answers ``/generate`` with a long story; stalls after the first word if told to."""

    stalls: ClassVar[bool] = False
    may_end: ClassVar[threading.Event]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        choice = {"index": 0, "text": "".join(WORDS), "finish_reason": "stop"}
        if not body.get("stream"):
            self.wfile.write(json.dumps({"id": "g", "choices": [choice]}).encode())
            return
        try:
            for word in WORDS:
                event = {"id": "g", "choices": [{**choice, "text": word}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                if self.stalls:
                    self.may_end.wait(30)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def storyteller(*, stalls: bool = False) -> Iterator[str]:
    may_end = threading.Event()
    handler = type("Handler", (Storyteller,), {"stalls": stalls, "may_end": may_end})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            may_end.set()
            http.shutdown()
            thread.join()


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("SORTSERVE_API_KEY", raising=False)
    with storyteller() as url:
        monkeypatch.setenv("SORTSERVE_URL", url)
        yield url


@contextmanager
def nobody_reads() -> Iterator[int]:
    """The end to write of a pipe whose other end is closed."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        yield write_end
    finally:
        os.close(write_end)


def run(arguments: list[str], stdout: int) -> tuple[int, str]:
    """Exit code and stderr of a process."""
    command = [sys.executable, "-m", "sortserve", *arguments]
    ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    return ended.returncode, ended.stderr


COMMANDS: list[Any] = [
    ["version"],
    ["--help"],
    ["generate", "--help"],
    ["generate", "Hi"],
    ["generate", "Hi", "--no-stream"],
    ["serve", "--help"],
    ["serve", "--print-config"],
    ["profile", "--help"],
    ["export", "--help"],
    ["eval", "--help"],
    ["selfdata", "--help"],
    pytest.param(["train", "--help"], marks=pytest.mark.slow),  # imports torch and transformers
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_reader_that_has_gone_ends_any_command_with_141_and_without_a_word(
    command: list[str],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with nobody_reads() as end, os.fdopen(os.dup(end), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)

        code = main(command)

    assert code == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [COMMANDS[i] for i in (0, 2, 3, 4)], ids=" ".join)
def test_the_interpreter_says_nothing_either_when_it_ends(command: list[str], url: str) -> None:
    with nobody_reads() as end:
        assert run(command, end) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("command", [COMMANDS[i] for i in (0, 2, 3, 4)], ids=" ".join)
def test_a_disk_that_is_full_is_one_line_and_exit_code_1(command: list[str], url: str) -> None:
    with open("/dev/full", "wb") as full:
        code, said = run(command, full.fileno())

    assert code == 1
    assert said == ("sortserve: error: input or output failed: No space left on device.\n")


def _hear_interrupts() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_in_the_middle_of_an_answer_is_130_and_no_traceback() -> None:
    with storyteller(stalls=True) as url:
        command = [sys.executable, "-u", "-m", "sortserve", "generate", "Hi", "--url", url]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_interrupts,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(5) == WORDS[0][:5]
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)

    assert (process.returncode, said) == (130, "")


def test_a_closed_output_is_no_failure_and_a_closed_input_a_mistake(url: str) -> None:
    closed = f"exec {sys.executable} -m sortserve"
    assert subprocess.run(["sh", "-c", f"{closed} version >&- 2>&-"]).returncode == 0

    ended = subprocess.run(["sh", "-c", f"{closed} generate - <&-"], capture_output=True, text=True)

    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("prompt", [b"\xff\xfe", b"caf\xe9"])
def test_a_prompt_that_is_no_text_is_a_mistake(
    prompt: bytes, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt), encoding="utf-8"))

    assert main(["generate", "-"]) == 2
    assert main(["generate", os.fsdecode(prompt)]) == 2
    assert capsys.readouterr().err == (
        "sortserve: error: PROMPT is no text: it is not valid UTF-8.\n" * 2
    )


def test_a_character_that_the_terminal_lacks_does_not_end_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

    def say() -> int:
        print("Grüße")
        return 0

    assert run_command(say) == 0
    assert written.getvalue() == b"Gr\\xfc\\xdfe\n"


def test_rich_leaves_a_reader_that_has_gone_to_the_command_line() -> None:
    with nobody_reads() as end, os.fdopen(os.dup(end), "w") as stdout:
        console = Console(file=stdout)

        def show() -> int:
            console.print("a table")
            return 0

        assert run_command(show) == 141
        with pytest.raises(BrokenPipeError):
            stdout.close()


def test_a_file_that_cannot_be_used_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read() -> int:
        with open("x" * 300):
            return 0

    assert run_command(read) == 2
    assert capsys.readouterr().err.startswith("sortserve: error: File name too long: xxx")


def test_memory_that_runs_out_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def eat() -> int:
        raise MemoryError

    assert run_command(eat) == 1
    assert capsys.readouterr().err == "sortserve: error: there is not enough memory.\n"


def test_whatever_a_mistake_quotes_it_is_one_short_printable_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def err() -> int:
        raise ConfigError("a\nb\r\x1b[2J\0\u2028" + "x" * 10_000)

    assert run_command(err) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert len(line) < MAX_LINE + 100
    assert one_line("déjà vu 東京") == "déjà vu 東京"
