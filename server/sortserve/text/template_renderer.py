"""Renders chat templates outside this process, within limits of time, memory and size."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from sortserve.core.errors import EngineError, OverloadedError
from sortserve.text import template_worker
from sortserve.text.template_worker import FAILED, TOO_LARGE, TOO_LONG, Limits, answer

__all__ = ["Renderer", "TemplateFailed", "TemplateStopped", "shared_renderer"]

MAX_WORKERS = 4
"""Renderings at once. One that loops holds one of them for as long as the limits let it."""
START_S = 60.0
"""Longest wait for the process to load, on a machine that is busy with something else."""
GRACE_S = 5.0
"""How much later than the kernel we give up a worker ourselves."""
TAKE_S = 2.0
"""Longest wait for a worker to take a job, and for a process that has loaded to fork one. Either is
a matter of a millisecond; who lets us wait so long is stopped, or starved, and is replaced."""
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class TemplateFailed(Exception):
    """The template does not compile, or raises; the message is its own."""


class TemplateStopped(Exception):
    """The template was stopped at a limit; the message says at which."""


class _StuckError(Exception):
    """A worker lives and does not answer, whatever its job is: it is stopped, or starved."""


class Renderer:
    """A process that renders, and what is needed to stop and replace it.

    Safe to use from several threads. Nothing is started before the first rendering, or ``start``.
    A process that dies, for whatever reason, is started again when it is next needed.
    """

    def __init__(self, limits: Limits | None = None, *, max_workers: int = MAX_WORKERS) -> None:
        self.limits = limits or Limits()
        self._max_workers = max_workers
        self._free = threading.Semaphore(max_workers)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []  # taken and given back by single calls: no lock
        self._process: _Process | None = None

    def start(self) -> None:
        """Let the process load while the caller does something else."""
        if _can_fork():
            self._started()

    def close(self) -> None:
        """End the process and its workers. The next rendering starts anew."""
        if self._process is not None:
            self._process.end_workers()
            self._end(self._process)

    def __del__(self) -> None:
        self.close()

    def compile(self, template: str) -> None:
        """Find out whether a template is one.

        Raises:
            TemplateFailed: it is not.
            TemplateStopped: it takes too much to find out.
            EngineError: the process cannot be started.
        """
        self._run({"template": template, "messages": None, "variables": {}})

    def render(self, template: str, messages: list[Any], variables: dict[str, Any]) -> str:
        """What transformers' ``apply_chat_template`` makes of a conversation.

        Args:
            template: the source of the template.
            messages: one conversation, in plain JSON values.
            variables: further arguments and variables of the template, in plain JSON values.

        Raises:
            TemplateFailed: the template raises, or a value is none of JSON's.
            TemplateStopped: a limit was met.
            OverloadedError: all workers are busy and stay so.
            EngineError: the process cannot be started, or its workers do not get on.
        """
        return self._run({"template": template, "messages": messages, "variables": variables})

    def _run(self, job: dict[str, Any]) -> str:
        limits = self.limits
        try:
            data = _as_json(job)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateFailed(str(error)) from error
        reply = self._ask(data) if _can_fork() else answer(data, limits.max_chars)
        kind, rest = reply[:1], reply[1:]
        if kind == FAILED:
            raise TemplateFailed(rest.decode())
        if kind == TOO_LARGE:
            raise TemplateStopped(f"it takes more than {limits.memory_bytes // 2**20} MiB")
        if kind == TOO_LONG:
            raise TemplateStopped(f"it writes more than {limits.max_chars} characters")
        return rest.decode(errors="surrogatepass")

    def _ask(self, job: bytes) -> bytes:
        limits = self.limits
        if not self._free.acquire(timeout=limits.wall_s):
            raise OverloadedError(
                f"{self._max_workers} chat templates are being rendered, and none has come to an "
                f"end for {limits.wall_s:g} s. Come back later.",
                retry_after_s=limits.wall_s,
            )
        try:
            worker, reply = self._answered(job)
            if reply is None:
                raise TemplateStopped(
                    f"it runs for more than {limits.cpu_s:g} s of processor time, or "
                    f"{limits.wall_s:g} s on the clock"
                )
            if reply == TOO_LARGE:
                worker.close()  # what it could not free would count against the next one
            else:
                self._idle.append(worker)
            return reply
        finally:
            self._free.release()

    def _answered(self, job: bytes) -> tuple[Connection, bytes | None]:
        """Who did the job, and the answer; None: it was stopped at a limit."""
        began_s = time.monotonic()
        worker, is_new = self._send(job)
        try:
            reply = self._reply(worker, None if is_new else TAKE_S)
            is_guilty = is_new or time.monotonic() - began_s >= self.limits.cpu_s
        except _StuckError:
            reply, is_guilty = None, False
        if reply is not None or is_guilty:
            return worker, reply
        # Too soon for a limit of this job, or not even begun: that was not the job's doing.
        worker, _ = self._send(job, to_new=True)
        try:
            return worker, self._reply(worker, None)
        except _StuckError:
            raise _not_getting_on() from None

    def _reply(self, worker: Connection, take_s: float | None) -> bytes | None:
        """What a worker says; None: it has died, by its limits or otherwise.

        Args:
            worker: has the job.
            take_s: how long it may take to begin; None: as long as the whole job may take.

        Raises:
            _StuckError: it lives, and has not begun or not ended in time.
        """
        try:
            if take_s is not None and not worker.poll(take_s):
                raise BlockingIOError
            worker.recv_bytes()  # the job is begun
            return worker.recv_bytes(4 * self.limits.max_chars + 1)
        except BlockingIOError:  # the end of a wait, here or in the kernel
            worker.close()
            raise _StuckError from None
        except (EOFError, OSError):
            worker.close()
            return None

    def _send(self, job: bytes, *, to_new: bool = False) -> tuple[Connection, bool]:
        """A worker that has the job, and whether it is new: else an idle one that is alive."""
        while True:
            is_new = to_new or not self._idle
            try:
                worker = self._new_worker() if is_new else self._idle.pop()
            except IndexError:  # another thread was faster
                continue
            try:
                worker.send_bytes(job)
                return worker, is_new
            except OSError as error:  # it has died since it was used, or is stopped
                worker.close()
                if is_new and isinstance(error, BlockingIOError):
                    raise _not_getting_on() from None
                if is_new:
                    raise TemplateStopped("its variables do not fit the memory limit") from None

    def _new_worker(self) -> Connection:
        for _ in range(2):  # the process may have died since it was used
            process = self._started()
            ours, theirs = socket.socketpair()
            _limit_waiting(ours, read_s=self.limits.wall_s + GRACE_S, write_s=TAKE_S)
            worker = Connection(ours.detach())
            try:
                with theirs:
                    socket.send_fds(process.control, [b"w"], [theirs.fileno()])
                if worker.poll(TAKE_S if process.has_loaded else START_S):
                    worker.recv_bytes()
                    process.has_loaded = True
                    return worker
            except (EOFError, OSError):
                pass
            worker.close()
            self._end(process)
        raise EngineError("The process that renders chat templates does not start.")

    def _started(self) -> _Process:
        with self._lock:
            if self._process is None:
                self._process = _Process(self.limits)
            return self._process

    def _end(self, process: _Process) -> None:
        with self._lock:
            if self._process is process:
                self._process = None
            process.end()
        with suppress(IndexError):  # its workers may be stopped as it was
            while True:
                self._idle.pop().close()


class _Process:
    """The process that forks workers, and the socket that asks it to."""

    def __init__(self, limits: Limits) -> None:
        self.has_loaded = False
        """Whether it has forked a worker: the next takes no time."""
        self.control, theirs = socket.socketpair()
        environment = {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONWARNINGS": "ignore",
            "TRANSFORMERS_VERBOSITY": "error",
            # Threads do not survive a fork.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", template_worker.__name__, json.dumps(asdict(limits))]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, **environment},
                    process_group=0,  # Ctrl-C is for the server, which ends this when it ends
                )
        except OSError as error:
            self.control.close()
            raise EngineError(
                f"The process that renders chat templates does not start: {error}."
            ) from error

    def end_workers(self) -> None:
        """Those that are stopped, too: they would not see that their sockets close."""
        if self._process.returncode is None:  # else its group may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        self.control.close()
        self._process.kill()
        self._process.wait()


@cache
def _renderer_of(process_id: int) -> Renderer:
    renderer = Renderer()
    atexit.register(renderer.close)
    return renderer


def shared_renderer() -> Renderer:
    """The one of this process; a forked child has its own."""
    return _renderer_of(os.getpid())


def _as_json(job: dict[str, Any]) -> bytes:
    """What the worker reads. Piece by piece: written whole, a list of long numbers would keep every
    other thread waiting for a quarter of a second.
    """
    return "".join(_ENCODER.iterencode(job)).encode(errors="surrogatepass")


def _not_getting_on() -> EngineError:
    return EngineError("The process that renders chat templates does not get on.")


def _can_fork() -> bool:
    """Elsewhere than on Unix templates are rendered here, and nothing stops them."""
    return hasattr(os, "fork") and hasattr(socket, "send_fds") and bool(sys.executable)


def _limit_waiting(sock: socket.socket, *, read_s: float, write_s: float) -> None:
    """Make every read and write that waits longer fail, also through the bare descriptor."""
    for option, seconds in ((socket.SO_RCVTIMEO, read_s), (socket.SO_SNDTIMEO, write_s)):
        timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, option, timeval)
