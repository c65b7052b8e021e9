"""Renders chat templates; the main module of the process that ``template_renderer`` starts.

A template is a program of the checkpoint, run on what a client sends: it may loop or eat memory.
This process loads what rendering needs and then only forks: each copy is a worker with its own
socket and its own limits, which the kernel enforces, and a worker that dies is one fork away from
its successor. It ends when its parent does: the control socket closes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["FAILED", "RENDERED", "TOO_LARGE", "TOO_LONG", "Limits", "answer", "main"]

RENDERED, FAILED, TOO_LARGE, TOO_LONG = b"R", b"F", b"M", b"L"
"""First byte of an answer: the text or the error follows, or a limit was met."""
MAX_ERROR_CHARS = 500


@dataclass(frozen=True)
class Limits:
    """What one rendering may take."""

    cpu_s: float = 1.0
    """Processor time."""
    wall_s: float = 10.0
    """Time on the clock, for a machine that is busy with something else."""
    memory_bytes: int = 256 * 2**20
    """Memory beyond what the process has when it begins."""
    max_chars: int = 8 * 2**20
    """Characters of the text."""


def answer(job: bytes, max_chars: int) -> bytes:
    """Do one job; an answer begins with RENDERED, FAILED, TOO_LARGE or TOO_LONG.

    A job is the JSON of ``template``, ``messages`` and ``variables``, the arguments of
    transformers' ``apply_chat_template``. Without ``messages`` the template is only compiled.
    """
    try:
        text = _render(**json.loads(job))
    except MemoryError:
        return TOO_LARGE
    except Exception as error:  # a template can fail in any way
        reason = str(error) or type(error).__name__
        if (line := getattr(error, "lineno", None)) is not None:
            reason += f" (line {line})"
        return FAILED + reason[:MAX_ERROR_CHARS].encode(errors="replace")
    if len(text) > max_chars:
        return TOO_LONG
    return RENDERED + text.encode(errors="surrogatepass")


def _render(template: str, messages: list[Any] | None, variables: dict[str, Any]) -> str:
    if messages is None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        _compile_jinja_template(template)
        return ""
    text = _bare_tokenizer().apply_chat_template(
        messages, chat_template=template, tokenize=False, **variables
    )
    if not isinstance(text, str):
        raise TypeError("messages must be one conversation, a list of objects")
    return text


@cache
def _bare_tokenizer() -> Any:
    """The rendering of transformers without a vocabulary, and without torch."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    return PreTrainedTokenizerBase()


def main() -> None:
    """Fork a worker for each socket that comes through standard input, until that closes."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # a parent may have ignored them
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the workers
    limits = Limits(**json.loads(sys.argv[1]))
    _render("", [{"role": "user", "content": ""}], {})  # load what the workers share
    with socket.socket(fileno=sys.stdin.fileno()) as control:
        while (received := socket.recv_fds(control, 1, 1))[0]:
            [handle] = received[1]
            try:
                is_worker = os.fork() == 0
            except OSError:
                is_worker = False  # the closed socket tells the parent
            if is_worker:
                try:
                    control.close()
                    _work(Connection(handle), limits)
                finally:
                    os._exit(0)
            os.close(handle)


def _work(connection: Connection, limits: Limits) -> None:
    """Answer jobs until the parent closes the connection, or a limit ends the process."""
    _limit_memory(limits.memory_bytes)
    connection.send_bytes(b"")  # ready
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        # Either signal ends the process wherever it is, in a long operation of the interpreter too.
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        signal.setitimer(signal.ITIMER_REAL, limits.wall_s)
        connection.send_bytes(b"")  # begun
        reply = answer(job, limits.max_chars)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(reply)


def _limit_memory(num_bytes: int) -> None:
    import resource

    statm = Path("/proc/self/statm")
    if statm.is_file():  # only Linux counts and limits the address space
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, used + num_bytes))


if __name__ == "__main__":
    main()
