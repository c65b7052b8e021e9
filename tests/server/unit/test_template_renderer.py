from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from sortserve.core.errors import EngineError, OverloadedError
from sortserve.text import template_renderer
from sortserve.text.template_renderer import (
    Renderer,
    TemplateFailed,
    TemplateStopped,
    _as_json,
    shared_renderer,
)
from sortserve.text.template_worker import Limits

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")

MESSAGES = [{"role": "user", "content": "hello"}]
SHOW = "{{ messages[0].content }}"
FOREVER = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    renderer = Renderer(Limits(cpu_s=0.3))
    yield renderer
    renderer.close()


def process_of(renderer: Renderer) -> int:
    process = renderer._process
    assert process is not None
    pid: int = process._process.pid
    return pid


def workers_of(renderer: Renderer) -> list[int]:
    pid = process_of(renderer)
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(condition: Callable[[], Any]) -> None:
    """Look again and again, as what happens in another process cannot be waited for here."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)


class InThread(threading.Thread):
    """A rendering on a thread of its own, and how it ended."""

    def __init__(self, renderer: Renderer, template: str) -> None:
        super().__init__(daemon=True)
        self._job = partial(renderer.render, template, MESSAGES, {})
        self.result: str | Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._job()
        except Exception as error:
            self.result = error


def test_others_render_while_one_loops(renderer: Renderer) -> None:
    looping = InThread(renderer, FOREVER)
    until(lambda: workers_of(renderer) if renderer._process else [])
    texts = [renderer.render(SHOW, MESSAGES, {}) for _ in range(3)]
    was_still_looping = looping.is_alive()
    looping.join()
    assert texts == ["hello"] * 3
    assert was_still_looping
    assert isinstance(looping.result, TemplateStopped)


def test_idle_workers_are_used_again(renderer: Renderer) -> None:
    renderer.render(SHOW, MESSAGES, {})
    before = workers_of(renderer)
    for _ in range(5):
        renderer.render(SHOW, MESSAGES, {})
    assert set(workers_of(renderer)) <= set(before)


def test_no_more_than_so_many_render_at_once_and_who_waits_too_long_is_told() -> None:
    renderer = Renderer(Limits(wall_s=0.01), max_workers=1)
    renderer._free.acquire()
    with pytest.raises(OverloadedError, match="1 chat templates are being rendered") as caught:
        renderer.render(SHOW, MESSAGES, {})
    assert caught.value.retry_after_s is not None


def test_an_idle_worker_that_is_killed_is_replaced(renderer: Renderer) -> None:
    renderer.render(SHOW, MESSAGES, {})
    for pid in workers_of(renderer):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not workers_of(renderer))
    assert renderer.render(SHOW, MESSAGES, {}) == "hello"


def test_a_worker_that_is_killed_at_work_fails_its_own_rendering_only() -> None:
    renderer = Renderer()
    looping = InThread(renderer, FOREVER)
    until(lambda: renderer._process and workers_of(renderer))
    [victim] = workers_of(renderer)
    assert renderer.render(SHOW, MESSAGES, {}) == "hello"
    os.kill(victim, signal.SIGKILL)
    looping.join()
    assert isinstance(looping.result, TemplateStopped)
    assert renderer.render(SHOW, MESSAGES, {}) == "hello"
    renderer.close()


def test_a_worker_that_dies_as_it_is_asked_costs_nobody_the_answer(renderer: Renderer) -> None:
    ours, theirs = socket.socketpair()
    renderer._idle.append(Connection(ours.detach()))

    def take_the_job_and_die() -> None:
        with theirs:
            theirs.recv(1 << 16)

    dying = threading.Thread(target=take_the_job_and_die)
    dying.start()
    assert renderer.render(SHOW, MESSAGES, {}) == "hello"
    dying.join()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Renderer]:
    """A renderer that soon takes who does not get on for stopped."""
    monkeypatch.setattr(template_renderer, "TAKE_S", 0.2)
    renderer = Renderer()
    renderer.render(SHOW, MESSAGES, {})
    yield renderer
    renderer.close()


@pytest.mark.parametrize("size", [1, 1 << 21], ids=["small-job", "job-larger-than-a-socket-holds"])
def test_a_worker_that_is_stopped_costs_nobody_the_answer(impatient: Renderer, size: int) -> None:
    [stopped] = workers_of(impatient)
    os.kill(stopped, signal.SIGSTOP)
    text = "a" * size

    assert impatient.render(SHOW, [{"role": "user", "content": text}], {}) == text

    os.kill(stopped, signal.SIGCONT)
    until(lambda: stopped not in workers_of(impatient))  # nobody listens to it any more


def test_a_process_that_is_stopped_is_started_again(impatient: Renderer) -> None:
    first = process_of(impatient)
    os.kill(first, signal.SIGSTOP)
    impatient._idle.pop().close()

    assert impatient.render(SHOW, MESSAGES, {}) == "hello"
    assert process_of(impatient) != first


def test_who_does_not_get_on_even_as_a_new_worker_is_our_error(
    impatient: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient._idle.pop().close()
    others = []

    def silent() -> Connection:
        ours, theirs = socket.socketpair()
        template_renderer._limit_waiting(ours, read_s=0.1, write_s=0.1)
        others.append(theirs)
        return Connection(ours.detach())

    monkeypatch.setattr(impatient, "_new_worker", silent)
    with pytest.raises(EngineError, match="does not get on"):
        impatient.render(SHOW, MESSAGES, {})
    for other in others:
        other.close()


def test_a_worker_that_is_stopped_ends_with_the_process(impatient: Renderer) -> None:
    [stopped] = workers_of(impatient)
    os.kill(stopped, signal.SIGSTOP)

    impatient.close()

    until(lambda: state_of(stopped) in "ZX")


def state_of(pid: int) -> str:
    """The letter of a process's state; X: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def test_a_process_that_is_killed_is_started_again(renderer: Renderer) -> None:
    renderer.render(SHOW, MESSAGES, {})
    first = process_of(renderer)
    os.kill(first, signal.SIGKILL)
    for worker in renderer._idle:
        worker.close()
    renderer._idle.clear()
    assert renderer.render(SHOW, MESSAGES, {}) == "hello"
    assert process_of(renderer) != first


