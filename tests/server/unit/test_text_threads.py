"""Large texts wait for each other, in a bounded number, and hold up nobody else."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from sortserve.api.text_threads import MAX_WAITING, NUM_THREADS, TextThreads, compiler_threads
from sortserve.core.errors import OverloadedError

WAIT_S = 30


async def test_beyond_the_limit_new_work_is_refused_and_answers_are_not() -> None:
    threads, gate = TextThreads(), threading.Event()
    waiting = [asyncio.create_task(threads.run(gate.wait)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)

    with pytest.raises(OverloadedError) as refused:
        await threads.run(gate.wait)
    answer = asyncio.create_task(threads.run(lambda: "answer", is_answer=True))
    await asyncio.sleep(0)
    gate.set()

    assert refused.value.status == 429
    assert await asyncio.wait_for(answer, WAIT_S) == "answer"
    assert await asyncio.gather(*waiting) == [True] * MAX_WAITING
    assert await threads.run(lambda: "again") == "again"


async def test_few_pieces_of_work_run_at_once_and_the_default_threads_stay_free() -> None:
    threads, gate = TextThreads(), threading.Event()
    running = threading.Semaphore(0)

    def work() -> None:
        running.release()
        assert gate.wait(WAIT_S)

    waiting = [asyncio.create_task(threads.run(work)) for _ in range(50)]
    free = await asyncio.wait_for(asyncio.to_thread(lambda: "free"), WAIT_S)
    for _ in range(NUM_THREADS):
        assert await asyncio.to_thread(running.acquire, timeout=WAIT_S)

    assert free == "free"
    assert not running.acquire(blocking=False)
    gate.set()
    await asyncio.gather(*waiting)


async def test_what_no_thread_is_there_for_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = TextThreads()

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as without_threads:
        without_threads.setattr(threading.Thread, "start", start)
        for _ in range(MAX_WAITING + 1):
            with pytest.raises(RuntimeError, match="new thread"):
                await threads.run(lambda: "never")

    assert await threads.run(lambda: "again") == "again"


async def test_what_fails_or_is_given_up_frees_its_place() -> None:
    threads, gate = TextThreads(), threading.Event()

    async def fail() -> None:
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0)

    for _ in range(MAX_WAITING + 1):
        await fail()
    given_up = [asyncio.create_task(threads.run(gate.wait)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)
    for task in given_up:
        task.cancel()
    await asyncio.gather(*given_up, return_exceptions=True)
    gate.set()

    assert await threads.run(lambda: "room") == "room"


async def test_of_a_crowd_the_loop_does_one_piece_a_round_and_others_come_between() -> None:
    threads = TextThreads()
    order: list[str] = []

    async def other() -> None:
        for i in range(5):
            order.append(f"other {i}")
            await asyncio.sleep(0)

    crowd = [threads.in_turn(partial(order.append, f"piece {i}")) for i in range(5)]
    await asyncio.gather(*crowd, other())

    places = [order.index(f"piece {i}") for i in range(5)]
    assert places == sorted(places)
    assert order.index("other 3") < places[3]


async def test_a_piece_that_fails_or_is_given_up_lets_the_next_have_its_turn() -> None:
    threads = TextThreads()
    given_up = asyncio.create_task(threads.in_turn(lambda: "given up"))
    await asyncio.sleep(0)
    failing = asyncio.create_task(threads.in_turn(lambda: 1 // 0))
    last = asyncio.create_task(threads.in_turn(lambda: "last"))
    given_up.cancel()

    assert await asyncio.wait_for(last, WAIT_S) == "last"
    with pytest.raises(ZeroDivisionError):
        await failing


async def test_grammars_and_texts_do_not_wait_for_each_other() -> None:
    texts, compilers, gate = TextThreads(), compiler_threads(), threading.Event()
    crowd = [asyncio.create_task(compilers.run(gate.wait)) for _ in range(MAX_WAITING)]
    await asyncio.sleep(0)

    assert await asyncio.wait_for(texts.run(lambda: "read"), WAIT_S) == "read"
    with pytest.raises(OverloadedError, match="256 formats wait to be compiled"):
        await compilers.run(gate.wait)
    gate.set()
    await asyncio.gather(*crowd)
