"""``benchmarks.service_cost``: the engine's half, and who takes how much of the cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from benchmarks.lib.cpu_time import main_thread_share, process_share, thread_times
from benchmarks.lib.engine_alone import run_rows

from sortserve.core.request import Request
from support.scripted import ScriptedRunner, make_engine, make_request


def requests() -> Iterator[Request]:
    for number in range(100):
        yield make_request(str(number), "abc", max_tokens=4)


def test_the_engine_alone_keeps_so_many_rows_busy_until_all_requests_are_answered() -> None:
    runner = ScriptedRunner()
    engine = make_engine(runner=runner)
    wanted = requests()

    run_rows(engine, wanted, exit_layer=engine.exits.full, num_rows=3, num_requests=7)

    assert not engine.has_work
    assert next(wanted).request_id == "7"
    num_rows = [len(plan.rows) for plan in runner.plans]
    assert num_rows == [3] * 8 + [1] * 4
    assert {row.exit_layer for plan in runner.plans for row in plan.rows} == {engine.exits.full}


def test_threads_of_a_process_are_seen_one_by_one() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        times = thread_times(os.getpid())
    finally:
        ended.set()
        thread.join()

    assert os.getpid() in times
    assert thread.native_id in times
    assert sum(times.values()) > 0


def test_shares_are_in_cores_and_count_threads_that_have_begun_meanwhile() -> None:
    before = {10: 5.0, 11: 1.0}
    after = {10: 5.5, 11: 4.0, 12: 0.5}

    assert process_share(before, after, wall_s=2.0) == 2.0
    assert main_thread_share(10, before, after, wall_s=2.0) == 0.25