def test_it_can_be_closed_and_used_again(renderer: Renderer) -> None:
    renderer.render(SHOW, MESSAGES, {})
    first = process_of(renderer)
    renderer.close()
    assert not Path(f"/proc/{first}").exists()
    assert renderer.render(SHOW, MESSAGES, {}) == "hello"


def test_a_process_that_does_not_start_is_our_error(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    broken = Renderer()
    with pytest.raises(EngineError, match="does not start"):
        broken.render(SHOW, MESSAGES, {})
    broken.close()


def test_a_program_that_is_missing_is_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EngineError, match="No such file"):
        Renderer().render(SHOW, MESSAGES, {})


def test_what_cannot_fork_renders_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_renderer, "_can_fork", lambda: False)
    renderer = Renderer(Limits(max_chars=5))
    renderer.start()
    assert renderer.render(SHOW, MESSAGES, {}) == "hello"
    with pytest.raises(TemplateStopped, match="5 characters"):
        renderer.render(SHOW + "!", MESSAGES, {})
    with pytest.raises(TemplateFailed):
        renderer.compile("{% if %}")
    assert renderer._process is None


def test_the_process_has_neither_torch_nor_the_sockets_of_its_parent(renderer: Renderer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        fresh = Renderer()
        fresh.render(SHOW, MESSAGES, {})
        pids = [process_of(fresh), *workers_of(fresh)]
        inode = os.readlink(f"/proc/self/fd/{listener.fileno()}")
        for pid in pids:
            assert inode not in open_handles(pid)
            assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
        fresh.close()


def open_handles(pid: int) -> list[str]:
    """What each handle of a process stands for."""
    links = []
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(handle))
    return links


def num_sockets(pid: int) -> int:
    return sum(link.startswith("socket:") for link in open_handles(pid))


def test_workers_keep_no_others_socket(renderer: Renderer) -> None:
    looping = [InThread(renderer, FOREVER) for _ in range(2)]
    renderer.render(SHOW, MESSAGES, {})
    for pid in workers_of(renderer):
        # One that has just been forked has all that we have, until its own program begins.
        until(lambda pid=pid: num_sockets(pid) == 1)  # type: ignore[misc]
    for thread in looping:
        thread.join()


def test_a_forked_process_has_a_renderer_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = shared_renderer()
    assert shared_renderer() is ours
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert shared_renderer() is not ours


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("", id="at-its-end"),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", id="killed"),
    ],
)
def test_nothing_is_left_when_the_server_ends(end: str) -> None:
    """Every process holds the write end of our pipes: reading them ends with the last."""
    program = f"""
import os, signal, threading
from sortserve.text.template_renderer import shared_renderer
renderer = shared_renderer()
messages = [{{"role": "user", "content": "hello"}}]
print(renderer.render("{{{{ messages[0].content }}}}", messages, {{}}), flush=True)
loop = threading.Thread(target=renderer.render, args=({FOREVER!r}, messages, {{}}), daemon=True)
loop.start()
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "hello\n"
    assert done.stderr == ""


def test_ctrl_c_in_the_terminal_is_not_for_the_process_that_renders(renderer: Renderer) -> None:
    renderer.render(SHOW, MESSAGES, {})
    assert os.getpgid(process_of(renderer)) != os.getpgid(0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_of_jsons_is_refused(renderer: Renderer, number: float) -> None:
    with pytest.raises(TemplateFailed, match="not JSON compliant"):
        renderer.render(SHOW, [{"role": "user", "content": "a", "extra": number}], {})

    with pytest.raises(TemplateFailed, match="not JSON compliant"):
        renderer.render(SHOW, MESSAGES, {"x": [{"y": number}]})


def test_writing_many_long_numbers_keeps_no_other_thread_waiting() -> None:
    job = {"messages": [10**4299] * 2000}
    writing = threading.Thread(target=_as_json, args=(job,))
    num_turns = 0

    writing.start()
    while writing.is_alive():
        writing.join(0.001)
        num_turns += 1

    assert num_turns > 10  # some fifty, or three if it were written in one piece
