"""Plans run on a thread of their own, in order, with the tokens of the plan before."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import numpy as np
import pytest

from sortserve.core.plan import RowPlan, StepPlan
from sortserve.core.sampling_params import RowFailure, SampledToken, SamplingParams, SamplingRow
from sortserve.core.slabs import Slabs
from sortserve.engine.step_thread import StepThread

TIMEOUT_S = 20.0


def row(request_id: str = "r", *, token_from: int | None = None) -> RowPlan:
    sampling = SamplingRow(
        params=SamplingParams(),
        seed=0,
        prompt_token_ids=(1,),
        output_token_ids=[],
        stop_token_ids=frozenset(),
    )
    return RowPlan(
        request_id=request_id,
        exit_layer=2,
        start=0,
        token_ids=[7],
        block_table_SB=np.zeros((1, 1), dtype=np.int32),
        sampling=sampling,
        token_from=token_from,
    )


def plan(*rows: RowPlan) -> StepPlan:
    return StepPlan(rows=rows, depth_cap=2)


class Recorder:
    """Each row's next token is one more than its last; waits until it is let go."""

    num_pages, block_size, slabs = 4, 4, Slabs(2)

    def __init__(self) -> None:
        self.go = threading.Event()
        self.plans: list[StepPlan] = []
        self.fails = False
        self.results: list[SampledToken | RowFailure] | None = None

    def execute(self, plan: StepPlan) -> list[SampledToken | RowFailure]:
        assert self.go.wait(TIMEOUT_S)
        self.plans.append(plan)
        if self.fails:
            raise MemoryError
        return self.results or [SampledToken(row.token_ids[-1] + 1) for row in plan.rows]


def test_a_launch_does_not_wait_and_the_next_plan_gets_its_tokens() -> None:
    runner = Recorder()
    thread = StepThread(runner)

    first = thread.launch(plan(row("a"), row("b")))
    second = thread.launch(plan(row("b", token_from=1), row("c")))
    assert runner.plans == []
    runner.go.set()

    assert first.result() == [SampledToken(8), SampledToken(8)]
    assert second.result() == [SampledToken(9), SampledToken(8)]
    assert [row.token_ids for row in runner.plans[1].rows] == [[8], [7]]
    assert thread.execute(plan(row("a"))) == [SampledToken(8)]


def test_what_a_plan_shows_is_read_before_the_launch_returns() -> None:
    runner = Recorder()
    shown = np.full((1, 1), 3, dtype=np.int32)
    pending = StepThread(runner).launch(plan(replace(row(), block_table_SB=shown)))

    shown[:] = 0
    runner.go.set()
    pending.result()

    assert runner.plans[0].rows[0].block_table_SB.tolist() == [[3]]


def test_a_plan_that_fails_is_told_to_who_waits_and_the_thread_goes_on() -> None:
    runner = Recorder()
    runner.go.set()
    runner.fails = True
    thread = StepThread(runner)
    failed, orphan = thread.launch(plan(row())), thread.launch(plan(row(token_from=0)))

    with pytest.raises(MemoryError):
        failed.result()
    with pytest.raises(IndexError):  # it has no token to go on from
        orphan.result()
    runner.fails = False
    assert thread.execute(plan(row())) == [SampledToken(8)]


def test_a_row_after_one_that_failed_reads_a_token_that_every_model_has() -> None:
    runner = Recorder()
    runner.go.set()
    runner.results = [RowFailure("non_finite")]
    thread = StepThread(runner)
    thread.execute(plan(row()))
    runner.results = None

    assert thread.execute(plan(row(token_from=0))) == [SampledToken(1)]


def test_the_thread_ends_with_the_last_reference() -> None:
    runner = Recorder()
    runner.go.set()
    before = set(threading.enumerate())
    launcher = StepThread(runner)
    launcher.execute(plan(row()))
    [thread] = set(threading.enumerate()) - before

    del launcher
    gc.collect()

    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def test_a_token_on_its_way_may_be_counted_and_not_read() -> None:
    tokens = [5, 6]
    known = SamplingRow(
        params=SamplingParams(),
        seed=0,
        prompt_token_ids=(1,),
        output_token_ids=tokens,
        stop_token_ids=frozenset(),
    )
    assert known.at(None) is known
    assert known.at(2) is known

    later = known.at(3).output_token_ids

    assert len(later) == 3
    assert (later[0], later[1], later[-2], later[:2]) == (5, 6, 6, [5, 6])
    with pytest.raises(AssertionError):
        later[-1]
    with pytest.raises(AssertionError):
        list(later)
    tokens.append(9)  # the count was taken before
    assert len(later) == 3
    assert known.at(3) is known
