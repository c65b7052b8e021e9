"""What two threads touch (see ``sortserve.engine.worker``), raced."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from sortserve.admission.choose import ExitChoice
from sortserve.admission.desk import AdmissionDesk
from sortserve.admission.lengths import MIN_ENDED, LengthEstimator
from sortserve.admission.newcomer import newcomer_demand
from sortserve.admission.outlook import Newcomer
from sortserve.admission.queue_limits import QueueLimits, Reservation
from sortserve.core.errors import EngineError, OverloadedError, UnavailableError
from sortserve.core.request import StepRecord
from sortserve.cost.costs import Costs
from sortserve.engine.worker import EngineWorker, RequestStream
from sortserve.scheduling.demand import Demand
from sortserve.scheduling.objective import get_objective
from sortserve.scheduling.policies.table import get_policy
from sortserve.telemetry.metrics import Metrics
from support.scripted import make_engine, make_exits, make_request

ROUNDS = 3000


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@contextmanager
def racing(work: Callable[[], None]) -> Iterator[None]:
    """Do something on another thread, over and over, until the block is left."""
    done = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        while not done.is_set():
            try:
                work()
            except BaseException as error:
                errors.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not errors, errors[0]


def test_lengths_can_be_asked_while_they_are_learned() -> None:
    estimator = LengthEstimator()
    for _ in range(MIN_ENDED + 1):
        estimator.observe(10, cut=False)

    alone = estimator.expect(0, 500)

    with racing(lambda: estimator.observe(10, cut=False)):
        together = {estimator.expect(0, 500) for _ in range(ROUNDS)}

    assert alone is not None
    assert together == {alone}


def test_a_place_in_the_queue_is_given_back_once_whoever_gives_it() -> None:
    limits = QueueLimits(max_requests=1, max_tokens=100)
    places: list[Reservation] = []

    def release_too() -> None:
        if places:
            places[-1].release()

    num_taken = 0
    with racing(release_too):
        for _ in range(ROUNDS):
            try:
                whole = limits.reserve(1, 10, retry_after_s=lambda *over: 1.0)
            except OverloadedError:  # the other thread is about to give the last one back
                continue
            num_taken += 1
            places.append(whole.take_one(20))
            places[-1].release()

    assert num_taken > 0
    for place in places:
        place.release()
    limits.reserve(1, 100, retry_after_s=lambda *over: 1.0)
    with pytest.raises(OverloadedError, match="2 requests would wait, 1 may"):
        limits.reserve(1, 1, retry_after_s=lambda *over: 1.0)


def test_a_request_on_its_way_to_the_engine_is_counted_once() -> None:
    desk = AdmissionDesk(
        exits=make_exits(2, 4, 6),
        policy=get_policy("deadline"),
        objective=get_objective("quality"),
        max_num_batched_tokens=64,
        overload_delay_s=0.0,
        clock=lambda: 0.0,
        expect=lambda request: 4,
        costs=Costs(),
    )
    entered = threading.Event()
    taken = threading.Event()
    taken.set()

    def take() -> None:
        if entered.is_set():
            desk.see((demand("r"),), ["r"])
            desk.see((), [])
            entered.clear()
            taken.set()

    choice = ExitChoice(6, None, fits=True)
    counts = set()
    with racing(take):
        for _ in range(ROUNDS // 10):
            assert taken.wait(30)
            taken.clear()
            desk.enter(make_request("r"), choice)
            entered.set()
            while not taken.is_set():
                counts.add(len(desk.load().demands))

    assert counts <= {0, 1}


def demand(request_id: str) -> Demand:
    newcomer = Newcomer(num_prompt_tokens=1, num_output_tokens=4, arrival_s=0.0)
    return newcomer_demand(6, newcomer, None, now=0.0, request_id=request_id)


async def test_every_request_that_was_accepted_while_the_engine_failed_is_answered() -> None:
    for _ in range(30):
        worker = EngineWorker(make_engine(max_model_len=256))
        worker.start()
        streams: list[RequestStream] = []
        failing = threading.Timer(0.001, worker.fail, ["a scripted fault"])
        failing.start()
        try:
            while True:
                name = str(len(streams))
                streams.append(worker.submit(make_request(name, max_tokens=100)))
        except (UnavailableError, OverloadedError):
            pass
        await asyncio.to_thread(failing.join)

        async with asyncio.timeout(30):
            for stream in streams:
                try:
                    outputs = [output async for output in stream]
                    assert outputs[-1].finish_reason is not None
                except EngineError:
                    pass
        assert await asyncio.to_thread(worker.stop, 30)
        assert worker._ledger.is_idle


def test_metrics_can_be_read_while_they_are_written() -> None:
    metrics = Metrics("tiny", (2, 4, 6), version="0")
    record = StepRecord(
        duration_s=0.01,
        predicted_s=0.01,
        depth_cap=6,
        rows_by_exit={6: 1},
        tokens_by_exit={6: 1},
        layers_run=6,
        layers_full=6,
    )
    routes = iter(range(10**9))

    def write() -> None:
        metrics.on_step(record)
        metrics.on_rejected(f"reason {next(routes) % 50}", None)

    with racing(write):
        texts = [metrics.render()[0].decode() for _ in range(20)]

    counts = [
        float(line.split()[-1])
        for text in texts
        for line in text.splitlines()
        if line.startswith("sortserve_generation_tokens_total{") and 'exit_layer="6"' in line
    ]
    assert counts == sorted(counts)
